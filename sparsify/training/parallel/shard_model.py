"""Shards a masked model over ranks by FSDP2, block by block."""

from typing import Any, Literal

from torch import nn
from torch.distributed.fsdp import fully_shard

from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.select import decoder_blocks
from sparsify.training.guards import check_shards
from sparsify.training.parallel.masked_gather import (
    check_gather,
    check_layers,
    shard_gathering_masked,
)

Gather = Literal["plain", "masked"]


def check_sharding(masked: MaskedModel, gather: Gather, ranks: int, parts: int = 1) -> None:
    """Refuse what :func:`shard` cannot do.

    Args:
        masked: the model; its tensors are not read.
        gather: as there.
        ranks: that share the model.
        parts: of a layer, by tensor parallelism.

    Raises:
        SparsifyError: the strategy, or a layer, cannot be sharded so.
    """
    check_shards(masked.strategy, masked.layers, ranks, parts)
    if gather == "masked":
        check_gather(masked.strategy)
        check_layers(masked.model, ranks)


def shard(masked: MaskedModel, teacher: nn.Module | None, gather: Gather, meshes: Any) -> None:
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
    check_sharding(masked, gather, mesh.size(), meshes.size() // mesh.size())
    if gather == "masked":
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
