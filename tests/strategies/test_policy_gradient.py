"""Terms of several ranks: their order, their average, and what a population is good for."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsify import Draw
from sparsify.strategies import policy_gradient
from sparsify.strategies.policy_gradient import MovingAverage, Term, coefficients
from tests.strategies.test_maskpro import Toy, ToyRun

RANKS, MICRO_BATCHES, DRAWS = 3, 2, 2


def terms_of(micro_batch: int, index0: int, share: float, slopes: bool) -> list[Term]:
    """The terms of the micro-batch with this number in the whole step."""
    generator = torch.Generator().manual_seed(micro_batch)
    terms = []
    for k in range(DRAWS):
        term = Term(Draw(4, 7, index0 + k), torch.randn((), generator=generator))
        if slopes:
            term.scale.append(torch.tensor(share))
            term.slopes.append(torch.randn((), generator=generator) * share)
        terms.append(term)
    return terms


def on_ranks(monkeypatch: pytest.MonkeyPatch, rank: int, values: list[Tensor]) -> None:
    """Be this rank, beside others with these values."""

    def gather(own: Tensor) -> Tensor:
        assert torch.equal(own, values[rank])
        return torch.stack(values)

    monkeypatch.setattr(policy_gradient, "rank_and_size", lambda: (rank, len(values)))
    monkeypatch.setattr(policy_gradient, "gather", gather)


def stacked(micro_batches: list[list[Term]]) -> Tensor:
    return torch.stack([torch.stack([t.value() for t in terms]) for terms in micro_batches])


@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("averages", [False, True])
def test_all_ranks_go_through_the_draws_as_one_process_would(
    slopes: bool, averages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def average() -> MovingAverage | None:
        if not averages:
            return None
        past = MovingAverage(0.9)
        past.remove(torch.tensor(0.7))
        return past

    whole = RANKS * MICRO_BATCHES
    alone = average()
    expected = coefficients(
        [terms_of(i, i * DRAWS, 1 / whole, slopes) for i in range(whole)], alone
    )
    assert [draw.index for draw, _ in expected] == list(range(whole * DRAWS))
    steps = [
        [terms_of(i, i * DRAWS, 1 / MICRO_BATCHES, slopes) for i in range(rank, whole, RANKS)]
        for rank in range(RANKS)
    ]
    values = [stacked(micro_batches) for micro_batches in steps]
    found = []
    for rank, micro_batches in enumerate(steps):
        own = average()
        on_ranks(monkeypatch, rank, values)
        found.append((coefficients(micro_batches, own), own))
    for terms, own in found:
        assert [draw for draw, _ in terms] == [draw for draw, _ in expected]
        for (_, coefficient), (_, other) in zip(terms, expected, strict=True):
            torch.testing.assert_close(coefficient, other, rtol=1e-6, atol=1e-7)
        for (_, coefficient), (_, other) in zip(terms, found[0][0], strict=True):
            assert torch.equal(coefficient, other)
        if own is not None and alone is not None:
            torch.testing.assert_close(own.sums, alone.sums, rtol=1e-6, atol=0)
            assert torch.equal(own.sums, found[0][1].sums)  # type: ignore[union-attr]


def test_a_step_without_micro_batches_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    # As when a checkpoint is loaded, and only the optimizer's state is wanted.
    monkeypatch.setattr(policy_gradient, "gather", None)
    toy = Toy(estimator="residual")
    before = toy.masker.logits_OI.detach().clone()
    toy.optimizer.step()
    assert torch.equal(toy.masker.logits_OI, before)


class RankRun(ToyRun):
    """The batch of one rank in a step: its own offset, and its own draws of that step."""

    def __init__(self, toy: Toy, step: int, rank: int) -> None:
        super().__init__(toy.layer, toy.scope, 2 * step + rank)
        self.first = Draw(0, step, rank)

    def draw(self, k: int = 0, of: int = 1) -> Draw:
        return replace(self.first, index=self.first.index * of + k)


def squared_errors(estimates: list[Tensor]) -> Tensor:
    """Of each estimate from their mean, summed over logits: their mean is the variance."""
    every = torch.stack(estimates).double()
    return (every - every.mean(0)).square().flatten(1).sum(1)


def test_two_ranks_halve_the_variance_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = [], []
    toy, peer = Toy(estimator="leave_one_out"), Toy(estimator="leave_one_out")
    start = toy.masker.logits_OI.detach().clone()
    for step in range(500):
        for ranks, estimates in ((1, one), (2, two)):
            run, values = RankRun(toy, step, 0), []
            if ranks == 2:
                with monkeypatch.context() as patched:
                    for rank, other in enumerate((toy, peer)):
                        other.strategy.loss(RankRun(other, step, rank))
                        values.append(stacked(other.strategy._terms))
                        other.strategy._terms.clear()
                    on_ranks(patched, 0, values)
                    toy.step(run)
            else:
                toy.step(run)
            estimates.append(start - toy.masker.logits_OI.detach())
            toy.masker.logits_OI.data.copy_(start)
    alone, both = squared_errors(one), squared_errors(two)
    ratio = float(both.mean() / alone.mean())
    errors = (float(x.std() / x.mean()) / math.sqrt(len(x)) for x in (alone, both))
    error = ratio * math.hypot(*errors)
    assert error < 0.06
    assert ratio == pytest.approx(0.5, abs=3 * error)
