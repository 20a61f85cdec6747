"""The knapsack against all assignments, one by one."""

import itertools
import random

import pytest

from sparsify.results.budget import choose
from sparsify.results.budget.choose import Knapsack


def instance(seed: int, scale: int = 1) -> tuple[list[dict[str, int]], list[dict[str, float]]]:
    """Five units with two to four options; some losses are negative, some costs are equal."""
    rng = random.Random(seed)  # noqa: S311
    names = [[f"{u}{o}" for o in range(rng.randint(2, 4))] for u in range(5)]
    costs = [{name: scale * rng.randint(1, 9) for name in own} for own in names]
    return costs, [{name: rng.uniform(-0.1, 1) for name in own} for own in names]


def totals(
    costs: list[dict[str, int]], losses: list[dict[str, float]]
) -> list[tuple[int, float, tuple[str, ...]]]:
    """Cost, loss and choice of every assignment."""
    return [
        (
            sum(of[p] for of, p in zip(costs, choice, strict=True)),
            sum(of[p] for of, p in zip(losses, choice, strict=True)),
            choice,
        )
        for choice in itertools.product(*losses)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_no_assignment_within_the_budget_is_better(seed: int) -> None:
    costs, losses = instance(seed)
    every = totals(costs, losses)
    cost_of = {choice: cost for cost, _, choice in every}
    loss_of = {choice: loss for _, loss, choice in every}
    knapsack = Knapsack(costs, losses)
    assert knapsack.least == min(cost_of.values())
    assert knapsack.most == max(cost_of.values())
    for budget in range(knapsack.least, knapsack.most + 2):
        choice = knapsack.at(budget)
        best = min(loss for cost, loss, _ in every if cost <= budget)
        assert cost_of[choice] <= budget
        assert loss_of[choice] == pytest.approx(best, abs=1e-12)
        # Nor does it spend what gains nothing.
        assert all(
            cost >= cost_of[choice] for cost, loss, _ in every if loss <= loss_of[choice] + 1e-12
        )


@pytest.mark.parametrize("seed", range(10))
def test_coarse_steps_stay_within_the_budget(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "STEPS", 50)
    costs, losses = instance(seed, scale=1000)
    costs = [{name: cost + index for name, cost in of.items()} for index, of in enumerate(costs)]
    every = totals(costs, losses)
    cost_of = {choice: cost for cost, _, choice in every}
    knapsack = Knapsack(costs, losses)
    for budget in range(knapsack.least, knapsack.most, 517):
        choice = knapsack.at(budget)
        assert cost_of[choice] <= budget
        # Rounding up loses at most one step of a fiftieth a unit.
        less = budget - 5 * (knapsack.most - knapsack.least) / 50 - 5
        worst = min((loss for cost, loss, _ in every if cost <= less), default=float("inf"))
        assert sum(of[p] for of, p in zip(losses, choice, strict=True)) <= worst + 1e-12


def test_only_options_with_a_loss_are_taken() -> None:
    costs = [{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2}]
    knapsack = Knapsack(costs, [{"b": 0.5, "c": 0.1}, {"a": 0.0}])
    assert (knapsack.least, knapsack.most) == (3, 4)
    assert knapsack.at(3) == ("b", "a")
    assert knapsack.at(100) == ("c", "a")
