"""The object that masks one layer: its interface, and one for a mask that never changes."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsify.common.errors import SparsifyError
from sparsify.masking import noise
from sparsify.masking.pattern import NMPattern


@dataclass(frozen=True)
class Draw:
    """Three numbers that name one random sample of all the model's masks. The same numbers always
    give the same masks, so a draw can be repeated at any time.

    Attributes:
        seed: the run's seed.
        step: the optimizer step.
        index: tells draws of one step apart: (micro-batch x data-parallel ranks + rank) x draws
            per micro-batch + draw.
    """

    seed: int
    step: int
    index: int

    def key(self, layer: str) -> Tensor:
        """The noise key of one layer: 0-d int64 on CPU."""
        return noise.fold(self.seed, self.step, self.index, layer)


Masking = Draw | Literal["hard", "dense"]
"""How to run the model: under a draw, under the hard mask that ships, or with all its weights."""


class Masker(nn.Module):
    """Owns every tensor that decides the mask of one layer; subclass it for a new kind of mask.

    Give every tensor of the layer's size O (out_features) as its first dimension: it is then
    sharded by rows, as the weight is. Shapes: O out, I in.

    Args:
        name: the layer's qualified name, which is also hashed into its noise key.
        shape: (O, I) of the whole layer.
        pattern: the N:M pattern.

    Attributes:
        learned_dtype: the type of the Parameters that require gradients. Where the strategy trains
            the base weights, they too must be in this type or in fp32: an optimizer step is often
            smaller than half the last place of a bf16 number, and ordinary rounding then loses it.
    """

    learned_dtype: torch.dtype = torch.float32

    def __init__(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> None:
        super().__init__()
        self.name = name
        self.shape = shape
        self.pattern = pattern

    def mask(self, draw: Draw, row0: int = 0) -> Tensor:
        """The mask of one draw, ``[O, I]``, differentiable in what this masker learns.

        The layer calls this in forward without a graph and in backward with one. Both calls must
        return the same mask: take randomness from ``noise`` with ``draw.key(self.name)`` only.

        Args:
            draw: which sample.
            row0: the index, in the whole layer, of the first row that this masker holds.

        Returns:
            A floating mask, by which the weight is multiplied; or a bool mask, True = kept, through
            which no gradient reaches the masker.
        """
        raise NotImplementedError(f"{type(self).__name__} must define mask(draw, row0)")

    def penalty(self, masked_OI: Tensor) -> Tensor:
        """This layer's penalty, 0-d; the strategy decides how it enters the loss.

        Args:
            masked_OI: the weight times the mask, not yet rounded to the weight's dtype.
        """
        return _no_penalty(masked_OI)

    def sample(self, weight_OI: Tensor, draw: Draw, row0: int = 0) -> tuple[Tensor, Tensor]:
        """Mask the weight for one draw. Override it only if masking is more than a multiplication
        by :meth:`mask`.

        Args:
            weight_OI: the weight, or rows of it.
            draw: which sample.
            row0: the index of the weight's first row in the whole layer.

        Returns:
            The masked weight ``[O, I]`` in the weight's dtype, and a 0-d penalty of this layer.
        """
        mask_OI = self.mask(draw, row0)
        hard = mask_OI.dtype == torch.bool
        masked_OI = _kept(weight_OI, mask_OI) if hard else weight_OI * mask_OI
        return masked_OI.to(weight_OI.dtype), self.penalty(masked_OI)

    def hard_mask(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        """The mask that is evaluated and exported: bool ``[O, I]``, deterministic, exactly N:M."""
        raise NotImplementedError(f"{type(self).__name__} must define hard_mask(weight_OI, row0)")

    def harden(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        """The weight under the hard mask. Dropped weights become +0.0; a product can leave -0.0."""
        with torch.no_grad():
            mask = self.hard_mask(weight_OI, row0)
        return _kept(weight_OI, mask)

    def forward(self, weight_OI: Tensor, masking: Masking, row0: int = 0) -> tuple[Tensor, Tensor]:
        """Mask the weight as ``masking`` says; returns (masked weight, penalty). Subclasses
        override ``mask`` or ``sample``, not this.
        """
        if isinstance(masking, Draw):
            return self.sample(weight_OI, masking, row0)
        return self.harden(weight_OI, row0), _no_penalty(weight_OI)

    def set_mask(self, mask_OI: Tensor) -> None:
        """Start from a bool mask ``[O, I]``, by default the one that ``calibrate`` found."""
        raise NotImplementedError(
            f"{type(self).__name__} must define set_mask, or its strategy init_masker"
        )

    def metrics(self) -> dict[str, Tensor]:
        """Describes the mask distribution in 0-d tensors, each a mean over rows. They are logged
        for each layer, and averaged over all weights.
        """
        return {}


class FixedMasker(Masker):
    """Holds one mask as one candidate number per group: for 2:4 a quarter of a byte per weight."""

    rank_OG: Tensor

    def __init__(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> None:
        super().__init__(name, shape, pattern)
        ranks = torch.zeros(shape[0], shape[1] // pattern.m, dtype=pattern.rank_dtype)
        # A Parameter, not a buffer: FSDP shards no buffers, and DDP would broadcast one at every
        # step.
        self.rank_OG = nn.Parameter(ranks, requires_grad=False)

    def set_mask(self, mask_OI: Tensor) -> None:
        """Store a bool mask ``[O, I]``.

        Raises:
            SparsifyError: some group does not keep exactly N weights.
        """
        try:
            self.rank_OG.data.copy_(self.pattern.rank(mask_OI))
        except SparsifyError as error:
            raise SparsifyError(f"{self.name}: {error}") from error

    def hard_mask(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        return self.pattern.unrank(self.rank_OG)

    def sample(self, weight_OI: Tensor, draw: Draw, row0: int = 0) -> tuple[Tensor, Tensor]:
        return self.harden(weight_OI, row0), _no_penalty(weight_OI)


def _kept(weight_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """The weight where the mask is True, and +0.0 elsewhere."""
    return torch.where(mask_OI, weight_OI, weight_OI.new_zeros(()))


def _no_penalty(like: Tensor) -> Tensor:
    return like.new_zeros((), dtype=torch.float32)
