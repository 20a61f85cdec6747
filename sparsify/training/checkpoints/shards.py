"""A checkpoint as a folder: every rank writes the rows that it holds, and nothing is gathered.

``shard-00000-of-00002.safetensors`` and so on hold consecutive rows of each sharded tensor, in the
order of the ranks; ``meta.pt`` holds everything else, with None for each tensor in the shards. Any
number of processes can read it, since rows are looked up by their index. Reading executes nothing
from the folder.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from sparsify.common.errors import SparsifyError
from sparsify.training.checkpoints.files import WholeFileIO, check_whole

META = "meta.pt"
_SHARD = re.compile(r"shard-\d{5}-of-(\d{5})\.safetensors")


class StoredRows:
    """One tensor of a folder, read only on demand.

    Attributes:
        name: its name in :func:`slots`.
        shape: the shape of the whole tensor.
    """

    def __init__(self, name: str, files: list[Any]) -> None:
        self._parts = [file.get_slice(name) for file in files]
        self._counts = [part.get_shape()[0] for part in self._parts]
        self.name = name
        self.shape = (sum(self._counts), *self._parts[0].get_shape()[1:])

    def read(self, start: int, count: int) -> Tensor:
        """Read some of its rows into main memory."""
        found, first = [], 0
        for part, held in zip(self._parts, self._counts, strict=True):
            begin = min(max(start - first, 0), held)
            end = min(max(start + count - first, begin), held)
            found.append(part[begin:end])
            first += held
        return torch.cat(found)


def read_whole(stored: StoredRows) -> Tensor:
    """Read all rows."""
    return stored.read(0, stored.shape[0])


def is_sharded(path: Path) -> bool:
    """Whether the path is a checkpoint folder with shards."""
    return (path / META).is_file()


def slots(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """The places of a Lightning checkpoint's large tensors: (name, dictionary, key)."""
    state = checkpoint["state_dict"]
    yield from ((f"state_dict/{key}", state, key) for key in state)
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", ())):
        for index, values in optimizer["state"].items():
            yield from ((f"optimizer_{number}/{index}/{key}", values, key) for key in values)


def write_shard(folder: Path, checkpoint: Mapping[str, Any], rank: int, ranks: int) -> None:
    """Write one rank's part of a checkpoint; rank 0's holds ``meta.pt`` too.

    Args:
        folder: an existing folder.
        checkpoint: holds sharded tensors as DTensors; this function replaces them by None.
        rank: the rank of this process.
        ranks: how many ranks write.
    """
    rows: dict[str, Tensor] = {}
    for name, owner, key in slots(checkpoint):
        if isinstance(owner[key], DTensor):
            rows[name] = owner[key].to_local().detach().cpu().contiguous()
            owner[key] = None
    save_file(rows, folder / f"shard-{rank:05}-of-{ranks:05}.safetensors")
    if rank == 0:
        torch.save(dict(checkpoint), folder / META)


def read_shards(folder: Path, place: Callable[[StoredRows], Tensor] = read_whole) -> dict[str, Any]:
    """Read a checkpoint from its folder, on CPU.

    Args:
        folder: a folder that :func:`write_shard` filled.
        place: reads a sharded tensor, or the part of it that is needed.

    Raises:
        SparsifyError: a shard is missing or damaged.
    """
    try:
        meta = torch.load(folder / META, map_location="cpu", weights_only=True)
        with ExitStack() as stack:
            files = [
                stack.enter_context(safe_open(path, framework="pt")) for path in _shards(folder)
            ]
            for name, owner, key in slots(meta):
                if owner[key] is None:
                    owner[key] = place(StoredRows(name, files))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SparsifyError(
            f"{folder}: this sharded checkpoint is damaged ({error}); resume from another one"
        ) from error
    return meta


def _shards(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    counts = {int(_SHARD.fullmatch(path.name)[1]) for path in paths}  # type: ignore[index]
    if counts != {len(paths)}:
        raise SparsifyError(
            f"{folder}: it holds {len(paths)} shards of {max(counts, default=1)}, and all are "
            "needed; copy the whole folder, or resume from another checkpoint"
        )
    return paths


class ShardedCheckpointIO(WholeFileIO):
    """Writes checkpoint files, and reads both files and whole folders of shards."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if is_sharded(Path(path)):
            check_whole(Path(path))
            return read_shards(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)
