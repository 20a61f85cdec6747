"""Swaps, against a loop that computes the whole error anew for every swap that it tries."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsify import LayerResult, NMPattern, SparsifyError
from sparsify.calibration import CrossHessian, Hessian
from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.sparsegpt import SparseGPT
from sparsify.strategies.swaps import Swaps, error_change, sweep
from sparsify.strategies.wanda import Wanda
from tests.strategies.layers import (
    PATTERNS,
    REAL,
    Array,
    Layer,
    block_of,
    check_mask,
    random_layer,
    real_layers,
    result_of,
)


def small_layer(seed: int = 0, rows: int = 6, columns: int = 40) -> Layer:
    return random_layer(rows, columns, windows=2, tokens=60, seed=seed)


def drifted(layer: Layer) -> Layer:
    """With another input in the dense model, as after pruned blocks."""
    noise = torch.randn(layer.x_STI.shape, generator=torch.Generator().manual_seed(9))
    return replace(layer, dense_STI=layer.x_STI + 0.5 * layer.x_STI.std() * noise)


def dense_output(layer: Layer, target: str) -> Array:
    dense = layer.dense_STI if target == "dense" else None
    x = layer.x if dense is None else dense.flatten(0, 1).double().numpy()
    return x @ layer.w.T


def errors(layer: Layer, weight: Array, target: str = "dense") -> Array:
    """The squared error of every row's output over all tokens."""
    return np.square(layer.x @ weight.T - dense_output(layer, target)).sum(0)


def swaps_of(mask: Array, start: int, m: int) -> list[tuple[int, int]]:
    group = range(start, start + m)
    return [(p, u) for p in group for u in group if mask[p] and not mask[u]]


def after(mask: Array, swap: tuple[int, int]) -> Array:
    mask = mask.copy()
    mask[list(swap)] = mask[list(swap)[::-1]]
    return mask


def improve(
    layer: Layer, mask: Array, pattern: str, target: str = "dense", sweeps: int = 50
) -> Array:
    """Row by row, group by group: the best swap, if it helps, until none does."""
    m = int(pattern.partition(":")[2])
    wanted = dense_output(layer, target)
    mask = mask.copy()
    for row, weight in enumerate(layer.w):

        def error(kept: Array, row: int = row, weight: Array = weight) -> float:
            return float(np.square(layer.x @ (weight * kept) - wanted[:, row]).sum())

        for _ in range(sweeps):
            before = mask[row].copy()
            for start in range(0, len(weight), m):
                tried = [after(mask[row], swap) for swap in swaps_of(mask[row], start, m)]
                best = min(tried, key=error)
                if error(best) < error(mask[row]):
                    mask[row] = best
            if (mask[row] == before).all():
                break
    return mask


def kept(layer: Layer, result: LayerResult) -> Array:
    weight = layer.weight_OI if result.weight is None else result.weight
    return np.where(result.mask.numpy(), weight.double().numpy(), 0)


