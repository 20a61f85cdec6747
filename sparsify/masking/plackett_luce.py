"""Masks drawn from the Plackett-Luce distribution: N of every M positions, one after another
without replacement, with probabilities proportional to exp(logit) among those that are left.

There is one logit a weight. A draw's *keys* are ``logits_OI + gumbel_OI`` with standard Gumbel
noise, and its mask is ``pattern.top(keys_OI)``: the descending order of the keys is the order in
which the positions are drawn (Kool, van Hoof and Welling, ICML 2019, arXiv 1903.06059).

Only positive terms are summed: a difference such as 1 - p would lose its digits where one position
has nearly all of the probability. Logits must be finite. A logit that is more than 80 below its
group's largest counts as 80 below it, because exp(-80) and its inverse are normal numbers in fp32.
Half-precision inputs are computed, and their results returned, in fp32.

Shapes: O out, I in, G groups = I / M, M group size.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import reduce

import torch
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.masking.by_shape import by_shape
from sparsify.masking.pattern import NMPattern

MAX_SETS = 128
_RANGE = 80.0
# A CPU works on this many weights at once: temporaries then stay in its cache, twice as fast.
_IN_CACHE = 1 << 17
_UNORDERED = 4  # largest N whose 2**N subsets are summed over


def score(logits_OI: Tensor, keys_OI: Tensor, pattern: NMPattern) -> Tensor:
    """The gradient of log P(mask) with respect to the logits, for the mask ``pattern.top(keys)``.

    For N <= 4 it is exact. For N >= 5 it is the gradient of the log-probability of the order in
    which the mask was drawn. Its mean over the orders of one mask is the gradient of log P(mask):
    no bias, but a little more variance. In either case it sums to 0 in every group, its expectation
    is 0, and no element is above 1 or below -N. Logits raised to the range of 80 count as raised.

    Args:
        logits_OI: ``[O, I]``.
        keys_OI: logits plus Gumbel noise, ``[O, I]``.
        pattern: the N:M pattern.

    Returns:
        ``[O, I]``, without a graph.
    """
    logits_OI, keys_OI = logits_OI.detach(), keys_OI.detach()
    rows, columns = logits_OI.shape
    if logits_OI.device.type != "cpu" or torch.compiler.is_compiling():
        return _score(logits_OI, keys_OI, pattern)
    at_once = max(1, _IN_CACHE // columns)
    blocks = zip(logits_OI.split(at_once), keys_OI.split(at_once), strict=True)
    out = torch.empty(rows, columns, dtype=_dtype(logits_OI))
    for start, (logits, keys) in zip(range(0, rows, at_once), blocks, strict=True):
        out[start : start + at_once] = _score(logits, keys, pattern)
    return out


def mean_mask(logits_OI: Tensor, pattern: NMPattern) -> Tensor:
    """The probability of every position to be kept, exact and differentiable in the logits.

    It goes through all sets that the first k < N draws can form: ``sum(C(M, k) for k < N)`` sets.

    Args:
        logits_OI: ``[O, I]``.
        pattern: the N:M pattern.

    Returns:
        ``[O, I]``; every group sums to N.

    Raises:
        SparsifyError: there are more than ``MAX_SETS`` sets.
    """
    mean: dict[int, Tensor] = {}
    for _, i, term in _draws(_weights(logits_OI, pattern), pattern):
        mean[i] = mean[i] + term if i in mean else term
    return torch.stack([mean[i] for i in range(pattern.m)], -1).flatten(-2)


def mask_probabilities(logits_OI: Tensor, pattern: NMPattern) -> Tensor:
    """The probability of every candidate mask, exact.

    Args:
        logits_OI: ``[O, I]``.
        pattern: the N:M pattern.

    Returns:
        ``[O, K, G]`` for the K candidates in the pattern's order; sums to 1 over K.

    Raises:
        SparsifyError: the draws go through more than ``MAX_SETS`` sets.
    """
    found: dict[frozenset[int], Tensor] = {}
    for drawn, _, term in _draws(_weights(logits_OI.detach(), pattern), pattern):
        if len(drawn) == pattern.n:
            found[drawn] = found[drawn] + term if drawn in found else term
    candidates = itertools.combinations(range(pattern.m), pattern.n)
    return torch.stack([found[frozenset(candidate)] for candidate in candidates], 1)


def sets_of(pattern: NMPattern) -> int:
    """How many sets of positions the draws of one group can pass through."""
    return sum(math.comb(pattern.m, k) for k in range(pattern.n))


def _draws(
    weights: list[Tensor], pattern: NMPattern
) -> Iterator[tuple[frozenset[int], int, Tensor]]:
    """Yield every way to draw one more position: (the set including the position, the position,
    the probability ``[O, G]`` to draw this set with this position last).
    """
    if (sets := sets_of(pattern)) > MAX_SETS:
        raise SparsifyError(
            f"pattern {pattern}: the mean of its Plackett-Luce masks goes through {sets:,} sets of "
            f"positions a group, and at most {MAX_SETS} are allowed; take a smaller N or M, for "
            "instance '4:8'"
        )
    level = {frozenset[int](): torch.ones_like(weights[0])}  # P(the first k draws are this set)
    for _ in range(pattern.n):
        next_level: dict[frozenset[int], Tensor] = {}
        for drawn, probability in level.items():
            left = [i for i in range(pattern.m) if i not in drawn]
            total = _sum(weights[i] for i in left)
            for i in left:
                # Not (probability / total) * weight: its gradient holds 1 / total**2, an overflow.
                term = probability * (weights[i] / total)
                grown = drawn | {i}
                next_level[grown] = next_level[grown] + term if grown in next_level else term
                yield grown, i, term
        level = next_level


@by_shape
def _score(logits_OI: Tensor, keys_OI: Tensor, pattern: NMPattern) -> Tensor:
    weights = _weights(logits_OI, pattern)
    if pattern.n <= 2:
        return _score_of_few(weights, pattern.top(keys_OI), pattern)
    # As in NMPattern.top: NaN counts as the largest, and of equal keys the lower index is kept.
    keys_OI = keys_OI.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order_OGM = torch.sort(pattern.groups(keys_OI), dim=-1, descending=True, stable=True).indices
    some = _score_of_set if pattern.n <= _UNORDERED else _score_of_order
    return some(torch.stack(weights, -1), order_OGM, pattern)


def _dtype(logits_OI: Tensor) -> torch.dtype:
    """The type to compute in."""
    return torch.promote_types(logits_OI.dtype, torch.float32)


def _weights(logits_OI: Tensor, pattern: NMPattern) -> list[Tensor]:
    """``exp(logit - largest)`` of every position of the groups: M tensors ``[O, G]``, contiguous
    because a CPU is many times slower along a last dimension of four.
    """
    logits_OI = logits_OI.to(_dtype(logits_OI))
    columns = [column.contiguous() for column in pattern.groups(logits_OI).unbind(-1)]
    lowest = reduce(torch.maximum, columns).detach()
    largest, lowest = lowest, lowest - _RANGE
    # Raise a low logit by a constant, which keeps its gradient; clamping would make that zero.
    return [
        (column + (lowest - column.detach()).clamp_(min=0)).sub(largest).exp_()
        for column in columns
    ]


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _sums_of_others(columns: list[Tensor]) -> list[Tensor]:
    """For each column the sum of all others, without subtraction."""
    before = list(itertools.accumulate(columns[:-1], torch.add))
    after = list(itertools.accumulate(columns[:0:-1], torch.add))[::-1]
    inner = [left + right for left, right in zip(before, after[1:], strict=False)]
    return [after[0], *inner, before[-1]]


def _score_of_few(weights: list[Tensor], mask_OI: Tensor, pattern: NMPattern) -> Tensor:
    """The score for N <= 2. Position i was drawn first with probability q_i; the second draw was
    then normalised by 1 / others_i.
    """
    kept = [column.to(weights[0].dtype) for column in pattern.groups(mask_OI).unbind(-1)]
    others = _sums_of_others(weights)
    per_weight = [(weights[0] + others[0]).reciprocal_()] * pattern.m
    if pattern.n == 2:
        inverse = [column.reciprocal_() for column in others]
        first = [k * inv for k, inv in zip(kept, inverse, strict=True)]  # not yet normalised
        total = _sum(first)
        second = _sums_of_others(
            [q.div_(total).mul_(inv) for q, inv in zip(first, inverse, strict=True)]
        )
        per_weight = [column.add_(per_weight[0]) for column in second]
    for k, weight, factor in zip(kept, weights, per_weight, strict=True):
        k.addcmul_(weight, factor, value=-1)
    return torch.stack(kept, -1).flatten(-2)


def _score_of_set(weight_OGM: Tensor, order_OGM: Tensor, pattern: NMPattern) -> Tensor:
    """The score as a sum over the subsets T of the kept set S. The first draws took T with
    probability post(T); the next draw then takes i with probability w_i / R(T), where R(T) is the
    total weight outside T.

    Among subsets of one size post(T) is proportional to F(T) B(T). F(T) sums the products of the
    1 / R on the way over all orders of T; B(T) does so over all orders of the rest of S. (The
    products of the w_i are equal for all T of a size.) So F and B may be scaled freely at each
    size: with a largest value of 1 they cannot overflow, and underflow does no harm, because the
    set of the largest weights has the largest F, B and 1 / R of its size.
    """
    n = pattern.n
    sorted_OGM = weight_OGM.gather(-1, order_OGM)
    kept = [column.contiguous() for column in sorted_OGM[..., :n].unbind(-1)]
    dropped = _sum(sorted_OGM[..., n:].unbind(-1))
    sizes = [[frozenset(c) for c in itertools.combinations(range(n), k)] for k in range(n)]
    inverse = {
        drawn: _sum([dropped, *(kept[i] for i in range(n) if i not in drawn)]).reciprocal_()
        for size in sizes
        for drawn in size
    }
    forward = {drawn: torch.ones_like(dropped) for drawn in sizes[0]}
    for size in sizes[1:]:
        sums = {t: _sum(forward[t - {i}] * inverse[t - {i}] for i in t) for t in size}
        forward |= _scaled(sums)
    backward = _scaled({t: inverse[t] for t in sizes[-1]})
    for size in sizes[-2::-1]:
        left = {t: [i for i in range(n) if i not in t] for t in size}
        sums = {t: inverse[t] * _sum(backward[t | {i}] for i in left[t]) for t in size}
        backward |= _scaled(sums)
    rates: dict[frozenset[int], Tensor] = {}  # post(T) / R(T)
    for size in sizes:
        joint = {t: forward[t] * backward[t] for t in size}
        total = _sum(joint.values())
        rates |= {t: joint[t] / total * inverse[t] for t in size}
    of_kept = [_sum(rate for t, rate in rates.items() if i not in t) for i in range(n)]
    of_dropped = [_sum(rates.values())] * (pattern.m - n)
    rate_OGM = torch.stack(of_kept + of_dropped, -1)
    return _scatter(sorted_OGM, rate_OGM, order_OGM, pattern)


def _scaled(level: dict[frozenset[int], Tensor]) -> dict[frozenset[int], Tensor]:
    largest = reduce(torch.maximum, level.values())
    return {drawn: value / largest for drawn, value in level.items()}


def _score_of_order(weight_OGM: Tensor, order_OGM: Tensor, pattern: NMPattern) -> Tensor:
    """Sums over the draws: one-hot of the drawn position - probabilities of those still left."""
    sorted_OGM = weight_OGM.gather(-1, order_OGM)
    left_OGM = sorted_OGM.flip(-1).cumsum(-1).flip(-1)[..., : pattern.n]
    # A kept position takes part in all draws up to its own, a dropped one in all N.
    rate_OGM = left_OGM.reciprocal().cumsum(-1)
    last = rate_OGM[..., -1:].expand(*rate_OGM.shape[:-1], pattern.m - pattern.n)
    return _scatter(sorted_OGM, torch.cat([rate_OGM, last], -1), order_OGM, pattern)


def _scatter(sorted_OGM: Tensor, rate_OGM: Tensor, order_OGM: Tensor, pattern: NMPattern) -> Tensor:
    """The score, (1 if kept) - weight x rate, of positions in the order of their keys; returned in
    the order of the weights, ``[O, I]``.
    """
    score_OGM = sorted_OGM.mul(rate_OGM).neg_()
    score_OGM[..., : pattern.n] += 1
    return torch.empty_like(score_OGM).scatter_(-1, order_OGM, score_OGM).flatten(-2)
