"""A checkpoint in shards: any rows can be read, and what is missing or damaged is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sparsify import SparsifyError
from sparsify.training.checkpoints.shards import (
    META,
    ShardedCheckpointIO,
    is_sharded,
    read_shards,
    slots,
    write_shard,
)

ROWS = (3, 0, 2)  # of three ranks


def checkpoint() -> dict[str, Any]:
    return {
        "state_dict": {"a": torch.arange(20.0).view(5, 4), "scalar": torch.tensor(2.0)},
        "optimizer_states": [
            {
                "state": {0: {"m": torch.arange(5) * 7, "step": torch.tensor(3.0)}},
                "param_groups": [],
            }
        ],
        "epoch": 4,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What three ranks write, their rows cut here by hand."""
    whole, start = checkpoint(), 0
    for rank, count in enumerate(ROWS):
        rows = slice(start, start + count)
        moments = whole["optimizer_states"][0]["state"][0]["m"]
        parts = {"state_dict/a": whole["state_dict"]["a"][rows], "optimizer_0/0/m": moments[rows]}
        save_file(parts, tmp_path / f"shard-{rank:05}-of-00003.safetensors")
        start += count
    whole["state_dict"]["a"] = whole["optimizer_states"][0]["state"][0]["m"] = None
    torch.save(whole, tmp_path / META)
    return tmp_path


def flat(content: Any) -> dict[str, Tensor]:
    return {name: owner[key] for name, owner, key in slots(content)}


def test_it_is_read_whole(folder: Path) -> None:
    for read in (read_shards(folder), ShardedCheckpointIO().load_checkpoint(folder)):
        assert read["epoch"] == 4
        found, wanted = flat(read), flat(checkpoint())
        assert (
            list(found)
            == list(wanted)
            == [
                "state_dict/a",
                "state_dict/scalar",
                "optimizer_0/0/m",
                "optimizer_0/0/step",
            ]
        )
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_files_are_lightnings_own(tmp_path: Path) -> None:
    assert not is_sharded(tmp_path)
    io, path = ShardedCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint(checkpoint(), path)
    assert not is_sharded(path)
    assert torch.equal(
        flat(io.load_checkpoint(path))["state_dict/a"], checkpoint()["state_dict"]["a"]
    )


@settings(deadline=None, max_examples=20)
@given(start=st.integers(0, 5), count=st.integers(0, 5))
def test_any_rows_are_read(
    tmp_path_factory: pytest.TempPathFactory, start: int, count: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for rank, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 5))):
        save_file(
            {"state_dict/a": checkpoint()["state_dict"]["a"][rows].clone()},
            folder / f"shard-{rank:05}-of-00003.safetensors",
        )
    torch.save({"state_dict": {"a": None}}, folder / META)
    read = read_shards(folder, lambda stored: stored.read(start, count))
    assert torch.equal(
        read["state_dict"]["a"], checkpoint()["state_dict"]["a"][start : start + count]
    )


def test_one_rank_writes_what_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path, checkpoint(), 0, 1)
    assert flat(read_shards(tmp_path)).keys() == flat(checkpoint()).keys()


def test_a_missing_or_damaged_shard(folder: Path) -> None:
    middle, last = (folder / f"shard-0000{rank}-of-00003.safetensors" for rank in (1, 2))
    kept = last.read_bytes()
    last.write_bytes(kept[:-3])
    with pytest.raises(SparsifyError, match="this sharded checkpoint is damaged"):
        read_shards(folder)
    last.write_bytes(kept)
    middle.unlink()
    with pytest.raises(SparsifyError, match="holds 2 shards of 3, and all are needed"):
        read_shards(folder)
