"""What a masker does by itself, and what a plugin need not write."""

import pytest
import torch
from torch import Tensor, nn

from sparsify import Draw, Masker, NMPattern

DRAW = Draw(0, 0, 0)
WEIGHT = torch.tensor([[1.0, -2.0, 3.0, -4.0], [-5.0, 6.0, -7.0, 8.0]])


class Scaled(Masker):
    """Multiplies by what it has learned."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__("layer", (2, 4), NMPattern(2, 4))
        self.factor_OI = nn.Parameter(factor)

    def mask(self, draw: Draw, row0: int = 0) -> Tensor:
        return self.factor_OI


class Kept(Masker):
    """Keeps the last two."""

    def mask(self, draw: Draw, row0: int = 0) -> Tensor:
        return torch.tensor([False, False, True, True]).expand(2, 4)


def test_a_sample_is_the_weight_times_the_mask_without_a_penalty() -> None:
    masker = Scaled(torch.full((2, 4), 0.5))
    masked, penalty = masker(WEIGHT, DRAW)
    assert torch.equal(masked, WEIGHT / 2)
    assert (penalty.shape, penalty.dtype, float(penalty)) == ((), torch.float32, 0)
    masked.sum().backward()
    assert torch.equal(masker.factor_OI.grad, WEIGHT)


def test_a_sample_is_rounded_once_to_the_weights_type() -> None:
    factor = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    seen: list[torch.dtype] = []

    class Penalized(Scaled):
        def penalty(self, masked_OI: Tensor) -> Tensor:
            seen.append(masked_OI.dtype)
            return masked_OI.sum()

    masked, penalty = Penalized(factor)(WEIGHT.bfloat16(), DRAW)
    assert torch.equal(masked, (WEIGHT * factor).bfloat16())
    assert not torch.equal(masked, WEIGHT.bfloat16() * factor.bfloat16())
    assert seen == [torch.float32]
    assert penalty.item() == float((WEIGHT * factor).sum())


def test_a_mask_of_bools_leaves_positive_zeros() -> None:
    masked, _ = Kept("layer", (2, 4), NMPattern(2, 4)).sample(WEIGHT, DRAW)
    assert masked.tolist() == [[0, 0, 3, -4], [0, 0, -7, 8]]
    assert not bool(masked[:, :2].signbit().any())


def test_a_masker_without_a_mask_is_told() -> None:
    with pytest.raises(NotImplementedError, match=r"Masker must define mask\(draw, row0\)"):
        Masker("layer", (2, 4), NMPattern(2, 4)).sample(WEIGHT, DRAW)
