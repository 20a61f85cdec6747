"""Training text that is packed as it is read, without end.

What is read is a function of the settings alone, and every position can be saved and restored
exactly: a stream is restored by reading again the documents that were shuffled together with the
next one, of which only a few tokens need to be kept.

Shapes: B batch, T tokens of a block.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.data.blend import PERMUTATION, check_same_data
from sparsify.data.documents import Document, Judge
from sparsify.data.packing import DOCUMENTS_A_CALL, Packer, to_batch
from sparsify.data.sources import BadRows, Rows, Shard
from sparsify.models.token_batch import TokenBatch
from sparsify.training.checkpoints.content import PLACE, restoring

# First words after the seed, beside those of blend.py.
CHOICE, SHARDS, BUFFER = 3, 4, 5

# Lightning fetches a batch ahead from a loader without length, and its saved position would be one
# batch too far. No run gets to the end of this one.
BATCHES = 2**40


class Blocks(Protocol):
    """Blocks of one source, without end."""

    def __next__(self) -> Tensor:
        """The next block, int32 [T]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, in plain values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state_dict` gave."""
        ...


class PackedBlocks:
    """Blocks that lie in memory, in one permutation after another.

    Args:
        blocks: int32 [blocks, T].
        seed: The run's.
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
    """Blocks of documents that are read, shuffled and packed as they are needed.

    Runs of `buffer` documents are permuted, and so is the order of the shards in every epoch.

    Args:
        name: Of the source, for messages.
        shards: Its parts.
        judge: Makes documents of rows.
        report: Where `judge` counts rows that it leaves out.
        packer: Makes tokens of documents.
        block_size: Tokens a block.
        seed: The run's.
        source: Number of the source.
        buffer: Documents shuffled together; 0 keeps the order of the source.

    Attributes:
        shards: Its parts.
        epoch: Of the newest document in the blocks so far; the first is 0.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        judge: Judge,
        report: BadRows,
        packer: Packer,
        block_size: int,
        seed: int,
        source: int,
        buffer: int,
    ) -> None:
        self._name, self._judge, self._report = name, judge, report
        self.shards = shards
        self._packer, self._block_size = packer, block_size
        self._seed, self._source, self._buffer = seed, source, buffer
        self._warn_at = 1
        self.epoch = 0
        self._epoch = 0  # of the next row
        self._shard = 0  # number of it in the epoch's order
        self._found = 0  # documents of the epoch so far
        self._rows: Rows | None = None  # of the shard; None before its first
        self._shard_name = ""  # for messages
        self._run = -1  # number of the run of documents that is being packed
        self._start = self._position()  # of the run
        self._documents: list[Document] = []
        self._packed = 0  # documents of the run that the packer has

    def __next__(self) -> Tensor:
        while len(self._packer.ids) < self._block_size:
            if self._packed == len(self._documents):
                self._run, self._start, self._packed = self._run + 1, self._position(), 0
                self._documents = self._read_run()
            documents = self._documents[self._packed : self._packed + DOCUMENTS_A_CALL]
            self._packer.add(documents)
            self._packed += len(documents)
        return self._packer.take(self._block_size)

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
        """The next documents in their new order; a run ends at the latest with the epoch."""
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
        """The rows of the present shard."""
        if self._rows is None:
            number = self._shard
            if self._buffer:
                rng = np.random.default_rng([self._seed, SHARDS, self._source, self._epoch])
                number = int(rng.permutation(len(self.shards))[number])
            self._rows = self.shards[number].rows(position)
            self._shard_name = self.shards[number].name
        return self._rows


class StreamLoader(Iterator[Tensor | TokenBatch]):
    """This process's batches of an endless blend; it can save its position.

    Every process makes all blocks and keeps its own batches, of which numbers rank, rank + world,
    ... of one process's: two ranks train on what one process reads with twice the gradient
    accumulation.

    Args:
        sources: Gives the blocks of each source.
        weights: Share of each source.
        masked: Whether some tokens are context only.
        seed: Not negative.
        batch_size: Blocks a batch.
        rank: This process, from 0.
        world: Number of processes.
        identity: What the blocks depend on; a saved position holds only where it is equal.
    """

    def __init__(
        self,
        sources: Sequence[Blocks],
        weights: Sequence[float],
        masked: bool,
        seed: int,
        batch_size: int,
        rank: int,
        world: int,
        identity: dict[str, Any],
    ) -> None:
        self._sources, self._masked = sources, masked
        self._borders = np.cumsum(weights)[:-1] / sum(weights)
        self._seed, self._batch_size, self._rank, self._world = seed, batch_size, rank, world
        self._identity = identity
        self._block = 0  # number of the next one, of all ranks

    def __len__(self) -> int:
        """More batches than any run reads."""
        return BATCHES

    def __next__(self) -> Tensor | TokenBatch:
        """The next batch [B, T]."""
        size = self._batch_size
        blocks = [next(self._sources[self.source_of(self._block + i)]) for i in self._round()]
        self._block += len(blocks)
        own = blocks[self._rank * size : (self._rank + 1) * size]
        return to_batch(torch.stack(own), self._masked)

    def source_of(self, block: int) -> int:
        """The number of the source that gives a block.

        Args:
            block: Its number, from 0.
        """
        share = np.random.default_rng([self._seed, CHOICE, block]).random()
        return int(np.searchsorted(self._borders, share, side="right"))

    def state_dict(self) -> dict[str, Any]:
        """The position, which is the same on every rank."""
        sources = [source.state_dict() for source in self._sources]
        return {"of": self._identity, "block": self._block, "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Args:
            state: What `state_dict` gave.

        Raises:
            SparsifyError: It was saved under other settings.
        """
        with restoring(PLACE):
            check_same_data(state["of"], self._identity)
            self._block = state["block"]
            for source, position in zip(self._sources, state["sources"], strict=True):
                source.load_state_dict(position)

    def _round(self) -> range:
        return range(self._batch_size * self._world)
