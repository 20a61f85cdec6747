"""Logits that are sharded by rows. What one process does with them is in ``test_maskpro.py``."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparsify import Draw, NMPattern
from sparsify.masking.sharded_rows import first_row
from sparsify.strategies.logit_masker import LogitMasker

RANKS = 3
ROWS = [slice(0, 4), slice(4, 8), slice(8, 10)]


@pytest.fixture(params=range(RANKS))
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process among three that hears nothing of the others."""
    dist.init_process_group("fake", rank=request.param, world_size=RANKS, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def test_a_rank_adds_the_scores_of_its_own_rows(rank: int) -> None:
    shape = (10, 16 + 4 * rank)  # torch remembers meshes by shape, and whose they were
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    terms = [(Draw(0, 2, 5), torch.tensor(0.3)), (Draw(0, 2, 6), torch.tensor(-2.0))]
    whole = LogitMasker("layer", shape, NMPattern(2, 4))
    whole.logits_OI.data.copy_(start)
    whole.add_scores(whole.logits_OI, terms, alpha=-0.5)
    assert first_row(whole.logits_OI) == 0

    mesh = init_device_mesh("cpu", (RANKS,))
    rows = ROWS[rank]
    part = DTensor.from_local(
        start[rows].clone(), mesh, [Shard(0)], shape=shape, stride=(shape[1], 1)
    )
    masker = LogitMasker("layer", shape, NMPattern(2, 4))
    masker.logits_OI = nn.Parameter(part)
    assert first_row(masker.logits_OI) == rows.start
    masker.add_scores(masker.logits_OI, terms, alpha=-0.5)
    assert torch.equal(masker.logits_OI.to_local(), whole.logits_OI[rows])
    assert not torch.equal(masker.logits_OI.to_local(), start[rows])
