"""The order in which training reads the blocks of several sources.

The order depends only on the seed and the epoch, so a run reads the same when it is repeated,
resumed at any batch, or split over ranks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from sparsify.common.errors import SparsifyError

PLACE = "the checkpoint's place in the data"

# These stand after the seed, so that the two kinds of draw never share a random stream. (Keys of
# different length would not do: NumPy pads with zeros, so [seed, 1] equals [seed, 1, 0].)
SHUFFLE, PERMUTATION = 1, 2

LARGEST = 1e100  # of a weight, so that products and sums of weights are finite
SMALLEST_SHARE = 2.0**-53  # the step between the random numbers by which a stream draws


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Splits an integer in proportion to weights, by the largest-remainder method.

    Args:
        total: The number to split.
        weights: Positive shares, of any sum.

    Returns:
        One integer per weight; they sum to `total`.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    quotas = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))
    for i in by_remainder[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


def draw(blocks: Mapping[str, Tensor], shares: Mapping[str, int], seed: int) -> Tensor:
    """Draws different blocks from each source, and shuffles them.

    Args:
        blocks: The blocks of each source, [blocks, T].
        shares: How many to draw from each.
        seed: Not negative.

    Returns:
        Their blocks, [sum of shares, T].

    Raises:
        SparsifyError: A source has fewer blocks than its share.
    """
    rng = np.random.default_rng(seed)
    samples = sum(shares.values())
    chosen = []
    for name, share in shares.items():
        if share > len(blocks[name]):
            raise SparsifyError(
                f"calibration asks for {share} of {samples} blocks from train source {name}, "
                f"which has {len(blocks[name])}; each block is used once: ask for fewer with "
                "--model.calibration.samples, or add text"
            )
        chosen.append(blocks[name][rng.permutation(len(blocks[name]))[:share]])
    return torch.cat(chosen)[rng.permutation(samples)]


def check_weights(names: Sequence[str], weights: Sequence[float | None]) -> list[float] | None:
    """Checks that weights are given for all sources or for none.

    Args:
        names: Names of the sources, for messages.
        weights: Their weights; None for a source without one.

    Returns:
        The weights, or None when no source has one.

    Raises:
        SparsifyError: Some sources lack a weight, or one is not positive and finite, or its share
            too small to draw.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    if len(given) < len(weights):
        lacking = [name for name, weight in zip(names, weights, strict=True) if weight is None]
        raise SparsifyError(
            f"train sources {', '.join(lacking)} have no weight and others have one; weights must "
            "be given for all sources or for none: add or remove weights"
        )
    for name, weight in zip(names, given, strict=True):
        if not 0 < weight <= LARGEST:
            raise SparsifyError(
                f"train source {name} has weight {weight}; a weight must be positive and finite, "
                f"at most {LARGEST}: change it, or remove the source"
            )
    for name, weight in zip(names, given, strict=True):
        if weight / sum(given) < SMALLEST_SHARE:
            raise SparsifyError(
                f"train source {name} has weight {weight} of {sum(given)} in all; so small a share "
                f"never gives a block, and must be {SMALLEST_SHARE:.0e} or more: raise the weight, "
                "or remove the source"
            )
    return given


def check_same_data(saved: Any, own: Any) -> None:
    """Checks that a saved position refers to the data that this run reads.

    Args:
        saved: The settings that decide what the saved run read.
        own: The same settings of this run.

    Raises:
        SparsifyError: They differ.
    """
    if saved != own:
        raise SparsifyError(
            f"the checkpoint's data position is in {saved} and this run has {own}; both must be "
            "the same to resume: use the same data settings and number of processes, or start a "
            "new run from the checkpoint's weights"
        )


