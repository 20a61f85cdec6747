"""Runs decoder blocks one by one over all windows of calibration text.

Nothing is assumed of the arguments with which a model calls its blocks: they are recorded for every
window, in runs of the model in which each block only hands on tensors of the shapes that it would
return. So what the model itself computes from the tokens (embeddings, positions, masks, inputs of
single blocks) is the model's own work, and no block is computed. Where a tensor that the block
before returned stands among the arguments, the present one is put in when the block runs.

Who owns which tensor, for every window:

- ``_calls``: the arguments of the blocks that have not been left. Tensors that are equal in all
  windows (positions, masks) are kept once, those of a window once for all blocks. The input of the
  first block is one of them. A list, dict or cache stays the object that the model made, one for
  each window, as blocks may pass values on in it (keys and values that later blocks share).
- ``_outputs``: those tensors that the block before the present one returned and the present one
  takes, of any number and shape.

One window is then run through the whole model, and each block must return there what it returns
here, also when it runs twice. A model that fails runs as a whole for every block.

Shapes: S windows, T tokens.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.calibration.calls import Call, NotReplayable, Output, mapped, tensors_of
from sparsify.calibration.placing import (
    Values,
    forward_replaced,
    moved,
    moved_when_called,
    replaced,
)
from sparsify.calibration.whole_passes import WholePasses, check_finite, not_finite, run_to_head

log = logging.getLogger("sparsify")


class Activations:
    """The input of one block for all windows.

    Args:
        model: the model, on CPU or on ``device``.
        blocks: its decoder blocks by qualified name, in order.
        windows_ST: token ids, int64.
        device: where to compute; modules that are elsewhere are moved there while they are used.
        offload: keep in main memory what differs by window.

    Raises:
        NotReplayable: the blocks cannot run one by one as they do in the model.
        SparsifyError: an activation of the first window is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Mapping[str, nn.Module],
        windows_ST: Tensor,
        device: torch.device,
        offload: bool,
    ) -> None:
        self._model, self._blocks, self._names = model, blocks, list(blocks)
        self._windows_ST, self._device = windows_ST, device
        self._keep_on = torch.device("cpu") if offload else device
        self._calls: list[dict[str, Call]] = []
        self._outputs: list[dict[int, Tensor]] = [{} for _ in windows_ST]
        inside = {id(m) for block in blocks.values() for m in block.modules()}
        seen: set[int] = set()
        for name, block in blocks.items():
            # Layers of several blocks that share a weight share its masker, and nothing else.
            own = {id(m) for n, m in block.named_modules() if ".masker." not in f"{n}."}
            if own & seen:
                raise NotReplayable(f"{name} shares modules with a block before it")
            seen |= own
        shell = [m for m in model.modules() if id(m) not in inside]
        with moved(shell, device, recurse=False):
            returned = self._see_returned()
            try:
                for window in range(len(windows_ST)):
                    self._calls.append(self._catch_calls(window, returned))
                self._check(len(windows_ST) - 1)
            except (NotReplayable, torch.OutOfMemoryError):
                raise
            except Exception as error:
                reason = f"they fail when they run by themselves ({error!r})"
                raise NotReplayable(reason) from error

    def run(self, block: str, weights: Mapping[str, Values]) -> Iterator[list[Tensor]]:
        """Run a block over all windows and yield the tensors that it returns for each.

        Args:
            block: the block after the one that was left last.
            weights: values to use instead of the block's Parameters, by name within the block.
        """
        with replaced(self._blocks[block], weights):
            for window in range(len(self._windows_ST)):
                yield self._run(block, window)

    def advance(self, block: str, weights: Mapping[str, Values]) -> None:
        """Leave a block: keep what the next one takes of its output; arguments as for :meth:`run`.

        Raises:
            SparsifyError: the output is not finite.
        """
        finite = torch.ones((), dtype=torch.bool, device=self._device)
        for window, tensors in enumerate(self.run(block, weights)):
            finite &= tensors[0].isfinite().all()
            del self._calls[window][block]
            following = next(iter(self._calls[window].values()), Call((), {}))
            taken = {part.index for part in following.parts() if isinstance(part, Output)}
            # A copy, as a block may return its own buffer, or a part of a larger tensor.
            self._outputs[window] = {i: tensors[i].to(self._keep_on, copy=True) for i in taken}
        if not finite.all():
            raise not_finite(f"the output of {block}", tensors[0].dtype)

    def _run(self, block: str, window: int) -> list[Tensor]:
        def place(part: Any) -> Any:
            value = self._outputs[window][part.index] if isinstance(part, Output) else part
            return value.to(self._device) if isinstance(value, Tensor) else value

        args, kwargs = self._calls[window][block].map(place)
        return tensors_of(self._blocks[block](*args, **kwargs))

    # -- how the model calls its blocks ------------------------------------------------------------

    def _see_returned(self) -> dict[str, Any]:
        """Run the first window; returns what each block returns, its tensors without values."""
        returned: dict[str, Any] = {}

        def leave(name: str, output: Any) -> None:
            tensors = tensors_of(output)
            if name in returned:
                raise NotReplayable(f"{name} runs several times in a forward pass")
            if not tensors:
                raise NotReplayable(f"{name} returns {type(output).__name__}, which is no tensor")
            check_finite(f"the output of {name}", tensors[0])
            returned[name] = mapped(output, _without_values)

        with self._watched(leave):
            self._run_model(0)
        if missing := [name for name in self._names if name not in returned]:
            raise NotReplayable(f"the model's forward pass does not call {missing[0]}")
        return returned

    def _catch_calls(self, window: int, returned: Mapping[str, Any]) -> dict[str, Call]:
        """Record how the model calls each block for a window, without running the blocks."""
        calls: dict[str, Call] = {}
        before: list[Tensor] = []  # what the stand-in of the block before returned
        kept: dict[int, tuple[Tensor, Tensor]] = {}  # a tensor's id: itself, so that it lives
        place = self._keep_on if window else self._device

        def keep(value: Any, first: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            for index, output in enumerate(before):
                if value.is_set_to(output):  # as a slice of all tokens is
                    return Output(index)
            if id(value) not in kept:
                one = first if _equal(value, first) else value.to(place, copy=True)
                kept[id(value)] = value, one
            return kept[id(value)][1]

        def stand_in(name: str, *args: Any, **kwargs: Any) -> Any:
            if name in calls or name != self._names[len(calls)]:
                raise NotReplayable(f"{name} is not called once and in its turn")
            firsts = iter(self._calls[0][name].parts() if window else ())
            call = Call(args, kwargs).map(lambda value: keep(value, next(firsts, None)))
            if before and not any(isinstance(part, Output) for part in call.parts()):
                raise NotReplayable(f"what enters {name} is not what the block before it returned")
            calls[name] = call
            output = mapped(returned[name], self._with_values)
            before[:] = tensors_of(output)
            return output

        with ExitStack() as stack:
            for name, block in self._blocks.items():
                stack.enter_context(forward_replaced(block, partial(stand_in, name)))
            self._run_model(window)
        return calls

    def _check(self, window: int) -> None:
        """Run a window through the model, and each block also by itself, on the same input."""
        alone = False

        def leave(name: str, output: Any) -> None:
            nonlocal alone
            if alone:
                return
            alone, expected = True, tensors_of(output)
            for _ in range(2):
                found = self._run(name, window)
                if len(found) != len(expected) or not all(map(_close, found, expected)):
                    raise NotReplayable(f"{name} by itself returns not what it does in the model")
            alone, self._outputs[window] = False, dict(enumerate(expected))

        with self._watched(leave):
            self._run_model(window)
        self._outputs[window] = {}

    @contextmanager
    def _watched(self, leave: Callable[[str, Any], None]) -> Iterator[None]:
        """Within this context, give ``leave`` each block's name and output when it has run."""
        with ExitStack() as stack:
            for name, block in self._blocks.items():
                hook = block.register_forward_hook(lambda *a, name=name: leave(name, a[2]))
                stack.callback(hook.remove)
            stack.enter_context(moved_when_called(self._blocks.values(), self._device))
            yield

    def _run_model(self, window: int) -> None:
        run_to_head(self._model, self._windows_ST[window : window + 1].to(self._device))

    def _with_values(self, part: Any) -> Any:
        """A tensor of zeros for one without values."""
        return torch.zeros_like(part, device=self._device) if isinstance(part, Tensor) else part


def start(
    model: PreTrainedModel,
    blocks: Mapping[str, nn.Module],
    windows_ST: Tensor,
    device: torch.device,
    offload: bool,
) -> Activations | WholePasses:
    """Begin with the first block, one by one if the blocks can run so; arguments as above."""
    try:
        return Activations(model, blocks, windows_ST, device, offload)
    except NotReplayable as error:
        log.warning(
            "calibration runs all blocks for each block's statistics, which is slow: %s", error
        )
        return WholePasses(model, windows_ST, device)


def _without_values(part: Any) -> Any:
    """A tensor's shape and type, as a tensor."""
    return torch.empty_like(part, device="meta") if isinstance(part, Tensor) else part


def _equal(value: Tensor, other: Any) -> bool:
    kind = (value.shape, value.dtype, value.device)
    same_kind = isinstance(other, Tensor) and (other.shape, other.dtype, other.device) == kind
    return same_kind and torch.equal(value, other)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal, but for the order in which a kernel may add floats."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    error = (found.float() - expected.float()).norm()
    return bool((error <= torch.finfo(found.dtype).eps * expected.float().norm()).all())
