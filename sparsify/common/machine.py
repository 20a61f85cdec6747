"""The names of the GPU and the CPU, for records; and in which precision they multiply."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """A GPU's model name; of any other device its type, such as ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_name() -> str:
    """The CPU's model name, or what ``platform`` says where the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in full fp32: in TF32 a Hessian may have no factorisation."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
