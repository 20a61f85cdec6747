"""Runs calibration text through a model block by block.

One buffer holds the activations of all windows at the entry of the present block. A strategy asks
the block for statistics (each kind is one pass over the buffer) and yields its results; then the
block runs once more, pruned as they say, and its output takes the place of its input. A strategy
that asks for nothing costs no forward pass at all.

A block is run with the arguments that the model itself gave it, caught in one pass over the first
window, so any architecture will do whose blocks pass one tensor of hidden states from each to the
next. All windows have one length and no padding, so these arguments hold for every window.

Shapes: S windows, T tokens, H hidden size, O out, I in.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from sparsify.calibration.cache import ResultWriter, read_results, result_folder, text_hash
from sparsify.calibration.gradients import gradient_norms
from sparsify.calibration.settings import Calibration
from sparsify.calibration.statistics import Statistic
from sparsify.errors import SparsifyError
from sparsify.inject import decoder_blocks, masked_layers
from sparsify.masked_linear import MaskedLinear, MaskScope
from sparsify.pattern import NMPattern
from sparsify.strategy import Block, LayerResult, SparsityStrategy

log = logging.getLogger("sparsify")


class _Call(NamedTuple):
    """How the model calls a block, less the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _BlockText(NamedTuple):
    """The statistics of one block's layers."""

    engine: "Layerwise"
    block: str | None
    layers: Mapping[str, MaskedLinear]

    def collect(self, kind: Callable[[int, torch.device], Any]) -> dict[str, Any]:
        return self.engine.collect(self.block, self.layers, kind)

    def gradient_norms(self) -> dict[str, Tensor]:
        return self.engine.gradient_norms(self.layers)


class _Stop(Exception):
    """Ends a forward pass of the model from inside."""


