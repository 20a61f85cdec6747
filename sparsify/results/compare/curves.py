"""Makes curves of what runs recorded while they learned, as means over their seeds."""

import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from sparsify.results.compare.loading import Run
from sparsify.results.compare.rows import Row, calibration_seconds, calibration_tokens

MOST_POINTS = 60
FLIPS = "flips_per_step"

T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """One value of one row, as a function of steps, tokens or seconds.

    Attributes:
        number: the row's number.
        steps: the steps at which all its seeds have a value.
        x: the mean over seeds of steps, tokens or seconds.
        mean: the mean value.
        low: the smallest value over seeds.
        high: the largest value over seeds.
        seeds: how many runs the curve averages.
    """

    number: int
    steps: list[int]
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: int

    @classmethod
    def over(
        cls, number: int, steps: list[int], x: list[float], values: list[list[float]], seeds: int
    ) -> "Curve":
        """Make a curve from the values of all seeds at each step."""
        mean = [statistics.fmean(some) for some in values]
        low, high = [min(some) for some in values], [max(some) for some in values]
        return cls(number, steps, x, mean, low, high, seeds)


def curve(number: int, row: Row, part: str, value: str, over: str) -> Curve | None:
    """Make a curve of a row; None if its runs have no such values.

    Args:
        number: the row's number.
        row: the row.
        part: the part of the history: validation or masks.
        value: the key of the value to draw; for masks also :data:`FLIPS`.
        over: step, tokens or seconds; tokens and seconds include those of calibration.
    """
    points = [p for run in row.samples if (p := _points(run, part, value, over))]
    if not points:
        return None
    steps = thinned(sorted(set.intersection(*(set(one) for one in points))), MOST_POINTS)
    if not steps:
        return None
    values = [[one[step][1] for one in points] for step in steps]
    x = [statistics.fmean(one[step][0] for one in points) for step in steps]
    return Curve.over(number, steps, x, values, len(points))


def paths(row: Row, part: str, value: str, over: str) -> list[tuple[list[float], list[float]]]:
    """What is spent and the value of each run of a row that has more than one such point; the
    arguments are those of :func:`curve`.
    """
    found = (_points(run, part, value, over) for run in row.samples)
    each = [[one[step] for step in sorted(one)] for one in found if len(one) > 1]
    return [([x for x, _ in one], [y for _, y in one]) for one in each]


def _points(run: Run, part: str, value: str, over: str) -> dict[int, tuple[float, float]]:
    """What is spent and the value, by step."""
    before = {
        "step": 0.0,
        "tokens": calibration_tokens(run),
        "seconds": calibration_seconds(run),
    }[over]
    if before is None:  # then it is not known where the curve starts
        return {}
    return {
        look["step"]: (look[over] + before, look[value])
        for look in _looks(run, part)
        if look.get(value) is not None and look.get(over) is not None
    }


def _looks(run: Run, part: str) -> list[dict[str, Any]]:
    """A part of the history; looks at masks with their flips for each step since the last look."""
    looks = (run.result.get("history") or {}).get(part) or []
    found, last = [], 0
    for look in looks:
        steps, last = look["step"] - last, look["step"]
        if look.get("flips") is not None and steps > 0:
            look = look | {FLIPS: look["flips"] / steps}
        found.append(look)
    return found


def thinned(values: list[T], most: int) -> list[T]:
    """At most ``most`` values, evenly spread, including the first and the last."""
    if len(values) <= most:
        return values
    return [values[round(k * (len(values) - 1) / (most - 1))] for k in range(most)]


def intervals(row: Row) -> set[int]:
    """The steps between two looks at the masks."""
    steps = [[look["step"] for look in _looks(run, "masks")] for run in row.samples]
    return {b - a for some in steps for a, b in pairwise(some)}
