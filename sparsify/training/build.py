"""Builds a run's masked model from its settings, and calibrates it.

Shapes: S windows, T tokens.
"""

import copy
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.calibration import Layerwise
from sparsify.calibration.permuting import find_orders
from sparsify.calibration.prior import SavedMasks
from sparsify.common.console import tell, tracked
from sparsify.common.errors import restoring
from sparsify.common.ranks import rank_zero
from sparsify.masking.masked_model import MaskedModel
from sparsify.models.base import BaseModel
from sparsify.models.load_checks import check_tokenizer, check_tokens
from sparsify.models.permutation_file import read_permutation
from sparsify.models.positions import check_positions
from sparsify.training.checkpoints.files import stored_orders
from sparsify.training.guards import check_dtype, check_text
from sparsify.training.step import checkpoint_activations

log = logging.getLogger("sparsify")


def build(module: Any, trainer: Any) -> tuple[MaskedModel, PreTrainedModel | None]:
    """Load the base model and mask it.

    Args:
        module: the LightningModule that holds the settings.
        trainer: Lightning's Trainer, or None.

    Returns:
        The masked model, whose maskers have no values yet; and the dense teacher, or None if the
        run needs no copy of it.

    Raises:
        SparsifyError: the model, the text and the settings do not fit together.
    """
    base, strategy = module.origin.base(), module.strategy
    if trainer is not None and trainer.datamodule is not None:
        check_positions(base.model, trainer.datamodule.block_size)
        check_tokenizer(base.model, module.tokenizer)
    permute(module, trainer, base)
    teacher = None
    fits = trainer is None or trainer.state.fn == TrainerFn.FITTING
    if module.distillation.needs_dense and strategy.effect.trains_base and fits:
        teacher = copy.deepcopy(base.model).requires_grad_(False)
    masked = MaskedModel(base, strategy, module.selection)
    check_dtype(masked)
    masked.check_called()
    if strategy.effect.prunes:
        covered = masked.coverage()
        tell(covered.lines(), trainer)
        if (warning := covered.warning()) is not None and rank_zero():
            log.warning("%s", warning)
    if module.gradient_checkpointing:
        checkpoint_activations(masked.model, masked.scope)
    return masked, teacher


def permute(module: Any, trainer: Any, base: BaseModel) -> None:
    """Put the channels of a module's base model into the orders that were asked for: those of the
    checkpoint that is restored, those of an export, or those that are found now.
    """
    asked, orders = module.permute, module.orders
    if orders is None and trainer is not None and (path := getattr(trainer, "restores", None)):
        with restoring(path):
            orders = stored_orders(path)
    elif orders is None and isinstance(asked, Path):
        taken = read_permutation(asked)
        taken.check_base(base.hash, str(asked))
        orders = taken.orders
    elif orders is None and asked:
        orders, module.searched = find_orders(
            base,
            module.strategy,
            module.selection,
            asked,
            lambda: text_of(module, trainer, base.model),
            module.calibration,
            trainer.strategy.root_device,
            lambda blocks: tracked(blocks, "permuting", trainer),
        )
    base.permute(orders or {})
    for part in module.strategy.modules():
        if isinstance(part, SavedMasks):
            part.check_order(base.permutation)


def text_of(module: Any, trainer: Any, model: PreTrainedModel) -> Tensor:
    """The calibration text of a trainer's data, int64 ``[S, T]``."""
    data, settings = trainer.datamodule, module.calibration
    check_text(module.name_or_path, data.embedded, "compute")
    windows_ST = data.calibration(settings.samples, settings.seed)
    check_tokens(model, windows_ST)
    return cast(Tensor, windows_ST)


def calibrate(
    module: Any, trainer: Any = None, windows: Callable[[], Tensor] | None = None
) -> dict[str, Any] | None:
    """Give the maskers of a built module their first values.

    Args:
        module: the LightningModule.
        trainer: Lightning's Trainer, or None.
        windows: gives the calibration text, int64 ``[S, T]``; None takes the trainer's.

    Returns:
        A record of the text that was read; None if the strategy read none.
    """

    def watch(blocks: Iterable[str]) -> Iterable[str]:
        return tracked(blocks, "calibrating", trainer)

    def of_trainer() -> Tensor:
        return text_of(module, trainer, module.lm)

    device = module.lm.device if trainer is None else trainer.strategy.root_device
    engine = Layerwise(module.masked, windows or of_trainer, module.calibration, device, watch)
    module.masked.calibrate(engine.run(module.strategy))
    if engine.record is not None and trainer is not None:
        described = trainer.datamodule.describe("train")
        engine.record |= {key: described[key] for key in ("bos", "sources") if key in described}
    return engine.record
