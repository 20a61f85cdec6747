"""Matches masks with the linear layers of a model: how a weight is stored, what pattern a mask has,
and whether the masks were made for this model.

Shapes: O out, I in.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.common.errors import SparsifyError
from sparsify.masking.layer import base_parameters
from sparsify.masking.linear import Stack, as_rows, as_stored, linear_shape, maskable, weight_name
from sparsify.masking.pattern import MAX_M, NMPattern
from sparsify.masking.select import decoder_blocks
from sparsify.models.hashes import hash_parameters

# Group sizes in the order of trial: those that hardware and published masks use, then all others.
GROUP_SIZES = tuple(sorted(range(2, MAX_M + 1), key=lambda m: (m not in (4, 8, 16), m)))


@dataclass(frozen=True)
class LayerShape:
    """The shape of a layer's weight.

    Attributes:
        rows: O.
        columns: I.
        transposed: whether the weight is stored as ``[I, O]``, as in GPT-2.
        in_block: whether the layer is part of a decoder block.
        experts: of how many experts it holds the matrices, one below the other; None for a linear
            layer.
    """

    rows: int
    columns: int
    transposed: bool = False
    in_block: bool = True
    experts: int | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of the weight as it is stored."""
        return tuple(self.to_stored(torch.empty(self.rows, self.columns, device="meta")).shape)

    def from_stored(self, values: Tensor) -> Tensor:
        """Bring values from the layout of the stored weight to ``[O, I]``."""
        return as_rows(values, self.transposed).contiguous()

    def to_stored(self, values_OI: Tensor) -> Tensor:
        """View values ``[O, I]`` in the layout of the stored weight."""
        return as_stored(values_OI, self.transposed, self.experts)

    def weight_name(self, name: str) -> str:
        """The name of the weight of a layer of this name."""
        return weight_name(name, self.experts)


def stored_shapes(model: PreTrainedModel) -> dict[str, LayerShape]:
    """The plain linear layers of a model, and its stacks of experts, by qualified name."""
    blocks = tuple(f"{name}." for name in decoder_blocks(model))
    return {
        name: LayerShape(
            *linear_shape(layer),
            layer.transposed if isinstance(layer, Stack) else not isinstance(layer, nn.Linear),
            name.startswith(blocks),
            len(layer.weight) if isinstance(layer, Stack) else None,
        )
        for name, layer in maskable(model).items()
    }


def layer_name(key: str, known: Container[str] = ()) -> str:
    """The layer's name in the key of a stored mask, which may end in ``.weight``, ``.mask`` or
    ``.weight.mask``; ``known`` are names of layers, of which some may end so themselves.
    """
    name = key.removesuffix(".mask")
    return name if name in known else name.removesuffix(".weight")


def check_known(source: Path, key: str, name: str, known: Iterable[str]) -> None:
    """Refuse a mask whose layer the base model lacks.

    Raises:
        SparsifyError: the model has no such layer.
    """
    if name not in known:
        raise SparsifyError(
            f"{source}: {key!r} names no linear layer of the base model, whose layers have names "
            f"like {next(iter(known), None)!r}: give the model that the masks were made for"
        )


def find_pattern(mask_OI: Tensor) -> NMPattern:
    """Find the pattern of a mask, in groups of 4, 8 or 16, or else the smallest that fit.

    Raises:
        SparsifyError: for no group size do all groups keep equally many weights.
    """
    for m in GROUP_SIZES:
        if mask_OI.shape[-1] % m == 0:
            kept = mask_OI.unflatten(-1, (-1, m)).sum(-1)
            n = int(kept.flatten()[0])
            if 1 <= n < m and bool((kept == n).all()):
                return NMPattern(n, m)
    raise SparsifyError(
        f"a mask {tuple(mask_OI.shape)} with {float(mask_OI.float().mean()):.1%} kept is N:M for "
        f"no M up to {MAX_M}; every group must keep equally many weights"
    )


def check_masks(masks: Mapping[str, Tensor], patterns: NMPattern | Mapping[str, NMPattern]) -> None:
    """Check that every mask keeps exactly N of every M weights.

    Args:
        masks: bool ``[O, I]`` by layer name, True = kept.
        patterns: the pattern of each mask, or one pattern for all.

    Raises:
        SparsifyError: a mask does not; the message names the layer, the row and the group.
    """
    for name, mask_OI in masks.items():
        pattern = patterns if isinstance(patterns, NMPattern) else patterns[name]
        if mask_OI.dtype != torch.bool or mask_OI.ndim != 2:
            raise SparsifyError(
                f"{name}: its mask is {mask_OI.dtype} {tuple(mask_OI.shape)}; it must be bool "
                "[out_features, in_features]"
            )
        if mask_OI.shape[1] % pattern.m:
            raise SparsifyError(
                f"{name}: in_features={mask_OI.shape[1]} is not a multiple of m={pattern.m}; "
                "give the pattern that the masks have"
            )
        try:
            pattern.rank(mask_OI)
        except SparsifyError as error:
            raise SparsifyError(f"{name}: {error}") from error


class BaseHashes:
    """The hashes of a model's dense weights, one for each type in which they can be loaded; each is
    computed when it is first needed, and again after the weights changed (in place through
    ``.data`` excepted, which PyTorch does not count).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[torch.dtype | None, str] = {}
        self._state: list[tuple[int, int]] = []

    def __contains__(self, base_hash: str) -> bool:
        parameters = base_parameters(self._model)
        # Tensors of inference mode count no changes.
        state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters.values()]
        if state != self._state:
            self._known.clear()
            self._state = state
        for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
            if dtype not in self._known:
                self._known[dtype] = hash_parameters(parameters, dtype)
            if self._known[dtype] == base_hash:
                return True
        return False

    def check(self, base_hash: str, what: str) -> None:
        """Refuse masks that were made for other weights.

        Args:
            base_hash: the hash of the model that the masks were made for; empty if unknown.
            what: name of the masks, for the message.

        Raises:
            SparsifyError: they were made for another model.
        """
        if base_hash and base_hash not in self:
            raise SparsifyError(
                f"{what}: made for a base model with hash {base_hash[:12]}..., and this one's is "
                f"{self._known[None][:12]}...; load the model that the masks were made for, in the "
                "type that it had then"
            )
