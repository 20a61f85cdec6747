"""Ranks that work together: a failure on one rank ends all of them with the same message."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparsify.common.errors import DiskFull, SparsifyError

T = TypeVar("T")


def processes() -> int:
    """How many processes take part in the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_zero() -> bool:
    """Whether this is the process that writes files for all."""
    return processes() == 1 or dist.get_rank() == 0


@contextmanager
def together() -> Iterator[None]:
    """Wait for all ranks at the end of the block; if it failed on one, it fails on all.

    The block must hold no communication, or the ranks would wait for each other in two places.

    Raises:
        SparsifyError: the block failed on another rank, whose message this is.
        DiskFull: the same, where that rank raised DiskFull.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    said: list[tuple[bool, str] | None] = [None] * processes()
    if processes() > 1:
        own = None if error is None else (isinstance(error, DiskFull), _message(error))
        dist.all_gather_object(said, own)
    if error is not None:
        raise error
    for rank, failure in enumerate(said):
        if failure is not None:
            full, message = failure
            raise (DiskFull if full else SparsifyError)(f"rank {rank}: {message}")


def from_rank_zero(items: Iterable[T]) -> Iterator[T]:
    """Yield on every rank the ``items`` of rank 0; the argument of other ranks is ignored.

    Items are sent one at a time, so that ranks wait for one only, and no rank holds all.

    Args:
        items: anything that can be pickled.

    Raises:
        SparsifyError: iterating failed on rank 0, whose message this is.
    """
    if processes() == 1:
        yield from items
    elif dist.get_rank() == 0:
        yield from _sent(items)
    else:
        yield from _received()


def _sent(items: Iterable[T]) -> Iterator[T]:
    source = iter(items)
    while True:
        try:
            item = next(source)
        except StopIteration:
            _broadcast("end", None)
            return
        except Exception as error:
            _broadcast("full" if isinstance(error, DiskFull) else "failed", _message(error))
            raise
        _broadcast("item", item)
        yield item


def _received() -> Iterator[Any]:
    while True:
        kind, content = _broadcast("", None)
        if kind == "end":
            return
        if kind in ("failed", "full"):
            raise (DiskFull if kind == "full" else SparsifyError)(f"rank 0: {content}")
        yield content


def _broadcast(kind: str, content: Any) -> tuple[str, Any]:
    """Return rank 0's arguments on every rank; those of other ranks are ignored."""
    said = [(kind, content)]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, SparsifyError) else f"{type(error).__name__}: {error}"


def data_parallel(trainer: Any) -> tuple[int, int]:
    """(rank, number of ranks) of this process among the processes that read different data."""
    strategy = None if trainer is None else trainer.strategy
    sampler = getattr(strategy, "distributed_sampler_kwargs", None)
    return (sampler["rank"], sampler["num_replicas"]) if sampler else (0, 1)


def leave_process_group() -> None:
    """Close the process group on all ranks together.

    Lightning leaves this to the interpreter's exit, where threads of the backend may still be at
    work and abort the process.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """(rank, number of ranks) of this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(values: Tensor) -> Tensor:
    """Give every rank the values of all ranks.

    Args:
        values: floating, of the same shape on all ranks.

    Returns:
        ``[R, *values.shape]`` of the same dtype, equal to the last bit on all ranks.
    """
    _, ranks = rank_and_size()
    if ranks == 1:
        return values[None]
    mine = values.double().contiguous()  # float64 holds every smaller float exactly
    of_ranks = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(of_ranks, mine)
    return torch.stack(of_ranks).to(values.dtype)
