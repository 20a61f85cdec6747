"""Measures how long a layer takes, dense and sparse.

Shapes: O out, I in, T tokens (rows of the layer's input).
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparsify.masking.pattern import TWO_FOUR
from sparsify.serving.backends import Backend

ROUNDS = 9
SAMPLE_SECONDS = 2e-3
"""The shortest duration of one sample: well above the resolution of a device's clock."""
MOST_COPIES = 32

Clock = Callable[[Sequence[Callable[[], object]], torch.device], list[float]]
"""Measures several calls together, and returns the seconds that one call of each takes."""


@dataclass(frozen=True)
class LayerKind:
    """The properties of a layer that its speed depends on.

    Attributes:
        shape: (O, I).
        dtype: the type of weight and input.
        bias: whether the layer adds a bias.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    bias: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape[0]} x {self.shape[1]} {dtype}" + ", bias" * self.bias


def token_counts(least: int, most: int) -> list[int]:
    """Both ends, and the powers of two between them."""
    powers = (2**i for i in range(most.bit_length()))
    return sorted({least, most, *(power for power in powers if least < power < most)})


def in_turns(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The median seconds of each call. The calls take turns, so that a change of the device's clock
    rate affects all of them.
    """
    repeats = []
    for call in calls:
        _seconds(call, 5, device)  # warm up: kernels are loaded and plans are made
        repeats.append(max(1, math.ceil(SAMPLE_SECONDS / max(_seconds(call, 5, device), 1e-9))))
    rounds = [
        [_seconds(call, n, device) for call, n in zip(calls, repeats, strict=True)]
        for _ in range(ROUNDS)
    ]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The seconds of one call, including the time to launch it."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


@torch.inference_mode()
def measure(
    kind: LayerKind,
    backend: Backend,
    counts: Sequence[int],
    device: torch.device,
    clock: Clock = in_turns,
) -> dict[int, tuple[float, float]]:
    """Time random 2:4 layers.

    Returns:
        By number of tokens: the seconds of the dense layer and of the sparse one.

    Raises:
        RuntimeError: the device cannot run the layer.
    """
    # In a model, a layer's weight is not in the cache: other layers ran since its last call. To
    # measure the same here, each call uses the next of several equal layers.
    dense = [_random_layer(kind, device) for _ in range(_copies(kind, device))]
    sparse = [backend.compress(layer.weight.detach(), _detached(layer.bias)) for layer in dense]
    found = {}
    for count in counts:
        x_TI = torch.randn(count, kind.shape[1], dtype=kind.dtype, device=device)
        calls = [_calls(layers, x_TI) for layers in (dense, sparse)]
        dense_seconds, sparse_seconds = clock(calls, device)
        found[count] = dense_seconds, sparse_seconds
    return found


def _calls(layers: Sequence[nn.Module], x_TI: torch.Tensor) -> Callable[[], object]:
    turn = itertools.cycle(layers)
    return lambda: next(turn)(x_TI)


def _copies(kind: LayerKind, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    # The compressed weights, a little more than half as large, must not fit the cache either.
    size = math.prod(kind.shape) * kind.dtype.itemsize // 2
    return min(MOST_COPIES, 1 + math.ceil(cache / size))


def _random_layer(kind: LayerKind, device: torch.device) -> nn.Linear:
    weight_OI = torch.randn(kind.shape, dtype=kind.dtype, device=device)
    weight_OI *= TWO_FOUR.top(weight_OI.abs())
    layer = nn.Linear(kind.shape[1], kind.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    if kind.bias:
        bias_O = torch.randn(kind.shape[0], dtype=kind.dtype, device=device)
        layer.bias = nn.Parameter(bias_O, requires_grad=False)
    return layer


def _detached(bias_O: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias_O is None else bias_O.detach()
