"""A checkpoint's place in the data, on another number of ranks."""

from typing import Any

import pytest

from sparsify import SparsifyError
from sparsify.data.blend import BatchesOfRank, BlendSampler
from sparsify.training.checkpoints.resume import continue_on

KEYS = ("ready", "started", "processed", "completed")


def at(done: int, ranks: int, accumulated: int, last: bool = False, running: int = 1) -> Any:
    """As Lightning saves it at the end of a rank's micro-batch number ``done``."""
    counts = dict.fromkeys(KEYS, done) | {"completed": done - running}
    progress = {"current": counts, "total": dict(counts), "is_last_batch": last}
    return {
        "step_shape": {"ranks": ranks, "accumulated": accumulated},
        "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}},
    }


def moved(checkpoint: Any, ranks: int, accumulated: int, epoch: int) -> tuple[dict[str, int], bool]:
    continue_on(checkpoint, {"ranks": ranks, "accumulated": accumulated}, epoch)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"] == progress["total"]
    return progress["current"], progress["is_last_batch"]


def counts(done: int, running: int = 1) -> dict[str, int]:
    return dict.fromkeys(KEYS, done) | {"completed": done - running}


def test_half_the_ranks_have_counted_twice_as_many() -> None:
    assert moved(at(4, 1, 2), 2, 1, epoch=5) == (counts(2), False)
    assert moved(at(3, 4, 1), 2, 2, epoch=9) == (counts(6), False)
    assert moved(at(4, 1, 2, running=0), 2, 1, epoch=5) == (counts(2, running=0), False)


def test_the_end_of_an_epoch_of_eleven_batches() -> None:
    # Two ranks leave the last batch out; one process has it still to see, in a step of its own.
    assert moved(at(5, 2, 1, last=True), 1, 2, epoch=11) == (counts(10), False)
    assert moved(at(10, 1, 2), 2, 1, epoch=5) == (counts(5), True)
    assert moved(at(11, 1, 2, last=True), 2, 1, epoch=5) == (counts(6), True)
    # Once validation has begun, the epoch is over.
    ended = at(5, 2, 1, last=True, running=0)
    assert moved(ended, 1, 2, epoch=11) == (counts(10, running=0), True)


def test_steps_of_another_size_are_refused() -> None:
    with pytest.raises(SparsifyError, match="2 in all: give --trainer.accumulate_grad_batches 1"):
        moved(at(4, 1, 2), 2, 2, epoch=5)
    with pytest.raises(SparsifyError, match="take a number of ranks that divides 2"):
        moved(at(4, 2, 1), 3, 1, epoch=5)


def test_the_middle_of_a_step_is_refused() -> None:
    with pytest.raises(
        SparsifyError, match="after 3 micro-batches of an epoch, within a step of 2"
    ):
        moved(at(3, 1, 2), 2, 1, epoch=5)


def test_the_data_goes_on_where_other_ranks_stopped() -> None:
    def batches(rank: int, ranks: int) -> BatchesOfRank:
        return BatchesOfRank(BlendSampler([44], None, seed=1), 4, rank, ranks)

    order = list(iter(batches(0, 1)))
    two = [iter(batches(rank, 2)) for rank in (0, 1)]
    assert [next(two[0]), next(two[1]), next(two[0])] == order[:3]
    one = iter(batches(0, 1))
    one.load_state_dict(two[0].state_dict())  # two rounds of two
    assert list(one) == order[4:]
    one = iter(batches(0, 1))
    for _ in range(6):
        next(one)
    two[1].load_state_dict(one.state_dict())
    assert next(two[1]) == order[7]
    one.load_state_dict({"epoch": 0, "batch": 11})
    two[0].load_state_dict(one.state_dict())
    assert list(two[0]) == []
