"""Masks of layers whose tensors are sharded by rows.

FSDP2 gives every rank consecutive rows of each tensor: the same rows of a layer's weight and of all
its masker's tensors, since these have O as their first dimension. So each rank makes the masks of
its own rows. Ranks then send each other one candidate number per group, not the fp32 tensors from
which the masks are made.

Shapes: O out, I in, G groups. "rank" means a process, but in ``mask_ranks`` a candidate's number.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.func import functional_call

from sparsify.masking.layer import MaskedLinear
from sparsify.masking.masker import Masker


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its rows; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def rows_of(tensor: DTensor) -> tuple[int, int]:
    """Of a sharded tensor: the index of this rank's first row, and how many rows it holds."""
    shape, start = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return start[0], shape[0]


def first_row(tensor: Tensor) -> int:
    """The index, in the whole tensor, of the first row that this process holds."""
    return rows_of(tensor)[0] if isinstance(tensor, DTensor) else 0


def sharded(rows: Tensor, like: DTensor) -> DTensor:
    """A DTensor sharded as ``like`` is, of which each rank gives its own ``rows``."""
    return DTensor.from_local(
        rows.to(like.to_local().device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def hard_mask(layer: MaskedLinear) -> Tensor:
    """The layer's whole hard mask, bool ``[O, I]``, on every rank."""
    mesh = _mesh(layer)
    if mesh is None:
        return layer.masker.hard_mask(layer.weight_OI)
    return layer.masker.pattern.unrank(_gathered_ranks(layer, mesh))


@torch.no_grad()
def mask_ranks(layer: MaskedLinear) -> Tensor:
    """The whole hard mask as one candidate number per group, ``[O, G]``, on every rank."""
    mesh = _mesh(layer)
    if mesh is None:
        return layer.masker.pattern.rank(layer.masker.hard_mask(layer.weight_OI), trusted=True)
    return _gathered_ranks(layer, mesh)


@torch.no_grad()
def shipped(layer: MaskedLinear) -> Tensor | None:
    """The layer's whole weight as it is exported, ``[O, I]``, on every rank. None if the layer is
    sharded and its masker only masks: weight and mask then determine it.
    """
    mesh = _mesh(layer)
    if mesh is None:
        return layer.masker.harden(layer.weight_OI)
    if type(layer.masker).harden is Masker.harden:
        return None
    row0, count = own_rows(layer, mesh)
    tensors, weight_OI = _own_tensors(layer.masker), _own_weight(layer, row0, count)
    if count:
        weight_OI = _call(layer.masker, "harden", tensors, weight_OI, row0)
    return _gathered(weight_OI, layer, mesh)


@torch.no_grad()
def metrics(layers: Mapping[str, MaskedLinear]) -> dict[str, dict[str, Tensor]]:
    """The maskers' metrics by layer, over all rows. For sharded layers this is the mean over ranks,
    weighted by their numbers of rows.
    """
    found = {name: _local_metrics(layer) for name, layer in layers.items()}
    mesh = next((m for layer in layers.values() if (m := _mesh(layer)) is not None), None)
    places = [(name, metric) for name, row in found.items() for metric in row]
    if mesh is None or not places:
        return found
    values = torch.stack([found[name][metric].float() for name, metric in places])
    dist.all_reduce(values, group=mesh.get_group())
    for (name, metric), value in zip(places, values.unbind(), strict=True):
        found[name][metric] = value
    return found


@torch.no_grad()
def retained_norms(layers: Mapping[str, MaskedLinear]) -> dict[str, Tensor]:
    """Two l1 norms by layer, over all rows, fp64 ``[2]``: of the weights that the hard mask keeps,
    and of the N largest weights of every group.
    """
    norms = {name: _local_norms(layer) for name, layer in layers.items()}
    mesh = next((m for layer in layers.values() if (m := _mesh(layer)) is not None), None)
    if mesh is None:
        return norms
    values = torch.stack(list(norms.values()))
    dist.all_reduce(values, group=mesh.get_group())
    return dict(zip(norms, values.unbind(), strict=True))


def _local_norms(layer: MaskedLinear) -> Tensor:
    masker, mesh = layer.masker, _mesh(layer)
    if mesh is None:
        weight_OI = layer.weight_OI.detach()
        mask_OI = masker.hard_mask(weight_OI)
    else:
        row0, count = own_rows(layer, mesh)
        weight_OI = _own_weight(layer, row0, count)
        if not count:
            return weight_OI.new_zeros(2, dtype=torch.float64)
        mask_OI = _call(masker, "hard_mask", _own_tensors(masker), weight_OI, row0)
    size_OI = weight_OI.abs()
    masks = (mask_OI, masker.pattern.top(size_OI))
    return torch.stack([torch.where(mask, size_OI, 0).sum(dtype=torch.float64) for mask in masks])


def _mesh(layer: MaskedLinear) -> DeviceMesh | None:
    """The mesh over which the layer is sharded; None during its forward, when FSDP2 gathers it."""
    return layer.weight.device_mesh if isinstance(layer.weight, DTensor) else None


def own_rows(layer: MaskedLinear, mesh: DeviceMesh) -> tuple[int, int]:
    """The index of the first of a layer's rows that this rank holds, and how many it holds."""
    shape, start = compute_local_shape_and_global_offset(layer.masker.shape, mesh, [Shard(0)])
    return start[0], shape[0]


def _gathered_ranks(layer: MaskedLinear, mesh: DeviceMesh) -> Tensor:
    masker, (row0, count) = layer.masker, own_rows(layer, mesh)
    tensors, weight_OI = _own_tensors(masker), _own_weight(layer, row0, count)
    groups = masker.shape[1] // masker.pattern.m
    ranks_OG = weight_OI.new_empty(0, groups, dtype=masker.pattern.rank_dtype)
    if count:
        mask_OI = _call(masker, "hard_mask", tensors, weight_OI, row0)
        ranks_OG = masker.pattern.rank(mask_OI)
    return _gathered(ranks_OG, layer, mesh)


def _gathered(rows: Tensor, layer: MaskedLinear, mesh: DeviceMesh) -> Tensor:
    """All ranks' rows of a matrix ``[O, any]``."""
    shape = torch.Size((layer.masker.shape[0], rows.shape[1]))
    whole_rows = DTensor.from_local(
        rows.contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1)
    )
    return whole_rows.full_tensor()


def _own_tensors(masker: Masker) -> dict[str, Tensor]:
    """The masker's tensors: this rank's rows if of the layer's size, others gathered."""
    return {
        name: p.to_local() if isinstance(p, DTensor) and p.shape[0] == masker.shape[0] else whole(p)
        for name, p in masker.named_parameters()
    }


def _own_weight(layer: MaskedLinear, row0: int, count: int) -> Tensor:
    weight_OI = cast(DTensor, layer.weight_OI.detach())
    if weight_OI.placements[0] == Shard(0):
        return weight_OI.to_local()
    # A weight stored as [I, O] is sharded by inputs.
    return weight_OI.full_tensor()[row0 : row0 + count]


def _local_metrics(layer: MaskedLinear) -> dict[str, Tensor]:
    """The metrics of this rank's rows, times these rows' share of all rows."""
    mesh = _mesh(layer)
    if mesh is None:
        return layer.masker.metrics()
    _, count = own_rows(layer, mesh)
    own = _call(layer.masker, "metrics", _own_tensors(layer.masker))
    share = count / layer.masker.shape[0]
    if not count:  # the mean over no rows is not a number
        return {name: torch.zeros_like(value) for name, value in own.items()}
    return {name: value * share for name, value in own.items()}


class _Method(nn.Module):
    def __init__(self, masker: Masker, name: str) -> None:
        super().__init__()
        self.masker, self.name = masker, name

    def forward(self, *args: Any) -> Any:
        return getattr(self.masker, self.name)(*args)


def _call(masker: Masker, name: str, tensors: Mapping[str, Tensor], *args: Any) -> Any:
    """Call a masker's method with other tensors in place of its Parameters."""
    named = {f"masker.{key}": value for key, value in tensors.items()}
    return functional_call(_Method(masker, name), named, args)
