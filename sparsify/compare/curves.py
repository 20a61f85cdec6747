"""What runs left while they learned, over their seeds."""

import statistics
from dataclasses import dataclass
from typing import TypeVar

from sparsify.compare.loading import Run
from sparsify.compare.rows import Row, calibration_seconds, calibration_tokens

MOST_POINTS = 60

T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """One value of one row over what was spent until then.

    Attributes:
        number: the row's number.
        steps: at which all its seeds have a value.
        x: the mean over seeds of steps, tokens or seconds.
        mean: the mean value.
        low: the smallest.
        high: the largest.
        seeds: how many runs it is of.
    """

    number: int
    steps: list[int]
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: int


def curve(number: int, row: Row, part: str, value: str, over: str) -> Curve | None:
    """A curve of a row; None where its runs have no such values.

    Args:
        number: the row's number.
        row: the row.
        part: of the history: validation or masks.
        value: the key of what is drawn.
        over: step, tokens or seconds; of tokens and seconds, those of calibration come first.
    """
    points = [p for run in row.samples if (p := _points(run, part, value, over))]
    if not points:
        return None
    steps = thinned(sorted(set.intersection(*(set(one) for one in points))), MOST_POINTS)
    if not steps:
        return None
    values = [[one[step][1] for one in points] for step in steps]
    return Curve(
        number,
        steps,
        [statistics.fmean(one[step][0] for one in points) for step in steps],
        [statistics.fmean(some) for some in values],
        [min(some) for some in values],
        [max(some) for some in values],
        len(points),
    )


def _points(run: Run, part: str, value: str, over: str) -> dict[int, tuple[float, float]]:
    """What is spent and the value, by step."""
    before = {
        "step": 0.0,
        "tokens": float(calibration_tokens(run)),
        "seconds": calibration_seconds(run) or 0.0,
    }[over]
    looks = (run.result.get("history") or {}).get(part) or []
    return {
        look["step"]: (look[over] + before, look[value])
        for look in looks
        if look.get(value) is not None and look.get(over) is not None
    }


def thinned(values: list[T], most: int) -> list[T]:
    """At most so many, evenly spread, with the first and the last."""
    if len(values) <= most:
        return values
    return [values[round(k * (len(values) - 1) / (most - 1))] for k in range(most)]


def intervals(row: Row) -> set[int]:
    """The steps between two looks at the masks."""
    looks = [(run.result.get("history") or {}).get("masks") or [] for run in row.samples]
    steps = [[look["step"] for look in some] for some in looks]
    return {b - a for some in steps for a, b in zip(some, some[1:], strict=False)}
