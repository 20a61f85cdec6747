"""Finds the masks of a sparse Hugging Face model from the zeros in its weights.

Shapes: O out, I in, G groups, M group size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.export.exchange.layers import GROUP_SIZES, stored_shapes
from sparsify.masking.pattern import NMPattern
from sparsify.models.base import load_model, load_skeleton
from sparsify.models.stored_weights import StoredWeights

# A layer with fewer zeros is dense: these are mostly values too small for their type.
DENSE_ZEROS = 0.1


@dataclass(frozen=True)
class LayerZeros:
    """The mask that the zeros of one layer imply.

    Attributes:
        name: the layer's qualified name.
        pattern: its pattern; None if the layer is dense.
        mask: bool ``[O, I]``, True = kept; None if the layer is dense.
        completed: number of groups with fewer nonzero weights than N, in which the lowest zero
            positions were marked as kept too.
    """

    name: str
    pattern: NMPattern | None = None
    mask: Tensor | None = None
    completed: int = 0


def read_zero_pattern(folder: Path, pattern: NMPattern | None = None) -> Iterator[LayerZeros]:
    """Read the linear layers of the decoder blocks one by one.

    Args:
        folder: a causal LM in safetensors files, with exact zeros.
        pattern: the pattern of all masked layers; None finds one for each layer: that which keeps
            the fewest weights, in groups of 4, 8 or 16, the smaller groups first.

    Yields:
        Each layer, dense or masked.

    Raises:
        SparsifyError: the folder is not a readable model, no layer is sparse, or a sparse layer
            has no pattern.
    """
    shapes = stored_shapes(model := load_skeleton(str(folder), ""))
    weights = StoredWeights(folder)
    weights.check()
    prefix, sparse, whole = model.base_model_prefix, False, dict[str, Tensor]()
    inside = (shape.weight_name(name) for name, shape in shapes.items() if shape.in_block)
    known = any(_key(weights, name, prefix) is not None for name in inside)
    for name, shape in shapes.items():
        if shape.in_block:
            own = shape.weight_name(name)
            if (key := _key(weights, own, prefix)) is not None:
                weight = weights.get(key)
            elif shape.experts is not None or not known:  # in parts, or under another name
                whole = whole or load_model(str(folder), "auto", "").state_dict()
                weight = whole[own]
            else:
                raise SparsifyError(
                    f"{folder}: its files hold no {own!r}; give a folder with the whole model"
                )
            if tuple(weight.shape) != shape.stored:
                raise SparsifyError(
                    f"{folder}: {name} is stored as {tuple(weight.shape)}, but config.json says "
                    f"{shape.stored}; the folder is damaged"
                )
            layer = _implied(name, shape.from_stored(weight) != 0, pattern)
            sparse |= layer.mask is not None
            yield layer
    if not sparse:
        raise SparsifyError(
            f"{folder}: fewer than {DENSE_ZEROS:.0%} of every layer's weights are zero, so none is "
            "masked; name a folder of a sparse model"
        )


def _implied(name: str, nonzero_OI: Tensor, pattern: NMPattern | None) -> LayerZeros:
    own = pattern or pattern_of(nonzero_OI)
    if own is not None and nonzero_OI.shape[1] % own.m == 0:
        counts_OG = own.groups(nonzero_OI).sum(-1)
        if bool((counts_OG <= own.n).all()):
            mask = own.top(nonzero_OI.half())  # ties keep the lower position
            return LayerZeros(name, own, mask, int((counts_OG < own.n).sum()))
    zeros = 1 - float(nonzero_OI.float().mean())
    if zeros < DENSE_ZEROS:
        return LayerZeros(name)
    raise SparsifyError(
        f"{name}: {zeros:.0%} of its weights are zero, but {_why(nonzero_OI, own)}; a layer is "
        f"dense or N:M along its inputs: give the pattern that it has, or prune it to one"
    )


def pattern_of(nonzero_OI: Tensor) -> NMPattern | None:
    """The pattern of lowest density that these weights fit. Most groups must keep exactly N: a
    small layer with scattered zeros would fit some pattern too.
    """
    fitting = []
    for m in GROUP_SIZES[:3]:
        if nonzero_OI.shape[1] % m == 0:
            counts_OG = nonzero_OI.unflatten(-1, (-1, m)).sum(-1)
            n = int(counts_OG.max())
            if 1 <= n < m and float((counts_OG == n).float().mean()) > 0.5:
                fitting.append(NMPattern(n, m))
    return min(fitting, key=lambda pattern: pattern.density, default=None)


def _why(nonzero_OI: Tensor, pattern: NMPattern | None) -> str:
    if pattern is None:
        return "for no group size of 4, 8 or 16 do most groups keep equally many weights"
    if nonzero_OI.shape[1] % pattern.m:
        return f"in_features={nonzero_OI.shape[1]} is not a multiple of m={pattern.m}"
    counts_OG = pattern.groups(nonzero_OI).sum(-1)
    row, group = (counts_OG > pattern.n).nonzero()[0].tolist()
    return (
        f"row {row}, group {group} has {int(counts_OG[row, group])} nonzero weights, more than the "
        f"{pattern.n} of {pattern}"
    )


def _key(weights: StoredWeights, weight: str, prefix: str) -> str | None:
    """The name that a weight has in the files; None if it is in none."""
    # Some folders were saved without the head; their names lack the prefix.
    keys = (weight, weight.removeprefix(f"{prefix}."))
    return next((key for key in keys if key in weights), None)
