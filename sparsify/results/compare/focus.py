"""Chooses the rows of a figure that are drawn in colour, since no reader tells 25 lines apart."""

from collections.abc import Sequence
from typing import Any

from sparsify.results.compare.drawing import style
from sparsify.results.compare.rows import COSTS, Row
from sparsify.results.compare.verdict import frontier, groups

MOST_COLOURED = 8


def order(rows: Sequence[Row]) -> list[int]:
    """The rows' numbers, those that a reader wants to see first in front: the best of every kind,
    those on a Pareto front, those that learned, and the others, each by perplexity.
    """
    kinds = groups(rows).values()
    bests = [min(own, key=lambda row: row.perplexity) for own in kinds if len(own) > 1]
    fronts = [row for own in kinds for cost in COSTS for row in reversed(frontier(own, cost))]
    learned = [row for row in rows if row.record["steps"]]
    numbers = {row.label: number for number, row in enumerate(rows)}
    return list(dict.fromkeys(numbers[r.label] for r in [*bests, *fronts, *learned, *rows]))


def foremost(rows: Sequence[Row], drawn: Sequence[int]) -> list[int]:
    """Of the rows that a figure draws, the numbers of those to show in colour, in their order."""
    wanted = [number for number in order(rows) if number in drawn][:MOST_COLOURED]
    return sorted(wanted)


def looks(rows: Sequence[Row], drawn: Sequence[int]) -> dict[int, dict[str, Any] | None]:
    """How each drawn row looks: its own style, or None where it is grey. A row that is in colour
    looks the same in every figure.
    """
    places = {number: place for place, number in enumerate(order(rows))}
    coloured = foremost(rows, drawn)
    return {number: style(places[number]) if number in coloured else None for number in drawn}
