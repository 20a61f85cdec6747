"""Which modules of a model hold matrices that can be masked: linear layers, and stacks of experts.

Shapes: B any leading dimensions, O out, I in, E experts.
"""

from collections.abc import Container, Hashable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsify.models.expert_layout import is_transposed


@dataclass(frozen=True)
class Stack:
    """A Parameter with the matrices of all experts of a block, before it is masked.

    Attributes:
        owner: the module that holds it.
        key: its name there.
        transposed: whether it is ``[E, I, O]`` and not ``[E, O, I]``.
    """

    owner: nn.Module
    key: str
    transposed: bool

    @property
    def weight(self) -> nn.Parameter:
        """The Parameter, also where a masked layer stands in its place."""
        return cast(nn.Parameter, self.owner._parameters[self.key])


def run_kind(kind: type, x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """What a class of linear layers computes with these tensors as its Parameters."""
    parameters = SimpleNamespace(weight=weight_OI, bias=bias_O)
    return cast(Tensor, cast(Any, kind).forward(parameters, x_BI))


@cache
def _is_linear(kind: type[nn.Module]) -> bool:
    """Whether a class is ``nn.Linear``, or a subclass that keeps nothing else and computes the
    same, as Falcon's does, which is tried with numbers that are exact.
    """
    own: Any = kind
    if not issubclass(kind, nn.Linear) or own.__init__ is not nn.Linear.__init__:
        return False
    if own.forward is nn.Linear.forward:
        return True
    x, weight, bias = (torch.arange(float(n), device="cpu") for n in (8, 12, 3))
    x_BI, weight_OI = x.view(1, 2, 4), weight.view(3, 4)
    try:
        return all(
            torch.equal(run_kind(kind, x_BI, weight_OI, b), F.linear(x_BI, weight_OI, b))
            for b in (None, bias)
        )
    except Exception:  # it reads more than its weight and bias
        return False


def can_mask(module: nn.Module) -> bool:
    """Whether a masked layer can replace the module: its class is ``Conv1D``, ``nn.Linear``, or a
    subclass of the latter that computes the same.
    """
    return type(module) is Conv1D or _is_linear(cast(Hashable, type(module)))


def stacks(module: nn.Module) -> dict[str, Stack]:
    """The stacks of experts' matrices that a module holds itself, by their names there. Empty if
    its class does not tell how they are stored.
    """
    transposed = is_transposed(module)
    if transposed is None:
        return {}
    return {
        key: Stack(module, key, transposed)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and parameter.is_floating_point()
    }


def maskable(model: nn.Module) -> dict[str, nn.Module | Stack]:
    """All that a masked layer can replace, by qualified name: linear layers, and stacks of experts
    under the names of their Parameters.
    """
    found: dict[str, nn.Module | Stack] = {}
    for name, module in model.named_modules():
        if can_mask(module):
            found[name] = module
        else:
            found |= {f"{name}.{key}": stack for key, stack in stacks(module).items()}
    return found


def elsewhere(model: nn.Module, layers: Container[str]) -> dict[int, str]:
    """By the ``id`` of a Parameter, the module that holds it, if it is none of ``layers``."""
    return {
        id(parameter): name
        for name, module in model.named_modules()
        if name not in layers
        for key, parameter in module.named_parameters(recurse=False)
        if f"{name}.{key}" not in layers
    }


def weight_name(name: str, experts: int | None) -> str:
    """The name of a layer's weight among the model's Parameters. A stack of experts is named like
    its Parameter; ``experts`` is None for a linear layer.
    """
    return f"{name}.weight" if experts is None else name


def as_rows(stored: Tensor, transposed: bool) -> Tensor:
    """View a weight as it is stored as ``[O, I]``, experts' matrices one below the other: all that
    masks know. ``transposed`` is that of :class:`Stack`, or of a Conv1D.
    """
    values = stored.mT if transposed else stored
    return values.flatten(0, 1) if values.ndim == 3 else values


def as_stored(values_OI: Tensor, transposed: bool, experts: int | None) -> Tensor:
    """The reverse of :func:`as_rows`; ``experts`` is None where there are none."""
    values = values_OI if experts is None else values_OI.unflatten(0, (experts, -1))
    return values.mT if transposed else values


def linear_shape(linear: nn.Module | Stack) -> tuple[int, int]:
    """(O, I) of a plain linear layer; of a stack, whose matrices stand one below the other, (E O,
    I).
    """
    weight = cast(Tensor, linear.weight)
    if isinstance(linear, Stack):
        experts, rows, columns = weight.mT.shape if linear.transposed else weight.shape
        return experts * rows, columns
    rows, columns = weight.shape if isinstance(linear, nn.Linear) else reversed(weight.shape)
    return int(rows), int(columns)
