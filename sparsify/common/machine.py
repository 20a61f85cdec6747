"""The names of the GPU and the CPU, for records."""

import platform
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
