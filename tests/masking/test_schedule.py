"""Schedules at their ends, halfway, and beyond."""

import math
from typing import Any

import pytest

from sparsify import Schedule, SparsifyError, SparsityStrategy


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("linear", 77.5, 55.0),
        ("cosine", 10 + 90 * (1 + math.cos(math.pi / 4)) / 2, 55.0),
        ("exponential", 100 / 10**0.25, math.sqrt(1000)),
    ],
)
def test_the_way_from_100_to_10(shape: str, quarter: float, half: float) -> None:
    schedule = Schedule(100.0, 10.0, shape)  # type: ignore[arg-type]
    for progress, value in ((-1, 100), (0, 100), (0.25, quarter), (0.5, half), (1, 10), (2, 10)):
        assert schedule.at(progress) == pytest.approx(value, rel=1e-12)


def test_a_schedule_is_linear_unless_told() -> None:
    assert Schedule(4.0, 0.05).at(0.5) == pytest.approx(2.025)
    assert Schedule(0.0, 1.0, "cosine").at(1 / 3) == pytest.approx(0.25)


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (-1.0, 1.0), (1.0, -1.0)])
def test_an_exponential_that_reaches_zero_is_refused(start: float, end: float) -> None:
    with pytest.raises(SparsifyError, match=f"from {start} to {end}; both must be above 0"):
        Schedule(start, end, "exponential")


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(SparsifyError, match="shape is 'cos'; it is one of"):
        Schedule(1.0, 0.0, "cos")  # type: ignore[arg-type]


def test_a_strategys_values_are_those_of_the_first_step_until_it_is_annealed() -> None:
    strategy = SparsityStrategy[Any]()
    values = strategy.values  # as a masker holds it
    strategy.schedules = {"sigma": Schedule(0.1, 0.3)}
    assert values == {"sigma": 0.1}
    strategy.anneal(0.5)
    assert values == {"sigma": pytest.approx(0.2)}
