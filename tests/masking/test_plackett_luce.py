"""Plackett-Luce masks: scores, means and draws against the enumeration of all orderings."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sparsify import NMPattern, SparsifyError
from sparsify.masking import noise
from sparsify.masking import plackett_luce as pl

EXACT = [(1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (3, 8), (4, 8), (1, 16), (2, 16), (3, 16), (4, 16)]


def log_order_probability(logits_BM: Tensor, order_BN: Tensor) -> Tensor:
    """log P(these draws in this order), for every row of B."""
    total = torch.zeros(len(order_BN), dtype=logits_BM.dtype)
    left = torch.ones(logits_BM.expand(len(order_BN), -1).shape, dtype=torch.bool)
    for drawn_B1 in order_BN.split(1, 1):
        rest_BM = torch.where(left, logits_BM, -torch.inf)
        total = total + rest_BM.log_softmax(-1).gather(1, drawn_B1)[:, 0]
        left = left.scatter(1, drawn_B1, False)
    return total


def log_probability(logits_BM: Tensor, mask_BM: Tensor) -> Tensor:
    """log P(mask) of every row by all orderings of its kept positions."""
    rows, m = mask_BM.shape
    kept_BN = mask_BM.nonzero()[:, 1].view(rows, -1)
    orders_QN = torch.tensor(list(itertools.permutations(range(kept_BN.shape[1]))))
    ordered = kept_BN[:, orders_QN].flatten(0, 1)
    repeated = logits_BM.expand(rows, m).repeat_interleave(len(orders_QN), 0)
    return log_order_probability(repeated, ordered).view(rows, -1).logsumexp(1)


def reference_score(logits_BM: Tensor, mask_BM: Tensor) -> Tensor:
    logits_BM = logits_BM.expand(mask_BM.shape).clone().requires_grad_()
    return torch.autograd.grad(log_probability(logits_BM, mask_BM).sum(), logits_BM)[0]


def score_of_sets(logits_BM: Tensor, mask_BM: Tensor, pattern: NMPattern) -> Tensor:
    """The module's score of given masks: keys that are 1 where kept lead to them."""
    return pl.score(logits_BM.expand(mask_BM.shape), mask_BM.to(logits_BM.dtype), pattern)


def published_score(logits_M: Tensor, mask_M: Tensor) -> Tensor:
    """The score as MaskPro's released code computes it (Sun et al., arXiv 2506.12876)."""
    m, p = mask_M.to(logits_M.dtype), logits_M.softmax(-1).clamp(1e-8, 1)
    r = 1 / (m / (1 - p + 1e-8)).sum()
    u = m / p + r * m / ((1 - p) ** 2 + 1e-8)
    return p * (u - (u * p).sum())


