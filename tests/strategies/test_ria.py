"""RIA: relative importance and activations."""

import numpy as np
import pytest
import torch

from sparsify.strategies.ria import RIA
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


def score(layer: Layer, power: float = 0.5) -> Array:
    """Weight by weight: its share of its column and of its row, by a power of the input's norm."""
    size = np.abs(layer.w).tolist()
    in_row = [sum(row) for row in size]
    in_column = [sum(column) for column in zip(*size, strict=True)]
    norm = np.linalg.norm(layer.x, axis=0).tolist()
    return np.array(
        [
            [(w / in_column[j] + w / in_row[i]) * norm[j] ** power for j, w in enumerate(row)]
            for i, row in enumerate(size)
        ]
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_layers(pattern: str) -> None:
    layer = random_layer()
    check_scores(RIA(), layer, pattern, score(layer))


@pytest.mark.parametrize("name", [*REAL, WIDE])
def test_layers_of_a_real_model(name: str) -> None:
    layer = real_layers()[name]
    result = check_scores(RIA(), layer, "2:4", score(layer))
    assert not torch.equal(result.mask, result_of(Wanda(), layer).mask)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_power_of_the_input(power: float) -> None:
    layer = random_layer()
    result = check_scores(RIA(power=power), layer, "2:4", score(layer, power))
    assert not torch.equal(result.mask, result_of(RIA(), layer).mask)


def test_rows_and_columns_of_zeros_have_no_importance() -> None:
    layer = random_layer(8, 16)
    layer.weight_OI[2] = 0
    layer.weight_OI[:, 5] = 0
    mask = result_of(RIA(), layer).mask
    others = [i for i in range(8) if i != 2]
    assert not bool(mask[others, 5].any())
    assert mask[2].tolist() == [True, True, False, False] * 4
