"""DSnoT: swaps within groups, against a loop over the rows."""

import numpy as np
import pytest
import torch

from sparsify import SparsifyError
from sparsify.strategies.dsnot import DSnoT
from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.sparsegpt import SparseGPT
from sparsify.strategies.wanda import Wanda
from tests.strategies.layers import (
    PATTERNS,
    REAL,
    WIDE,
    Array,
    Layer,
    check_mask,
    random_layer,
    real_layers,
    result_of,
)


def expected_part(layer: Layer) -> Array:
    """What each weight adds to its row's output on average, summed over a window."""
    windows = len(layer.x_STI)
    return layer.w * (layer.x.sum(0) / windows)


def refine(
    layer: Layer, mask: Array, pattern: str, cycles: int = 50, threshold: float = 0.1
) -> Array:
    """The swaps of one row after another, one cycle after another."""
    m = int(pattern.partition(":")[2])
    part, variance = expected_part(layer), layer.x.var(0)
    score = np.abs(layer.w) * np.linalg.norm(layer.x, axis=0)
    mask = mask.copy()
    for row in range(len(mask)):
        loss = part[row, ~mask[row]].sum()
        sign = np.sign(loss)
        candidates = [j for j in range(mask.shape[1]) if not mask[row, j]]
        candidates.sort(key=lambda j: -sign * part[row, j] / variance[j])
        movable = mask[row].copy()  # a weight moves at most once
        for grown in candidates[:cycles]:
            group = range(grown // m * m, grown // m * m + m)
            partners = [j for j in group if movable[j]]
            if not partners:
                continue
            pruned = min(partners, key=lambda j: score[row, j])
            after = loss + part[row, pruned] - part[row, grown]
            if np.sign(after) != sign or abs(loss) <= threshold:
                break
            mask[row, grown], mask[row, pruned] = True, False
            movable[pruned] = False
            loss = after
    return mask


@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_layers(pattern: str) -> None:
    layer = random_layer(rows=40)
    initial = result_of(Wanda(), layer, pattern).mask
    result = result_of(DSnoT(), layer, pattern)
    check_mask(result, layer, pattern, refine(layer, initial.numpy(), pattern))
    assert float((result.mask != initial).double().mean()) > 1e-3


@pytest.mark.parametrize("name", [*REAL, WIDE])
def test_layers_of_a_real_model(name: str) -> None:
    layer = real_layers()[name]
    initial = result_of(Wanda(), layer).mask
    result = result_of(DSnoT(skip=[]), layer)
    check_mask(result, layer, "2:4", refine(layer, initial.numpy(), "2:4"))
    assert int((result.mask != initial).sum()) > 100


@pytest.mark.parametrize(
    "settings", [{"cycles": 1}, {"cycles": 7}, {"cycles": 1000}, {"threshold": 30.0}], ids=str
)
def test_every_setting(settings: dict[str, float]) -> None:
    layer = random_layer(rows=40)
    initial = result_of(Wanda(), layer).mask.numpy()
    result = result_of(DSnoT(**settings), layer)  # type: ignore[arg-type]
    check_mask(result, layer, "2:4", refine(layer, initial, "2:4", **settings))  # type: ignore[arg-type]
    if settings.get("cycles") != 1000:
        assert not torch.equal(result.mask, result_of(DSnoT(), layer).mask)


def test_one_cycle_swaps_at_most_one_pair_a_row() -> None:
    layer = random_layer(rows=40)
    moved = (result_of(DSnoT(cycles=1), layer).mask != result_of(Wanda(), layer).mask).sum(1)
    assert set(moved.tolist()) <= {0, 2}
    assert 2 in moved.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_the_expected_output_of_the_rows_comes_back(seed: int) -> None:
    layer = random_layer(rows=40, seed=seed)
    part = expected_part(layer)
    before, after = (
        (part * ~result_of(strategy, layer).mask.numpy()).sum(1) for strategy in (Wanda(), DSnoT())
    )
    # One swap may take a row further away: any that does not overshoot is accepted.
    assert (np.sign(after) == np.sign(before)).all()
    assert np.abs(after).mean() < 0.6 * np.abs(before).mean()


def test_a_row_of_small_loss_is_left_alone() -> None:
    layer = random_layer()
    assert torch.equal(result_of(DSnoT(threshold=1e9), layer).mask, result_of(Wanda(), layer).mask)


@pytest.mark.parametrize("initial", ["magnitude", SparseGPT()])
def test_any_strategy_gives_the_initial_mask(initial: str | SparseGPT) -> None:
    layer = random_layer(rows=40)
    strategy = Magnitude() if isinstance(initial, str) else initial
    start = result_of(strategy, layer).mask
    result = result_of(DSnoT(initial=initial), layer)
    check_mask(result, layer, "2:4", refine(layer, start.numpy(), "2:4"))
    assert not torch.equal(result.mask, start)


@pytest.mark.parametrize(
    ("name", "skip", "refined"),
    [
        ("model.layers.0.mlp.up_proj", None, False),
        ("model.layers.0.self_attn.q_proj", None, True),
        ("model.layers.0.mlp.up_proj", [], True),
        ("model.layers.0.self_attn.q_proj", "*q_proj", False),
        ("model.layers.0.self_attn.q_proj", ["*k_proj", "*q_proj"], False),
        ("model.layers.0.self_attn.q_proj", ["*k_proj"], True),
    ],
)
def test_layers_of_skip_keep_the_initial_mask(
    name: str, skip: str | list[str] | None, refined: bool
) -> None:
    layer = random_layer(rows=40)
    layer = Layer(name, layer.weight_OI, layer.x_STI, layer.gradient_OI)
    strategy = DSnoT() if skip is None else DSnoT(skip=skip)
    same = torch.equal(result_of(strategy, layer).mask, result_of(Wanda(), layer).mask)
    assert same != refined


@pytest.mark.parametrize("settings", [{"cycles": 0}, {"threshold": -1.0}])
def test_settings_that_make_no_sense(settings: dict[str, float]) -> None:
    with pytest.raises(SparsifyError, match="cycles must be at least 1 and the threshold not neg"):
        DSnoT(**settings)  # type: ignore[arg-type]
