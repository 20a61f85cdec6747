"""Finds the choice that meets a budget: predicted from single changes, decided by joint runs.

1. Every unit is measured alone at every pattern, all others dense.
2. A :class:`~sparsify.results.budget.choose.Knapsack` over these losses predicts the best choice
   for a budget. The choice is run as a whole; so are the uniform patterns.
3. Losses do not add up far from the dense model. So each unit of the best choice is moved to its
   next cheaper and next dearer pattern, with all others as chosen, and the knapsack is solved again
   over these losses. What is better as a whole is taken. This is repeated.

For a ratio the budget itself is searched: by bisection, each step a joint run.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.results.budget.choose import Knapsack
from sparsify.results.budget.goal import Goal, Pattern
from sparsify.results.budget.units import Choice, Units, uniform

T = TypeVar("T")
Table = list[dict[Pattern, float]]
Watch = Callable[[Sequence[T], str], Iterable[T]]

SURE = 2.0  # standard errors that a ratio must stay below its limit
BISECTIONS = 8
STEPS = 100  # at most, from a choice that does not keep the ratio to the dearest
POINTS = 6  # of the frontier, besides what the search runs anyway
PENALTIES = (0.0, 0.5, 1.0, 2.0)  # on a change, in medians of what changes do


@dataclass(frozen=True)
class Point:
    """A choice that was run as a whole.

    Attributes:
        choice: the pattern of each unit.
        increase: of the loss above the dense model's, mean over windows, nats a token.
        error: its standard error over windows.
        predicted: the sum of the units' increases when each is changed alone.
        kind: how it was found: ``uniform``, ``search`` or ``frontier``.
    """

    choice: Choice
    increase: float
    error: float
    predicted: float
    kind: str

    @property
    def ratio(self) -> float:
        """Of its perplexity to the dense model's."""
        return math.exp(self.increase)

    def keeps(self, ratio: float) -> bool:
        """Whether its perplexity ratio is surely at most this."""
        return self.increase + SURE * self.error <= math.log(ratio)


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Attributes:
        chosen: the best choice, under the masks of uniform calibrations.
        final: the same choice, its masks calibrated together, as ``fit`` does.
        points: all choices that were run, by increasing cost.
        alone: the loss increase of each unit alone at each pattern.
    """

    chosen: Point
    final: Point
    points: list[Point]
    alone: Table


class Search:
    """Searches.

    Args:
        units: the units and what they cost.
        goal: the limit.
        few: the losses of a choice on few windows.
        many: the same on many windows.
        together: the same on many windows, with masks that are calibrated together.
        watch: wraps an iteration, to show its progress under a title.
    """

    def __init__(
        self,
        units: Units,
        goal: Goal,
        few: Callable[[Choice], Tensor],
        many: Callable[[Choice], Tensor],
        together: Callable[[Choice], Tensor],
        watch: Watch[tuple[int, Pattern]],
    ) -> None:
        self._units, self._goal, self._watch = units, goal, watch
        self._few, self._many, self._together = few, many, together
        self._dense: Choice = (None,) * len(units.costs)
        self._points: dict[Choice, Point] = {}
        self._alone: Table = []

    def run(self) -> Found:
        """Measure and choose.

        Raises:
            SparsifyError: the budget lies outside of what the patterns allow.
        """
        self._check_range()
        every = [(u, p) for u, of in enumerate(self._units.costs) for p in of if p is not None]
        self._alone = self._changes(self._dense, every, "each part alone")
        for pattern in self._goal.patterns:
            if (choice := uniform(self._units, pattern)) is not None:
                self._point(choice, "uniform")
        by_ratio = self._goal.name == "max_perplexity_ratio"
        knapsack = Knapsack(self._units.costs, self._alone)
        best = self._cheapest(knapsack) if by_ratio else self._fitting(knapsack)
        for number in range(self._goal.rounds):
            title = f"changes of the choice, round {number + 1}"
            around = self._changes(best.choice, self._neighbours(best.choice), title)
            better = self._improved(best, around, by_ratio)
            if better is best:
                break
            best = better
        for part in range(1, POINTS + 1):
            cost = knapsack.least + (knapsack.most - knapsack.least) * part / (POINTS + 1)
            self._point(knapsack.at(cost), "frontier")
        final = self._final(best.choice)
        while by_ratio and not final.keeps(self._goal.limit):
            best = self._dearer(best, knapsack)
            final = self._final(best.choice)
        points = sorted(self._points.values(), key=lambda p: self._units.cost(p.choice))
        return Found(best, final, points, self._alone)

    def _check_range(self) -> None:
        costs = [of.values() for of in self._units.costs]
        least, most = sum(map(min, costs)), sum(map(max, costs))
        name, limit = self._goal.name, self._limit
        if name == "max_perplexity_ratio" or least <= limit < most:
            return
        scale = {"kept": sum(self._units.weights), "milliseconds": 1e6}.get(name, 1)
        raise SparsifyError(
            f"{name}={self._goal.limit:g}: the patterns allow from {least / scale:.6g} to "
            f"{most / scale:.6g}; give a number from the first to below the second, or other "
            "--patterns"
        )

    @property
    def _limit(self) -> float:
        """In the unit of costs."""
        scale = {"kept": sum(self._units.weights), "milliseconds": 1e6}.get(self._goal.name, 1)
        return self._goal.limit * scale

    # -- measuring ---------------------------------------------------------------------------------

    def _changes(self, choice: Choice, changes: Sequence[tuple[int, Pattern]], title: str) -> Table:
        """By how much each change of one unit raises the loss of a choice."""
        before = float(self._few(choice).mean())
        table: Table = [{} for _ in choice]
        for own, pattern in zip(table, choice, strict=True):
            own[pattern] = 0.0
        for unit, pattern in self._watch(changes, title):
            changed = (*choice[:unit], pattern, *choice[unit + 1 :])
            table[unit][pattern] = float(self._few(changed).mean()) - before
        # Dense units are what changes are measured against, even where no unit may be dense.
        return [
            {p: loss for p, loss in own.items() if p in cost}
            for own, cost in zip(table, self._units.costs, strict=True)
        ]

    def _neighbours(self, choice: Choice) -> list[tuple[int, Pattern]]:
        """The next cheaper and the next dearer pattern of each unit."""
        found: list[tuple[int, Pattern]] = []
        for unit, (own, cost) in enumerate(zip(choice, self._units.costs, strict=True)):
            order = sorted(cost, key=cost.__getitem__)
            at = order.index(own)
            found += [(unit, order[i]) for i in (at - 1, at + 1) if 0 <= i < len(order)]
        return found

    def _point(self, choice: Choice, kind: str = "search") -> Point:
        if choice not in self._points:
            self._points[choice] = self._as_point(choice, self._many(choice), kind)
        return self._points[choice]

    def _final(self, choice: Choice) -> Point:
        return self._as_point(choice, self._together(choice), "final")

    def _as_point(self, choice: Choice, losses_W: Tensor, kind: str) -> Point:
        difference_W = losses_W - self._many(self._dense)
        error = float(difference_W.std() / math.sqrt(len(difference_W)))
        predicted = sum(own.get(p, 0.0) for own, p in zip(self._alone, choice, strict=True))
        return Point(choice, float(difference_W.mean()), error, predicted, kind)

    # -- choosing ----------------------------------------------------------------------------------

    def _fitting(self, knapsack: Knapsack[Pattern]) -> Point:
        """The best of the predicted choice and the uniform ones that the budget allows."""
        self._point(knapsack.at(self._limit))
        fitting = [p for c, p in self._points.items() if self._units.cost(c) <= self._limit]
        return min(fitting, key=lambda point: point.increase)

    def _cheapest(self, knapsack: Knapsack[Pattern], most: float = math.inf) -> Point:
        """The cheapest of the knapsack's choices that keeps the ratio, found by bisection; or a
        cheaper one that was run before.
        """
        low, high = float(knapsack.least), min(float(knapsack.most), most)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self._point(knapsack.at(middle)).keeps(self._goal.limit):
                high = middle
            else:
                low = middle
        kept = [p for p in self._points.values() if p.keeps(self._goal.limit)]
        if not kept:
            raise SparsifyError(
                f"max_perplexity_ratio={self._goal.limit:g}: none of the choices that were run "
                "keeps it; allow a larger one, or add denser patterns to --patterns, such as dense"
            )
        return min(kept, key=lambda p: (self._units.cost(p.choice), p.increase))

    def _improved(self, best: Point, around: Table, by_ratio: bool) -> Point:
        """The best choice after changes around the present one; that itself if none is better."""
        changes = [abs(x) for own in around for x in own.values() if x]
        scale = statistics.median(changes) if changes else 0.0
        knapsacks = []
        # Where the plain sum fails, as many changes at once no longer add up, fewer may still help.
        for penalty in PENALTIES:
            held: Table = [
                {p: loss + penalty * scale * (p != own) for p, loss in of.items()}
                for of, own in zip(around, best.choice, strict=True)
            ]
            knapsacks.append(Knapsack(self._units.costs, held))
        if by_ratio:
            return self._cheapest(knapsacks[0], self._units.cost(best.choice))
        for knapsack in knapsacks[1:]:
            self._point(knapsack.at(self._limit))
        return self._fitting(knapsacks[0])

    def _dearer(self, best: Point, knapsack: Knapsack[Pattern]) -> Point:
        """A choice dearer than the best whose joint run keeps the ratio: the cheapest that is surer
        to keep it, or else the cheapest of all that were run.
        """
        least = self._units.cost(best.choice)
        for part in range(1, STEPS + 1):
            point = self._point(knapsack.at(least + (knapsack.most - least) * part / STEPS))
            surer = point.increase < best.increase and self._units.cost(point.choice) > least
            if surer and point.keeps(self._goal.limit):
                return point
        run = [p for p in self._points.values() if p.keeps(self._goal.limit)]
        if dearer := [p for p in run if self._units.cost(p.choice) > least]:
            return min(dearer, key=lambda p: self._units.cost(p.choice))
        raise SparsifyError(
            f"max_perplexity_ratio={self._goal.limit:g}: none of the choices that were run keeps "
            "it with masks that are calibrated together; allow a larger one"
        )


def cheaper_and_better(points: Sequence[Point], cost: Mapping[Choice, int]) -> list[Point]:
    """The points that no other beats at its cost or below, by increasing cost."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (cost[p.choice], p.increase)):
        if not kept or point.increase < kept[-1].increase:
            kept.append(point)
    return kept
