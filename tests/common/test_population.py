"""What travels between ranks, with the collective replaced."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sparsify.common.ranks import gather, rank_and_size


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Three ranks, this one the second; rank r holds r - 1 more than this one. Yields what left."""
    left: list[Tensor] = []

    def all_gather(of_ranks: list[Tensor], mine: Tensor) -> None:
        left.append(mine)
        for rank, values in enumerate(of_ranks):
            values.copy_(mine + (rank - 1))

    fakes: dict[str, Any] = {
        "is_initialized": lambda: True,
        "get_rank": lambda: 1,
        "get_world_size": lambda: 3,
        "all_gather": all_gather,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(dist, name, fake)
    return left


def test_every_ranks_values_come_in_order_and_exactly(sent: list[Tensor]) -> None:
    assert rank_and_size() == (1, 3)
    values = torch.tensor([[0.1, -2.0], [3.0, 1e-30]])
    found = gather(values)
    assert found.dtype == torch.float32
    assert found.shape == (3, 2, 2)
    assert torch.equal(found[1], values)
    assert torch.equal(found[0], (values.double() - 1).float())
    assert torch.equal(found[2], (values.double() + 1).float())
    (mine,) = sent
    assert mine.dtype == torch.float64
    assert mine.nbytes == 4 * 8


def test_values_that_do_not_lie_side_by_side_are_sent_in_their_order(sent: list[Tensor]) -> None:
    values = torch.arange(6.0).view(2, 3).T
    assert torch.equal(gather(values)[1], values)
    assert sent[0].is_contiguous()


def test_one_process_keeps_its_values_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dist, "all_gather")
    assert rank_and_size() == (0, 1)
    values = torch.tensor([0.1, 0.2])
    assert torch.equal(gather(values), values[None])