def random_logits(*shape: int, std: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * std


@pytest.mark.parametrize("std", [1.0, 3.0])
@pytest.mark.parametrize(("n", "m"), EXACT)
def test_score_is_the_gradient_of_the_log_probability(n: int, m: int, std: float) -> None:
    pattern = NMPattern(n, m)
    table = pattern.table()
    mask = table[:: math.ceil(len(table) / 60)]
    logits = random_logits(*mask.shape, std=std)
    score = score_of_sets(logits, mask, pattern)
    assert score.dtype == torch.float64
    torch.testing.assert_close(score, reference_score(logits, mask), rtol=0, atol=1e-9)
    assert score.sum(-1).abs().max() < 1e-12
    for i in range(m):
        step = torch.zeros(m, dtype=torch.float64)
        step[i] = 1e-5
        up, down = (log_probability(logits + sign * step, mask) for sign in (1, -1))
        torch.testing.assert_close(score[:, i], (up - down) / 2e-5, rtol=0, atol=1e-6)


def test_score_of_a_layer_goes_group_by_group_and_block_by_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for n, m in [(1, 2), (2, 4), (3, 8), (8, 16)]:
        pattern = NMPattern(n, m)
        logits = random_logits(7, 3 * m).float()
        keys = logits + noise.gumbel(noise.fold("block"), 7, 3 * m)
        whole = pl.score(logits, keys, pattern)
        single = pl.score(logits.view(-1, m), keys.view(-1, m), pattern).view(7, -1)
        torch.testing.assert_close(whole, single, rtol=0, atol=1e-6)
        assert not (whole > 0)[~pattern.top(keys)].any()
        monkeypatch.setattr(pl, "_IN_CACHE", 2 * 3 * m)
        assert torch.equal(pl.score(logits, keys, pattern), whole)
        monkeypatch.undo()
        learned = torch.nn.Parameter(logits)
        assert not pl.score(learned, learned + keys, pattern).requires_grad
        half = pl.score(logits.bfloat16(), keys, pattern)
        assert half.dtype == torch.float32
        assert torch.equal(half, pl.score(logits.bfloat16().float(), keys, pattern))


EXTREME = [[10.0, 0, 0, 0], [20.0, 0, 0, 0], [60.0, 0, 0, 0], [100.0, 0, 0, 0], [0, 60.0, 60.0, 0]]
EXTREME += [[60.0, 30, 0, 0], [0, 5, 20, 79], [-200, -200, -200, -120.0], [0, 70, 79, 35.0]]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("row", EXTREME)
def test_scores_stay_exact_where_one_position_dominates(n: int, row: list[float]) -> None:
    pattern, logits = NMPattern(n, 4), torch.tensor(row, dtype=torch.float64)
    table = pattern.table()
    probability = log_probability(logits, table).exp()
    expected = reference_score(logits, table)
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        score = score_of_sets(logits.to(dtype), table, pattern)
        torch.testing.assert_close(score.double(), expected, rtol=0, atol=atol)
        assert (probability @ score.double()).abs().max() < atol


@pytest.mark.parametrize(("n", "m"), [(3, 8), (4, 8), (4, 6)])
def test_scores_of_sets_over_the_whole_range_of_fp32(n: int, m: int) -> None:
    pattern = NMPattern(n, m)
    table = pattern.table()
    generator = torch.Generator().manual_seed(1)
    logits = torch.rand(len(table), m, generator=generator, dtype=torch.float64) * 79
    expected = reference_score(logits, table)
    torch.testing.assert_close(score_of_sets(logits, table, pattern), expected, rtol=0, atol=1e-11)
    # The reference sees the logits that fp32 sees: at 79 a rounding is worth 4e-6.
    rounded = logits.float()
    expected = reference_score(rounded.double(), table)
    score = score_of_sets(rounded, table, pattern).double()
    torch.testing.assert_close(score, expected, rtol=0, atol=2e-6 * n)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 8), (3, 8), (4, 8)])
def test_the_expected_score_is_zero(n: int, m: int) -> None:
    pattern = NMPattern(n, m)
    logits = random_logits(m, std=2.0)
    probability = log_probability(logits, pattern.table()).exp()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-12)
    mean = probability @ score_of_sets(logits, pattern.table(), pattern)
    assert mean.abs().max() < 1e-12


def test_the_published_formula_fails_at_a_gap_of_ten() -> None:
    logits, kept = torch.tensor([10.0, 0, 0, 0]), torch.tensor([1.0, 1, 0, 0])
    score = pl.score(logits[None], kept[None], NMPattern(2, 4))[0]
    torch.testing.assert_close(score, torch.tensor([0, 2 / 3, -1 / 3, -1 / 3]), rtol=0, atol=1e-4)
    published = published_score(logits.double(), kept)
    assert float(published[0]) == pytest.approx(-0.35, abs=0.005)
    # At a small gap the two agree.
    logits = logits / 5
    score = pl.score(logits[None], kept[None], NMPattern(2, 4))[0]
    torch.testing.assert_close(
        score.double(), published_score(logits.double(), kept), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8)])
def test_the_largest_keys_are_plackett_luce_draws(n: int, m: int) -> None:
    pattern, draws = NMPattern(n, m), 100_000
    logits = random_logits(m)
    keys = logits.float() + noise.gumbel(noise.fold("draws", n, m), draws, m)
    counts = pattern.rank(pattern.top(keys))[:, 0].long().bincount(minlength=pattern.candidates)
    expected = log_probability(logits, pattern.table()).exp() * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = pattern.candidates - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("n", "m"), [(5, 8), (7, 8), (8, 16), (2, 4), (4, 8)])
def test_the_ordered_score_is_the_gradient_of_the_order(n: int, m: int) -> None:
    pattern, logits = NMPattern(n, m), random_logits(50, m, std=2.0).requires_grad_()
    keys = logits.detach() + noise.gumbel(noise.fold("order"), 50, m)
    order = keys.argsort(-1, descending=True)
    log_p = log_order_probability(logits, order[:, :n]).sum()
    (expected,) = torch.autograd.grad(log_p, logits)
    score = ordered_score(logits.detach(), order, pattern)
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-12)
    if n >= 5:
        assert torch.equal(pl.score(logits, keys, pattern), score)


