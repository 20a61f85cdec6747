"""GBLM-Pruner: Wanda's score and the gradient's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsify.strategies.gblm import GBLM
from sparsify.strategies.wanda import Wanda
from tests.strategies.layers import (
    PATTERNS,
    REAL,
    WIDE,
    Array,
    Layer,
    check_scores,
    keep_largest,
    random_layer,
    real_layers,
    result_of,
)


def score(layer: Layer, alpha: float = 100.0) -> Array:
    """Weight by weight; the norm of an input is the root of the mean over windows."""
    per_window = [(window.double().numpy() ** 2).sum(0) for window in layer.x_STI]
    norm = np.sqrt(sum(per_window) / len(per_window)).tolist()
    gradient = layer.g.tolist()
    return np.array(
        [
            [abs(w) * norm[j] + alpha * abs(w) * gradient[i][j] for j, w in enumerate(row)]
            for i, row in enumerate(layer.w.tolist())
        ]
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_layers(pattern: str) -> None:
    layer = random_layer()
    check_scores(GBLM(), layer, pattern, score(layer))


@pytest.mark.parametrize("name", [*REAL, WIDE])
def test_layers_of_a_real_model(name: str) -> None:
    layer = real_layers()[name]
    result = check_scores(GBLM(), layer, "2:4", score(layer))
    assert not torch.equal(result.mask, result_of(Wanda(), layer).mask)


def test_alpha_weighs_the_gradient() -> None:
    layer = random_layer()
    assert torch.equal(result_of(GBLM(alpha=0.0), layer).mask, result_of(Wanda(), layer).mask)
    check_scores(GBLM(alpha=1e4), layer, "2:4", score(layer, 1e4))
    only = result_of(GBLM(alpha=1e9), layer).mask.numpy()
    assert (only == keep_largest(np.abs(layer.w) * layer.g, "2:4")).all()


def test_the_balance_does_not_depend_on_the_number_of_windows() -> None:
    layer = random_layer()
    once = result_of(GBLM(), layer).mask
    twice = result_of(GBLM(), replace(layer, x_STI=layer.x_STI.repeat(2, 1, 1))).mask
    assert float((once == twice).double().mean()) > 0.999
