"""Ranks mask their rows first, and gather masked weights instead of weights and maskers' tensors.

Plain FSDP2 gathers a block's frozen weights and its maskers' tensors twice per step, and reduces
the gradients of the latter. That is 22 bytes per weight and step with bf16 weights and six fp32
logits for every four weights. Here each rank masks its own rows; the masked rows are gathered in
the weight's type, and the gradient of the masked weight returns to the rows and goes on through the
masker. That is 6 bytes, and each mask is made once instead of by every rank. The price: all ranks
share the same masks, while with plain FSDP2 each rank has its own draws.

Data flow of one layer. Before a block's forward, FSDP2 asks each shard what to gather. The masker
then masks the shard without a graph, under the masking of this forward pass (or, when the block is
gathered again for backward, of the forward pass that is being differentiated). The layer multiplies
by the gathered weight like any linear layer. Once the gradient is reduced to the shard, the masker
runs again with a graph and passes it to its own tensors; the weight's own gradient is dropped.

FSDP2 calls ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather`` of a shard that has them. PyTorch
does not promise to keep this, so each forward pass checks that they were called.

Shapes: O out, I in, B any leading dimensions.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call
from torch.nn.functional import pad

from sparsify.common.errors import SparsifyError
from sparsify.masking.layer import MaskedConv1D, MaskedLinear, masked_layers
from sparsify.masking.masker import Draw, Masking
from sparsify.masking.select import decoder_blocks
from sparsify.masking.sharded_rows import own_rows, sharded


def check_gather(strategy: Any) -> None:
    """Refuse a strategy that needs more than the gradient of one run at a time.

    Raises:
        SparsifyError: it trains weights, or each of its ranks learns from its own draws.
    """
    name, effect = type(strategy).__name__, strategy.effect
    if not effect.only_masks or effect.exchanges_draws:
        what = "needs other draws on each rank" if effect.exchanges_draws else "changes weights"
        raise SparsifyError(
            f"gather masked: {name} {what}, and this is for masks that learn by gradients over "
            "frozen weights; give --model.gather plain"
        )


def check_gatherable(name: str, layer: MaskedLinear, ranks: int) -> None:
    """Refuse a layer if some rank would not hold whole rows of it.

    Raises:
        SparsifyError: its weight is stored as ``[I, O]`` or is that of experts, or it has too few
            rows.
    """
    fix = "give --model.gather plain"
    if isinstance(layer, MaskedConv1D):
        raise SparsifyError(
            f"{name}: its weight is stored as [in, out], so that no rank holds whole rows to mask; "
            f"{fix}"
        )
    if layer.experts is not None:
        raise SparsifyError(f"{name}: experts are gathered as they are, and masked then; {fix}")
    rows = layer.masker.shape[0]
    if -(-rows // ranks) * (ranks - 1) >= rows:
        raise SparsifyError(
            f"{name}: some of {ranks} ranks would hold none of its {rows} rows; {fix}"
        )


def check_layers(model: nn.Module, ranks: int) -> None:
    """Refuse a model with a layer that cannot be gathered masked.

    Raises:
        SparsifyError: there is one; the message names it.
    """
    blocks = decoder_blocks(model)
    for name, layer in masked_layers(model).items():
        check_gatherable(name, layer, ranks)
        if not name.startswith(tuple(f"{block}." for block in blocks)):
            raise SparsifyError(
                f"{name}: it is in no decoder block, and stays gathered from forward to backward; "
                "give --model.gather plain"
            )


def shard_gathering_masked(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model whose blocks gather masked weights, and whose layers were checked."""
    layers, blocks = masked_layers(model), decoder_blocks(model)
    own = {parameter for layer in layers.values() for parameter in layer.masker.parameters()}
    for block in blocks.values():
        fully_shard(block, mesh=mesh, ignored_params=own)
    fully_shard(model, mesh=mesh, ignored_params=own)
    gathers = [MaskedGather(layer, mesh) for layer in layers.values()]
    for layer, gather in zip(layers.values(), gathers, strict=True):
        layer.gather = gather

    def hook(*_: Any) -> None:
        for gather in gathers:
            gather.hook()

    # Before FSDP2's own hook, which checks only once which methods its shards have.
    model.register_forward_pre_hook(hook, prepend=True)


