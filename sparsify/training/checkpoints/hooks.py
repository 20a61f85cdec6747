"""Adds to Lightning's checkpoint what was learned and the base model's name, and restores it."""

from typing import Any, cast

from lightning.pytorch.trainer.states import TrainerFn

from sparsify.common.seal import content_hash
from sparsify.masking.layer import base_parameters
from sparsify.training.checkpoints.content import check_content, check_training
from sparsify.training.checkpoints.new_settings import keep_patience
from sparsify.training.checkpoints.resume import (
    check_fits,
    check_order,
    check_place,
    check_resumes,
    continue_on,
    reopen_epoch,
    step_shape,
)


def saved_keys(module: Any) -> set[str]:
    """The keys of the state that checkpoints hold: all but base weights that never change."""
    kept = {name for name in module.state_dict() if not name.startswith("teacher.")}
    if module.strategy.effect.changes_base:
        return kept
    return kept - {f"model.{name}" for name in base_parameters(module.lm, all_names=True)}


def save(module: Any, checkpoint: dict[str, Any]) -> None:
    """Turn Lightning's checkpoint of a run into one of ours, in place."""
    kept = saved_keys(module)
    checkpoint["state_dict"] = {
        key: value for key, value in checkpoint["state_dict"].items() if key in kept
    }
    checkpoint["base_hash"] = module.masked.base.hash
    if (permutation := module.masked.base.permutation) is not None:
        checkpoint["orders"] = dict(permutation.orders)
        checkpoint["searched"] = module.searched
    if "config" in (settings := checkpoint.get("hyper_parameters", {})):
        checkpoint["settings_sha256"] = content_hash(settings["config"])
    checkpoint["schedule_values"] = dict(module.strategy.values)
    checkpoint["calibration"] = module.calibrated
    # Once fit has returned, Lightning no longer knows how far in the data it was.
    trainer = module.trainer
    in_fit = trainer.state.fn == TrainerFn.FITTING and (trainer.training or trainer.validating)
    checkpoint["resumable"] = in_fit
    checkpoint["step_shape"] = step_shape(trainer)


def restore(module: Any, checkpoint: dict[str, Any], trainer: Any) -> None:
    """Check a checkpoint against a module, build the module, and restore what Lightning does not.

    Args:
        module: the LightningModule.
        checkpoint: the checkpoint as it was read.
        trainer: Lightning's Trainer; None if the checkpoint is loaded without one.

    Raises:
        SparsifyError: the checkpoint is damaged, or belongs to another run.
    """
    check_content(checkpoint, getattr(trainer, "ckpt_path", None) or "the checkpoint")
    check_order(checkpoint, module.hparams["permute"])
    module.orders = checkpoint.get("orders") or {}
    module.searched = checkpoint.get("searched") or {}
    module.configure_model()
    module.steps_before = checkpoint["global_step"]
    module.calibrated = checkpoint.get("calibration")
    # The masks' metrics depend on these values; a resumed run sets them anew.
    module.strategy.values.update(checkpoint.get("schedule_values") or {})
    state = module.state_dict()
    expected = {key: state[key] for key in saved_keys(module)}
    check_fits(checkpoint, module.masked.base.hash, expected)
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
        check_resumes(checkpoint, trainer.max_steps, trainer.ckpt_path)
        check_training(checkpoint, trainer)
        reopen_epoch(checkpoint)
        check_place(checkpoint, trainer.max_epochs or 0, trainer.ckpt_path)
        keep_patience(checkpoint["callbacks"], cast(Any, trainer).callbacks)
        if (now := step_shape(trainer)) != checkpoint["step_shape"]:
            continue_on(checkpoint, now, epoch_batches(trainer))


def epoch_batches(trainer: Any) -> int:
    """How many micro-batches an epoch has on this rank."""
    batches = len(trainer.datamodule.train_dataloader())
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
