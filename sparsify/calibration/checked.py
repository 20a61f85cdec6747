"""Checks what a strategy's ``calibrate`` yields, as authors of strategies err there. A mask of
another shape would be broadcast, and a late one would never have pruned anything, in silence.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.masking.experts import Expert
from sparsify.masking.layer import MaskedLinear
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy


def checked(
    strategy: SparsityStrategy,
    blocks: Iterable[Block],
    layers: Mapping[str, MaskedLinear | Expert],
    prune: Callable[[], bool],
) -> Iterator[tuple[str, LayerResult]]:
    """Yield what ``calibrate`` yields.

    Args:
        strategy: the strategy.
        blocks: what its ``calibrate`` is given.
        layers: by the names that it may yield.
        prune: whether results prune the text that later blocks are given.

    Raises:
        SparsifyError: it yields something else than a layer's name and its result, or yields it
            after it took the next block, though that should have seen this one pruned.
    """
    who, left = f"{type(strategy).__name__}.calibrate", set[str]()

    def watched() -> Iterator[Block]:
        for block in blocks:
            yield block
            left.update(block.layers)

    found: object = strategy.calibrate(watched())
    if not isinstance(found, Iterable):
        raise SparsifyError(
            f"{who} returned {_kind(found)}; it must yield (layer name, LayerResult) for each layer"
        )
    for item in found:
        name, result = _parts(item, who)
        if name not in layers:
            raise SparsifyError(
                f"{who} gave a result for {name!r}, which is no masked layer; take names from "
                "block.layers"
            )
        if name in left and prune():
            raise SparsifyError(
                f"{who} gave the result of {name} after it took the next block, whose statistics "
                "are those of a model in which this layer is pruned; yield all layers of a block "
                "before you take the next, and do not collect results in a list first"
            )
        _check(name, result, tuple(layers[name].masker.shape), who)
        if result.weight is not None and strategy.effect.only_masks:
            raise SparsifyError(
                f"{who} gave a new weight for {name}, but the strategy says that base weights stay "
                'as they are; declare effect = Effect(weights="updated") in the class'
            )
        yield name, result


def _parts(item: Any, who: str) -> tuple[str, LayerResult]:
    pair = isinstance(item, tuple) and len(item) == 2
    if not pair or not isinstance(item[0], str) or not isinstance(item[1], LayerResult):
        kinds = ", ".join(map(_kind, item)) if isinstance(item, tuple) else _kind(item)
        raise SparsifyError(f"{who} yields ({kinds}); yield name, LayerResult(mask) for each layer")
    return item


def _check(name: str, result: LayerResult, shape: tuple[int, ...], who: str) -> None:
    mask, weight = result.mask, result.weight
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise SparsifyError(
            f"{who} gave {name} as mask {_kind(mask)}; it must be bool {list(shape)}, as the "
            "layer's weight_OI is [out, in], with True for the weights that are kept"
        )
    if weight is None:
        return
    sound = isinstance(weight, Tensor) and weight.is_floating_point()
    if not sound or tuple(weight.shape) != shape:
        raise SparsifyError(
            f"{who} gave {name} as new weight {_kind(weight)}; it must be floating point "
            f"{list(shape)}, as the layer's weight_OI is [out, in]"
        )


def _kind(value: object) -> str:
    """What a value is, in words that its author knows."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
