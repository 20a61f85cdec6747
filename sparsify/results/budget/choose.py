"""The exact best choice under a budget, if losses of units add up.

A multiple-choice knapsack by dynamic programming: after the first u units, the least loss for every
cost up to c. Costs are counted in steps of their greatest common divisor, or, if that gives more
than :data:`STEPS`, in coarser steps that are rounded up, so that no choice exceeds its budget. One
table serves all budgets.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import torch

P = TypeVar("P")
STEPS = 2**17


class Knapsack(Generic[P]):
    """The best choices for every budget.

    Args:
        costs: by unit, the cost of each option, an integer.
        losses: by unit, the loss of each option that may be taken.
    """

    def __init__(
        self, costs: Sequence[Mapping[P, int]], losses: Sequence[Mapping[P, float]]
    ) -> None:
        # Cheapest first: of equal losses the table keeps the first.
        options = [
            sorted(loss, key=cost.__getitem__) for cost, loss in zip(costs, losses, strict=True)
        ]
        self.least = sum(cost[own[0]] for cost, own in zip(costs, options, strict=True))
        more = [
            [cost[p] - cost[own[0]] for p in own] for cost, own in zip(costs, options, strict=True)
        ]
        span = sum(own[-1] for own in more)
        self.most = self.least + span
        self._step = max(1, math.gcd(*(c for own in more for c in own)), math.ceil(span / STEPS))
        self._more = [[math.ceil(c / self._step) for c in own] for own in more]
        self._options = options
        size = 1 + sum(own[-1] for own in self._more)
        best = torch.zeros(size, dtype=torch.float64)
        self._taken = []
        for own, of, loss in zip(options, self._more, losses, strict=True):
            table = torch.full((len(own), size), torch.inf, dtype=torch.float64)
            for row, p, c in zip(table, own, of, strict=True):
                row[c:] = best[: size - c] + loss[p]
            best, taken = table.min(0)
            self._taken.append(taken.to(torch.int8))
        self._best = best

    def at(self, budget: float) -> tuple[P, ...]:
        """The choice of least loss that costs at most ``budget``, which is at least ``least``."""
        at = min(int((budget - self.least) // self._step), len(self._best) - 1)
        # What is cheaper and no worse is better: the table may leave some of a budget unused.
        at = int((self._best[: at + 1] <= self._best[at]).nonzero()[0])
        choice: list[P] = []
        for options, more, taken in zip(
            reversed(self._options), reversed(self._more), reversed(self._taken), strict=True
        ):
            own = int(taken[at])
            choice.append(options[own])
            at -= more[own]
        return tuple(reversed(choice))
