"""The search of orders: what it predicts is what happens, and no round makes it worse."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparsify.calibration import channel_orders
from sparsify.calibration.channel_orders import Inputs, find_order
from sparsify.masking.pattern import NMPattern

CPU = torch.device("cpu")


def inputs(
    pattern: str, channels: int, copies: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Inputs:
    """A layer whose inputs are correlated, and of different sizes; some weights are equal."""
    generator = torch.Generator().manual_seed(seed)
    columns = copies * channels
    x_TI = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64)
    mix_II = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x_TI = x_TI @ (mix_II / columns**0.5 + torch.eye(columns)) * torch.rand(columns).add(0.1)
    weight_OI = torch.randn(9, columns, generator=generator).mul(4).round().div(4)
    gram_II = (x_TI.T @ x_TI).to(dtype)
    columns_KC = torch.arange(columns).view(copies, channels)
    score = lambda weight_OI, scale_I: weight_OI.abs() * scale_I  # noqa: E731
    scale_I = torch.ones(columns, dtype=dtype)
    return Inputs(weight_OI, gram_II, scale_I, score, columns_KC, NMPattern.parse(pattern))


def error_of(layers: Sequence[Inputs], order_C: Tensor) -> float:
    """The error under an order, from its definition."""
    total = 0.0
    for layer in layers:
        at_I = torch.empty(layer.columns_KC.numel(), dtype=torch.int64)
        for columns_C in layer.columns_KC:
            at_I[columns_C] = columns_C[order_C]
        weight_OI = layer.weight_OI.double()[:, at_I]
        score_OI = layer.score(layer.weight_OI.double(), layer.scale_I.double())[:, at_I]
        lost_OI = weight_OI * ~layer.pattern.top(score_OI)
        gram_II = layer.gram_II[at_I][:, at_I].double()
        total += float(torch.einsum("oi,ij,oj->", lost_OI, gram_II, lost_OI))
    return total


@pytest.mark.parametrize(
    "layers",
    [
        [inputs("2:4", 32)],
        [inputs("1:4", 32), inputs("2:4", 32, seed=1)],
        [inputs("4:8", 32), inputs("2:4", 32, seed=1)],
        [inputs("2:4", 16, copies=2)],
    ],
    ids=["2:4", "two layers", "two group sizes", "two columns a channel"],
)
def test_predicted_changes_are_those_of_the_recomputed_error(layers: list[Inputs]) -> None:
    generator = torch.Generator().manual_seed(3)
    width = max(layer.pattern.m for layer in layers)
    channels = layers[0].columns_KC.shape[1]
    order_C = torch.randperm(channels, generator=generator)
    at_PS = channel_orders._pairs(channels, 1, width, generator)
    exchanges_XS = channel_orders._exchanges(width)
    error, gain_XP = channel_orders._gains(layers, order_C, at_PS, exchanges_XS, CPU)
    before = error_of(layers, order_C)
    assert error == pytest.approx(before, rel=1e-9)
    for x in range(0, len(exchanges_XS), 5):
        for p in range(len(at_PS)):
            new_C = order_C.clone()
            new_C[at_PS[p]] = order_C[at_PS[p][exchanges_XS[x]]]
            found = error_of(layers, new_C) - before
            assert float(gain_XP[x, p]) == pytest.approx(found, rel=1e-5, abs=1e-9 * before)
    new_C = order_C.clone()  # all pairs at once, each with another exchange
    chosen_P = torch.arange(len(at_PS)) * 3 % len(exchanges_XS)
    new_C[at_PS] = order_C[at_PS.gather(1, exchanges_XS[chosen_P])]
    both_PP = channel_orders._between(layers, order_C, new_C, at_PS, CPU)
    alone_P = gain_XP[chosen_P, torch.arange(len(at_PS))]
    together = float(alone_P.sum() + both_PP.sum() - both_PP.diagonal().sum())
    assert together == pytest.approx(error_of(layers, new_C) - before, rel=1e-5)


def test_the_error_never_rises_and_ends_far_lower() -> None:
    layers = [inputs("2:4", 64, dtype=torch.float32), inputs("2:4", 64, 1, 1, torch.float32)]
    order_C, errors = find_order(layers, 1, CPU, rounds=30, least=0.0)
    assert torch.equal(order_C.sort().values, torch.arange(64))
    assert all(later <= earlier for earlier, later in pairwise(errors))
    assert errors[0] == pytest.approx(error_of(layers, torch.arange(64)), rel=1e-4)
    assert errors[-1] == pytest.approx(error_of(layers, order_C), rel=1e-4)
    assert errors[-1] < 0.9 * errors[0]
    again_C, _ = find_order(layers, 1, CPU, rounds=30, least=0.0)
    assert torch.equal(order_C, again_C)


def test_channels_stay_in_their_runs() -> None:
    order_C, errors = find_order([inputs("2:4", 48, copies=2)], 3, CPU, rounds=20, least=0.0)
    assert torch.equal(order_C.view(3, 16).sort().values.flatten(), torch.arange(48))
    assert errors[-1] < errors[0]


def test_a_share_weighs_a_layers_error() -> None:
    first, second = inputs("2:4", 32), inputs("2:4", 32, seed=1)
    second.share = 0.0
    both_C, _ = find_order([first, second], 1, CPU, rounds=5)
    alone_C, _ = find_order([first], 1, CPU, rounds=5)
    assert torch.equal(both_C, alone_C)
