"""Packed 2:4 weights: the kept values, and four bits of metadata per group.

They are made when a model is loaded, never stored. ``docs/packed.md`` defines every byte.

Shapes: O out, I in, B any leading dimensions, G groups = I / 4, V stored values a row, P panels of
eight rows, C chunks of 16 inputs, E the eight rows of a panel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.common.bits import bits
from sparsify.common.errors import SparsifyError
from sparsify.masking.pattern import TWO_FOUR

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Rows start at multiples of this many bytes: the widest load of a GPU thread.
ALIGNMENT = 16
#: The metadata of so many rows lie together: one such load has a word of each.
PANEL = 8


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A 2:4 weight with its dropped values left out.

    Attributes:
        values_OV: the kept values of every row in order, two per group; zeros fill the row to a
            multiple of 16 bytes.
        metadata_PCE: int16; a word holds four groups' nibbles in order, the first in its lowest
            bits, and the words of eight rows for the same inputs lie together. Zeros fill up the
            last panel, and C to a multiple of eight.
        in_features: I.
    """

    values_OV: Tensor
    metadata_PCE: Tensor
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight."""
        return len(self.values_OV), self.in_features

    @property
    def bits_per_weight(self) -> float:
        """How many bits are stored for each of the O x I weights, filling zeros included."""
        rows, columns = self.shape
        return 8 * (self.values_OV.nbytes + self.metadata_PCE.nbytes) / (rows * columns)

    def unpack(self) -> Tensor:
        """The weight ``[O, I]``: kept values bit for bit, all others +0.0."""
        groups = self.in_features // TWO_FOUR.m
        nibbles_OG = split_words(self.metadata_PCE)[: len(self.values_OV), :groups]
        values = self.values_OV[:, : groups * TWO_FOUR.n].unflatten(-1, (groups, TWO_FOUR.n))
        weight = bits(values).new_zeros(*nibbles_OG.shape, TWO_FOUR.m)
        weight.scatter_(-1, positions(nibbles_OG), bits(values))
        return weight.flatten(-2).view(values.dtype)


def pack(weight_OI: Tensor, mask_OI: Tensor | None = None) -> PackedWeight:
    """Pack a weight.

    A group that keeps fewer than two weights also stores its lowest other positions, with values
    +0.0.

    Args:
        weight_OI: fp32, fp16 or bf16 ``[O, I]``, I a multiple of 4.
        mask_OI: bool ``[O, I]``, True = kept, at most two in every group; what it drops counts as
            +0.0. None keeps what is not zero; a -0.0 is a zero.

    Raises:
        SparsifyError: another type or shape, or a group keeps more than two.
    """
    _check(weight_OI, mask_OI)
    mask_OI = weight_OI != 0 if mask_OI is None else mask_OI
    _check_two_four(mask_OI)
    pairs_OI = TWO_FOUR.top(mask_OI.to(torch.int8))
    masked_OI = bits(weight_OI).where(mask_OI, 0).view(weight_OI.dtype)
    nibbles_OG = nibbles(pairs_OI)
    metadata_PCE = join_nibbles(nibbles_OG)
    values_OV = _fill(kept_values(masked_OI, nibbles_OG), ALIGNMENT // weight_OI.itemsize)
    return PackedWeight(values_OV, metadata_PCE, weight_OI.shape[1])


def product(x_BI: Tensor, packed: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """The reference for kernels over packed weights: ``F.linear`` with the whole weight."""
    return F.linear(x_BI, packed.unpack(), bias_O)


def nibbles(mask_OI: Tensor) -> Tensor:
    """The metadata of every group: bits 0 and 1 are the position of its first kept weight, bits 2
    and 3 that of its second.

    Args:
        mask_OI: bool ``[O, I]``, exactly two True in every group.

    Returns:
        uint8 ``[O, G]``.

    Raises:
        SparsifyError: a group does not keep exactly two.
    """
    first, second = TWO_FOUR.table().nonzero()[:, 1].view(-1, 2).unbind(-1)
    by_rank = (first | second << 2).to(mask_OI.device, torch.uint8)
    return by_rank[TWO_FOUR.rank(mask_OI).int()]


def positions(nibbles_OG: Tensor) -> Tensor:
    """Both kept positions of every group: int64 ``[O, G, 2]``, 0 to 3."""
    return torch.stack([nibbles_OG & 3, nibbles_OG >> 2], -1).long()


def kept_values(weight_OI: Tensor, nibbles_OG: Tensor) -> Tensor:
    """The kept values of every row in order: ``[O, I / 2]``."""
    kept = TWO_FOUR.groups(bits(weight_OI)).gather(-1, positions(nibbles_OG))
    return kept.flatten(-2).view(weight_OI.dtype)


def join_nibbles(nibbles_OG: Tensor) -> Tensor:
    """Store four nibbles per word, and the words of eight rows together: int16 ``[P, C, E]``."""
    filled = F.pad(_fill(nibbles_OG, 2 * ALIGNMENT), (0, 0, 0, -len(nibbles_OG) % PANEL))
    bytes_OY = filled[:, 0::2] | filled[:, 1::2] << 4
    return bytes_OY.view(torch.int16).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def split_words(metadata_PCE: Tensor) -> Tensor:
    """The inverse of :func:`join_nibbles`, with all filling."""
    bytes_OY = metadata_PCE.transpose(1, 2).contiguous().view(torch.uint8).flatten(0, 1)
    return torch.stack([bytes_OY & 15, bytes_OY >> 4], -1).flatten(-2)


def _fill(rows: Tensor, multiple: int) -> Tensor:
    return F.pad(bits(rows), (0, -rows.shape[1] % multiple)).view(rows.dtype)


def _check(weight_OI: Tensor, mask_OI: Tensor | None) -> None:
    shape = tuple(weight_OI.shape)
    if weight_OI.dtype not in DTYPES:
        raise SparsifyError(
            f"a weight of {weight_OI.dtype} cannot be packed; convert it to float32, float16 or "
            "bfloat16 first"
        )
    if weight_OI.ndim != 2 or shape[1] % TWO_FOUR.m:
        raise SparsifyError(
            f"a weight of shape {shape} cannot be packed: it needs [out, in] with in a multiple "
            "of 4; leave this layer dense"
        )
    if mask_OI is not None and (mask_OI.dtype != torch.bool or mask_OI.shape != weight_OI.shape):
        raise SparsifyError(
            f"the mask is {mask_OI.dtype} {tuple(mask_OI.shape)} and the weight {shape}; "
            "give a bool mask of the weight's shape"
        )


def _check_two_four(mask_OI: Tensor) -> None:
    kept_OG = TWO_FOUR.groups(mask_OI).sum(-1)
    if (wrong := kept_OG > TWO_FOUR.n).any():
        row, group = wrong.nonzero()[0].tolist()
        raise SparsifyError(
            f"row {row}, group {group} (inputs {4 * group} to {4 * group + 3}) keeps "
            f"{int(kept_OG[row, group])} weights; a packed weight is 2:4, at most 2 of every 4: "
            "mask it first"
        )
