"""Runs the engine on a model by hand, without a module and a Trainer."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify import Block, Effect, LayerResult, NMPattern, SparsityStrategy
from sparsify.calibration import Calibration, Layerwise
from sparsify.masking.layer import masked_layers
from sparsify.masking.overrides import Overrides
from sparsify.masking.select import Selection, decoder_blocks
from tests.conftest import masked_model

TWO_FOUR = NMPattern(2, 4)
TEXT = torch.randint(2, 64, (6, 16), generator=torch.Generator().manual_seed(0))
UNCACHED = Calibration(cache=False)


def masked(
    model: PreTrainedModel,
    settings: Calibration = UNCACHED,
    text: Tensor | Callable[[], Tensor] = TEXT,
    pattern: NMPattern = TWO_FOUR,
    base_hash: str | None = None,
    overrides: Overrides = Overrides(),
    **globs: list[str],
) -> Layerwise:
    """An engine for a model whose layers are masked now."""
    made = masked_model(model, SparsityStrategy(), Selection(pattern, overrides=overrides, **globs))
    if base_hash is not None:
        made.base.hash = base_hash
    windows = (lambda: text) if isinstance(text, Tensor) else text
    return Layerwise(made, windows, settings, torch.device("cpu"))


def calibrated(
    model: PreTrainedModel, strategy: SparsityStrategy, **options: Any
) -> dict[str, LayerResult]:
    """All results, in their order."""
    return dict(masked(model, **options).run(strategy))


def count_passes(model: nn.Module) -> list[str]:
    """A list that names each block when it computes; its first part tells."""
    passes: list[str] = []
    for name, block in decoder_blocks(model).items():
        part = next(block.children())
        part.register_forward_pre_hook(lambda *_, name=name: passes.append(name))
    return passes


class Probe(SparsityStrategy):
    """Keeps all that it can learn of each block, and prunes by magnitude.

    Args:
        kinds: of statistics.
        gradients: ask for these too.
        update: also change the weights, in a way that shows in what comes next.
    """

    def __init__(self, *kinds: Any, gradients: bool = False, update: bool = False) -> None:
        super().__init__()
        self.kinds, self.gradients, self.update = kinds, gradients, update
        self.effect = Effect(weights="updated" if update else "frozen")
        self.found: dict[Any, dict[str, Any]] = {kind: {} for kind in [*kinds, "gradients"]}

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            for kind in self.kinds:
                self.found[kind] |= block.collect(kind)
            if self.gradients:
                self.found["gradients"] |= block.gradient_norms()
            for name, layer in block.layers.items():
                weight_OI = layer.weight_OI.detach()
                new_OI = 1.5 * weight_OI + 0.1 if self.update else None
                yield name, LayerResult(layer.masker.pattern.top(weight_OI.abs()), new_OI)


def apply(engine: Layerwise, model: nn.Module, strategy: SparsityStrategy) -> None:
    """Run a strategy and give every new weight to its layer at once, as a module does."""
    for name, result in engine.run(strategy):
        if result.weight is not None:
            masked_layers(model)[name].weight_OI.data.copy_(result.weight)
