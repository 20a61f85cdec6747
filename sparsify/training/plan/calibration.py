"""Calibration of a plan: the real code, on one window and on tensors without values."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from sparsify.calibration import Calibration, Hessian, Layerwise, layerwise
from sparsify.export.mask_file.file import MaskFile
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy
from sparsify.training.plan.settings import PlanSettings

WINDOWS = 1  # calibration windows that are run; the memory of the others' inputs is added


def calibrate(masked: MaskedModel, settings: PlanSettings) -> bool:
    """Run calibration, and before it a search of orders of channels if the run would; returns
    whether text is read.
    """
    permutes = _search_orders(masked, settings)
    engine = _engine(masked, settings)
    with _valueless():
        masked.calibrate(engine.run(masked.strategy))
    return permutes or engine.record is not None


def _engine(masked: MaskedModel, settings: PlanSettings) -> Layerwise:
    asked = settings.module.calibration
    plain = Calibration(activations=asked.activations, cache=False)
    windows = min(WINDOWS, asked.samples), settings.block_size
    tokens_ST = torch.zeros(windows, dtype=torch.long)
    return Layerwise(masked, lambda: tokens_ST, plain, torch.device("cpu"))


@contextmanager
def _valueless() -> Iterator[None]:
    """Without what asks for values: no value is not zero here."""

    def empty(masks: MaskFile, name: str) -> Tensor:
        return torch.empty(masks.index.layers[name].shape, dtype=torch.bool)

    with (
        # A stored mask would be checked and decoded by its bytes.
        patch.object(MaskFile, "__getitem__", empty),
        patch.object(layerwise, "text_hash", lambda _: ""),
        patch.object(layerwise, "warn_of_few", lambda *_: None),
    ):
        yield


def _search_orders(masked: MaskedModel, settings: PlanSettings) -> bool:
    """Hold what a search of orders of channels holds: X^T X of a block's inputs, and those of the
    residual stream of all blocks; returns whether it reads text.
    """
    kinds = settings.module.permute
    if isinstance(kinds, Path) or not kinds or not masked.strategy.effect.prunes:
        return False
    engine, residual = _engine(masked, settings), "residual" in kinds
    width = masked.model.config.get_text_config().hidden_size
    held: list[Tensor] = []

    class Search(SparsityStrategy):
        def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
            for block in blocks:
                grams = block.collect(Hessian)
                found = {id(grams[name]): grams[name].matrix_II for name in block.layers}
                if residual:
                    held.extend(gram for gram in found.values() if len(gram) == width)
                largest = max(found.values(), key=len)
                _ = [largest.clone() for _ in range(2)]  # in the present order, and products
            yield from ()

    with _valueless():
        for _ in engine.run(Search()):
            pass
    return True
