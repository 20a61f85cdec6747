"""Experts whose matrices are masked: a mixture-of-experts block holds them as one Parameter.

All matrices of such a stack are masked as one matrix ``[E O, I]``, in which expert e has O rows
from row ``e O`` on, so that one masker, one mask and one entry in every file serve for all.

The Parameter stays where it is, and the block computes as its own class says. Where that takes the
matrix of an expert (``self.down_proj[3]``) it gets an object that stands for the matrix in a
product, and multiplies by it masked, as a masked linear layer does. So the masked matrix of one
expert exists at a time, and each expert's input can be seen.

Who owns what: the block holds the Parameter and the masked layer, both under one name, by which
the block finds the layer while it runs, and all others the Parameter. Meanwhile the layer holds
views of every expert's rows, made once, so that autograd gathers the experts' gradients in one
tensor.

Shapes: E experts, O out and I in of one expert, T tokens, B any leading dimensions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.common.errors import SparsifyError
from sparsify.masking.layer import MaskedConv1D, MaskedLinear, MaskScope
from sparsify.masking.linear import Stack
from sparsify.masking.masker import Masker

T = TypeVar("T")
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


class MaskedExperts(MaskedLinear):
    """Stands in a block for the matrices of its experts. Called with (x ``[B, I]``, an expert's
    number), it multiplies by that expert's matrix.

    Args:
        stack: the Parameter to mask.
        masker: makes the masks, for ``[E O, I]``.
        scope: the model's scope.
    """

    experts: int

    def __init__(self, stack: Stack, masker: Masker, scope: MaskScope) -> None:
        nn.Module.__init__(self)
        self.stack, self.masker, self.scope, self.gather = stack, masker, scope, None
        self.bias, self.transposed = None, stack.transposed
        self.experts = stack.weight.shape[0]
        self._stand_in: Callable[[int], Tensor] | None = None
        self._rows: list[list[Tensor]] | None = None
        self._hooks: list[Any] = []
        if stack.transposed:  # in memory as [E, O, I], so that its rows can be viewed
            stack.weight.data = stack.weight.data.mT.contiguous().mT

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The Parameter, ``[E, O, I]`` or ``[E, I, O]``."""
        return self.stack.weight

    @property
    def shape(self) -> torch.Size:
        """Of the Parameter, as the block may ask for it."""
        return self.weight.shape

    def put(self, model: nn.Module, name: str) -> None:
        owner, key = self.stack.owner, self.stack.key
        owner._modules[key] = self
        if self.scope.experts is None and hasattr(owner, "is_transposed"):
            # Others than the class's own forward read all matrices at once.
            self.scope.experts = cast(Any, model).get_experts_implementation()
            cast(Any, model).set_experts_implementation("eager")
        self._hooks = [
            owner.register_forward_pre_hook(self._enter),
            owner.register_forward_hook(self._exit, always_call=True),
        ]

    def leave(self, model: nn.Module, name: str) -> None:
        owner, key = self.stack.owner, self.stack.key
        del owner._modules[key]
        for hook in self._hooks:
            hook.remove()
        left = any(isinstance(module, MaskedExperts) for module in model.modules())
        if self.scope.experts is not None and not left:
            cast(Any, model).set_experts_implementation(self.scope.experts)
            self.scope.experts = None
        if self.transposed:
            self.stack.weight.data = self.stack.weight.data.contiguous()

    def _enter(self, *_: Any) -> None:
        self.stack.owner.__dict__[self.stack.key] = self  # found before the Parameter of this name

    def _exit(self, *_: Any) -> None:
        self.stack.owner.__dict__.pop(self.stack.key, None)
        self._rows = None

    def rows(self, expert: int) -> slice:
        """Where an expert's rows lie among all."""
        count = self.masker.shape[0] // self.experts
        return slice(expert * count, (expert + 1) * count)

    def _by_expert(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each expert; a tensor that has others than the layer is used by all."""
        if tensor.shape[:1] != self.masker.shape[:1]:
            return [tensor] * self.experts
        return list(tensor.unflatten(0, (self.experts, -1)).unbind())

    def forward(self, x_BI: Tensor, expert: int) -> Tensor:  # type: ignore[override]
        if self._stand_in is not None:
            return self.multiply(x_BI, self._stand_in(expert), None)
        if self._rows is None:
            whole = [self.weight_OI, *self.masker_parameters().values()]
            self._rows = [self._by_expert(tensor) for tensor in whole]
        weight_OI, *tensors = (rows[expert] for rows in self._rows)
        return self.masked_product(x_BI, weight_OI, self.rows(expert).start, tensors)

    def multiply(self, x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        if self.transposed:  # in memory as in the plain block, for the same bits
            return x_BI @ weight_OI.T.contiguous()
        return F.linear(x_BI, weight_OI)

    def plain(self) -> nn.Module:
        raise NotImplementedError("experts are no layer of their own")

    @contextmanager
    def standing_in(self, weights: Callable[[int], Tensor]) -> Iterator[None]:
        """Within this context multiply by other matrices ``[O, I]``, given by expert."""
        self._stand_in = weights
        try:
            yield
        finally:
            self._stand_in = None

    # -- as the block sees it ----------------------------------------------------------------------

    def __getitem__(self, expert: Any) -> "_Matrix":
        try:
            number = range(self.experts)[expert]
        except TypeError:
            number = None
        if not isinstance(number, int):
            raise _unknown(self, "a selection of several at once")
        return _Matrix(self, number)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if hasattr(Tensor, name):
                raise _unknown(self, name) from None
            raise

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        if function is torch.bmm and not kwargs and isinstance(args[1], cls):
            x_EBI, layer = args
            layer.check_used(transposed=True)
            return torch.stack([layer(x_BI, e) for e, x_BI in enumerate(x_EBI)])
        raise _unknown(next(a for a in args if isinstance(a, cls)), function)

    def check_used(self, transposed: bool) -> None:
        """Refuse a product in the other layout than the Parameter's."""
        if transposed != self.transposed:
            raise _unknown(self, "a product in the other layout")


class _Matrix:
    """Stands for the matrix of one expert in a product."""

    def __init__(self, layer: MaskedExperts, expert: int) -> None:
        self.layer, self.expert = layer, expert

    def __getattr__(self, name: str) -> Any:
        raise _unknown(self.layer, name) if hasattr(Tensor, name) else AttributeError(name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        values = list(args)
        if function is F.linear:
            named = kwargs or {}
            x_BI = values[0] if values else named["input"]
            matrix = values[1] if len(values) > 1 else named["weight"]
            bias = values[2] if len(values) > 2 else named.get("bias")
            matrix.layer.check_used(transposed=False)
            y_BO = matrix.layer(x_BI, matrix.expert)
            return cast(Tensor, y_BO if bias is None else y_BO + bias)
        if function in _MATMUL and len(values) == 2 and isinstance(values[1], cls):
            values[1].layer.check_used(transposed=True)
            return cast(Tensor, values[1].layer(values[0], values[1].expert))
        raise _unknown(next(a for a in values if isinstance(a, cls)).layer, function)


class _Unknown(SparsifyError, AttributeError):
    """Also an AttributeError, for code that asks whether there is an attribute."""


def _unknown(layer: MaskedExperts, use: Any) -> SparsifyError:
    what = getattr(use, "__name__", use)
    return _Unknown(
        f"{layer.masker.name}: {type(layer.stack.owner).__name__} uses its experts' matrices in "
        f"{what}, which no mask is known for; leave them dense with --model.exclude "
        f"'*.{layer.stack.key}'"
    )


def masked(linear: nn.Module | Stack, masker: Masker, scope: MaskScope) -> MaskedLinear:
    """The masked layer that takes the place of a linear layer, or of a stack of experts."""
    if isinstance(linear, Stack):
        return MaskedExperts(linear, masker, scope)
    kind = MaskedLinear if isinstance(linear, nn.Linear) else MaskedConv1D
    return kind(linear, masker, scope)


class Expert:
    """One expert's matrix, as calibration sees it: like a masked layer of its own.

    Attributes:
        stack: the name of the layer that holds all experts of the block.
        layer: that layer.
        number: of the expert.
        rows: the expert's rows among all.
        masker: has the name, shape (O, I) and pattern of this matrix, and no mask.
    """

    def __init__(self, stack: str, layer: MaskedExperts, number: int) -> None:
        self.stack, self.layer, self.number = stack, layer, number
        self.rows = layer.rows(number)
        shape = self.rows.stop - self.rows.start, layer.masker.shape[1]
        self.masker = Masker(f"{stack}.{number}", shape, layer.masker.pattern)

    @property
    def weight_OI(self) -> Tensor:
        """The weight as ``[O, I]``."""
        return self.layer.weight_OI[self.rows]


def matrices(layers: Mapping[str, MaskedLinear]) -> dict[str, MaskedLinear | Expert]:
    """The layers by name, with every expert by itself; the third of ``mlp.experts.down_proj`` is
    ``mlp.experts.down_proj.2``.
    """
    found: dict[str, MaskedLinear | Expert] = {}
    for name, layer in layers.items():
        if isinstance(layer, MaskedExperts):
            found |= {f"{name}.{e}": Expert(name, layer, e) for e in range(layer.experts)}
        else:
            found[name] = layer
    return found


def gathered(
    items: Iterable[tuple[str, T]], layers: Mapping[str, MaskedLinear]
) -> Iterator[tuple[str, list[T]]]:
    """Collect what belongs to one layer: (its name, one item, or one for every expert in order).

    Args:
        items: by the names of :func:`matrices`; those of one layer's experts in any order.
        layers: the layers by name.

    Raises:
        SparsifyError: there is an item for some of a layer's experts only.
    """
    waiting: dict[str, dict[int, T]] = {}
    for name, item in items:
        if name in layers:
            yield name, [item]
            continue
        stack, _, number = name.rpartition(".")
        found = waiting.setdefault(stack, {})
        found[int(number)] = item
        if len(found) == cast(MaskedExperts, layers[stack]).experts:
            found = waiting.pop(stack)
            yield stack, [found[e] for e in sorted(found)]
    for stack, found in waiting.items():
        raise SparsifyError(
            f"{stack}: there are results for {len(found)} of "
            f"{cast(MaskedExperts, layers[stack]).experts} experts; calibrate must yield all"
        )
