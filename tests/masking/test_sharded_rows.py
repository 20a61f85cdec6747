"""Rows of a layer by themselves, as a rank holds them, have the masks that they have in the whole.

Shapes: O out, I in.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from sparsify import Draw, LayerResult, NMPattern, SparsityStrategy
from sparsify.masking.experts import masked
from sparsify.masking.layer import MaskScope
from sparsify.masking.masker import Masker
from sparsify.masking.sharded_rows import hard_mask, mask_ranks, shipped
from sparsify.strategies.fixed_mask import FixedMask
from sparsify.strategies.maskllm import MaskLLM
from sparsify.strategies.maskpro import MaskPro
from sparsify.strategies.proxsparse import ProxSparse
from sparsify.strategies.sr_ste import SRSTE

PATTERN, SHAPE = NMPattern(2, 4), (10, 16)
STRATEGIES: dict[str, Callable[[], SparsityStrategy]] = {
    "maskllm": MaskLLM,
    "maskllm, hard": lambda: MaskLLM(hard=True),
    "maskpro": lambda: MaskPro(strength=1.0),
    "maskpro, mean": lambda: MaskPro(estimator="mean_gradient"),
    "sr_ste": SRSTE,
    "asp": lambda: SRSTE(refresh="never"),
    "proxsparse": lambda: ProxSparse(anchor=1e-3),
    "fixed_mask": FixedMask,
    "lora": lambda: FixedMask(lora_rank=2),
}


def layer(make: Callable[[], SparsityStrategy]) -> tuple[SparsityStrategy, Masker, Tensor, Tensor]:
    """A strategy, its masker of a whole layer, started, the weight and the prior's mask."""
    strategy = make()
    masker = strategy.make_masker("a.layer", SHAPE, PATTERN)
    weight_OI = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    prior_OI = PATTERN.top(weight_OI.abs().flip(1))
    strategy.init_masker(masker, weight_OI.clone(), LayerResult(prior_OI))
    for number, parameter in enumerate(masker.parameters()):
        if parameter.is_floating_point():  # as if it had learned
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data += 0.01 * noise
    return strategy, masker, weight_OI, prior_OI


def rows_of(masker: Masker, start: int, end: int) -> dict[str, Tensor]:
    """The masker's tensors as a rank holds them, found without the sharding's code."""
    return {
        name: p.detach()[start:end] if len(p) == SHAPE[0] else p.detach()
        for name, p in masker.named_parameters()
    }


@pytest.mark.parametrize(("start", "end"), [(0, 4), (4, 10), (9, 10)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_rows_are_masked_as_in_the_whole(name: str, start: int, end: int) -> None:
    _, masker, weight_OI, _ = layer(STRATEGIES[name])
    rows = rows_of(masker, start, end)
    samples = []
    for masking in (Draw(0, 3, 0), Draw(0, 3, 1), "hard"):
        whole_OI, _ = masker(weight_OI, masking)
        part_OI, _ = functional_call(masker, rows, (weight_OI[start:end], masking, start))
        torch.testing.assert_close(part_OI, whole_OI[start:end], rtol=0, atol=0)
        samples.append(whole_OI)
    random = name.startswith("maskllm") or name == "maskpro"
    assert torch.equal(samples[0], samples[1]) != random
    if random and end - start == 6:  # with row 0's noise they would be others
        wrong_OI, _ = functional_call(masker, rows, (weight_OI[start:end], Draw(0, 3, 0), 0))
        assert not torch.equal(wrong_OI, samples[0][start:end])


@pytest.mark.parametrize("name", STRATEGIES)
def test_rows_start_as_in_the_whole(name: str) -> None:
    strategy = STRATEGIES[name]()
    weight_OI = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    prior_OI = PATTERN.top(weight_OI.abs().flip(1))
    whole = strategy.make_masker("a.layer", SHAPE, PATTERN)
    strategy.init_masker(whole, weight_OI.clone(), LayerResult(prior_OI))
    part = strategy.make_masker("a.layer", (6, SHAPE[1]), PATTERN)
    strategy.init_masker(part, weight_OI[4:].clone(), LayerResult(prior_OI[4:]), row0=4)
    for key, value in rows_of(whole, 4, 10).items():
        assert torch.equal(part.get_parameter(key), value), key


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_whole_layer_needs_no_other_ranks(name: str) -> None:
    _, masker, weight_OI, _ = layer(STRATEGIES[name])
    linear = torch.nn.Linear(SHAPE[1], SHAPE[0])
    linear.weight.data.copy_(weight_OI)
    whole = masked(linear, masker, MaskScope())
    mask_OI = masker.hard_mask(linear.weight)
    assert torch.equal(hard_mask(whole), mask_OI)
    assert torch.equal(PATTERN.unrank(mask_ranks(whole)), mask_OI)
    ships = shipped(whole)
    assert ships is not None
    assert torch.equal(ships, masker.harden(linear.weight))
