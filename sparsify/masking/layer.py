"""A linear layer that masks its weight each time it is called.

Data flow of one layer. Forward: the masker makes the masked weight, the layer multiplies its input
by it, and frees it. Only the input and the layer's own Parameters are kept for backward. Backward:
the masker makes the masked weight again, now with a graph. The masked weight gives the gradient of
the input. The gradient of the masked weight (output gradient times input) flows through the graph
to the masker's Parameters, and to the weight if it is trained. Between forward and backward, no
extra tensor of the weight's size exists.

Shapes: O out, I in, B any leading dimensions.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from sparsify.masking.linear import as_rows, as_stored, run_kind, weight_name
from sparsify.masking.masker import Draw, Masker, Masking
from sparsify.masking.pattern import NMPattern


class MaskScope:
    """What all masked layers of one model share.

    Attributes:
        masking: how the layers mask at present.
        grad: whether the current forward pass builds a graph.
        penalties: the layers' penalties in the current forward pass, 0-d, one per product.
        experts: how Transformers computed experts before they were masked, if they are.
    """

    def __init__(self) -> None:
        self.masking: Masking = "hard"
        self.grad = False
        self.penalties: list[Tensor] = []
        self.experts: Any = None

    @contextmanager
    def use(self, masking: Masking) -> Iterator[list[Tensor]]:
        """Run the model under ``masking``; yields the list to which layers add their penalties."""
        before = self.masking, self.grad, self.penalties
        self.masking, self.grad, self.penalties = masking, torch.is_grad_enabled(), []
        try:
            yield self.penalties
        finally:
            self.masking, self.grad, self.penalties = before

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[list[Tensor]]]:
        """For activation checkpointing: recomputation uses the draw of its own forward pass."""
        return nullcontext(), self.use(self.masking)


class Gather(Protocol):
    """Multiplies for a layer whose ranks mask their rows of the weight before they gather them."""

    def multiply(self, x_BI: Tensor) -> Tensor: ...


class _MaskedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        layer: "MaskedLinear",
        masking: Masking,
        row0: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BI, weight_OI, *tensors)
        ctx.layer, ctx.masking, ctx.row0 = layer, masking, row0
        masked_OI, penalty = _mask(layer, masking, row0, weight_OI, tensors)
        return layer.multiply(x_BI, masked_OI.to(x_BI.dtype), bias_O), penalty

    @staticmethod
    def backward(ctx: Any, grad_BO: Tensor, grad_penalty: Tensor) -> tuple[Any, ...]:
        x_BI, *saved = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _, _, *need_tensors = ctx.needs_input_grad
        needs = [need_weight, *need_tensors]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(need) for t, need in zip(saved, needs, strict=True)]
            masked_OI, penalty = _mask(ctx.layer, ctx.masking, ctx.row0, leaves[0], leaves[1:])
        grad_x = grad_BO @ masked_OI.detach().to(grad_BO.dtype) if need_x else None
        grad_bias = grad_BO.flatten(0, -2).sum(0) if need_bias else None
        grads: list[Tensor | None] = [None] * len(leaves)
        if masked_OI.requires_grad:
            grad_OI = grad_BO.flatten(0, -2).T @ x_BI.flatten(0, -2)
            outputs, seeds = [masked_OI], [grad_OI.to(masked_OI.dtype)]
            if penalty.requires_grad:
                outputs, seeds = [*outputs, penalty], [*seeds, grad_penalty]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(outputs, wanted, seeds, allow_unused=True))
            grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
        return grad_x, grads[0], grad_bias, None, None, None, *grads[1:]


def _mask(
    layer: "MaskedLinear", masking: Masking, row0: int, weight_OI: Tensor, tensors: Any
) -> tuple[Tensor, Tensor]:
    named = dict(zip(layer.masker_parameters(), tensors, strict=True))
    # Autocast is for the matmuls; masks are made in the precision of the masker's own tensors.
    with torch.autocast(weight_OI.device.type, enabled=False):
        return cast(
            tuple[Tensor, Tensor], functional_call(layer.masker, named, (weight_OI, masking, row0))
        )


class MaskedLinear(nn.Module):
    """Takes the place of a linear layer: holds its Parameters, under the same names, and a masker.

    Args:
        linear: the layer to replace; its Parameters are shared, not copied.
        masker: makes the mask.
        scope: the model's scope, shared by all its layers.
    """

    weight: Tensor
    bias: Tensor | None
    #: Whether the weight is stored with inputs before outputs.
    transposed = False
    #: Of how many experts it holds the matrices; None for a linear layer.
    experts: int | None = None

    def __init__(self, linear: nn.Module, masker: Masker, scope: MaskScope) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, linear.weight)
        self.register_parameter("bias", cast(nn.Parameter | None, linear.bias))
        self.kind = type(linear)
        self.masker = masker
        self.scope = scope
        self.gather: Gather | None = None

    @property
    def weight_OI(self) -> Tensor:
        """The weight as ``[O, I]``."""
        return self.as_rows(self.weight)

    def as_stored(self, values_OI: Tensor) -> Tensor:
        """View values of shape ``[O, I]`` in the layout in which the weight is stored."""
        return as_stored(values_OI, self.transposed, self.experts)

    def as_rows(self, stored: Tensor) -> Tensor:
        """View values in the layout in which the weight is stored as ``[O, I]``."""
        return as_rows(stored, self.transposed)

    def weight_name(self, name: str) -> str:
        """The name of the weight among the model's Parameters, where ``name`` is the layer's."""
        return weight_name(name, self.experts)

    def put(self, model: nn.Module, name: str) -> None:
        """Take the plain layer's place in a model."""
        model.set_submodule(name, self)

    def leave(self, model: nn.Module, name: str) -> None:
        """Give the place back to a plain layer with the same Parameters."""
        model.set_submodule(name, self.plain())

    def multiply(self, x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Multiply by the same operation as the plain layer, so that results are bit-identical."""
        return run_kind(self.kind, x_BI, weight_OI, bias_O)

    @property
    def out_features(self) -> int:
        return self.masker.shape[0]

    @property
    def in_features(self) -> int:
        return self.masker.shape[1]

    def masker_parameters(self) -> dict[str, nn.Parameter]:
        """The masker's Parameters by name, in the order in which autograd sees them."""
        return dict(self.masker.named_parameters())

    def forward(self, x_BI: Tensor) -> Tensor:
        if self.gather is not None:
            return self.gather.multiply(x_BI)
        return self.masked_product(x_BI, self.weight_OI, 0, self.masker_parameters().values())

    def masked_product(
        self, x_BI: Tensor, weight_OI: Tensor, row0: int, tensors: Iterable[Tensor]
    ) -> Tensor:
        """Multiply by rows of the weight, masked as the scope says.

        Args:
            x_BI: the input.
            weight_OI: the rows.
            row0: the number of the first of them in the whole weight.
            tensors: the masker's, of these rows.
        """
        masking, bias, device = self.scope.masking, self.bias, x_BI.device.type
        if masking == "dense":
            return self.multiply(x_BI, weight_OI, bias)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x_BI, bias = x_BI.to(dtype), None if bias is None else bias.to(dtype)
        y_BO, penalty = cast(Any, _MaskedProduct).apply(
            x_BI, weight_OI, bias, self, masking, row0, *tensors
        )
        if isinstance(masking, Draw):
            self.scope.penalties.append(penalty)
        return cast(Tensor, y_BO)

    def plain(self) -> nn.Module:
        """A plain layer with the same Parameters, to put back in this one's place."""
        linear = self.kind(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = cast(nn.Parameter, self.weight)
        linear.register_parameter("bias", cast(nn.Parameter | None, self.bias))
        return linear

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, pattern={self.masker.pattern}"


class MaskedConv1D(MaskedLinear):
    """A masked layer for GPT-2's ``Conv1D``, which stores its weight as ``[I, O]``."""

    transposed = True

    def multiply(self, x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        y = torch.addmm(cast(Tensor, bias_O), x_BI.reshape(-1, x_BI.shape[-1]), weight_OI.T)
        return y.view(*x_BI.shape[:-1], -1)

    def plain(self) -> nn.Module:
        with torch.device("meta"):
            conv = Conv1D(self.out_features, self.in_features)
        conv.weight = cast(nn.Parameter, self.weight)
        conv.bias = cast(nn.Parameter, self.bias)
        return conv


def local_rows(values_OI: Tensor) -> Tensor:
    """The rows of a weight or a masker's tensor that this process holds, as a view; all rows if
    nothing is sharded.

    A group lies within one row, so work that treats each group by itself needs only these rows.
    (This fails for weights stored as ``[I, O]``; the module refuses to shard them for training.)
    """
    return values_OI.to_local() if isinstance(values_OI, DTensor) else values_OI


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """The masked layers by qualified name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)
    }


def put_back(model: nn.Module, plain: Mapping[str, nn.Module]) -> None:
    """Give the places of all masked layers back to the modules that were there. Stacks of experts,
    which are no modules of their own, get their Parameters back.
    """
    for name, layer in masked_layers(model).items():
        if name in plain:
            model.set_submodule(name, plain[name])
        else:
            layer.leave(model, name)


def maskers(layers: Mapping[str, MaskedLinear]) -> dict[Masker, Tensor]:
    """Each masker once, with the weight ``[O, I]`` that it masks. Layers that share a weight also
    share its masker.
    """
    return {layer.masker: layer.weight_OI for layer in layers.values()}


def layer_patterns(model: nn.Module) -> dict[str, NMPattern]:
    """The pattern of every masked layer by qualified name."""
    return {name: layer.masker.pattern for name, layer in masked_layers(model).items()}


def base_parameters(model: nn.Module, all_names: bool = False) -> dict[str, nn.Parameter]:
    """The dense model's Parameters by name, without those of maskers.

    Args:
        model: the model, masked or not.
        all_names: list a shared Parameter under each of its names.
    """
    named = model.named_parameters(remove_duplicate=not all_names)
    return {name: parameter for name, parameter in named if ".masker." not in name}
