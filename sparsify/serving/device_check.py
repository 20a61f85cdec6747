"""Runs layers through PyTorch's 2:4 products on a GPU: are they right, and are they faster?

Shapes: O out, I in, T tokens.
"""

import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.serving.backends import BACKENDS, Backend
from sparsify.serving.measure import Clock, LayerKind, in_turns, measure

TOKENS = (1, 8, 16, 128, 2048)
_CHECK_TOKENS = 16


@dataclass(frozen=True)
class Product:
    """One layer's sparse product against the same product in float32.

    Attributes:
        error: the largest difference, as a share of the largest output; None if the product failed.
        tolerance: the error that rounding to the layer's type can explain.
        reason: why the product failed.
    """

    error: float | None
    tolerance: float
    reason: str = ""

    @property
    def problem(self) -> str | None:
        """What is wrong with the product, or None."""
        if self.error is None:
            return f"its sparse product failed on the device ({self.reason})"
        if self.error <= self.tolerance:
            return None
        return (
            f"its sparse product is off by {self.error:.2g} of the largest output; "
            f"the tolerance is {self.tolerance:.2g}"
        )


@dataclass(frozen=True)
class Timing:
    """The times of one product, milliseconds."""

    kind: str
    tokens: int
    sparse_ms: float
    dense_ms: float


@dataclass
class DeviceReport:
    """Where the products ran, through which backend, and the time of each distinct shape."""

    name: str
    backend: str
    timings: list[Timing] = field(default_factory=list)

    def table(self) -> Table:
        """A table of sparse and dense milliseconds, and their ratio."""
        table = Table(title=f"{self.backend} on {self.name}, weights not in cache")
        table.add_column("out x in")
        for column in ("tokens", "sparse ms", "dense ms", "speed-up"):
            table.add_column(column, justify="right")
        for t in self.timings:
            times = (f"{t.sparse_ms:.4f}", f"{t.dense_ms:.4f}", f"{t.dense_ms / t.sparse_ms:.2f}x")
            table.add_row(t.kind, str(t.tokens), *times)
        return table


class DeviceCheck:
    """Checks layers one after the other, and times each shape once.

    Args:
        device: where to run the layers.
        name: the device's name, for the report.
        backend: makes sparse layers.
        clock: measures their times.
    """

    def __init__(
        self, device: torch.device, name: str, backend: Backend, clock: Clock = in_turns
    ) -> None:
        self._device, self._backend, self._clock = device, backend, clock
        self.report = DeviceReport(name, backend.name)

    @torch.inference_mode()
    def run(self, weight_OI: Tensor) -> Product:
        """Compress one layer's weight and check its product. The weight must already be 2:4, since
        compressing silently drops what is too much, and of a type and shape that the backend takes.
        """
        weight_OI = weight_OI.to(self._device).contiguous()
        tolerance = 2 * torch.finfo(weight_OI.dtype).eps
        x_TI = self._inputs(weight_OI, _CHECK_TOKENS)
        try:
            y_TO = self._backend.compress(weight_OI, None)(x_TI).float()
            error = _error(y_TO, F.linear(x_TI.float(), weight_OI.float()))
            self._time(weight_OI)
        except RuntimeError as failure:  # in a kernel, or out of memory; continue with other layers
            return Product(None, tolerance, str(failure).partition("\n")[0])
        if not math.isfinite(error):
            return Product(None, tolerance, "its output is not finite")
        return Product(error, tolerance)

    def _inputs(self, weight_OI: Tensor, tokens: int) -> Tensor:
        shape = tokens, weight_OI.shape[1]
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight_OI)

    def _time(self, weight_OI: Tensor) -> None:
        rows, columns = weight_OI.shape
        kind = LayerKind((rows, columns), weight_OI.dtype, bias=False)
        if any(timing.kind == str(kind) for timing in self.report.timings):
            return
        times = measure(kind, self._backend, TOKENS, self._device, self._clock)
        for tokens, (dense, sparse) in times.items():
            self.report.timings.append(Timing(str(kind), tokens, sparse * 1e3, dense * 1e3))


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def cuda_check(device: str) -> DeviceCheck:
    """The check on a CUDA device, by the first backend that runs there.

    Raises:
        SparsifyError: there is no such device, or no backend runs on it.
    """
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise SparsifyError(f"device {device!r}: it must be 'cpu', or a CUDA device such as 'cuda'")
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise SparsifyError(
            f"device {device!r}: PyTorch finds {torch.cuda.device_count()} CUDA devices; name one "
            "of them, or leave it at 'cpu', which checks all but the sparse products"
        )
    where = torch.device(device)
    backend = next((backend for backend in BACKENDS if backend.available(where)), None)
    if backend is None:
        names = ", ".join(backend.name for backend in BACKENDS)
        raise SparsifyError(
            f"device {device!r}: none of {names} runs on it; install a build of PyTorch that has "
            "one for this GPU, or leave the device at 'cpu'"
        )
    return DeviceCheck(where, torch.cuda.get_device_name(where), backend)
