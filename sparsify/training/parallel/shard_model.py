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
        gather: as for :func:`shard`.
        ranks: how many ranks share the model.
        parts: into how many parts tensor parallelism splits a layer.

    Raises:
        SparsifyError: the strategy or a layer cannot be sharded in this way.
    """
    check_shards(masked.strategy, masked.layers, ranks, parts)
    if gather == "masked":
        check_gather(masked.strategy)
        check_layers(masked.model, ranks)


def shard(masked: MaskedModel, teacher: nn.Module | None, gather: Gather, meshes: Any) -> None:
    """Shard the model, and the dense one that it learns from, in place.

    Args:
        masked: the model.
        teacher: the dense model, if the run keeps one.
        gather: what ranks send each other: ``plain`` weights and the maskers' tensors, or
            ``masked`` weights.
        meshes: Lightning's device mesh.

    Raises:
        SparsifyError: the strategy, or a layer, cannot be sharded so.
    """
    mesh, strategy = meshes["data_parallel"], masked.strategy
    for layer in masked.layers.values():
        if layer.experts is not None and layer.transposed:  # FSDP2 takes no other order in memory
            layer.weight.data = layer.weight.data.contiguous()
    check_sharding(masked, gather, mesh.size(), meshes.size() // mesh.size())
    if gather == "masked":
        shard_gathering_masked(masked.model, mesh)
        return
    for model in (masked.model, teacher):
        if model is not None:
            for block in decoder_blocks(model).values():
                fully_shard(block, mesh=mesh)
            # By default torch keeps tensors outside of blocks gathered until backward. Without a
            # backward pass, steps would change the gathered copy, and be lost with it.
            always = True if strategy.effect.without_gradients else None
            fully_shard(model, mesh=mesh, reshard_after_forward=always)
