from typing import Any

import pytest

from sparsify.results.compare.curves import FLIPS, MOST_POINTS, curve, intervals
from sparsify.results.compare.rows import Row
from tests.results.compare.made import row


def with_history(steps: list[list[int]], **more: Any) -> Row:
    """A row whose seed s has, at step k, spent 10 k tokens and k + s seconds, value k + s / 10."""
    one = row([3.0 + seed / 10 for seed in range(len(steps))], **more)
    for seed, run in enumerate(one.runs):
        looks = [
            {"step": k, "tokens": 10 * k, "seconds": k + seed, "perplexity": k + seed / 10}
            for k in steps[seed]
        ]
        run.result["history"] = {"validation": looks, "masks": []}
    return one


def test_a_curve_is_of_the_steps_that_all_seeds_have() -> None:
    one = curve(
        4, with_history([[0, 5, 10], [0, 10, 20], [0, 10]]), "validation", "perplexity", "seconds"
    )
    assert one is not None
    assert (one.number, one.steps, one.seeds) == (4, [0, 10], 3)
    assert one.x == [1.0, 11.0]
    assert one.mean == pytest.approx([0.1, 10.1])
    assert (one.low, one.high) == ([0, 10], [0.2, 10.2])


def test_what_calibration_took_comes_first() -> None:
    calibration = {"samples": 4, "block_size": 8, "seconds": 7.0}
    rows = with_history([[0, 1]], calibration=calibration)
    found = {
        over: curve(0, rows, "validation", "perplexity", over)
        for over in ("step", "tokens", "seconds")
    }
    assert {over: one.x for over, one in found.items() if one} == {
        "step": [0, 1],
        "tokens": [32, 42],
        "seconds": [7, 8],
    }


def test_unknown_seconds_of_calibration_have_no_curve() -> None:
    calibration = {"samples": 4, "block_size": 8, "seconds": 7.0, "device": "NVIDIA H100"}
    rows = with_history([[0, 1]], calibration=calibration)
    assert curve(0, rows, "validation", "perplexity", "seconds") is None
    assert curve(0, rows, "validation", "perplexity", "tokens") is not None


def test_flips_are_by_step() -> None:
    one = row([3.0])
    flips = {10: 0.5, 30: 0.5, 70: 0.2, 80: None}
    looks = [{"step": step, "flips": share} for step, share in flips.items()]
    one.runs[0].result["history"] = {"masks": looks}
    found = curve(0, one, "masks", FLIPS, "step")
    assert found is not None
    assert found.steps == [10, 30, 70]
    assert found.mean == pytest.approx([0.05, 0.025, 0.005])


def test_rows_without_such_values_have_no_curve() -> None:
    assert curve(0, row([3.0]), "validation", "perplexity", "tokens") is None
    assert curve(0, with_history([[0]]), "validation", "entropy", "tokens") is None
    assert curve(0, with_history([[0], [1]]), "validation", "perplexity", "tokens") is None
    one = with_history([[0]])
    one.runs[0].result["history"]["validation"][0]["perplexity"] = None
    assert curve(0, one, "validation", "perplexity", "tokens") is None


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    one = curve(0, with_history([list(range(1000))]), "validation", "perplexity", "step")
    assert one is not None
    assert len(one.steps) == MOST_POINTS
    assert (one.steps[0], one.steps[-1]) == (0, 999)
    assert one.steps == sorted(set(one.steps))


def test_steps_between_looks() -> None:
    one = row([3.0])
    one.runs[0].result["history"] = {"masks": [{"step": k} for k in (50, 100, 120)]}
    assert intervals(one) == {50, 20}
    assert intervals(row([3.0])) == set()