class MaskedGather:
    """Does one layer's part when its block is gathered.

    Make it when the block is sharded without the masker's Parameters; they are sharded here.

    Args:
        layer: the layer; its weight is sharded.
        mesh: the ranks that share it.
    """

    def __init__(self, layer: MaskedLinear, mesh: DeviceMesh) -> None:
        self._layer, self._mesh = layer, mesh
        self._row0, self._rows = own_rows(layer, mesh)
        self._before_backward: Masking = "hard"
        self._gathered: Masking | None = None
        self._penalty = torch.zeros((), dtype=torch.float32)
        self._penalty_grad: Tensor | None = None
        for name, parameter in list(layer.masker.named_parameters()):
            owner, _, own_name = name.rpartition(".")
            shard = distribute_tensor(parameter.data, mesh, [Shard(0)])
            new = nn.Parameter(shard, requires_grad=parameter.requires_grad)
            setattr(layer.masker.get_submodule(owner), own_name, new)
        self._learns = any(p.requires_grad for p in layer.masker.parameters())
        weight = cast(nn.Parameter, layer.weight)
        if self._learns:
            # FSDP2 reduces a gradient only if it is required; no optimizer gets this one.
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(self._route)

    def hook(self) -> None:
        """Make FSDP2 call this object, before every forward: moving a model makes new shards."""
        shard: Any = cast(Any, self._layer.weight)._local_tensor
        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = self._give, self._take

    def multiply(self, x_BI: Tensor) -> Tensor:
        """Multiply by the gathered weight, which is masked already."""
        layer, masking = self._layer, self._layer.scope.masking
        if self._gathered != masking and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                f"the weight of {layer.masker.name} was gathered under {self._gathered}, and is "
                f"used under {masking}: this version of PyTorch gathers otherwise"
            )
        if isinstance(masking, Draw):
            penalty = self._penalty.detach()
            if torch.is_grad_enabled() and self._learns:
                penalty.requires_grad_().register_hook(self._keep_penalty_grad)
            layer.scope.penalties.append(penalty)
        return layer.multiply(x_BI, layer.weight_OI, layer.bias)

    def _keep_penalty_grad(self, grad: Tensor) -> None:
        self._penalty_grad = grad

    @torch.no_grad()
    def _give(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        """This rank's masked rows, padded to the largest number of rows that a rank has."""
        scope = self._layer.scope
        # Backward gathers a block again, outside of the scope of its forward pass.
        in_backward = torch._C._current_graph_task_id() != -1
        masking = self._before_backward if in_backward else scope.masking
        if not in_backward:
            self._gathered = masking
            if isinstance(masking, Draw) and scope.grad:
                self._before_backward = masking
        weight_OI = self._weight()
        if masking != "dense":
            weight_OI, penalty = self._mask(weight_OI, masking, self._tensors())
            if not in_backward and isinstance(masking, Draw):
                dist.all_reduce(penalty, group=self._mesh.get_group())
                self._penalty = penalty
        most = -(-self._layer.masker.shape[0] // self._mesh.size())
        return (pad(weight_OI, (0, 0, 0, most - self._rows)),), None

    def _take(
        self, outputs: tuple[Tensor, ...], metadata: Any, dtype: Any, *, out: Any = None
    ) -> Any:
        """Return the gathered tensor as the weight; a second gather writes to the same memory."""
        return None if out is not None else (outputs[0], outputs)

    def _route(self, weight: Any) -> None:
        """Pass the gradient of the masked weight on to the masker's tensors."""
        grad_OI, weight.grad = weight.grad.to_local(), None
        named = dict(self._layer.masker.named_parameters())
        wanted = [name for name, parameter in named.items() if parameter.requires_grad]
        tensors = self._tensors()
        for name in wanted:
            tensors[name] = tensors[name].detach().requires_grad_()
        with torch.enable_grad():
            masked_OI, penalty = self._mask(self._weight(), self._before_backward, tensors)
            outputs, seeds = [masked_OI], [grad_OI.to(masked_OI.dtype)]
            if penalty.requires_grad and self._penalty_grad is not None:
                outputs, seeds = [*outputs, penalty], [*seeds, self._penalty_grad]
            grads = torch.autograd.grad(
                outputs, [tensors[name] for name in wanted], seeds, allow_unused=True
            )
        for name, grad in zip(wanted, grads, strict=True):
            if grad is not None:
                _accumulate(named[name], grad)

    def _weight(self) -> Tensor:
        return cast(DTensor, self._layer.weight.detach()).to_local()

    def _tensors(self) -> dict[str, Tensor]:
        named = self._layer.masker.named_parameters()
        return {name: cast(DTensor, p.detach()).to_local() for name, p in named}

    def _mask(
        self, weight_OI: Tensor, masking: Masking, tensors: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        arguments = (weight_OI, masking, self._row0)
        with torch.autocast(weight_OI.device.type, enabled=False):
            return cast(
                tuple[Tensor, Tensor], functional_call(self._layer.masker, tensors, arguments)
            )


def _accumulate(parameter: nn.Parameter, grad: Tensor) -> None:
    own = cast(DTensor, parameter)
    if own.grad is None:
        own.grad = sharded(grad, own)
    else:
        cast(DTensor, own.grad).to_local().add_(grad)
    # Autograd and FSDP2 call these hooks where they accumulate a gradient.
    for hook in (cast(Any, parameter)._post_accumulate_grad_hooks or {}).values():
        hook(parameter)