class BlendSampler(Sampler[int]):
    """Indices into the concatenated blocks of several sources, in the order of one epoch.

    Without weights, each block comes once per epoch. With weights, source i gives ``quotas[i]``
    blocks per epoch. It takes them from an endless sequence of permutations of its own blocks, and
    each epoch goes on where the last one ended: small sources repeat evenly, large ones are covered
    over several epochs. Either way an epoch has ``sum(sizes)`` blocks, shuffled together.

    Args:
        sizes: Number of blocks of each source.
        weights: Relative share of each source in an epoch, or None.
        seed: Not negative.

    Raises:
        SparsifyError: A weight is so small that its source would give no block.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.sizes = list(sizes)
        self.seed = seed
        self.epoch = 0
        self.weighted = weights is not None
        self.quotas = self.sizes if weights is None else apportion(sum(sizes), weights)
        if weights is not None and 0 in self.quotas:
            raise SparsifyError(
                f"train weights {list(weights)} give 0 of {len(self)} blocks an epoch to source "
                f"number {self.quotas.index(0) + 1}; every source must give one: raise its weight "
                "or remove it"
            )

    def __len__(self) -> int:
        """Number of blocks per epoch."""
        return sum(self.sizes)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch for iterators that begin after this call.

        Args:
            epoch: Counted from 0.
        """
        self.epoch = epoch

    def order(self) -> NDArray[np.int64]:
        """The indices of the chosen epoch, int64 [len(self)]."""
        indices: NDArray[np.int64] = np.arange(len(self))
        if self.weighted:
            offsets = np.cumsum([0, *self.sizes])
            indices = np.concatenate([offsets[i] + self._drawn(i) for i in range(len(self.sizes))])
        return np.random.default_rng([self.seed, SHUFFLE, self.epoch]).permutation(indices)

    def __iter__(self) -> Iterator[int]:
        """Yields the indices of the chosen epoch."""
        yield from self.order().tolist()

    def _drawn(self, source: int) -> NDArray[np.int64]:
        size, quota = self.sizes[source], self.quotas[source]
        start, end = self.epoch * quota, (self.epoch + 1) * quota
        first, last = start // size, (end - 1) // size
        permutations = [
            np.random.default_rng([self.seed, PERMUTATION, source, number]).permutation(size)
            for number in range(first, last + 1)
        ]
        return np.concatenate(permutations)[start - first * size : end - first * size]


class BatchesOfRank(Sampler[list[int]]):
    """The batches of one rank: every world-th batch of the sampler's order, starting at the rank.

    At step i the ranks together read the batches ``i * world`` to ``(i + 1) * world - 1`` of a
    single process. So two ranks train on what one process reads with twice the gradient
    accumulation. A last step without a full batch for every rank is dropped.

    Args:
        sampler: Gives the order; its ``set_epoch`` chooses the epoch.
        batch_size: Blocks per batch.
        rank: This process, from 0.
        world: Number of processes.
    """

    def __init__(self, sampler: BlendSampler, batch_size: int, rank: int, world: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        """Number of batches per epoch, the same on every rank."""
        return len(self.sampler) // (self.batch_size * self.world)

    def __iter__(self) -> "BatchIterator":
        """Begins the epoch that the sampler is set to when the first batch is asked for."""
        return BatchIterator(self)

    def identity(self) -> dict[str, Any]:
        """The settings that decide an epoch's batches; a saved position is valid only under equal
        ones. The number of processes is not among them: it only decides who reads a batch.
        """
        return {
            "blocks": list(self.sampler.sizes),
            "blocks an epoch": list(self.sampler.quotas),
            "seed": self.sampler.seed,
            "batch_size": self.batch_size,
        }


class BatchIterator(Iterator[list[int]]):
    """Iterates over one epoch of a `BatchesOfRank`; its position can be saved and restored.

    It asks for the epoch at the first batch, as trainers set the epoch after they get the iterator.

    Args:
        batches: The batches to go through.
    """

    def __init__(self, batches: BatchesOfRank) -> None:
        self.batches = batches
        self._step = 0
        self._epoch: int | None = None  # the epoch that _step is in; None until it is known
        self._order: NDArray[np.int64] | None = None

    def __next__(self) -> list[int]:
        """The indices of the next batch, [batch_size]."""
        batches = self.batches
        if self._order is None:
            self._epoch, self._step = self._position()
            self._order = batches.sampler.order()
        if self._step >= len(batches):
            raise StopIteration
        start = (self._step * batches.world + batches.rank) * batches.batch_size
        self._step += 1
        indices: list[int] = self._order[start : start + batches.batch_size].tolist()
        return indices

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank: the epoch, and how many of its batches all ranks
        together have read.
        """
        epoch, step = self._position()
        return {"epoch": epoch, "batch": step * self.batches.world}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position, and sets the sampler's epoch to the saved one.

        Args:
            state: What `state_dict` gave, on any number of ranks. If the present ranks cannot share
                so many batches equally, these were the last of their epoch, which then ends.
        """
        self.batches.sampler.set_epoch(state["epoch"])
        step = -(-state["batch"] // self.batches.world)
        self._epoch, self._step, self._order = state["epoch"], step, None

    def _position(self) -> tuple[int, int]:
        if self._epoch is not None and self._order is not None:
            return self._epoch, self._step
        # Not begun. If the trainer has set another epoch since a position was restored, that
        # position was the end of its epoch.
        epoch = self.batches.sampler.epoch
        return epoch, self._step if self._epoch in (None, epoch) else 0