def ordered_score(logits_BM: Tensor, order_BM: Tensor, pattern: NMPattern) -> Tensor:
    weight_B1M = torch.stack(pl._weights(logits_BM, pattern), -1)
    return pl._score_of_order(weight_B1M, order_BM[:, None], pattern)


def test_the_ordered_score_has_mean_zero() -> None:
    for n, m in ((5, 8), (8, 16)):
        logits, draws = random_logits(2 * m).float().expand(20_000, -1), 20_000
        keys = logits + noise.gumbel(noise.fold("zero", n), draws, 2 * m)
        score = pl.score(logits, keys, NMPattern(n, m)).double()
        z = score.mean(0) / (score.std(0) / math.sqrt(draws))
        assert z.abs().max() < 4
        assert (score.std(0) > 0.1).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (4, 6)])
def test_the_exact_score_is_the_mean_of_ordered_ones(n: int, m: int) -> None:
    pattern, logits = NMPattern(n, m), random_logits(m, std=1.5)
    for mask in pattern.table():
        kept, dropped = mask.nonzero()[:, 0].tolist(), (~mask).nonzero()[:, 0].tolist()
        orders = torch.tensor([[*order, *dropped] for order in itertools.permutations(kept)])
        share = log_order_probability(logits, orders[:, :n]).softmax(0)
        mean = share @ ordered_score(logits.expand(len(orders), -1), orders, pattern)
        exact = score_of_sets(logits, mask[None], pattern)[0]
        torch.testing.assert_close(exact, mean, rtol=0, atol=1e-12)


def test_the_exact_score_varies_less_than_the_ordered_one() -> None:
    pattern, logits = NMPattern(2, 4), torch.zeros(1, 4, dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    ordered = ordered_score(logits.expand(24, -1), orders, pattern).square().sum(-1).mean()
    exact = score_of_sets(logits, pattern.table(), pattern).square().sum(-1).mean()
    assert float(ordered) == pytest.approx(3 / 4 + 2 / 3)  # 1 - 1/4 and 1 - 1/3, a draw each
    assert float(exact) == pytest.approx(4 * (1 - 1 / 4 - 1 / 6) ** 2)


def test_among_equal_keys_the_lower_position_is_drawn_first() -> None:
    for n, m in [(1, 4), (2, 4), (3, 4), (4, 8), (5, 8), (8, 16)]:
        pattern, logits = NMPattern(n, m), random_logits(1, m, std=2.0)
        falling = torch.arange(m, 0, -1, dtype=torch.float64)[None]
        expected = pl.score(logits, falling, pattern)
        assert torch.equal(pattern.top(falling)[0], torch.arange(m) < n)
        for tied in (torch.zeros(1, m), falling.clamp(max=2), torch.full((1, m), torch.nan)):
            assert torch.equal(pl.score(logits, tied, pattern), expected)
    # What is not a number ties with infinity, as in NMPattern.top.
    keys = torch.tensor([[0.0, torch.inf, 1, torch.nan]]).repeat(1, 2)
    keys[0, 4:] = torch.tensor([-torch.inf, 0, -1, torch.nan])
    logits = random_logits(1, 8)
    plain = torch.tensor([[0.0, 9, 1, 8, -9, 0, -1, 7]])
    for n in (2, 3, 5):
        pattern = NMPattern(n, 8)
        assert torch.equal(pl.score(logits, keys, pattern), pl.score(logits, plain, pattern))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (2, 16)])
def test_mean_mask_is_the_mean_of_all_masks(n: int, m: int) -> None:
    pattern, logits = NMPattern(n, m), random_logits(2, 3 * m, std=2.0)
    table = pattern.table()
    mean = pl.mean_mask(logits, pattern)
    assert mean.shape == logits.shape
    for got, row in zip(mean.view(-1, m), logits.view(-1, m), strict=True):
        expected = log_probability(row, table).exp() @ table.double()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(mean.view(-1, m).sum(-1), torch.full((6,), float(n)).double())
    torch.testing.assert_close(pl.mean_mask(logits.float(), pattern), mean.float())
    assert pl.mean_mask(logits.half(), pattern).dtype == torch.float32


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (2, 16)])
def test_the_probability_of_every_mask(n: int, m: int) -> None:
    pattern, logits = NMPattern(n, m), random_logits(2, 3 * m, std=2.0)
    found = pl.mask_probabilities(logits, pattern)
    assert found.shape == (2, pattern.candidates, 3)
    for got, row in zip(found.movedim(1, -1).flatten(0, 1), logits.view(-1, m), strict=True):
        expected = log_probability(row, pattern.table()).exp()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert pl.mask_probabilities(logits.half(), pattern).dtype == torch.float32


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 8)])
def test_mean_mask_is_differentiable(n: int, m: int) -> None:
    pattern, logits = NMPattern(n, m), random_logits(1, 2 * m).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pl.mean_mask(x, pattern), (logits,))


