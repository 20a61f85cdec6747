"""What one process does for all, so that a failure of one ends all, with its message."""

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
    """Whether this is the process that writes what all have made."""
    return processes() == 1 or dist.get_rank() == 0


@contextmanager
def together() -> Iterator[None]:
    """Wait for all ranks at the end of the block; if it failed on one, it fails on all.

    The block must hold no communication, or the ranks would wait for each other in two places.

    Raises:
        SparsifyError: it failed on another rank; the message is the one there, and a full disk is
            one on all.
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
    """Yield on every rank what ``items`` gives on rank 0; on the others it is not looked at.

    One item at a time, so that ranks wait for one only, and no rank holds all.

    Args:
        items: of anything that can be pickled.

    Raises:
        SparsifyError: iterating failed on rank 0; the message is the one there.
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
    """What rank 0 says; on the others the arguments are not looked at."""
    said = [(kind, content)]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, SparsifyError) else f"{type(error).__name__}: {error}"


def data_parallel(trainer: Any) -> tuple[int, int]:
    """(rank, number of ranks) of this process among those that see different data."""
    strategy = None if trainer is None else trainer.strategy
    sampler = getattr(strategy, "distributed_sampler_kwargs", None)
    return (sampler["rank"], sampler["num_replicas"]) if sampler else (0, 1)


def leave_process_group() -> None:
    """End a run of several processes together; Lightning leaves it to the interpreter's exit.

    There, a backend's threads may still be at work, and the process is aborted.
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
    """The values of every rank, on every rank.

    Args:
        values: floating, of the same shape on all ranks.

    Returns:
        ``[R, *values.shape]`` of the same dtype, equal to the last bit on all ranks.
    """
    _, ranks = rank_and_size()
    if ranks == 1:
        return values[None]
    mine = values.double().contiguous()  # holds exactly whatever they were computed in
    of_ranks = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(of_ranks, mine)
    return torch.stack(of_ranks).to(values.dtype)
