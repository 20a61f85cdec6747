"""The engine of calibration: gives a strategy statistics block by block, and takes its results.

A strategy asks a block for statistics; each kind costs one pass over the block's input. It yields
its results, and the block is run once more, pruned by them, to get the input of the next block. A
strategy that asks for no statistics costs no forward pass at all.

Shapes: S windows, T tokens, O out, I in.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sparsify.calibration.activations import Activations, start
from sparsify.calibration.cache import (
    cache_limit,
    computation,
    make_room,
    result_folder,
    text_hash,
)
from sparsify.calibration.checked import checked
from sparsify.calibration.collecting import Statistics, warn_of_few
from sparsify.calibration.gradients import gradient_norms
from sparsify.calibration.placing import Values, moved
from sparsify.calibration.pruned import pruned_weights
from sparsify.calibration.results import ResultWriter, computing_cost, is_whole, read_results
from sparsify.calibration.settings import Calibration
from sparsify.calibration.shared import on_rank_zero
from sparsify.calibration.whole_passes import WholePasses
from sparsify.common.errors import SparsifyError
from sparsify.common.machine import device_name, full_precision
from sparsify.common.ranks import from_rank_zero
from sparsify.masking.experts import Expert, matrices
from sparsify.masking.layer import MaskedLinear
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.select import decoder_blocks
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy, goes_on_by_block

log = logging.getLogger("sparsify")


class _BlockText:
    """The statistics of one block's layers, each kind collected once."""

    def __init__(
        self, engine: "Layerwise", block: str | None, layers: Mapping[str, MaskedLinear | Expert]
    ) -> None:
        self._engine, self._block, self._layers = engine, block, layers
        self._collected: dict[Any, Mapping[str, Any]] = {}

    def collect(self, kind: Callable[[int, torch.device], Any]) -> Mapping[str, Any]:
        if kind not in self._collected:
            self._collected[kind] = self._engine.collect(self._block, self._layers, kind)
        return self._collected[kind]

    def gradient_norms(self) -> dict[str, Tensor]:
        return self._engine.gradient_norms(self._layers)


