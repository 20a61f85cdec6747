"""Policy gradients on one logit a weight: its masks, estimators, steps and memory.

A tiny problem, one layer of four groups, stands in for the model where expectations are taken.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify import Draw, LayerResult, NMPattern, RunResult, SparsifyError
from sparsify.masking import noise
from sparsify.masking.experts import masked
from sparsify.masking.layer import MaskScope
from sparsify.masking.masker import Masking
from sparsify.masking.plackett_luce import mask_probabilities
from sparsify.strategies import logit_masker
from sparsify.strategies.logit_masker import InitialMask, LogitMasker
from sparsify.strategies.maskpro import MaskPro
from sparsify.training.step import BatchRun
from tests.conftest import SIZES, masked_model

TWO_FOUR = NMPattern(2, 4)
ESTIMATORS = ("residual", "leave_one_out", "control_variate")
SHAPE = (2, 8)
GROUPS = 4


class ToyRun:
    """A layer whose loss is the squared error of its output plus an offset that changes with every
    batch: what a baseline on the same batch takes away.
    """

    def __init__(self, layer: nn.Module, scope: MaskScope, step: int) -> None:
        self.layer, self.scope, self.step = layer, scope, step
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(16, 8, generator=generator)
        self.y = torch.randn(16, 2, generator=generator)
        self.offset = float(noise.normal(noise.fold("offset", step), 1, 1))
        self.task_loss = None

    def draw(self, k: int = 0, of: int = 1) -> Draw:
        return Draw(0, self.step, k)

    def __call__(self, masking: Masking, grad: bool = True) -> RunResult:
        with torch.set_grad_enabled(grad), self.scope.use(masking):
            output = self.layer(self.x)
        loss = (output - self.y).square().mean() + self.offset
        return RunResult(loss, loss, output, torch.zeros(()))


class Toy:
    """One masked layer, its strategy, and the strategy's optimizer."""

    def __init__(self, pattern: NMPattern = TWO_FOUR, **settings: object) -> None:
        generator = torch.Generator().manual_seed(1)
        linear = nn.Linear(8, 2, bias=False).requires_grad_(False)
        # Small beside what is to be predicted: the loss is nearly linear in the mask, as a model's.
        linear.weight.data.copy_(torch.randn(2, 8, generator=generator) / 5)
        self.strategy = MaskPro("magnitude", **{"lr": 1.0, "strength": 1.0, **settings})  # type: ignore[arg-type]
        self.masker = self.strategy.make_masker("layer", SHAPE, pattern)
        self.scope = MaskScope()
        self.layer = masked(linear, self.masker, self.scope)
        prior = pattern.top(linear.weight.abs())
        self.strategy.init_masker(self.masker, linear.weight, LayerResult(prior))
        # Away from the start, so that no symmetry hides a mistake.
        self.masker.logits_OI.data += torch.randn(SHAPE, generator=generator)
        self.maskers = {self.masker: self.layer.weight_OI}
        self.optimizer = self.strategy.optimizer(
            [self.masker.logits_OI], self.maskers, lambda params: torch.optim.SGD(params, lr=1.0)
        )

    def run(self, step: int) -> ToyRun:
        return ToyRun(self.layer, self.scope, step)

    def step(self, *runs: ToyRun, divisor: int | None = None) -> None:
        """One step of so many micro-batches, as Lightning makes it."""

        def closure() -> float:
            for run in runs:
                loss = self.strategy.loss(run) / (divisor or len(runs))
                if loss.requires_grad:
                    loss.backward()
            self.strategy.before_step(self.maskers)
            return 0.0

        self.masker.logits_OI.grad = None
        self.optimizer.step(closure)

    def estimate(self, step: int) -> Tensor:
        """The gradient that one step follows; the logits are put back."""
        before = self.masker.logits_OI.detach().clone()
        self.step(self.run(step))
        step_OI = before - self.masker.logits_OI.detach()
        self.masker.logits_OI.data.copy_(before)
        return step_OI


