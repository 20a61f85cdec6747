"""Runs decoder blocks one by one over all windows of calibration text.

One buffer holds the input of the present block for all windows; the block's output then replaces
it. Each block is called with the other arguments that the model itself gave it, which were recorded
in one pass over the first window. So any architecture will do whose blocks pass one tensor of
hidden states from one to the next. The arguments are valid for all windows, as these have the same
length and no padding.

Shapes: B batch (of one window), S windows, T tokens, H hidden size.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.common.errors import SparsifyError


class _Call(NamedTuple):
    """The arguments with which the model calls a block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):
    """Ends a forward pass of the model from inside."""


class Activations:
    """The input of one block for all windows.

    Args:
        model: the model, on CPU or on ``device``.
        blocks: its decoder blocks by qualified name, in order.
        windows_ST: token ids, int64.
        device: where to compute; modules that are elsewhere are moved there while they are used.
        offload: keep the buffer in main memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Mapping[str, nn.Module],
        windows_ST: Tensor,
        device: torch.device,
        offload: bool,
    ) -> None:
        self._model, self._blocks = model, blocks
        self._windows_ST, self._device = windows_ST, device
        self._keep_on = torch.device("cpu") if offload else device
        self._calls: dict[str, _Call] = {}
        inside = {id(m) for block in blocks.values() for m in block.modules()}
        shell = [m for m in model.modules() if id(m) not in inside]
        with moved(shell, device, recurse=False):
            self._catch_calls()
            self._hidden_STH = self._catch_hidden()

    def run(self, block: str, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Run a block over all windows and yield its output for each, ``[1, T, H]``.

        Args:
            block: the block whose input the buffer holds.
            weights: values to use instead of the block's Parameters, by name within the block.
        """
        call = self._calls[block]
        with _replaced(self._blocks[block], weights):
            for hidden_TH in self._hidden_STH:
                hidden_BTH = hidden_TH[None].to(self._device)
                output = self._blocks[block](hidden_BTH, *call.args, **call.kwargs)
                yield _hidden_of(block, output)

    def advance(self, block: str, weights: Mapping[str, Tensor]) -> None:
        """Replace the input of a block by its output; arguments as for :meth:`run`."""
        finite = torch.ones((), dtype=torch.bool, device=self._device)
        for index, output_BTH in enumerate(self.run(block, weights)):
            finite &= output_BTH.isfinite().all()
            self._hidden_STH[index] = output_BTH[0]
        if not finite.all():
            raise _not_finite(f"the output of {block}", self._hidden_STH.dtype)

    def _catch_calls(self) -> None:
        """Run the first window through all blocks and record the arguments of each."""
        names = list(self._blocks)
        before: dict[str, Tensor] = {}

        def enter(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden, self._calls[name] = _split(name, args, kwargs)
            _check_finite(f"what enters {name}", hidden)
            if before and not torch.equal(before["output"], hidden):
                raise _not_replayable(
                    name, "what enters it is not what the block before it returned"
                )

        def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
            before["output"] = _hidden_of(name, output)
            _check_finite(f"the output of {name}", before["output"])
            if name == names[-1]:
                raise _Stop

        with ExitStack() as stack:
            for name, module in self._blocks.items():
                moves = moved([module], self._device)
                for hook in (
                    module.register_forward_pre_hook(lambda *_, m=moves: _ignore(m.__enter__())),
                    module.register_forward_pre_hook(
                        lambda m, a, k, name=name: enter(name, m, a, k), with_kwargs=True
                    ),
                    module.register_forward_hook(
                        lambda *_, m=moves: _ignore(m.__exit__(None, None, None))
                    ),
                    module.register_forward_hook(lambda m, a, o, name=name: leave(name, m, a, o)),
                ):
                    stack.callback(hook.remove)
            self._run_model(0)
        if missing := [name for name in names if name not in self._calls]:
            raise _not_replayable(missing[0], "the model's forward pass does not call it")

    def _catch_hidden(self) -> Tensor:
        """Record the input of the first block for all windows."""
        first = next(iter(self._blocks))
        caught: list[Tensor] = []

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            caught.append(_split(first, args, kwargs)[0][0].to(self._keep_on))
            raise _Stop

        hook = self._blocks[first].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            for index in range(len(self._windows_ST)):
                self._run_model(index)
        finally:
            hook.remove()
        return torch.stack(caught)

    def _run_model(self, index: int) -> None:
        tokens = self._windows_ST[index : index + 1].to(self._device)
        try:
            self._model(input_ids=tokens, use_cache=False)
        except _Stop:
            return


def _split(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    if args and isinstance(args[0], Tensor):
        return args[0], _Call(args[1:], kwargs)
    hidden = kwargs.get("hidden_states")
    if isinstance(hidden, Tensor):
        return hidden, _Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"})
    raise _not_replayable(name, "it is called without a tensor of hidden states")


def _hidden_of(name: str, output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise _not_replayable(name, f"it returns {type(hidden).__name__}, not hidden states")
    return hidden


def _not_replayable(name: str, reason: str) -> SparsifyError:
    return SparsifyError(
        f"{name} cannot be calibrated by itself: {reason}; layerwise calibration needs blocks that "
        "pass one tensor of hidden states from one to the next: take a strategy that needs no "
        "activations"
    )


def _check_finite(what: str, hidden: Tensor) -> None:
    """Refuse activations that are not finite, as no statistic can be made of them."""
    if not bool(hidden.isfinite().all()):
        raise _not_finite(what, hidden.dtype)


def _not_finite(what: str, dtype: torch.dtype) -> SparsifyError:
    fix = (
        "float16 holds nothing above 65504: give --model.dtype bfloat16 or float32"
        if dtype == torch.float16
        else "give a model whose activations are finite, or --model.dtype float32"
    )
    name = str(dtype).removeprefix("torch.")
    return SparsifyError(f"{what} is not finite in {name} on calibration text; {fix}")


def _ignore(_: Any) -> None:
    """Drop the value: what a hook returns would replace the module's input or output."""


@contextmanager
def _replaced(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Use other values for some Parameters while the block runs."""
    before = {name: block.get_parameter(name).data for name in weights}
    try:
        for name, weight in weights.items():
            block.get_parameter(name).data = weight
        yield
    finally:
        for name, weight in before.items():
            block.get_parameter(name).data = weight


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
