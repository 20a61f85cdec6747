"""The search on losses that are known: what it may end with."""

import pytest
import torch
from torch import Tensor

from sparsify import SparsifyError
from sparsify.masking.pattern import NMPattern
from sparsify.results.budget.goal import Goal
from sparsify.results.budget.search import Found, Search
from sparsify.results.budget.units import Choice, Units

SPARSE = NMPattern(6, 8)


def search(dense: int, sparse: int, units: int, together: float, allowed: list[str]) -> Found:
    """All masks together lose ``together`` times as much as the masks of single calibrations."""
    costs = [{None: dense, SPARSE: sparse} for _ in range(units)]
    if "dense" not in allowed:
        costs = [{SPARSE: sparse, NMPattern(7, 8): dense} for _ in range(units)]
    layers = {f"u{i}": (f"l{i}",) for i in range(units)}
    goal = Goal.parse(allowed, {"max_perplexity_ratio": 1.0015}, "layer", 4, 0, 1)

    def losses(choice: Choice, factor: float) -> Tensor:
        lost = sum(0.0 if p is None else 0.001 if p == SPARSE else 0.0005 for p in choice)
        return torch.full((8,), 3.0 + factor * lost, dtype=torch.float64)

    return Search(
        Units(layers, [dense] * units, costs, costs),
        goal,
        lambda choice: losses(choice, 1.0),
        lambda choice: losses(choice, 1.0),
        lambda choice: losses(choice, together),
        lambda items, title: items,
    ).run()


@pytest.mark.parametrize("units", [2, 3, 7])
@pytest.mark.parametrize(
    ("dense", "sparse"), [(100, 75), (100, 70), (4096, 3136), (18432, 14112), (1000003, 750001)]
)
def test_the_dense_model_keeps_every_ratio(dense: int, sparse: int, units: int) -> None:
    found = search(dense, sparse, units, 10.0, ["dense", "6:8"])
    assert found.final.choice == (None,) * units


def test_where_none_keeps_it_together_that_is_said() -> None:
    with pytest.raises(SparsifyError, match="with masks that are calibrated together; allow"):
        search(100, 75, 2, 10.0, ["7:8", "6:8"])