def log_probability(logits_OI: Tensor, mask_OI: Tensor, pattern: NMPattern) -> Tensor:
    """Of a mask, by going through all orders in which each group's positions can be drawn."""
    total = torch.zeros((), dtype=torch.float64)
    for logits, mask in zip(
        pattern.groups(logits_OI.double()).flatten(0, 1),
        pattern.groups(mask_OI).flatten(0, 1),
        strict=True,
    ):
        orders = []
        for order in itertools.permutations(mask.nonzero().flatten().tolist()):
            left, product = list(range(pattern.m)), torch.ones((), dtype=torch.float64)
            for i in order:
                product = product * logits[i].exp() / logits[left].exp().sum()
                left.remove(i)
            orders.append(product)
        total = total + torch.stack(orders).sum().log()
    return total


def score(logits_OI: Tensor, mask_OI: Tensor, pattern: NMPattern) -> Tensor:
    leaf = logits_OI.detach().double().requires_grad_()
    return torch.autograd.grad(log_probability(leaf, mask_OI, pattern), leaf)[0]


def exact_gradient(toy: Toy) -> Tensor:
    """Of the expected loss, over all masks of the layer."""
    weight, run = toy.layer.weight_OI, toy.run(0)
    table = TWO_FOUR.table()
    logits = toy.masker.logits_OI.detach().double().requires_grad_()
    each = [  # log-probability of each candidate of each group
        torch.stack([log_probability(group[None], c[None], TWO_FOUR) for c in table])
        for group in logits.view(GROUPS, 4)
    ]
    expected = torch.zeros((), dtype=torch.float64)
    for ranks in itertools.product(range(6), repeat=GROUPS):
        mask = TWO_FOUR.unrank(torch.tensor(ranks).view(2, 2))
        loss = (run.x @ torch.where(mask, weight, 0).T - run.y).square().mean().double()
        log_p = torch.stack([each[g][rank] for g, rank in enumerate(ranks)]).sum()
        expected = expected + log_p.exp() * loss
    return torch.autograd.grad(expected, logits)[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_estimators_have_the_exact_gradient_as_mean(estimator: str) -> None:
    toy = Toy(estimator=estimator)
    exact = exact_gradient(toy)
    estimates = torch.stack([toy.estimate(step) for step in range(800)]).double()
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert float(((estimates.mean(0) - exact).abs() / error).max()) < 4
    # The test sees a gradient that is a tenth too small somewhere.
    assert float((0.1 * exact.abs() / error).max()) > 1


def test_baselines_on_the_same_batch_and_slopes_lower_the_variance() -> None:
    def variance(**settings: object) -> float:
        toy = Toy(**settings)
        return float(torch.stack([toy.estimate(step) for step in range(200)])[50:].var(0).sum())

    residual = variance(estimator="residual")
    assert residual > 1.5 * variance(estimator="leave_one_out", draws=4)
    assert residual > 2 * variance(estimator="control_variate")


@pytest.mark.parametrize("text", ["1:4", "2:4", "3:8"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_follows_the_score_of_its_draws(estimator: str, text: str) -> None:
    pattern = NMPattern.parse(text)
    toy = Toy(pattern, estimator=estimator, memory=0.9, draws=3)
    past: list[float] = []
    for step in range(3):
        run, logits = toy.run(step), toy.masker.logits_OI.detach()
        draws = [Draw(0, step, k) for k in range(3 if estimator == "leave_one_out" else 1)]
        masks = [pattern.top(logits + noise.gumbel(draw.key("layer"), *SHAPE)) for draw in draws]
        losses = [loss_of(run, toy, mask) for mask in masks]
        scores = [score(logits, mask, pattern) for mask in masks]
        expected = torch.zeros(SHAPE, dtype=torch.float64)
        if estimator == "leave_one_out":
            for k in range(3):
                others = (sum(losses) - losses[k]) / 2
                expected += (losses[k] - others) / 3 * scores[k]
        else:
            ages = [0.9**age for age in range(len(past))][::-1]
            mean = sum(a * p for a, p in zip(ages, past, strict=True)) / (sum(ages) or 1)
            if estimator == "residual":
                initial = pattern.unrank(toy.masker.initial_OG)
                advantage = losses[0] - loss_of(run, toy, initial)
            else:
                remainder, gradient = linearised(run, toy, masks[0])
                advantage = losses[0] - remainder
                expected += gradient
            expected += (advantage - mean) * scores[0]
            past.append(float(advantage))
        torch.testing.assert_close(toy.estimate(step).double(), expected, rtol=2e-4, atol=1e-6)


def loss_of(run: ToyRun, toy: Toy, mask: Tensor) -> Tensor:
    weight = toy.layer.weight_OI.double() * mask
    return (run.x.double() @ weight.T - run.y).square().mean() + run.offset


def linearised(run: ToyRun, toy: Toy, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The loss at a mask by its slope at the mean, and that slope's gradient in the logits; the
    mean and its derivative go over all candidates.
    """
    pattern = toy.masker.pattern
    leaf = toy.masker.logits_OI.detach().double().requires_grad_()
    means = []
    for group in leaf.view(-1, pattern.m):
        each = [log_probability(group[None], c[None], pattern).exp() for c in pattern.table()]
        means.append((torch.stack(each)[:, None] * pattern.table()).sum(0))
    mean = torch.stack(means).view(SHAPE)
    point = mean.detach().requires_grad_()
    at_mean = loss_of(run, toy, point)
    slope = torch.autograd.grad(at_mean, point)[0]
    line = at_mean.detach() + (slope * (mask.double() - mean.detach())).sum()
    return line, torch.autograd.grad(mean, leaf, slope)[0]


def forget(toy: Toy) -> None:
    """Only the past, whose mean stays zero whatever is taken in."""
    if toy.strategy.average is not None:
        toy.strategy.average.memory = 1.0
        toy.strategy.average.sums.zero_()


def test_micro_batches_of_a_step_are_averaged() -> None:
    for estimator in ESTIMATORS:
        toy = Toy(estimator=estimator)
        singles = []
        for step in (3, 4):
            forget(toy)
            singles.append(toy.estimate(step))
        before = toy.masker.logits_OI.detach().clone()
        forget(toy)
        toy.step(toy.run(3), toy.run(4))
        found = before - toy.masker.logits_OI.detach()
        torch.testing.assert_close(found, (singles[0] + singles[1]) / 2, rtol=1e-4, atol=1e-6)


def test_starts_from_its_prior_and_ships_the_largest_logits() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    strategy = MaskPro("magnitude", strength=7.0)
    masker = strategy.make_masker("layer", (6, 16), TWO_FOUR)
    prior = TWO_FOUR.top(weight.abs())
    strategy.init_masker(masker, weight, LayerResult(prior))
    assert torch.equal(masker.logits_OI, prior * 7.0)
    assert torch.equal(masker.hard_mask(weight), prior)
    initial, _ = masker.sample(weight, InitialMask(0, 3, 1))
    assert torch.equal(initial, torch.where(prior, weight, 0))
    masker.logits_OI.data[0, :4] = torch.tensor([1.0, 3.0, 2.0, 0.0])
    assert masker.hard_mask(weight)[0, :4].tolist() == [False, True, True, False]
    initial, _ = masker.sample(weight, InitialMask(0, 3, 1))
    assert torch.equal(initial, torch.where(prior, weight, 0))
    assert float(masker.metrics()["margin"]) == pytest.approx((7.0 * 23 + 1.0) / 24)


def test_tells_how_sure_its_distribution_is(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = MaskPro("magnitude", strength=1.0)
    masker = strategy.make_masker("layer", (6, 16), TWO_FOUR)
    masker.logits_OI.data.normal_(generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(logit_masker, "AT_ONCE", 64)  # four rows, and two
    found = {name: float(value) for name, value in masker.metrics().items()}
    p = mask_probabilities(masker.logits_OI.detach().double(), TWO_FOUR)
    assert found["entropy"] == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    assert found["max_probability"] == pytest.approx(float(p.amax(1).mean()), rel=1e-5)
    samples = [masker.sampled_mask(Draw(0, 0, index)) for index in range(400)]
    pairs = zip(samples[::2], samples[1::2], strict=True)
    changes = torch.stack([(a != b).float().mean() for a, b in pairs])
    error = float(changes.std() / len(changes) ** 0.5)
    assert abs(found["sample_change"] - float(changes.mean())) < 4 * error
    many = strategy.make_masker("layer", (6, 16), NMPattern(8, 16))
    assert set(many.metrics()) == {"margin"}, "too many masks to go through"


def test_a_scaled_loss_leaves_the_control_variate_right() -> None:
    # As in the last step of an epoch, when fewer micro-batches are left than are accumulated.
    found = []
    for divisor in (1, 4):
        toy = Toy(estimator="control_variate")
        forget(toy)
        toy.step(toy.run(3), divisor=divisor)
        found.append(toy.masker.logits_OI.grad)
    torch.testing.assert_close(found[0] / 4, found[1], rtol=1e-4, atol=1e-6)


def test_the_mean_gradient_alone_is_the_slope_at_the_mean() -> None:
    for pattern in (TWO_FOUR, NMPattern(3, 8)):
        toy = Toy(pattern, estimator="mean_gradient")
        expected = linearised(toy.run(0), toy, toy.masker.hard_mask(toy.layer.weight_OI))[1]
        torch.testing.assert_close(toy.estimate(0).double(), expected, rtol=2e-4, atol=1e-6)


def test_graded_logits_start_at_the_prior_and_follow_magnitudes_within_it() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    weight[0, :4] = torch.tensor([4.0, 2.0, -1.0, 0.0])
    weight[1, :4] = torch.tensor([4.0, 2.0, -1.0, 0.5])
    weight[2, :4] = 0
    prior = TWO_FOUR.top(weight.abs())
    prior[1, :4] = torch.tensor([True, False, True, False])
    strategy = MaskPro("magnitude", strength=0.5, grading=3.0)
    masker = strategy.make_masker("layer", (6, 16), TWO_FOUR)
    strategy.init_masker(masker, weight, LayerResult(prior))
    found = masker.logits_OI.detach()
    assert torch.equal(masker.hard_mask(weight), prior)
    assert bool(found.isfinite().all())
    expected = torch.tensor([0.5, 0.5 - 3 * math.log(2), -3 * math.log(4), 3 * math.log(1e-3)])
    torch.testing.assert_close(found[0, :4], expected)
    # The prior keeps 1 and drops 2, which counts as just below 1.
    low = -3 * math.log(4)
    expected = torch.tensor([0.5, low, 0.5 + low, -3 * math.log(8)])
    torch.testing.assert_close(found[1, :4], expected)
    weak = MaskPro("magnitude", strength=1e-3, grading=3.0)
    weak.init_masker(masker, weight, LayerResult(prior))
    assert torch.equal(masker.hard_mask(weight), prior)


@pytest.mark.parametrize("strength", [1.0, 3.0, 5.0])
def test_the_strength_sets_how_many_groups_a_draw_changes(strength: float) -> None:
    # 0.58, 0.13 and 0.02 of the groups, from the probability of the start's own mask
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    strategy = MaskPro("magnitude", strength=strength)
    masker = strategy.make_masker("layer", (64, 512), TWO_FOUR)
    strategy.init_masker(masker, weight, LayerResult(TWO_FOUR.top(weight.abs())))
    drawn = masker.sampled_mask(Draw(0, 0, 0))
    changed = (drawn != masker.hard_mask(weight)).unflatten(1, (-1, 4)).any(-1).double().mean()
    p = math.exp(strength) / (2 * math.exp(strength) + 2)
    expected = 1 - 2 * p * p / (1 - p)
    spread = math.sqrt(expected * (1 - expected) / 8192)
    assert float(changed) == pytest.approx(expected, abs=4 * spread)


def test_chunks_and_shards_make_the_same_masks_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, start = (
        torch.randn(10, 16, generator=generator),
        torch.randn(10, 16, generator=generator),
    )

    def made(rows: slice = slice(0, 10)) -> LogitMasker:
        masker = LogitMasker("layer", (rows.stop - rows.start, 16), TWO_FOUR)
        masker.logits_OI.data.copy_(start[rows])
        return masker

    draw, terms = (
        Draw(0, 2, 5),
        [(Draw(0, 2, 5), torch.tensor(0.3)), (Draw(0, 2, 6), torch.tensor(-2.0))],
    )
    whole = made()
    mask, _ = whole.sample(weight, draw)
    total = torch.cat([part for _, part in whole.scores(terms)])
    monkeypatch.setattr(logit_masker, "AT_ONCE", 48)
    chunked, part = made(), made(slice(3, 8))
    assert torch.equal(chunked.sample(weight, draw)[0], mask)
    assert torch.equal(part.sample(weight[3:8], draw, row0=3)[0], mask[3:8])
    pieces = list(chunked.scores(terms))
    assert [piece.shape[0] for _, piece in pieces] == [3, 3, 3, 1]
    assert torch.equal(torch.cat([piece for _, piece in pieces]), total)
    assert torch.equal(torch.cat([p for _, p in part.scores(terms, row0=3)]), total[3:8])


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """Yields a list that takes the most bytes that were allocated at once, beyond those before."""
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    found.append(max(itertools.accumulate(event.nbytes() for event in events)))


@pytest.mark.parametrize("estimator", ["residual", "leave_one_out"])
def test_a_step_allocates_less_than_a_byte_a_weight(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As small beside this model as it is beside a real one.
    monkeypatch.setattr(logit_masker, "AT_ONCE", 1 << 13)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # with others a good first draw is drawn again, and so is worth 0
        model = LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).eval().requires_grad_(False)
    strategy = MaskPro("magnitude", estimator=estimator, strength=2.0)  # type: ignore[arg-type]
    masked = masked_model(model, strategy)
    masks = masked.layers
    masked.calibrate(
        (name, LayerResult(TWO_FOUR.top(layer.weight_OI.abs()))) for name, layer in masks.items()
    )
    weights = sum(layer.weight_OI.numel() for layer in masks.values())
    beside = sum(
        p.nbytes
        for layer in masks.values()
        for n, p in layer.masker.named_parameters()
        if n != "logits_OI"
    )
    tokens = torch.randint(0, 64, (1, 16), generator=torch.Generator().manual_seed(0))
    optimizer = strategy.optimizer([], masked.maskers, None)  # type: ignore[arg-type]

    def step(number: int) -> None:
        run = BatchRun(masked, tokens, Draw(0, number, 0))
        optimizer.step(lambda: strategy.loss(run).item())

    step(0)
    before = [layer.masker.logits_OI.detach().clone() for layer in masks.values()]
    with peak_bytes() as peak:
        step(1)
    moved = [
        not torch.equal(layer.masker.logits_OI, value)
        for layer, value in zip(masks.values(), before, strict=True)
    ]
    assert all(moved)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (peak[0] + beside) / weights < 1.0
    with peak_bytes() as peak:  # the measurement sees a tensor of four bytes a weight
        kept = [torch.zeros_like(layer.masker.logits_OI) for layer in masks.values()]
    assert peak[0] / weights == pytest.approx(4.0, rel=0.01)
    del kept


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SparsifyError, match="draws=1, memory=0.99; .* at least 2"):
        MaskPro("magnitude", draws=1)
    with pytest.raises(SparsifyError, match="strength=2.0, grading=-1.0"):
        MaskPro("magnitude", strength=2.0, grading=-1.0)
    with pytest.raises(SparsifyError, match="memory=1"):
        MaskPro("magnitude", memory=1.0)
    strategy = MaskPro("magnitude", estimator="control_variate")
    with pytest.raises(SparsifyError, match="8:16"):
        strategy.make_masker("layer", (4, 32), NMPattern(8, 16))
