import re
from collections import Counter

import numpy as np
import pytest

from sparsify.common.errors import SparsifyError
from sparsify.data.blend import BatchesOfRank, BlendSampler, apportion, check_weights


def epoch(sampler: BlendSampler, number: int) -> list[int]:
    sampler.set_epoch(number)
    return list(sampler)


@pytest.mark.parametrize(
    ("total", "weights", "quotas"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [0.5, 0.25, 0.25], [5, 3, 2]),
        (7, [3, 2, 1], [4, 2, 1]),  # 3.5, 2.33, 1.17
        (100, [1e-9, 1], [0, 100]),
        (5, [5], [5]),
    ],
)
def test_apportion(total: int, weights: list[float], quotas: list[int]) -> None:
    assert apportion(total, weights) == quotas


def test_apportion_is_within_one_of_exact() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.random(int(rng.integers(1, 9))) + 1e-3
        total = int(rng.integers(0, 999))
        quotas = apportion(total, weights.tolist())
        assert sum(quotas) == total
        assert np.all(np.abs(quotas - total * weights / weights.sum()) < 1)


def test_without_weights_every_block_once_an_epoch() -> None:
    sampler = BlendSampler([5, 30, 2], None, seed=3)
    orders = [epoch(sampler, e) for e in range(4)]
    assert all(sorted(order) == list(range(37)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert len(sampler) == 37


def test_order_is_a_function_of_seed_and_epoch() -> None:
    for weights in (None, [1.0, 2.0]):
        sampler = BlendSampler([20, 30], weights, seed=3)
        later, earlier = epoch(sampler, 5), epoch(sampler, 2)
        again = BlendSampler([20, 30], weights, seed=3)
        assert epoch(again, 2) == earlier
        assert epoch(again, 5) == later
        assert epoch(BlendSampler([20, 30], weights, seed=4), 5) != later


def test_weights_give_quotas_and_even_repeats() -> None:
    sizes, weights = [4, 40, 16], [2.0, 1.0, 1.0]
    sampler = BlendSampler(sizes, weights, seed=0)
    assert sampler.quotas == [30, 15, 15]
    total: Counter[int] = Counter()
    for e in range(8):
        order = epoch(sampler, e)
        assert len(order) == len(sampler) == 60
        by_source = Counter(0 if i < 4 else 1 if i < 44 else 2 for i in order)
        assert by_source == {0: 30, 1: 15, 2: 15}
        counts = Counter(order)
        assert {counts[i] for i in range(4)} <= {7, 8, 9}
        assert max(counts[i] for i in range(4, 44)) <= 2
        total += counts
        # No block of a source is ever more than one repeat ahead of another.
        for blocks in (range(4), range(4, 44), range(44, 60)):
            seen = [total[i] for i in blocks]
            assert max(seen) - min(seen) <= 1
    assert {total[i] for i in range(4)} == {60}  # 8 epochs of 30, over 4 blocks
    assert {total[i] for i in range(4, 44)} == {3}  # 8 epochs of 15, over 40 blocks


def test_shuffle_differs_from_permutations() -> None:
    # Epoch 1's shuffle and a source's permutation would be equal were they drawn from one stream.
    sampler = BlendSampler([64], [1.0], seed=0)
    orders = [tuple(epoch(sampler, e)) for e in range(6)]
    drawn = []
    for e in range(6):
        sampler.set_epoch(e)
        drawn.append(tuple(sampler._drawn(0).tolist()))
    assert len(set(orders + drawn)) == 12


def test_weight_errors() -> None:
    assert check_weights(["a", "b"], [None, None]) is None
    assert check_weights(["a", "b"], [1, 0.5]) == [1, 0.5]
    with pytest.raises(SparsifyError, match="train sources b, c have no weight .* add or remove"):
        check_weights(["a", "b", "c"], [1.0, None, None])
    for weight in (0.0, -1.0, float("nan"), float("inf"), 1e308, 10**400):
        with pytest.raises(SparsifyError, match=rf"weight {re.escape(str(weight))}; .* positive"):
            check_weights(["a", "b"], [1.0, weight])
    for weight in (5e-324, 1e-17):
        with pytest.raises(SparsifyError, match=f"source b has weight {weight} of 1.0 in all"):
            check_weights(["a", "b"], [1.0, weight])
    largest = check_weights(["a", "b"], [1e100, 1e100])
    assert largest is not None
    assert apportion(2**40, largest) == [2**39, 2**39]
    with pytest.raises(SparsifyError, match="give 0 of 20 blocks an epoch to source number 2;"):
        BlendSampler([10, 10], [1.0, 1e-6], seed=0)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("blocks", [24, 29, 47])
def test_ranks_interleave_to_one_process(world: int, blocks: int) -> None:
    def batches(rank: int, world: int) -> BatchesOfRank:
        return BatchesOfRank(BlendSampler([10, blocks - 10], None, seed=1), 4, rank, world)

    one = list(batches(0, 1))
    order = epoch(BlendSampler([10, blocks - 10], None, seed=1), 0)
    assert one == [order[i : i + 4] for i in range(0, blocks - blocks % 4, 4)]
    ranks = [list(batches(rank, world)) for rank in range(world)]
    assert {len(r) for r in ranks} == {len(batches(0, world))} == {len(one) // world}
    interleaved = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert interleaved == one[: len(interleaved)]


def test_epoch_is_read_at_the_first_batch() -> None:
    batches = BatchesOfRank(BlendSampler([20], None, seed=1), 4, 0, 1)
    iterator = iter(batches)
    batches.sampler.set_epoch(3)
    other = BatchesOfRank(BlendSampler([20], None, seed=1), 4, 0, 1)
    other.sampler.set_epoch(3)
    assert list(iterator) == list(other)


def test_position_of_an_iterator_that_has_not_begun() -> None:
    batches = BatchesOfRank(BlendSampler([20], None, seed=1), 4, 0, 1)
    iterator = iter(batches)
    batches.sampler.set_epoch(2)
    assert iterator.state_dict() == {"epoch": 2, "batch": 0}
    iterator.load_state_dict({"epoch": 1, "batch": 5})
    assert iterator.state_dict() == {"epoch": 1, "batch": 5}
    assert list(iterator) == []
    iterator.load_state_dict({"epoch": 1, "batch": 5})
    batches.sampler.set_epoch(2)
    assert iterator.state_dict() == {"epoch": 2, "batch": 0}
    assert len(list(iterator)) == 5
