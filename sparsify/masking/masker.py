"""What masks one layer: the interface, and the masker of a mask that does not change."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsify.common.errors import SparsifyError
from sparsify.masking import noise
from sparsify.masking.pattern import NMPattern


@dataclass(frozen=True)
class Draw:
    """One sample of all masks of the model, named by numbers, so that it can be made again at any
    time.

    Attributes:
        seed: the run's seed.
        step: the optimizer step.
        index: (micro-batch x data-parallel ranks + rank) x draws per micro-batch + draw.
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

    A tensor of the layer's size has O (out_features) as its first dimension, so that it shards by
    rows with the weight. Shapes: O out, I in.

    Args:
        name: the layer's qualified name; part of its noise key.
        shape: (O, I) of the whole layer.
        pattern: the N:M pattern.

    Attributes:
        learned_dtype: of the Parameters that require gradients; also the least exact type, beside
            fp32, in which the base weights may be if they are what learns. A step is often smaller
            than half of a bf16's last place, and is lost in rounding unless that is stochastic.
    """

    learned_dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> None:
        super().__init__()
        self.name = name
        self.shape = shape
        self.pattern = pattern

    def mask(self, draw: Draw, row0: int = 0) -> Tensor:
        """The mask of one draw, ``[O, I]``, differentiable in what this masker learns.

        It is made in forward without a graph and again in backward with one, and must be the same
        both times: take randomness from ``noise`` with ``draw.key(self.name)`` only.

        Args:
            draw: which sample.
            row0: the number of the first row that this masker holds in the whole layer.

        Returns:
            Floating, to multiply the weight by; or bool, True = kept, which has no gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} must define mask(draw, row0)")

    def penalty(self, masked_OI: Tensor) -> Tensor:
        """A 0-d penalty of this layer, which a strategy may add to its loss.

        Args:
            masked_OI: the weight times the mask, not yet rounded to the weight's dtype.
        """
        return _no_penalty(masked_OI)

    def sample(self, weight_OI: Tensor, draw: Draw, row0: int = 0) -> tuple[Tensor, Tensor]:
        """Mask the weight for one draw; to be overridden only where that is no product with
        :meth:`mask`.

        Args:
            weight_OI: the weight, or rows of it.
            draw: which sample.
            row0: the number of the weight's first row in the whole layer.

        Returns:
            The masked weight ``[O, I]`` in the weight's dtype, and a 0-d penalty of this layer.
        """
        mask_OI = self.mask(draw, row0)
        hard = mask_OI.dtype == torch.bool
        masked_OI = _kept(weight_OI, mask_OI) if hard else weight_OI * mask_OI
        return masked_OI.to(weight_OI.dtype), self.penalty(masked_OI)

    def hard_mask(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        """The mask that ships: bool ``[O, I]``, deterministic, exactly N:M."""
        raise NotImplementedError(f"{type(self).__name__} must define hard_mask(weight_OI, row0)")

    def harden(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        """The weight under the hard mask; what is dropped is +0.0, where a product leaves -0.0."""
        with torch.no_grad():
            mask = self.hard_mask(weight_OI, row0)
        return _kept(weight_OI, mask)

    def forward(self, weight_OI: Tensor, masking: Masking, row0: int = 0) -> tuple[Tensor, Tensor]:
        """Mask the weight as asked: (masked weight, penalty). To change it, override ``mask`` or
        ``sample``.
        """
        if isinstance(masking, Draw):
            return self.sample(weight_OI, masking, row0)
        return self.harden(weight_OI, row0), _no_penalty(weight_OI)

    def take_gradients(self, grads: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Called in backward with the gradients of this masker's Parameters, once for each use of
        the layer; what is returned is accumulated in their ``grad``, for an optimizer.

        To update in backward, so that no gradient outlives its layer's backward, override it: move
        the rows that this process holds, ``local_rows(parameter.detach())``, and return nothing of
        what was taken. That is for one process, or for ranks that gather masked weights: elsewhere
        ranks average their gradients only later. And it is for layers that one backward pass goes
        through once: autograd refuses the second use of what the first has moved.

        Args:
            grads: by Parameter name, of the same rows; of one micro-batch, as its loss was scaled.
        """
        return grads

    def set_mask(self, mask_OI: Tensor) -> None:
        """Start from a bool mask ``[O, I]``: what a strategy does with what ``calibrate`` found."""
        raise NotImplementedError(
            f"{type(self).__name__} must define set_mask, or its strategy init_masker"
        )

    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors that describe the distribution, each a mean over rows; logged per layer and
        over all weights.
        """
        return {}


class FixedMasker(Masker):
    """Holds one mask, as a candidate's rank per group (a quarter of a byte a weight for 2:4)."""

    rank_OG: Tensor

    def __init__(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> None:
        super().__init__(name, shape, pattern)
        ranks = torch.zeros(shape[0], shape[1] // pattern.m, dtype=pattern.rank_dtype)
        # A Parameter, not a buffer: FSDP shards no buffers, and DDP would broadcast one at every
        # step.
        self.rank_OG = nn.Parameter(ranks, requires_grad=False)

    def set_mask(self, mask_OI: Tensor) -> None:
        """Take over a bool mask ``[O, I]``.

        Raises:
            SparsifyError: a group does not hold exactly N.
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