@pytest.mark.parametrize("target", ["dense", "own"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_layers(pattern: str, target: str) -> None:
    layer = drifted(small_layer(rows=25))
    initial = result_of(SparseGPT(), layer, pattern).mask
    result = result_of(Swaps(SparseGPT(), target=target), layer, pattern)  # type: ignore[arg-type]
    check_mask(result, layer, pattern, improve(layer, initial.numpy(), pattern, target))
    assert float((result.mask != initial).double().mean()) > 0.03


def test_the_change_of_error_of_every_swap() -> None:
    layer = drifted(small_layer(rows=5, columns=16))
    mask_OI = NMPattern(2, 8).top(layer.weight_OI.abs())
    weight_IO, mask_IO = layer.weight_OI.double().T, mask_OI.T
    gram_II = torch.from_numpy(layer.h)
    target_IO = torch.from_numpy(layer.x.T @ dense_output(layer, "dense"))
    residual_IO = gram_II @ (weight_IO * mask_IO) - target_IO
    before = errors(layer, layer.w * mask_OI.numpy())
    count = 0
    for start in (0, 8):
        group = slice(start, start + 8)
        change_MMO = error_change(
            weight_IO[group], mask_IO[group], gram_II[group, group], residual_IO[group]
        )
        assert int(change_MMO.isfinite().sum()) == 5 * 2 * 6
        for row in range(5):
            for p, u in swaps_of(mask_OI[row].numpy(), start, 8):
                masks = mask_OI.numpy().copy()
                masks[row] = after(masks[row], (p, u))
                exact = (errors(layer, layer.w * masks) - before)[row]
                found = float(change_MMO[p - start, u - start, row])
                assert abs(found - exact) < 1e-5 * abs(exact)
                count += 1
    assert count == 2 * 5 * 2 * 6


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("name", REAL)
def test_no_sweep_raises_the_error_of_any_row(name: str, pattern: str) -> None:
    layer = drifted(real_layers()[name])
    masks = [
        result_of(Swaps("magnitude", "dense", sweeps=sweeps), layer, pattern).mask.numpy()
        for sweeps in (0, 1, 2, 4, 8, 50)
    ]
    found = [errors(layer, layer.w * mask) for mask in masks]
    for before, later in itertools.pairwise(found):
        assert (later <= before).all()
    assert (masks[0] == result_of(Magnitude(), layer, pattern).mask.numpy()).all()
    assert found[-1].sum() < 0.85 * found[0].sum()


@pytest.mark.parametrize("seed", range(4))
def test_the_end_is_an_optimum_of_single_swaps(seed: int) -> None:
    layer = drifted(small_layer(seed, rows=8, columns=12))
    mask = result_of(Swaps(target="dense"), layer).mask.numpy()
    initial = result_of(Swaps(target="dense", sweeps=0), layer).mask.numpy()
    wanted = dense_output(layer, "dense")
    table = NMPattern(2, 4).table().numpy()
    for row, weight in enumerate(layer.w):

        def error(kept: Array, row: int = row, weight: Array = weight) -> float:
            return float(np.square(layer.x @ (weight * kept) - wanted[:, row]).sum())

        found = error(mask[row])
        swaps = [swap for start in (0, 4, 8) for swap in swaps_of(mask[row], start, 4)]
        assert all(error(after(mask[row], swap)) > found * (1 - 1e-6) for swap in swaps)
        every = [error(np.concatenate(groups)) for groups in itertools.product(table, repeat=3)]
        assert min(every) * (1 - 1e-9) <= found <= error(initial[row]) * (1 + 1e-6)


def test_a_sweep_makes_at_most_one_swap_a_group_and_changes_nothing_it_is_given() -> None:
    layer = small_layer(rows=30)
    given = [t.T.contiguous() for t in (layer.weight_OI, largest(layer))]
    gram_II = torch.from_numpy(layer.h).float()
    target_IO = gram_II @ given[0]
    copies = [tensor.clone() for tensor in (*given, gram_II, target_IO)]
    new_IO = sweep(*given, gram_II, target_IO, NMPattern(2, 4))
    moved = (new_IO != given[1]).view(-1, 4, 30).sum(1)
    assert set(moved.flatten().tolist()) == {0, 2}
    for now, before in zip((*given, gram_II, target_IO), copies, strict=True):
        assert torch.equal(now, before)


def largest(layer: Layer) -> torch.Tensor:
    return result_of(Magnitude(), layer).mask


def test_the_dense_models_output_is_met_better_when_it_is_the_target() -> None:
    layer = drifted(small_layer(rows=40))
    own, dense = (kept(layer, result_of(Swaps(target=t), layer)) for t in ("own", "dense"))  # type: ignore[arg-type]
    assert errors(layer, dense, "dense").sum() < 0.98 * errors(layer, own, "dense").sum()
    assert errors(layer, own, "own").sum() < 0.98 * errors(layer, dense, "own").sum()


# -- refit -----------------------------------------------------------------------------------------


def least_squares(layer: Layer, mask: Array, damping: float) -> Array:
    """Row by row the weights with the least error plus damping."""
    share = damping * np.diag(layer.h).mean()
    wanted = layer.x.T @ dense_output(layer, "dense")
    new = np.zeros_like(layer.w)
    for row, on in enumerate(mask):
        matrix = layer.h[np.ix_(on, on)] + share * np.eye(on.sum())
        new[row, on] = np.linalg.solve(matrix, wanted[on, row] + share * layer.w[row, on])
    return new


@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_refitted_weights_are_those_of_least_squares(pattern: str, damping: float) -> None:
    layer = drifted(small_layer(rows=25))
    masks = result_of(Swaps(target="dense"), layer, pattern).mask
    result = result_of(Swaps(target="dense", refit=True, damping=damping), layer, pattern)
    assert torch.equal(result.mask, masks)
    best = least_squares(layer, masks.numpy(), damping)
    np.testing.assert_allclose(kept(layer, result), best, rtol=0, atol=1e-4 * np.abs(best).max())
    assert errors(layer, best).sum() < errors(layer, layer.w * masks.numpy()).sum()


def test_refitting_a_real_layer_lowers_its_error() -> None:
    layer = drifted(real_layers()[REAL[1]])
    plain, refitted = (
        result_of(Swaps(target="dense", refit=refit), layer) for refit in (False, True)
    )
    assert plain.weight is None
    best = errors(layer, least_squares(layer, refitted.mask.numpy(), 0.1)).sum()
    found, before = (
        errors(layer, kept(layer, refitted)).sum(),
        errors(layer, kept(layer, plain)).sum(),
    )
    assert found < 1.01 * best < 0.95 * before


# -- inputs that are not usual ---------------------------------------------------------------------


def test_dead_inputs() -> None:
    layer = small_layer()
    layer.x_STI[..., [0, 5, 6, 7]] = 0
    result = result_of(Swaps(refit=True), layer)  # checks that weights are finite
    assert not bool(result.mask[:, 0].any())


def test_a_layer_of_which_no_swap_helps_keeps_its_mask() -> None:
    layer = small_layer()
    best = result_of(Swaps(target="dense"), layer).mask
    block = block_of(layer, "2:4")
    grams, crosses = block.collect(Hessian), block.collect(CrossHessian)
    weight_IO = layer.weight_OI.T.contiguous()
    target_IO = crosses["layer"].matrix_II.T @ weight_IO
    again = sweep(
        weight_IO, best.T.contiguous(), grams["layer"].matrix_II, target_IO, NMPattern(2, 4)
    )
    assert torch.equal(again.T, best)


def test_activations_that_are_no_numbers_are_an_error() -> None:
    layer = small_layer()
    layer.x_STI[0, 0, 3] = float("nan")
    with pytest.raises(SparsifyError, match=r"^layer: its calibration activations overflow"):
        result_of(Swaps("magnitude"), layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "both"}, "target='both'; it must be 'dense' or 'own'"),
        ({"sweeps": -1}, "sweeps=-1, damping=0.1; neither may be negative"),
        ({"damping": -0.5}, "sweeps=50, damping=-0.5; neither may be negative"),
        ({"initial": "swap"}, "swap"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        Swaps(**settings)  # type: ignore[arg-type]


def test_it_says_what_it_changes() -> None:
    assert Swaps().effect.weights == "frozen"
    assert Swaps(refit=True).effect.weights == "updated"
    assert Swaps(Wanda()).describe()["settings"]["target"] == "own"
