"""ADMM-Iter, against a slow one in float64 and against least squares."""

import numpy as np
import pytest
import torch

from sparsify import SparsifyError
from sparsify.strategies.admm import ADMM
from sparsify.strategies.wanda import Wanda
from tests.strategies.layers import (
    PATTERNS,
    REAL,
    Array,
    Layer,
    check,
    error,
    keep_largest,
    random_layer,
    real_layers,
    result_of,
)


def iterate(
    layer: Layer,
    pattern: str,
    steps: int = 20,
    pruning_steps: int = 15,
    rho: float = 1.0,
    damping: float = 0.1,
) -> tuple[Array, Array]:
    """The iteration in the authors' layout: the transposed weight, inputs as rows."""
    n, m = map(int, pattern.split(":"))
    norm = np.array([h**0.5 + 1e-8 for h in np.diag(layer.h)])
    c = layer.h / np.outer(norm, norm)
    c = c + damping * np.mean(np.diag(c)) * np.eye(len(norm))
    w = (layer.w * norm).T
    target, inverse, u = c @ w, np.linalg.inv(c + rho * np.eye(len(norm))), np.zeros_like(w)
    for t in range(steps):
        if t < pruning_steps:
            v = np.abs(w + u)
            share = (1 - n / m) * (1 - (1 - (t + 1) / pruning_steps) ** 3)  # of all weights
            protected = keep_largest(v.T, pattern).T
            order = np.argsort(np.where(protected, np.inf, v), axis=None)
            mask = np.ones(v.size, bool)
            mask[order[: int(share * v.size + 1e-9)]] = False
            mask = mask.reshape(v.shape)
        z = (w + u) * mask
        u = u + (w - z)
        w = inverse @ (target + rho * (z - u))
    return mask.T, ((w + u) * mask).T / norm


def least_squares(layer: Layer, mask: Array) -> Array:
    """Row by row the best weights of a mask."""
    out = np.zeros_like(layer.w)
    for row, kept in enumerate(mask):
        out[row, kept] = np.linalg.solve(layer.h[np.ix_(kept, kept)], layer.h[kept] @ layer.w[row])
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_layers(pattern: str) -> None:
    layer = random_layer(columns=120 if pattern == "3:5" else 128)
    mask, weight = iterate(layer, pattern)
    check(result_of(ADMM(), layer, pattern), layer, pattern, mask, weight)


@pytest.mark.parametrize("name", REAL)
def test_layers_of_a_real_model(name: str) -> None:
    layer = real_layers()[name]
    mask, weight = iterate(layer, "2:4")
    result = result_of(ADMM(), layer)
    check(result, layer, "2:4", mask, weight)
    assert result.weight is not None
    change = result.weight.double().numpy() - layer.w
    wanda = np.where(result_of(Wanda(), layer).mask.numpy(), 0, layer.w)
    assert error(change, layer.h) < 0.9 * error(wanda, layer.h)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1, "pruning_steps": 1},
        {"steps": 8, "pruning_steps": 3},
        {"rho": 0.3},
        {"damping": 0.01},
    ],
    ids=str,
)
def test_every_setting(settings: dict[str, float]) -> None:
    layer = random_layer(columns=64)
    mask, weight = iterate(layer, "2:4", **settings)  # type: ignore[arg-type]
    check(result_of(ADMM(**settings), layer), layer, "2:4", mask, weight)  # type: ignore[arg-type]
    default = iterate(layer, "2:4")[1]
    assert np.abs(default - weight).max() > 0.01


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_many_steps_give_the_least_squares_weights_of_the_mask(pattern: str) -> None:
    layer = random_layer(columns=32)
    result = result_of(ADMM(steps=3000, damping=1e-6), layer, pattern)
    assert result.weight is not None
    mask, weight = result.mask.numpy(), result.weight.double().numpy()
    best = least_squares(layer, mask)
    np.testing.assert_allclose(weight, best, rtol=0, atol=2e-3 * np.abs(best).max())
    found, least = (error(w - layer.w, layer.h) for w in (weight, best))
    assert least <= found < 1.001 * least


def test_the_error_is_below_that_of_wandas_mask_and_below_that_of_its_own_without_update() -> None:
    for seed in range(5):
        layer = random_layer(columns=64, seed=seed)
        result = result_of(ADMM(), layer)
        assert result.weight is not None
        found = error(result.weight.double().numpy() - layer.w, layer.h)
        wanda = np.where(result_of(Wanda(), layer).mask.numpy(), 0, layer.w)
        own = np.where(result.mask.numpy(), 0, layer.w)
        assert found < 0.9 * error(wanda, layer.h)
        assert found < 0.9 * error(own, layer.h)


def test_a_first_choice_in_one_step_is_wandas() -> None:
    layer = random_layer(columns=64)
    one = result_of(ADMM(steps=1, pruning_steps=1), layer)
    assert torch.equal(one.mask, result_of(Wanda(), layer).mask)
    assert not torch.equal(result_of(ADMM(), layer).mask, one.mask)


def test_dead_inputs_give_finite_weights() -> None:
    layer = random_layer(columns=64)
    layer.x_STI[..., [0, 5, 6, 7]] = 0
    result = result_of(ADMM(), layer)  # checks that they are finite
    assert not bool(result.mask[:, [0]].any())


def test_an_iteration_that_diverges_is_an_error() -> None:
    layer = random_layer(columns=64)
    layer.x_STI[0, 0, 3] = float("nan")
    with pytest.raises(SparsifyError, match=r"^layer: its iteration does not converge; raise rho"):
        result_of(ADMM(), layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"steps": 5, "pruning_steps": 6},
            "pruning_steps=6 of steps=5; it must be from 1 to steps",
        ),
        ({"pruning_steps": 0}, "pruning_steps=0 of steps=20"),
        ({"rho": 0.0}, "rho must be positive"),
        ({"damping": -0.1}, "damping not negative"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        ADMM(**settings)  # type: ignore[arg-type]
