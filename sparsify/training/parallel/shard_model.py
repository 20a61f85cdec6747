"""Shards a masked model over ranks by FSDP2, block by block."""

from typing import Any, Literal

from torch import nn
from torch.distributed.fsdp import fully_shard

from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.select import decoder_blocks
from sparsify.training.guards import check_shards
from sparsify.training.parallel.masked_gather import check_gather, shard_gathering_masked


def shard(
    masked: MaskedModel, teacher: nn.Module | None, gather: Literal["plain", "masked"], meshes: Any
) -> None:
    """Shard the model, in place, and the dense one that it learns from.

    Args:
        masked: the model.
        teacher: the dense model, where the run keeps one.
        gather: what ranks send each other: ``plain`` weights and all that masks are made of, or
            ``masked`` weights.
        meshes: Lightning's device mesh.

    Raises:
        SparsifyError: the strategy, or a layer, cannot be sharded so.
    """
    mesh, strategy = meshes["data_parallel"], masked.strategy
    check_shards(strategy, masked.layers, mesh.size(), meshes.size() // mesh.size())
    if gather == "masked":
        check_gather(strategy)
        shard_gathering_masked(masked.model, mesh)
        return
    for model in (masked.model, teacher):
        if model is not None:
            for block in decoder_blocks(model).values():
                fully_shard(block, mesh=mesh)
            # Left to itself torch keeps what belongs to no block gathered until backward. Where
            # none comes, steps would move the gathered copy, and be lost with it.
            always = True if strategy.effect.without_gradients else None
            fully_shard(model, mesh=mesh, reshard_after_forward=always)
