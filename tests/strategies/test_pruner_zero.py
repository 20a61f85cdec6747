"""Pruner-Zero: the published score, with its scaling to the layer's range."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.pruner_zero import PrunerZero
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


def score(layer: Layer) -> Array:
    """Weight by weight."""
    low, high = float(layer.g.min()), float(layer.g.max())
    gradient = layer.g.tolist()
    return np.array(
        [
            [abs(w * w) * (gradient[i][j] - low) / (high - low) for j, w in enumerate(row)]
            for i, row in enumerate(layer.w.tolist())
        ]
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_layers(pattern: str) -> None:
    layer = random_layer()
    layer = replace(layer, gradient_OI=layer.gradient_OI + 0.005)  # the least one counts
    result = check_scores(PrunerZero(), layer, pattern, score(layer))
    without = keep_largest(layer.w**2 * layer.g, pattern)
    assert (result.mask.numpy() != without).mean() > 0.01


@pytest.mark.parametrize("name", [*REAL, WIDE])
def test_layers_of_a_real_model(name: str) -> None:
    layer = real_layers()[name]
    result = check_scores(PrunerZero(), layer, "2:4", score(layer))
    assert not torch.equal(result.mask, result_of(Magnitude(), layer).mask)


def test_activations_do_not_count() -> None:
    layer = random_layer()
    other = replace(layer, x_STI=layer.x_STI.flip(-1))
    assert torch.equal(result_of(PrunerZero(), layer).mask, result_of(PrunerZero(), other).mask)


def test_equal_gradients_everywhere_still_give_a_mask() -> None:
    layer = random_layer()
    layer = replace(layer, gradient_OI=torch.ones_like(layer.gradient_OI))
    assert int(result_of(PrunerZero(), layer).mask.sum()) == layer.w.size // 2
