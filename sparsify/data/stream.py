"""Packs training text into blocks while it is read, without end.

The blocks depend only on the settings, and every position can be saved and restored exactly. To
restore a stream, the documents that were shuffled together with the next one are read again; a
checkpoint holds only their position and the few tokens that await their block.

Shapes: B batch, T tokens of a block.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.data.blend import PERMUTATION
from sparsify.data.documents import Document, Judge
from sparsify.data.packing import DOCUMENTS_A_CALL, Packer
from sparsify.data.sources import BadRows, Rows, Shard
from sparsify.data.windows import with_start

# These stand after the seed and keep random streams apart, like those of blend.py.
CHOICE, SHARDS, BUFFER = 3, 4, 5


class Blocks(Protocol):
    """An endless sequence of blocks from one source."""

    def __next__(self) -> Tensor:
        """The next block, int32 [T]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, in plain values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state_dict` returned."""
        ...


class PackedBlocks:
    """Endless blocks from a source that lies in memory, in one permutation after another.

    Args:
        blocks: int32 [blocks, T].
        seed: The run's seed.
        source: Number of the source.
    """

    def __init__(self, blocks: Tensor, seed: int, source: int) -> None:
        self._blocks, self._key = blocks, [seed, PERMUTATION, source]
        self._drawn = 0
        self._order: list[int] = []

    def __next__(self) -> Tensor:
        number, at = divmod(self._drawn, len(self._blocks))
        if at == 0 or not self._order:
            rng = np.random.default_rng([*self._key, number])
            self._order = rng.permutation(len(self._blocks)).tolist()
        self._drawn += 1
        return self._blocks[self._order[at]]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn, self._order = state["drawn"], []


class StreamedBlocks:
    """Endless blocks of documents that are read, shuffled and packed as they are needed.

    Documents are shuffled in runs of `buffer`, and the shards in every epoch.

    Args:
        name: Name of the source, for messages.
        shards: Parts of the source.
        judge: Turns rows into documents.
        report: Where `judge` counts the rows that it leaves out.
        packer: Turns documents into tokens.
        block_size: Tokens per block.
        start: Ids of the special tokens in front of each block.
        seed: The run's seed.
        source: Number of the source.
        buffer: Number of documents shuffled together; 0 keeps the order of the source.

    Attributes:
        shards: Parts of the source.
        epoch: Epoch of the last document read so far, from 0.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        judge: Judge,
        report: BadRows,
        packer: Packer,
        block_size: int,
        start: Sequence[int],
        seed: int,
        source: int,
        buffer: int,
    ) -> None:
        self._name, self._judge, self._report = name, judge, report
        self.shards = shards
        self._packer, self._special = packer, start
        self._own = block_size - len(start)  # tokens of a block's text
        self._seed, self._source, self._buffer = seed, source, buffer
        self._warn_at = 1
        self.epoch = 0
        self._epoch = 0  # epoch of the next row
        self._shard = 0  # number of the shard in the epoch's order
        self._found = 0  # documents of the epoch so far
        self._rows: Rows | None = None  # rows of the shard; None before its first
        self._shard_name = ""  # for messages
        self._run = -1  # number of the run of documents that is being packed
        self._start = self._position()  # position where that run starts
        self._documents: list[Document] = []  # of that run
        self._packed = 0  # how many of them the packer already has

    def __next__(self) -> Tensor:
        while len(self._packer.ids) < self._own:
            if self._packed == len(self._documents):
                self._run, self._start, self._packed = self._run + 1, self._position(), 0
                self._documents = self._read_run()
            documents = self._documents[self._packed : self._packed + DOCUMENTS_A_CALL]
            self._packer.add(documents)
            self._packed += len(documents)
        return with_start(self._special, self._packer.take(self._own))

    def state_dict(self) -> dict[str, Any]:
        return {
            "run": self._run,
            "start": self._start,
            "packed": self._packed,
            "packer": self._packer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start = start = state["start"]
        self._epoch, self._shard, self._found = start["epoch"], start["shard"], start["found"]
        self._rows = None
        if start["rows"] is not None:
            self._open_shard(start["rows"])
        self._run, self._packed = state["run"], state["packed"]
        self._documents = self._read_run() if self._run >= 0 else []
        self._packer.load_state_dict(state["packer"])

    def _position(self) -> dict[str, Any]:
        rows = None if self._rows is None else self._rows.position()
        return {"epoch": self._epoch, "shard": self._shard, "found": self._found, "rows": rows}

    def _read_run(self) -> list[Document]:
        """Read the next run of documents and shuffle it; a run does not go beyond its epoch."""
        documents: list[Document] = []
        while len(documents) < (self._buffer or DOCUMENTS_A_CALL):
            number, row = next(self._open_shard(), (0, None))
            if number:
                document = self._judge(self._shard_name, number, row)
                if document is not None:
                    documents.append(document)
                    self._found += 1
                    self.epoch = self._epoch
                continue
            self._rows, self._shard = None, self._shard + 1
            if self._shard == len(self.shards):
                self._next_epoch()
                if documents:
                    break
        if (total := self._report.counts.total()) >= self._warn_at:
            self._report.warn()
            self._warn_at = 10 * total
        if self._buffer:
            rng = np.random.default_rng([self._seed, BUFFER, self._source, self._run])
            documents = [documents[i] for i in rng.permutation(len(documents))]
        return documents

    def _next_epoch(self) -> None:
        if not self._found:
            raise SparsifyError(
                f"{self._name}: no document was found in it; a stream without end needs one: add "
                "text, or remove the source"
            )
        self._epoch, self._shard, self._found = self._epoch + 1, 0, 0

    def _open_shard(self, position: Any = None) -> Rows:
        """The rows of the current shard, opened if need be."""
        if self._rows is None:
            number = self._shard
            if self._buffer:
                rng = np.random.default_rng([self._seed, SHARDS, self._source, self._epoch])
                number = int(rng.permutation(len(self.shards))[number])
            self._rows = self.shards[number].rows(position)
            self._shard_name = self.shards[number].name
        return self._rows
