"""SparseGPT, against optimal brain surgeon by its definition: a true inverse for every column."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsify import SparsifyError
from sparsify.calibration import Hessian
from sparsify.strategies.sparsegpt import SparseGPT, inverse_factor
from sparsify.strategies.wanda import Wanda
from tests.strategies.layers import (
    PATTERNS,
    REAL,
    Array,
    Layer,
    check,
    check_mask,
    error,
    keep_largest,
    random_layer,
    real_layers,
    result_of,
)

LAYERS = ["random", *REAL]


def layer_of(name: str) -> Layer:
    """A random layer of 320 inputs, more than two runs of columns, or a real one of 192."""
    return random_layer() if name == "random" else real_layers()[name]


def damped(layer: Layer, share: float = 0.01) -> Array:
    """X^T X and a share of its mean diagonal."""
    return layer.h + share * np.diag(layer.h).mean() * np.eye(len(layer.h))


@cache
def first_rows(name: str) -> list[Array]:
    """For every column j the first row of the inverse of H[j:, j:]."""
    hessian = damped(layer_of(name))
    return [np.linalg.inv(hessian[j:, j:])[0] for j in range(len(hessian))]


def surgeon(layer: Layer, rows: list[Array], pattern: str) -> tuple[Array, Array, Array]:
    """Mask, weight, and the loss of each removal, column by column.

    At the start of a group each row drops its M - N weights whose removal costs least; a removed
    weight's error goes to all weights on its right.
    """
    n, m = map(int, pattern.split(":"))
    weight, losses = layer.w.copy(), np.zeros_like(layer.w)
    mask = np.ones(weight.shape, bool)
    for j, inverse in enumerate(rows):
        if j % m == 0:
            for row in range(len(weight)):
                cost = [weight[row, k] ** 2 / rows[k][0] for k in range(j, j + m)]
                mask[row, j + np.argsort(cost, kind="stable")[: m - n]] = False
        for row in np.flatnonzero(~mask[:, j]):
            removed = weight[row, j]
            losses[row, j] = removed**2 / inverse[0]
            weight[row, j:] -= removed / inverse[0] * inverse
            weight[row, j] = 0
    return mask, weight, losses


CASES = [("random", pattern) for pattern in PATTERNS] + [(name, "2:4") for name in REAL]


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_the_update_is_optimal_brain_surgeons(name: str, pattern: str) -> None:
    layer = layer_of(name)
    mask, weight, losses = surgeon(layer, first_rows(name), pattern)
    result = result_of(SparseGPT(update_weights=True), layer, pattern)
    check(result, layer, pattern, mask, weight)
    assert result.weight is not None
    if (result.mask.numpy() == mask).all():
        size = np.abs(weight).max()
        np.testing.assert_allclose(result.weight.numpy(), weight, rtol=0, atol=2e-3 * size)
    # What all removals cost is the error under the damped Hessian, exactly.
    change = result.weight.double().numpy() - layer.w
    assert error(weight - layer.w, damped(layer)) == pytest.approx(losses.sum(), rel=1e-9)
    assert error(change, damped(layer)) == pytest.approx(losses.sum(), rel=1e-3)
    # It pays: the same choice without the update is worse.
    chosen = result_of(SparseGPT(), layer, pattern).mask.numpy()
    assert error(change, layer.h) < 0.97 * error(np.where(chosen, 0, layer.w), layer.h)


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_the_choice_alone_is_one_score_on_the_dense_weights(name: str, pattern: str) -> None:
    layer = layer_of(name)
    squares = np.array([row[0] for row in first_rows(name)])
    result = result_of(SparseGPT(), layer, pattern)
    check_mask(result, layer, pattern, keep_largest(layer.w**2 / squares, pattern))
    # Not the diagonal of the whole inverse, which is another choice.
    whole = np.diag(np.linalg.inv(damped(layer)))
    assert (keep_largest(layer.w**2 / whole, pattern) != result.mask.numpy()).any()


def test_the_factor_holds_the_inverses_of_all_trailing_submatrices() -> None:
    layer = random_layer(columns=64)
    hessian = Hessian(64, torch.device("cpu"))
    for x_TI in layer.x_STI:
        hessian.add(x_TI)
    before = hessian.matrix_II.clone()
    factor = inverse_factor(hessian.matrix_II, 0.01, "layer").double().numpy()
    assert torch.equal(hessian.matrix_II, before)
    assert (np.tril(factor, -1) == 0).all()
    for j in range(64):
        row = np.linalg.inv(damped(layer)[j:, j:])[0]
        np.testing.assert_allclose(factor[j, j] ** 2, row[0], rtol=1e-3)
        np.testing.assert_allclose(
            factor[j, j:] / factor[j, j], row / row[0], atol=1e-3 * np.abs(row / row[0]).max()
        )


def test_the_damping_is_a_share_of_the_mean() -> None:
    layer = random_layer(columns=64)
    for share in (0.01, 1.0):
        rows = [np.linalg.inv(damped(layer, share)[j:, j:])[0] for j in range(64)]
        mask, weight, _ = surgeon(layer, rows, "2:4")
        strategy = SparseGPT(update_weights=True, damping=share)
        check(result_of(strategy, layer), layer, "2:4", mask, weight)
        scaled = replace(layer, x_STI=1000 * layer.x_STI)
        assert torch.equal(result_of(strategy, scaled).mask, result_of(strategy, layer).mask)


@pytest.mark.parametrize("update", [False, True])
def test_with_uncorrelated_inputs_it_is_wanda(update: bool) -> None:
    scale = (torch.randn(64, generator=torch.Generator().manual_seed(0))).exp()
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    layer = Layer("layer", weight, torch.diag(scale)[None], weight)
    result = result_of(SparseGPT(update_weights=update, damping=0.0), layer)
    assert torch.equal(result.mask, result_of(Wanda(), layer).mask)
    if update:
        assert result.weight is not None
        torch.testing.assert_close(result.weight, weight * result.mask)


@pytest.mark.parametrize("update", [False, True])
def test_weights_of_dead_inputs_go_first(update: bool) -> None:
    layer = random_layer(columns=256)
    dead = [0, 5, 6, 128, 130, 131, 253]
    layer.x_STI[..., dead] = 0
    layer.weight_OI[:, dead] = 50.0
    result = result_of(SparseGPT(update_weights=update), layer)
    expected = [j for j in dead if j // 4 != 32]
    assert not bool(result.mask[:, expected].any())
    # Three of the group at 128 are dead, and two must stay: the living one is among them.
    assert bool(result.mask[:, 129].all())
    if update:
        assert result.weight is not None
        assert not bool(result.weight[:, dead].any())
        alive = [j for j in range(256) if j not in dead]
        assert float(result.weight[:, alive].abs().max()) < 50


def few_tokens() -> Layer:
    """Ten tokens for 64 inputs: H is singular."""
    layer = random_layer(columns=64)
    return replace(layer, x_STI=layer.x_STI[:1, :10])


@pytest.mark.parametrize("update", [False, True])
def test_a_singular_hessian_is_damped_until_it_can_be_factored(update: bool) -> None:
    layer = few_tokens()
    assert np.linalg.matrix_rank(layer.h) == 10
    result = result_of(SparseGPT(update_weights=update, damping=0.0), layer)
    if update:
        assert result.weight is not None
        change = result.weight.double().numpy() - layer.w
        wanda = np.where(result_of(Wanda(), layer).mask.numpy(), 0, layer.w)
        assert error(change, layer.h) < 0.5 * error(wanda, layer.h)


def test_the_damping_rises_tenfold_from_what_was_asked_for() -> None:
    # Its least eigenvalue is -0.5 of the mean: 0.01 and 0.1 fail, 1.0 does.
    hessian = torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    factor = inverse_factor(hessian, 0.01, "layer").double()
    torch.testing.assert_close(
        torch.linalg.inv(factor.T @ factor),
        torch.tensor([[2.0, 1.5], [1.5, 2.0]], dtype=torch.float64),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("update", [False, True])
def test_activations_that_overflow_are_an_error(update: bool, value: float) -> None:
    layer = random_layer(columns=64)
    layer.x_STI[3, 2, 17] = value
    with pytest.raises(
        SparsifyError, match=r"^layer: its calibration activations overflow.*model\.dtype float32"
    ):
        result_of(SparseGPT(update_weights=update), layer)


def test_a_hessian_that_cannot_be_factored_is_an_error() -> None:
    def indefinite() -> Tensor:
        return torch.tensor([[1.0, 1e6], [1e6, 1.0]])

    for damping, most in ((0.01, "100"), (0.0, "0.1")):
        with pytest.raises(SparsifyError, match=f"^layer: .* with {most} of its mean") as raised:
            inverse_factor(indefinite(), damping, "layer")
        assert f"raise --model.calibration.samples, or damping (now {damping:g})" in str(
            raised.value
        )


def test_negative_damping_is_an_error() -> None:
    with pytest.raises(SparsifyError, match="damping=-1.*must not be negative"):
        SparseGPT(damping=-1)


def test_only_the_update_changes_weights() -> None:
    assert SparseGPT().effect.weights == "frozen"
    assert SparseGPT(update_weights=True).effect.weights == "updated"
    assert SparseGPT(update_weights=True).describe()["settings"]["update_weights"] is True


def test_new_weights_have_the_models_type() -> None:
    layer = random_layer(columns=64)
    half = replace(layer, weight_OI=layer.weight_OI.bfloat16(), x_STI=layer.x_STI.bfloat16())
    result = result_of(SparseGPT(update_weights=True), half)
    assert result.weight is not None
    assert result.weight.dtype == torch.bfloat16