class _Known(BaseException):
    """Ends a strategy's calibration, as an earlier run kept its result in a folder. It is not an
    Exception, as a strategy may catch those.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder


class Layerwise:
    """Calibrates one model.

    Args:
        masked: the masked model, on CPU or on ``device``; afterwards it is where it was.
        windows: returns the token ids, int64 ``[S, T]``; it is called once, when a statistic is
            first asked for.
        settings: see :class:`Calibration`.
        device: where to compute. Blocks that are elsewhere are moved there one by one.
        watch: wraps the iteration over blocks, to show its progress.
    """

    def __init__(
        self,
        masked: MaskedModel,
        windows: Callable[[], Tensor],
        settings: Calibration,
        device: torch.device,
        watch: Callable[[Iterable[str]], Iterable[str]] = iter,
    ) -> None:
        self._model, self._scope, self._settings = masked.model, masked.scope, settings
        self._base_hash, self._device, self._watch = masked.base.hash, device, watch
        self._modules = decoder_blocks(masked.model)
        self._whole_layers = masked.layers
        self._layers = matrices(self._whole_layers)
        self._patterns = {name: layer.masker.pattern for name, layer in self._layers.items()}
        self._get_windows = windows
        self._windows_ST: Tensor | None = None
        self._activations: Activations | WholePasses | None = None
        self._dense: Activations | WholePasses | None = None  # as if no block were pruned
        self._results: dict[str, LayerResult] = {}  # of the present block
        self._done: dict[str, LayerResult | None] = {}  # of finished blocks; None if on disk
        self._start_time = 0.0
        self._gradient_norms: dict[str, Tensor] | None = None
        self._writer: ResultWriter | None = None
        self._strategy: SparsityStrategy | None = None
        self._few: dict[str, int] = {}  # tokens of the experts that got too few of them
        self._begun = False  # whether the strategy has yielded a result
        self.record: dict[str, Any] | None = None

    def run(self, strategy: SparsityStrategy) -> Iterator[tuple[str, LayerResult]]:
        """Yield what the strategy's ``calibrate`` yields, or what it yielded in an equal run.

        A result is yielded when its block is finished, so that the caller may apply it at once
        without changing weights that a pass still needs. Afterwards ``record`` says what was done,
        or is None if no text was asked for. In a run of several processes rank 0 computes, and all
        yield its results.
        """
        yield from on_rank_zero(self.run_here(strategy), self._model.device)
        (self.record,) = from_rank_zero([self.record])

    def run_here(self, strategy: SparsityStrategy) -> Iterator[tuple[str, LayerResult]]:
        """Do the work of :meth:`run` in this process."""
        self._strategy = strategy
        self._start_time = start = time.perf_counter()
        folder: Path | None = None
        try:
            with torch.no_grad(), full_precision(), self._scope.use("dense"):
                for name, result in checked(strategy, self._blocks(), self._layers, self._prunes):
                    self._begun = True
                    self._results[name] = result
                    yield from self._finished()
                self._finish_block()
                yield from self._finished()
            if self._writer is not None:
                self._writer.finish(time.perf_counter() - start, device_name(self._device))
                make_room()
        except _Known as known:
            folder = known.folder
        finally:
            if self._writer is not None:
                self._writer.close()
        if folder is not None:
            for name, result in read_results(folder, self._patterns):
                yield name, result.to(self._layers[name].weight_OI.device)
        warn_of_few(self._few, self._layers)
        if self.record is not None:
            # For a kept result, state what it once cost to compute, so that comparisons are fair.
            before = self._writer.seconds if self._writer is not None else 0.0
            own = before + time.perf_counter() - start, device_name(self._device)
            seconds, device = own if folder is None else computing_cost(folder)
            self.record |= {"seconds": round(seconds, 1), "device": device}
            self.record["cached"] = folder is not None

    def _finish_block(self, stored: bool = False) -> None:
        if self._writer is not None and self._results and not stored:
            for name, result in self._results.items():
                self._writer.add(name, result)
            self._writer.commit(time.perf_counter() - self._start_time)
        # None for stored results, which are read again one by one rather than all held at once.
        self._done.update(dict.fromkeys(self._results) if stored else self._results)
        self._results.clear()

    def _finished(self) -> Iterator[tuple[str, LayerResult]]:
        for name in list(self._done):
            result = self._done.pop(name) or cast(ResultWriter, self._writer).read(name)
            yield name, result.to(self._layers[name].weight_OI.device)

    def _windows(self) -> Tensor:
        """The text. At the first call, a kept result of an equal run may end the calibration."""
        if self._windows_ST is None:
            self._check_unbegun()
            self._windows_ST = self._get_windows()
            samples, block_size = self._windows_ST.shape
            self.record = {
                "samples": samples,
                "block_size": block_size,
                "tokens": samples * block_size,
                "seed": self._settings.seed,
                "sha256": text_hash(self._windows_ST),
                "activations": self._settings.activations,
            }
            if self._settings.cache:
                self._look_up()
        return self._windows_ST

    def _check_unbegun(self, what: str = "statistics") -> None:
        if self._begun:
            raise SparsifyError(
                f"the strategy's calibrate asks for {what} after it gave a layer's result; "
                "the first request must come before the first result"
            )

    def _look_up(self) -> None:
        cache_limit()  # raises before the work, not after it, if the limit is wrong
        strategy = cast(SparsityStrategy, self._strategy).calibrator()
        folder = result_folder(strategy, self.depends_on())
        if folder is None:
            return
        if is_whole(folder, self._patterns):
            log.info("calibration's result of an earlier run, from %s", folder)
            raise _Known(folder)
        name = self._model.config._name_or_path or type(self._model).__name__
        about: dict[str, Any] = {"strategy": type(strategy).__name__, "model": Path(name).name}
        about["samples"] = len(cast(Tensor, self._windows_ST))
        self._writer = ResultWriter(folder, self._patterns, about, goes_on_by_block(strategy))

    def depends_on(self) -> dict[str, Any]:
        """What results depend on besides the strategy, in JSON values; it reads the text."""
        self._windows()
        patterns = {name: str(pattern) for name, pattern in self._patterns.items()}
        own = {"base": self._base_hash, "text": self.record, "layers": patterns}
        return own | computation(self._model, self._device)

    def _blocks(self) -> Iterator[Block]:
        left = dict(self._layers)
        for name in self._watch(self._modules):
            inside = {n: left.pop(n) for n in list(left) if n.startswith(f"{name}.")}
            module = self._modules[name]
            stored = self._writer is not None and self._writer.holds(inside)
            with moved([module], self._device):
                if stored:
                    self._results |= {n: cast(ResultWriter, self._writer).read(n) for n in inside}
                elif inside:
                    yield Block(name, inside, _BlockText(self, name, inside))
                if self._activations is not None:
                    self._activations.advance(name, self._pruned(name))
                if self._dense is not None:
                    self._dense.advance(name, {})
            self._finish_block(stored)
        if left:
            yield Block("", left, _BlockText(self, None, left))

    # -- statistics --------------------------------------------------------------------------------

    def collect(
        self,
        block: str | None,
        layers: Mapping[str, MaskedLinear | Expert],
        kind: Callable[[int, torch.device], Any],
    ) -> Mapping[str, Any]:
        """See :meth:`Block.collect`; ``block`` is None for layers outside all blocks."""
        if block is None:
            raise SparsifyError(
                f"{', '.join(layers)} lies outside the decoder blocks, but calibration goes "
                "through these block by block; leave it dense, or take a strategy that needs no "
                "activations"
            )
        self._activations = self._activations or self._start(block)
        run, run_dense = partial(self._activations.run, block, {}), None
        if getattr(kind, "paired", False) and self._settings.activations == "pruned":
            if self._dense is None:
                self._check_unbegun("paired statistics")
                self._dense = self._start(block)
            run_dense = partial(self._dense.run, block, {})
        return Statistics(layers, kind, self._device, run, run_dense, self._few)

    def gradient_norms(self, layers: Mapping[str, MaskedLinear | Expert]) -> dict[str, Tensor]:
        """See :meth:`Block.gradient_norms`."""
        if self._gradient_norms is None:
            windows_ST = self._windows()
            with moved([self._model], self._device):
                keep_on = torch.device("cpu") if self._settings.offload else self._device
                self._gradient_norms = gradient_norms(
                    self._model, self._whole_layers, windows_ST, keep_on
                )
        all_of = self._gradient_norms
        own = {
            name: all_of[layer.stack][layer.rows] if isinstance(layer, Expert) else all_of[name]
            for name, layer in layers.items()
        }
        return {name: norms_OI.to(self._device) for name, norms_OI in own.items()}

    def _start(self, block: str) -> Activations | WholePasses:
        """Read the text and run it up to a block; the blocks before it hold no masked layer."""
        settings = self._windows(), self._device, self._settings.offload
        activations = start(self._model, self._modules, *settings)
        for name, module in self._modules.items():
            if name == block:
                break
            with moved([module], self._device):
                activations.advance(name, {})
        return activations

    def _prunes(self) -> bool:
        return self._activations is not None and self._settings.activations == "pruned"

    def _pruned(self, block: str) -> dict[str, Values]:
        """The pruned weights of a block by name within it; none if activations stay dense."""
        if not self._prunes():
            return {}
        found = pruned_weights(self._results, self._whole_layers)
        return {name.removeprefix(f"{block}."): values for name, values in found.items()}
