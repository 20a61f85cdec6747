"""Gives modules other values, another forward or another device for a while."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsify.masking.experts import MaskedExperts


class ExpertValues(NamedTuple):
    """The values of a stack of experts, made for each when it is used.

    Attributes:
        layer: whose they are.
        of: gives an expert's ``[O, I]`` by its number.
    """

    layer: MaskedExperts
    of: Callable[[int], Tensor]


#: The values of a Parameter.
Values = Tensor | ExpertValues


@contextmanager
def replaced(module: nn.Module, weights: Mapping[str, Values]) -> Iterator[None]:
    """Use other values for some Parameters, given by name within the module."""
    with ExitStack() as stack:
        for name, weight in weights.items():
            if isinstance(weight, ExpertValues):
                stack.enter_context(weight.layer.standing_in(weight.of))
            else:
                parameter = module.get_parameter(name)
                stack.callback(setattr, parameter, "data", parameter.data)
                parameter.data = weight.to(parameter.device)
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have a call of the module run another function."""
    own = vars(module).get("forward")  # that of a library which wrapped this one object
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def moved(
    modules: Iterable[nn.Module], device: torch.device, recurse: bool = True
) -> Iterator[None]:
    """Move the modules' tensors to a device, and afterwards each back to where it was."""
    places: list[tuple[nn.Module, torch.device]] = []
    try:
        for module in modules:
            for part in module.modules() if recurse else [module]:
                tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
                if tensors and tensors[0].device != device:
                    places.append((part, tensors[0].device))
                    part._apply(lambda t: t.to(device), recurse=False)
        yield
    finally:
        for part, place in places:
            part._apply(lambda t, place=place: t.to(place), recurse=False)


@contextmanager
def moved_when_called(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Move each module to a device while it runs. Its forward hooks that were there before find it
    on the device.
    """
    running: list[Any] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(moved([module], device))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = []
    try:
        for module in modules:
            hooks.append(module.register_forward_pre_hook(enter, prepend=True))
            hooks.append(module.register_forward_hook(leave))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while running:  # those that an exception ended
            leave()
