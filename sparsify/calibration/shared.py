"""Calibration in a run of several processes: rank 0 computes, or reads what an earlier run kept,
and the others take over its results as they come.

By broadcast, so that no disk needs to be shared and it is the same with the cache and without.

Shapes: O out, I in.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsify.common.ranks import from_rank_zero, processes
from sparsify.masking.strategy import LayerResult


class _Packed(NamedTuple):
    """One layer's result in main memory, its mask as one bit a weight."""

    name: str
    shape: tuple[int, ...]
    bits: bytes
    weight: Tensor | None


def on_rank_zero(
    results: Iterable[tuple[str, LayerResult]], device: torch.device
) -> Iterator[tuple[str, LayerResult]]:
    """Yield on every rank what ``results`` gives on rank 0; on the others it is not looked at.

    Args:
        results: (layer name, result).
        device: of what is yielded.

    Raises:
        SparsifyError: calibration failed on rank 0; the message is the one there.
    """
    if processes() == 1:
        yield from results
        return
    for packed in from_rank_zero(_pack(*item) for item in results):
        yield packed.name, _unpack(packed).to(device)


def _pack(name: str, result: LayerResult) -> _Packed:
    mask = result.mask.cpu().numpy()
    weight = None if result.weight is None else result.weight.detach().cpu()
    return _Packed(name, mask.shape, np.packbits(mask).tobytes(), weight)


def _unpack(packed: _Packed) -> LayerResult:
    bits = np.unpackbits(np.frombuffer(packed.bits, np.uint8), count=int(np.prod(packed.shape)))
    return LayerResult(torch.from_numpy(bits.astype(bool)).view(packed.shape), packed.weight)
