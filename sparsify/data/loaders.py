"""Training loaders that can save their position in a checkpoint and go back to it."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from sparsify.common.errors import SparsifyError, restoring
from sparsify.data.blend import (
    PLACE,
    BatchesOfRank,
    check_same_data,
)
from sparsify.data.packing import PackedText, to_batch
from sparsify.data.stream import CHOICE, Blocks
from sparsify.models.token_batch import TokenBatch

# The length that an endless loader states, which no run reaches. From a loader without a length
# Lightning fetches one batch ahead, and the saved position would be one batch too far.
BATCHES = 2**40


def identity_of(start: Sequence[int]) -> dict[str, Any]:
    """What a saved position says of the special tokens in front of blocks; without any, nothing, as
    earlier versions did.
    """
    return {"bos": list(start)} if start else {}


class TrainLoader(StatefulDataLoader[Tensor | TokenBatch]):  # type: ignore[misc]  # torchdata has no types
    start: Sequence[int] = ()  # ids of the special tokens in front of each block

    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = self.batch_sampler.identity()
        return identity | identity_of(self.start)

    def state_dict(self) -> dict[str, Any]:
        return {"of": self.identity(), "position": super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with restoring(PLACE):
            check_same_data(state["of"], self.identity())
            _check_position(state["position"])
            super().load_state_dict(state["position"])
            # Only iter() makes torchdata read the position. Left to Lightning, an error in it would
            # be hidden behind one of Lightning's own.
            iter(self)
            super().load_state_dict(state["position"])


def _check_position(position: Mapping[str, Any]) -> None:
    """Check the types of a saved position: torchdata takes any true value for the end of an epoch,
    and any number for a count.

    Raises:
        ValueError: a value has a type that the loader does not save; it is named.
    """
    if type(position["_iterator_finished"]) is not bool:
        raise ValueError(
            f"_iterator_finished is {position['_iterator_finished']!r}, and not a bool"
        )
    counts = {key: position[key] for key in ("_num_yielded", "_sampler_iter_yielded")}
    for key, value in (counts | (position["_sampler_iter_state"] or {})).items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{key} is {value!r}, and not a count")


class BlockDataset(Dataset[Tensor | TokenBatch]):
    def __init__(self, packed: PackedText, masked: bool) -> None:
        self.blocks, self.masked = packed.blocks, masked

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Tensor | TokenBatch:
        return to_batch(self.blocks[index], self.masked)


def train_loader(
    packed: Iterable[PackedText], masked: bool, batches: BatchesOfRank, start: Sequence[int]
) -> TrainLoader:
    with warnings.catch_warnings():
        # torchdata 0.11 calls a function that torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        loader = TrainLoader(
            ConcatDataset([BlockDataset(p, masked) for p in packed]),
            batch_sampler=batches,
            # A loader draws a number at the start of each epoch. Drawn from the global
            # generator, it would change the dropout of a resumed run.
            generator=torch.Generator(),
        )
    loader.start = start
    return loader


def eval_loader(
    packed: PackedText, masked: bool, batch_size: int
) -> DataLoader[Tensor | TokenBatch]:
    return DataLoader(
        BlockDataset(packed, masked), batch_size=batch_size, generator=torch.Generator()
    )


def check_sampler_of_trainer(trainer: Any) -> None:
    if (
        trainer is not None
        and trainer.world_size > 1
        and trainer._accelerator_connector.use_distributed_sampler
    ):
        raise SparsifyError(
            "the trainer has use_distributed_sampler=True; TextDataModule gives each process its "
            "own batches: set Trainer(use_distributed_sampler=False)"
        )


def check_trainer_of_stream(trainer: Any) -> None:
    if getattr(trainer, "max_steps", 1) == -1:
        raise SparsifyError(
            "the trainer has max_steps -1, and train streams without end; only a number of steps "
            "ends such a run: give --trainer.max_steps"
        )
    interval = getattr(trainer, "val_check_interval", 1.0)
    if isinstance(interval, float) and interval != 1.0:
        raise SparsifyError(
            f"the trainer has val_check_interval {interval}, a share of an epoch, and train "
            "streams without end; give a whole number of batches"
        )


class StreamLoader(Iterator[Tensor | TokenBatch]):
    """This process's batches of an endless blend; it can save its position.

    Every process makes the blocks of all, and keeps every world-th batch, starting at its rank. So
    two ranks train on what one process reads with twice the gradient accumulation.

    Args:
        sources: The blocks of each source.
        weights: Relative share of each source.
        masked: Whether some tokens are context only.
        seed: Not negative.
        batch_size: Blocks per batch.
        rank: This process, from 0.
        world: Number of processes.
        identity: The settings that decide the blocks; a saved position is valid only under equal
            ones.
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
        self._block = 0  # number of the next block, counted over all ranks

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
        """The number of the source that a block comes from.

        Args:
            block: Number of the block, from 0.
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
