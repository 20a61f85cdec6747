"""Wanda: magnitude times the norm of the input."""

import numpy as np
import pytest
import torch

from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.wanda import Wanda
from tests.strategies.layers import (
    PATTERNS,
    REAL,
    WIDE,
    Array,
    Layer,
    check_scores,
    random_layer,
    real_layers,
    result_of,
)


def score(layer: Layer) -> Array:
    """Weight by weight."""
    norm = [sum(x * x for x in column) ** 0.5 for column in layer.x.T.tolist()]
    return np.array([[abs(w) * norm[j] for j, w in enumerate(row)] for row in layer.w.tolist()])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_layers(pattern: str) -> None:
    layer = random_layer()
    check_scores(Wanda(), layer, pattern, score(layer))


@pytest.mark.parametrize("name", [*REAL, WIDE])
def test_layers_of_a_real_model(name: str) -> None:
    layer = real_layers()[name]
    result = check_scores(Wanda(), layer, "2:4", score(layer))
    assert not torch.equal(result.mask, result_of(Magnitude(), layer).mask)


def test_with_equal_inputs_the_larger_half_stays() -> None:
    weight = torch.arange(1.0, 9.0)[None]
    result = result_of(Wanda(), Layer("layer", weight, torch.ones(2, 4, 8), weight))
    assert (weight * result.mask).tolist() == [[0, 0, 3, 4, 0, 0, 7, 8]]


def test_a_large_input_keeps_a_small_weight() -> None:
    weight = -torch.arange(1.0, 9.0)[None]
    x_STI = torch.ones(1, 4, 8)
    x_STI[..., 0] = -100
    result = result_of(Wanda(), Layer("layer", weight, x_STI, weight))
    assert (weight * result.mask).tolist() == [[-1, 0, 0, -4, 0, 0, -7, -8]]


def test_the_norm_is_over_all_tokens_of_all_windows() -> None:
    # One large token in the last window decides as much as many small ones.
    x_STI = torch.zeros(2, 4, 4)
    x_STI[0, :, 0] = 1.0  # norm 2
    x_STI[1, 3, 1] = 2.1
    x_STI[..., 2] = 0.5  # norm 1.41
    x_STI[..., 3] = 0.1
    ones = torch.ones(1, 4)
    assert result_of(Wanda(), Layer("layer", ones, x_STI, ones), "1:4").mask.tolist() == [
        [False, True, False, False]
    ]
    assert result_of(Wanda(), Layer("layer", ones, x_STI, ones)).mask.tolist() == [
        [True, True, False, False]
    ]