class _Known(Exception):
    """Ends a strategy's calibration: its result is in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder


class Layerwise:
    """Calibrates one model.

    Args:
        model: with masked layers; on CPU or on ``device``, it comes back to where it was.
        scope: its scope.
        windows: gives the token ids, int64 ``[S, T]``; called once, when a statistic is first
            asked for.
        settings: see :class:`Calibration`.
        base_hash: the name of the model's weights, for the cache.
        device: where to compute. Blocks that are elsewhere are moved there one by one.
        watch: wraps the iteration over blocks, to show how far it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scope: MaskScope,
        windows: Callable[[], Tensor],
        settings: Calibration,
        base_hash: str,
        device: torch.device,
        watch: Callable[[Iterable[str]], Iterable[str]] = iter,
    ) -> None:
        self._model, self._scope, self._settings = model, scope, settings
        self._base_hash, self._device, self._watch = base_hash, device, watch
        self._modules = decoder_blocks(model)
        self._get_windows = windows
        self._windows_ST: Tensor | None = None
        self._calls: dict[str, _Call] = {}
        self._hidden_STH: Tensor | None = None
        self._results: dict[str, LayerResult] = {}  # of the present block
        self._done: dict[str, LayerResult] = {}  # of blocks that are finished
        self._gradient_norms: dict[str, Tensor] | None = None
        self._writer: ResultWriter | None = None
        self._strategy: SparsityStrategy | None = None
        self._begun = False  # whether a result has been given
        self.record: dict[str, Any] | None = None

    def run(self, strategy: SparsityStrategy) -> Iterator[tuple[str, LayerResult]]:
        """What the strategy's ``calibrate`` yields, or what an equal run yielded.

        Results come when their block is finished, so that the caller can apply them then: no pass
        over a block sees weights that were changed. Afterwards ``record`` tells what was done, or
        is None if no text was asked for.
        """
        self._strategy = strategy
        start = time.perf_counter()
        try:
            with torch.no_grad(), _full_precision(), self._scope.use("dense"):
                for name, result in strategy.calibrate(self._blocks()):
                    self._begun = True
                    self._results[name] = result
                    yield from self._finished()
                self._finish_block()
                yield from self._finished()
            if self._writer is not None:
                self._writer.finish()
        except _Known as known:
            folder = known.folder
        else:
            folder = None
        finally:
            if self._writer is not None:
                self._writer.close()
        if folder is not None:
            yield from read_results(folder, self._patterns)
        if self.record is not None:
            self.record["seconds"] = round(time.perf_counter() - start, 1)
            self.record["cached"] = folder is not None

    def _finish_block(self) -> None:
        self._done.update(self._results)
        self._results.clear()

    def _finished(self) -> Iterator[tuple[str, LayerResult]]:
        for name in list(self._done):
            result = self._done.pop(name)
            yield name, result
            if self._writer is not None:
                self._writer.add(name, result)

    @property
    def _patterns(self) -> dict[str, NMPattern]:
        return {n: layer.masker.pattern for n, layer in masked_layers(self._model).items()}

    def _windows(self) -> Tensor:
        """The text; at the first call the result of an equal run may take the strategy's place."""
        if self._windows_ST is None:
            if self._begun:
                raise SparsifyError(
                    "the strategy's calibrate asks for statistics after it gave a layer's result; "
                    "the first request must come before the first result"
                )
            self._windows_ST = self._get_windows()
            samples, block_size = self._windows_ST.shape
            self.record = {
                "samples": samples,
                "block_size": block_size,
                "seed": self._settings.seed,
                "sha256": text_hash(self._windows_ST),
                "activations": self._settings.activations,
            }
            if self._settings.cache:
                self._look_up()
        return self._windows_ST

    def _look_up(self) -> None:
        strategy = cast(SparsityStrategy, self._strategy).calibrator()
        patterns = {name: str(pattern) for name, pattern in self._patterns.items()}
        inputs = {"base": self._base_hash, "text": self.record, "layers": patterns}
        folder = result_folder(strategy, inputs)
        if folder.exists():
            log.info("calibration's result of an earlier run, from %s", folder)
            raise _Known(folder)
        self._writer = ResultWriter(folder, self._patterns)

    def _blocks(self) -> Iterator[Block]:
        left = masked_layers(self._model)
        for name in self._watch(self._modules):
            inside = {n: left.pop(n) for n in list(left) if n.startswith(f"{name}.")}
            module = self._modules[name]
            with _moved([module], self._device):
                if inside:
                    yield Block(name, inside, _BlockText(self, name, inside))
                if self._hidden_STH is not None:
                    self._advance(name, inside)
            self._finish_block()
        if left:
            yield Block("", left, _BlockText(self, None, left))

    # -- statistics --------------------------------------------------------------------------------

    def collect(
        self,
        block: str | None,
        layers: Mapping[str, MaskedLinear],
        kind: Callable[[int, torch.device], Any],
    ) -> dict[str, Any]:
        """See :meth:`Block.collect`; ``block`` is None for layers outside all blocks."""
        if block is None:
            raise SparsifyError(
                f"{', '.join(layers)} lies outside the decoder blocks, and calibration goes "
                "through these block by block; leave it dense, or take a strategy that needs no "
                "activations"
            )
        if self._hidden_STH is None:
            self._start(block)
        found: dict[str, Statistic] = {}
        window: list[tuple[Tensor, Statistic]] = []  # inputs seen in this window, kept alive

        def see(name: str, x_BI: Tensor) -> None:
            if name not in found:
                shared = (stat for x, stat in window if _same(x, x_BI))
                found[name] = next(shared, None) or kind(x_BI.shape[-1], x_BI.device)
            if not any(stat is found[name] and _same(x, x_BI) for x, stat in window):
                found[name].add(x_BI.flatten(0, -2))
                window.append((x_BI, found[name]))

        with ExitStack() as stack:
            for name, layer in layers.items():
                hook = layer.register_forward_pre_hook(
                    lambda _, args, name=name: see(name, args[0])
                )
                stack.callback(hook.remove)
            for index in range(self._count):
                window.clear()
                self._forward(block, index, {})
        if missing := [name for name in layers if name not in found]:
            raise SparsifyError(
                f"no calibration token reached {', '.join(missing)}; every masked layer must be "
                "used: raise --model.calibration.samples, or leave it dense with --model.exclude"
            )
        return found

    def gradient_norms(self, layers: Mapping[str, MaskedLinear]) -> dict[str, Tensor]:
        """See :meth:`Block.gradient_norms`."""
        if self._gradient_norms is None:
            windows_ST = self._windows()
            with _moved([self._model], self._device):
                keep_on = torch.device("cpu") if self._settings.offload else self._device
                self._gradient_norms = gradient_norms(
                    self._model, masked_layers(self._model), windows_ST, keep_on
                )
        return {name: self._gradient_norms[name].to(self._device) for name in layers}

    # -- activations -------------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return len(self._windows())

    def _start(self, block: str) -> None:
        """Catch what enters the first block, and how each is called; go to ``block``."""
        self._windows()
        inside = {id(m) for block in self._modules.values() for m in block.modules()}
        shell = [m for m in self._model.modules() if id(m) not in inside]
        with _moved(shell, self._device, recurse=False):
            self._catch_calls()
            self._catch_hidden()
        for name in self._modules:
            if name == block:
                return
            with _moved([self._modules[name]], self._device):
                self._advance(name, {})

    def _catch_calls(self) -> None:
        """Run the first window through all blocks; remember each one's arguments."""
        names = list(self._modules)
        before: dict[str, Tensor] = {}

        def enter(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden, self._calls[name] = _split(name, args, kwargs)
            if before and not torch.equal(before["output"], hidden):
                raise _not_replayable(
                    name, "what enters it is not what the block before it returned"
                )

        def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
            before["output"] = _hidden_of(name, output)
            if name == names[-1]:
                raise _Stop

        with ExitStack() as stack:
            for name, module in self._modules.items():
                moves = _moved([module], self._device)
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

    def _catch_hidden(self) -> None:
        """Fill the buffer with what enters the first block."""
        first = next(iter(self._modules))

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden, _ = _split(first, args, kwargs)
            if self._hidden_STH is None:
                keep_on = torch.device("cpu") if self._settings.offload else hidden.device
                self._hidden_STH = hidden.new_empty(
                    (self._count, *hidden.shape[1:]), device=keep_on
                )
            self._hidden_STH[index] = hidden[0]
            raise _Stop

        hook = self._modules[first].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            for index in range(self._count):  # noqa: B007  # read by the hook
                self._run_model(index)
        finally:
            hook.remove()

    def _run_model(self, index: int) -> None:
        tokens = self._windows()[index : index + 1].to(self._device)
        try:
            self._model(input_ids=tokens, use_cache=False)
        except _Stop:
            return

    def _advance(self, block: str, layers: Mapping[str, MaskedLinear]) -> None:
        """Run a block over all windows, pruned as its results say; keep its output."""
        weights = {}
        if self._settings.activations == "pruned":
            for name, result in self._results.items():
                if name in layers:
                    parameter, value = _pruned(layers[name], result)
                    weights[f"{name.removeprefix(f'{block}.')}.{parameter}"] = value
        for index in range(self._count):
            hidden = self._forward(block, index, weights)
            self._hidden_STH[index] = hidden[0]  # type: ignore[index]

    def _forward(self, block: str, index: int, weights: dict[str, Tensor]) -> Tensor:
        call = self._calls[block]
        hidden_BTH = self._hidden_STH[index : index + 1].to(self._device)  # type: ignore[index]
        output = functional_call(
            self._modules[block], weights, (hidden_BTH, *call.args), call.kwargs
        )
        return _hidden_of(block, output)


def _pruned(layer: MaskedLinear, result: LayerResult) -> tuple[str, Tensor]:
    weight_OI = layer.weight_OI if result.weight is None else result.weight
    pruned_OI = torch.where(result.mask.to(weight_OI.device), weight_OI, 0)
    return "weight", layer.as_stored(pruned_OI.to(layer.weight))


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
        "pass one tensor of hidden states from each to the next: take a strategy that needs no "
        "activations"
    )


def _same(x: Tensor, y: Tensor) -> bool:
    return (x.data_ptr(), x.shape, x.stride()) == (y.data_ptr(), y.shape, y.stride())


def _ignore(_: Any) -> None:
    """A hook that returns something would change what the module is given."""


@contextmanager
def _moved(
    modules: Iterable[nn.Module], device: torch.device, recurse: bool = True
) -> Iterator[None]:
    """Have the modules' tensors on a device, and afterwards where they were before."""
    places: list[tuple[nn.Module, torch.device]] = []
    try:
        for module in modules:
            tensors = [*module.parameters(recurse), *module.buffers(recurse)]
            if tensors and tensors[0].device != device:
                places.append((module, tensors[0].device))
                module._apply(lambda t: t.to(device), recurse)
        yield
    finally:
        for module, place in places:
            module._apply(lambda t, place=place: t.to(place), recurse)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply fp32 matrices as fp32: in TF32 a Hessian may not factor."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
