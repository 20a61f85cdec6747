"""Reads a training blend in which at least one source streams."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify.data.documents import Judge, open_source
from sparsify.data.loaders import StreamLoader, identity_of
from sparsify.data.packing import PackedText, Packer
from sparsify.data.sources import BadRows, BadRowsPolicy, Source
from sparsify.data.stream import Blocks, PackedBlocks, StreamedBlocks


class Streaming:
    """Reads the streams of a blend.

    Args:
        sources: the sources of the blend, by name.
        tokenizer: turns text into token ids.
        bad_rows: whether rows without a usable text are errors or left out.
        block_size: tokens per block, T.
        start: ids of the special tokens in front of each block.
        seed: seed of the order of documents and sources.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        tokenizer: PreTrainedTokenizerBase,
        bad_rows: BadRowsPolicy,
        block_size: int,
        start: Sequence[int],
        seed: int,
    ) -> None:
        self._sources, self._tokenizer, self._bad_rows = sources, tokenizer, bad_rows
        self._block_size, self._start, self._seed = block_size, start, seed

    def stream(self, name: str) -> StreamedBlocks:
        """The blocks of one streamed source, from its start."""
        source, report = self._sources[name], BadRows()
        return StreamedBlocks(
            name,
            open_source(source, stream=True),
            Judge(source, self._bad_rows, report, self._tokenizer),
            report,
            Packer(self._tokenizer, name),
            self._block_size,
            self._start,
            self._seed,
            list(self._sources).index(name),
            source.shuffle_buffer,
        )

    def first_blocks(self, name: str, count: int) -> Tensor:
        """The first ``count`` blocks of a stream, ``[count, T]``; fewer if its first epoch is
        shorter.
        """
        stream, blocks = self.stream(name), list[Tensor]()
        while len(blocks) < count:
            block = next(stream)
            if stream.epoch:
                break
            blocks.append(block)
        empty = torch.empty(0, self._block_size, dtype=torch.int32)
        return torch.stack(blocks) if blocks else empty

    def loader(
        self,
        packed: Mapping[str, PackedText],
        weights: list[float] | None,
        masked: bool,
        batch_size: int,
        rank: int,
        world: int,
    ) -> StreamLoader:
        """This process's batches.

        Args:
            packed: the sources of the blend that lie in memory.
            weights: relative shares of the sources; None if there is only one.
            masked: whether targets must be told from context.
            batch_size: blocks per batch on each process.
            rank: rank of this process among those that read different data.
            world: number of these processes.
        """
        sources: list[Blocks] = []
        identity: dict[str, Any] = {}
        for number, (name, source) in enumerate(self._sources.items()):
            identity[name] = source.identity()
            if name in packed:
                identity[name]["blocks"] = len(packed[name].blocks)
                sources.append(PackedBlocks(packed[name].blocks, self._seed, number))
            else:
                stream = self.stream(name)
                identity[name]["parts"] = len(stream.shards)
                sources.append(stream)
        return StreamLoader(
            sources,
            weights or [1.0],
            masked,
            self._seed,
            batch_size,
            rank,
            world,
            {
                "sources": identity,
                "seed": self._seed,
                "batch_size": batch_size,
                "block_size": self._block_size,
            }
            | identity_of(self._start),
        )
