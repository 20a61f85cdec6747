"""Letters beside points, none over another. Needs Matplotlib."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.results.compare.drawing import FONT, INK, PAGE, letter

LINE = FONT + 0.5  # points from one line to the next
ASIDE = 9.0  # points from a marker to its letter
NEAR = 20.0  # points along x, within which letters could meet


def put_letters(axes: Any, points: Mapping[int, tuple[float, float]]) -> None:
    """Write each row's letter beside its point: those of nearby points in one column, at least a
    line apart, and each with a thin line to its point if it had to move.

    Args:
        axes: with its final scales and limits.
        points: of each row's number, in data units.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # the layout decides where points are
    inch = 72 / figure.dpi
    (left, low), (right, high) = axes.bbox.get_points() * inch
    at = {
        number: tuple(value * inch for value in axes.transData.transform(point))
        for number, point in points.items()
    }
    for column in columns({number: x for number, (x, _) in at.items()}):
        edge = max(at[number][0] for number in column)
        sign = 1 if edge + 2 * ASIDE < right else -1
        if sign < 0:
            edge = min(at[number][0] for number in column)
        heights = spread_apart([at[number][1] for number in column], LINE, low + LINE / 2, high)
        for number, height in zip(column, heights, strict=True):
            x, y = at[number]
            moved = abs(height - y) > LINE / 3 or abs(edge - x) > LINE / 3
            axes.annotate(
                letter(number),
                points[number],
                xytext=(edge + sign * ASIDE - x, height - y),
                textcoords="offset points",
                ha="left" if sign > 0 else "right",
                va="center",
                bbox={"facecolor": PAGE, "edgecolor": "none", "pad": 0.5},
                arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.5, "shrinkB": 3}
                if moved
                else None,
            )


def columns(places: Mapping[int, float]) -> list[list[int]]:
    """Numbers whose places along x are near each other, from left to right."""
    found: list[list[int]] = []
    for number in sorted(places, key=lambda one: places[one]):
        if found and places[number] - places[found[-1][-1]] < NEAR:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def spread_apart(values: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """The values, moved as little as possible (in squares) to be at least so far apart.

    Args:
        values: in any order, which is kept.
        least: the distance between two.
        low: the least that a value may become; it is undercut by none unless all do not fit.
        high: the most.
    """
    # Without the distances they are to have, values only have to rise: isotonic regression.
    order = sorted(range(len(values)), key=lambda number: values[number])
    blocks: list[list[float]] = []
    for place, number in enumerate(order):
        blocks.append([values[number] - place * least])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    rising = [statistics.fmean(block) for block in blocks for _ in block]
    top = high - (len(values) - 1) * least
    found = [0.0] * len(values)
    for place, (number, value) in enumerate(zip(order, rising, strict=True)):
        found[number] = max(low, min(top, value)) + place * least
    return found
