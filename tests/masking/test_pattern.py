"""Patterns: their candidates, numbers and the choice of the largest scores."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify import NMPattern, SparsifyError
from sparsify.masking import pattern

PATTERNS = ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "8:16"]


def slow_top(scores: list[list[int]], n: int, m: int) -> list[list[bool]]:
    """Keep n of m by repeated search for the largest, the first one where several are."""
    result = []
    for row in scores:
        kept = [False] * len(row)
        for start in range(0, len(row), m):
            for _ in range(n):
                best = -1
                for i in range(start, start + m):
                    if not kept[i] and (best < 0 or row[i] > row[best]):
                        best = i
                kept[best] = True
        result.append(kept)
    return result


def random_mask(n: int, m: int, rows: int, groups: int, rng: random.Random) -> Tensor:
    """Exactly n kept of every m, bool [rows, groups * m]."""
    mask = torch.zeros(rows, groups, m, dtype=torch.bool)
    for row, group in itertools.product(range(rows), range(groups)):
        mask[row, group, rng.sample(range(m), n)] = True
    return mask.flatten(-2)


@pytest.mark.parametrize(("text", "n", "m"), [("2:4", 2, 4), (" 1 : 4 ", 1, 4), ("8:16", 8, 16)])
def test_a_pattern_is_read_and_written(text: str, n: int, m: int) -> None:
    pattern = NMPattern.parse(text)
    assert (pattern.n, pattern.m) == (n, m)
    assert str(pattern) == f"{n}:{m}"
    assert NMPattern.parse(pattern) is pattern
    assert NMPattern.parse(str(pattern)) == pattern
    assert pattern.density == n / m


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "2:17", "0:0"])
def test_numbers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(SparsifyError, match=f"'{text}'.*1 <= N < M <= 16.*'2:4'"):
        NMPattern.parse(text)


@pytest.mark.parametrize("text", ["2:4:8", "x", "", "2", "2/4", "-2:4", "2.0:4"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(SparsifyError, match="two integers as 'N:M'.*for instance '2:4'"):
        NMPattern.parse(text)


@pytest.mark.parametrize("text", PATTERNS)
def test_candidates_are_in_the_order_of_combinations(text: str) -> None:
    pattern = NMPattern.parse(text)
    sets = list(itertools.combinations(range(pattern.m), pattern.n))
    assert pattern.candidates == len(sets) == math.comb(pattern.m, pattern.n)
    table = pattern.table()
    assert table.dtype == torch.bool
    assert table.shape == (len(sets), pattern.m)
    kept = table.nonzero()[:, 1].view(-1, pattern.n)  # row by row, positions ascending
    assert kept.tolist() == [list(positions) for positions in sets]


def test_the_candidates_of_2_4_by_eye() -> None:
    rows = ["".join(str(int(bit)) for bit in row) for row in NMPattern(2, 4).table()]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]


@pytest.mark.parametrize("text", PATTERNS)
def test_rank_and_unrank_are_inverse_on_all_candidates(text: str) -> None:
    pattern = NMPattern.parse(text)
    masks = pattern.table().view(2, -1) if pattern.candidates % 2 == 0 else pattern.table()
    ranks = pattern.rank(masks)
    assert ranks.dtype == (torch.uint8 if pattern.candidates <= 256 else torch.int16)
    assert ranks.flatten().tolist() == list(range(pattern.candidates))
    assert torch.equal(pattern.unrank(ranks), masks)
    assert torch.equal(pattern.rank(masks, trusted=True), ranks)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rank_and_unrank_are_inverse_on_any_mask(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 16), label="m")
    n = data.draw(st.integers(1, m - 1), label="n")
    rows, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    pattern = NMPattern(n, m)
    mask = random_mask(n, m, rows, groups, random.Random(data.draw(st.integers(0, 2**20))))  # noqa: S311
    ranks = pattern.rank(mask)
    assert ranks.shape == (rows, groups)
    assert torch.equal(pattern.unrank(ranks), mask)
    first = tuple(mask[0, :m].nonzero()[:, 0].tolist())
    assert (
        next(itertools.islice(itertools.combinations(range(m), n), int(ranks[0, 0]), None)) == first
    )


@pytest.mark.parametrize("text", PATTERNS)
def test_top_agrees_with_a_slow_search_with_many_ties(text: str) -> None:
    pattern = NMPattern.parse(text)
    rng = random.Random(1)  # noqa: S311
    for values in (1, 2, 3, 1000):  # 1: all equal
        scores = [
            [rng.randrange(values) - values // 2 for _ in range(4 * pattern.m)] for _ in range(8)
        ]
        expected = slow_top(scores, pattern.n, pattern.m)
        assert pattern.top(torch.tensor(scores)).tolist() == expected
        assert pattern.top(torch.tensor(scores, dtype=torch.float32)).tolist() == expected
        # Rounded to bf16, different scores become ties; the reference sees the same rounded ones.
        halved = torch.tensor(scores, dtype=torch.bfloat16)
        assert pattern.top(halved).tolist() == slow_top(halved.tolist(), pattern.n, pattern.m)


def test_the_largest_weights_by_eye() -> None:
    weights = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]])
    mask = NMPattern(2, 4).top(weights)
    assert weights[mask].tolist() == [3, 4, 7, 8]
    # Wanda's score |w| * norm of the input reverses the choice where the first inputs are large.
    score = weights * torch.tensor([9.0, 9, 1, 1, 1, 1, 1, 1])
    assert weights[NMPattern(2, 4).top(score)].tolist() == [1, 2, 7, 8]


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_a_wrong_mask_has_no_rank(count: int) -> None:
    mask = NMPattern(2, 4).unrank(torch.zeros(3, 2, dtype=torch.uint8))
    mask[1, 4:] = torch.arange(4) < count
    with pytest.raises(
        SparsifyError, match=f"row 1, group 1 keeps {count} weights.*exactly 2 of 4"
    ):
        NMPattern(2, 4).rank(mask)


def test_holds_counts_nonzeros_in_every_group() -> None:
    pattern = NMPattern(2, 4)
    weights = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0], [0, -1, -0.0, 2, 5, 0, 0, 0]])
    assert pattern.holds(weights)
    weights[1, 0] = 1e-30
    assert not pattern.holds(weights)
    assert not pattern.holds(torch.tensor([[0.0, 0, 1, 1, 1, 1, 1, 0]]))


def test_patterns_that_were_first_used_without_values_have_values_later() -> None:
    pattern._table.cache_clear()
    pattern._rank_of_bits.cache_clear()
    with FakeTensorMode():
        ranks = NMPattern(3, 5).rank(torch.ones(1, 5, dtype=torch.bool), trusted=True)
        assert NMPattern(3, 5).unrank(ranks).shape == (1, 5)
    mask = torch.tensor([[True, False, True, True, False]])
    assert torch.equal(NMPattern(3, 5).unrank(NMPattern(3, 5).rank(mask)), mask)
