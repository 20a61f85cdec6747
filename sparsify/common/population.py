"""What ranks tell each other that all learn the same from draws of their own.

A draw is made again from numbers that every rank knows, so that only what came of it travels.

Shapes: R ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def place() -> tuple[int, int]:
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
    _, ranks = place()
    if ranks == 1:
        return values[None]
    mine = values.double().contiguous()  # holds exactly whatever they were computed in
    of_ranks = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(of_ranks, mine)
    return torch.stack(of_ranks).to(values.dtype)
