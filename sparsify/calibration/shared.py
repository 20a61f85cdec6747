"""Calibration in a run of several processes: rank 0 computes the results, or reads them from the
cache, and sends each to the other ranks.

Results are broadcast, so that the ranks need no common disk, with the cache or without it.

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
    """One layer's result in main memory, with one bit per weight for the mask."""

    name: str
    shape: tuple[int, ...]
    bits: bytes
    weight: Tensor | None
    inputs: Tensor | None


def on_rank_zero(
    results: Iterable[tuple[str, LayerResult]], device: torch.device
) -> Iterator[tuple[str, LayerResult]]:
    """Yield on every rank the ``results`` of rank 0; the argument of other ranks is ignored.

    Args:
        results: pairs of layer name and result.
        device: the device of the results that are yielded.

    Raises:
        SparsifyError: calibration failed on rank 0, whose message this is.
    """
    if processes() == 1:
        yield from results
        return
    for packed in from_rank_zero(_pack(*item) for item in results):
        yield packed.name, _unpack(packed).to(device)


def _pack(name: str, result: LayerResult) -> _Packed:
    mask = result.mask.cpu().numpy()
    weight, inputs = (
        None if part is None else part.detach().cpu() for part in (result.weight, result.inputs)
    )
    return _Packed(name, mask.shape, np.packbits(mask).tobytes(), weight, inputs)


def _unpack(packed: _Packed) -> LayerResult:
    bits = np.unpackbits(np.frombuffer(packed.bits, np.uint8), count=int(np.prod(packed.shape)))
    mask_OI = torch.from_numpy(bits.astype(bool)).view(packed.shape)
    return LayerResult(mask_OI, packed.weight, packed.inputs)