@pytest.mark.parametrize("row", [[0.3, -1, 2, 0.0], *EXTREME])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_gradients_of_mean_and_score_agree(n: int, row: list[float]) -> None:
    """d E[m] / d logits = E[m score], also where logits are treated as 80 below the largest."""
    pattern, table = NMPattern(n, 4), NMPattern(n, 4).table()
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        logits = torch.tensor([row], dtype=dtype)
        slope = torch.autograd.functional.jacobian(lambda x: pl.mean_mask(x, pattern)[0], logits)
        probability = log_probability(logits.double(), table).exp()
        score = score_of_sets(logits[0], table, pattern).double()
        expected = torch.einsum("k,ki,kj->ij", probability, table.double(), score)
        torch.testing.assert_close(slope[:, 0].double(), expected, rtol=0, atol=atol)


def test_too_many_sets_are_refused() -> None:
    even = pl.mean_mask(torch.zeros(1, 8), NMPattern(4, 8))  # 93 sets
    torch.testing.assert_close(even, torch.full((1, 8), 0.5))
    with pytest.raises(SparsifyError, match=r"3:16: .* 137 sets .* at most 128 .*; take a smaller"):
        pl.mean_mask(torch.zeros(1, 16), NMPattern(3, 16))
    with pytest.raises(SparsifyError, match="137 sets"):
        pl.mask_probabilities(torch.zeros(1, 16), NMPattern(3, 16))


def test_estimators_of_a_gradient_rank_as_they_should() -> None:
    """A quadratic loss of 50 groups plus an offset of each minibatch: what may be subtracted."""
    pattern, groups, steps = NMPattern(2, 4), 50, 3000
    size = 4 * groups
    generator = torch.Generator().manual_seed(0)
    best = torch.tensor([1.0, 1, 0, 0]).repeat(groups)
    logits = (2 * best + 0.3 * torch.randn(size, generator=generator))[None]
    features = torch.randn(40, size, generator=generator) * 0.15 / math.sqrt(40)
    target = features @ torch.randn(size, generator=generator) * 0.3
    slope = torch.randn(size, generator=generator) * 0.02
    offset = 3 + 0.3 * torch.randn(steps, generator=generator)

    def loss(mask: Tensor) -> Tensor:
        return offset + 0.1 * (mask @ features.T - target).square().sum(-1) + mask @ slope

    def loss_slope(mask: Tensor) -> Tensor:
        return 0.2 * (mask @ features.T - target) @ features + slope

    losses, scores, masks = [], [], []
    for draw in range(3):
        keys = logits + noise.gumbel(noise.fold("toy", draw), steps, size)
        masks.append(pattern.top(keys).float())
        scores.append(pl.score(logits.expand(steps, -1), keys, pattern))
        losses.append(loss(masks[-1]))
    variable = logits.clone().requires_grad_()
    mean = pl.mean_mask(variable, pattern)

    def linear(anchor: Tensor) -> Tensor:
        """The loss's tangent at the anchor is subtracted, and its exact gradient added."""
        gradient = loss_slope(anchor)
        tangent = loss(anchor) + (masks[0] - anchor) @ gradient
        (exact,) = torch.autograd.grad((mean * gradient).sum(), variable, retain_graph=True)
        return (losses[0] - tangent)[:, None] * scores[0] + exact

    residual = losses[0] - loss(best)
    mean_loss = torch.stack(losses).mean(0)
    others = [(f - mean_loss)[:, None] / 2 * s for f, s in zip(losses, scores, strict=True)]
    estimates = {
        "vanilla": losses[0][:, None] * scores[0],
        "residual": residual[:, None] * scores[0],
        "three draws against each other": torch.stack(others).sum(0),
        "tangent at the start": linear(best),
        "tangent at the mean": linear(mean.detach()[0]),
    }
    variance = {name: float(g.var(0).sum()) for name, g in estimates.items()}
    assert variance["vanilla"] > 50 * variance["residual"]
    order = list(variance.values())
    assert order == sorted(order, reverse=True)
    reference = estimates["tangent at the mean"].mean(0)
    for name, estimate in estimates.items():
        apart = float((estimate.mean(0) - reference).square().sum())
        assert apart < 1.5 * (variance[name] + order[-1]) / steps, name
