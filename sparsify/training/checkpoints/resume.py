"""Checks that a checkpoint fits this run, and rescales its data position to another number of
ranks.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify.calibration.permuting import is_kinds, parse_permute
from sparsify.common.errors import SparsifyError
from sparsify.common.ranks import data_parallel

log = logging.getLogger("sparsify")


def check_fits(
    checkpoint: Mapping[str, Any], base_hash: str, state: Mapping[str, torch.Tensor]
) -> None:
    """Check that a checkpoint was made for this base model and these masks.

    Args:
        checkpoint: what Lightning read.
        base_hash: the hash of this run's base model.
        state: the tensors that this run would save, by name.

    Raises:
        SparsifyError: it was not.
    """
    if checkpoint.get("base_hash") != base_hash:
        raise SparsifyError(
            f"the checkpoint belongs to base model {str(checkpoint.get('base_hash'))[:12]}, and "
            f"this one is {base_hash[:12]}; give the --model.name_or_path and --model.dtype of "
            "its run"
        )
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        if name in found and checkpoint["state_dict"][name].dtype != tensor.dtype:
            raise SparsifyError(
                f"the checkpoint's {name} is {checkpoint['state_dict'][name].dtype} and must be "
                f"{tensor.dtype}: it is damaged, or its run had another --model.dtype; resume from "
                "another checkpoint, or with the dtype of its run"
            )
    if odd := sorted(set(found.items()) ^ set(wanted.items())):
        name = odd[0][0]
        raise SparsifyError(
            f"the checkpoint's masks do not fit this run: {name} is {found.get(name, 'missing')} "
            f"in it and {wanted.get(name, 'unknown')} here; give the strategy, pattern, include, "
            "exclude and overrides of its run"
        )


def check_order(checkpoint: Mapping[str, Any], asked: str | Sequence[str]) -> None:
    """Check that a run permutes as its checkpoint's did, whose orders it takes.

    Args:
        checkpoint: what Lightning read.
        asked: this run's ``permute``.

    Raises:
        SparsifyError: it asks for others.
    """
    saved = checkpoint.get("hyper_parameters", {}).get("permute", asked)  # old ones do not say
    if _order(saved) != _order(asked):
        raise SparsifyError(
            f"the checkpoint's run had --model.permute {saved}, and this one has {asked}: masks "
            f"are learned for one order of the channels; give {saved}, or start without a "
            "checkpoint"
        )


def _order(permute: Any) -> tuple[str, ...] | Path:
    if isinstance(permute, str) and not is_kinds(permute):
        return Path(permute)  # which need not be there any more
    return parse_permute(permute if isinstance(permute, Sequence) else str(permute))


def check_resumes(checkpoint: Mapping[str, Any], steps: int, path: Any) -> None:
    """Check that training can continue from the checkpoint at ``path`` until it has taken ``steps``
    optimizer steps in all.

    Raises:
        SparsifyError: the checkpoint's data position is missing, or no step is left to take.
    """
    if checkpoint.get("resumable") is False:
        raise SparsifyError(
            "the checkpoint was saved after fit had returned and does not know its place in the "
            "data; resume from one that was saved during the run"
        )
    if checkpoint["global_step"] >= steps > 0:
        raise SparsifyError(
            f"the checkpoint is at step {checkpoint['global_step']} of {steps}, so nothing is left "
            f"to learn; test and export it with sparsify export --ckpt_path {path}, or give more "
            "steps with --trainer.max_steps"
        )


def reopen_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Count an epoch as open again, in place, if the checkpoint's run ended within it: Lightning
    counts it as over, and would leave out the rest of its data.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    now = fit_loop["epoch_progress"]["current"]
    if (
        0 < now["ready"] == now["processed"]
        and not fit_loop["epoch_loop.batch_progress"]["is_last_batch"]
    ):
        for counts in fit_loop["epoch_progress"].values():
            counts["processed"] -= 1
            counts["completed"] = counts["processed"]


def check_place(checkpoint: Mapping[str, Any], epochs: int, path: Any) -> None:
    """Check that less than ``epochs`` epochs are over, if that is above 0; and warn if the place is
    within a step.

    Raises:
        SparsifyError: all are over.
    """
    over = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if over >= epochs > 0:
        raise SparsifyError(
            f"the checkpoint is at the end of epoch {over} of {epochs}, so nothing is left to "
            f"learn; test and export it with sparsify export --ckpt_path {path}, or give more "
            "epochs with --trainer.max_epochs"
        )
    if lost := open_micro_batches(checkpoint):
        log.warning(
            "the checkpoint was saved within a step: the gradients of its first %s micro-batch(es) "
            "are lost, so that the run goes on a little differently",
            lost,
        )


def open_micro_batches(checkpoint: Mapping[str, Any]) -> int:
    """How many micro-batches of a step that was not taken a checkpoint counts as read."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if progress["is_last_batch"]:
        return 0
    lost: int = progress["current"]["ready"] % checkpoint["step_shape"]["accumulated"]
    return lost


def step_shape(trainer: Any) -> dict[str, int]:
    """How many micro-batches an optimizer step has: ranks, and how many run one after another."""
    return {"ranks": data_parallel(trainer)[1], "accumulated": trainer.accumulate_grad_batches}


def continue_on(checkpoint: Mapping[str, Any], now: Mapping[str, int], epoch: int) -> None:
    """Rescale a checkpoint's data position, in place, to another number of ranks.

    Lightning counts micro-batches per rank, and ranks take micro-batches in turn. So after the same
    number of optimizer steps, a run on half as many ranks has counted twice as many.

    Args:
        checkpoint: what Lightning read.
        now: the run's ``step_shape``.
        epoch: how many micro-batches an epoch of this run has per rank.

    Raises:
        SparsifyError: this run's optimizer step has another number of micro-batches, or the
            checkpoint was saved in the middle of a step.
    """
    before = checkpoint["step_shape"]
    size = before["ranks"] * before["accumulated"]
    if now["ranks"] * now["accumulated"] != size:
        raise SparsifyError(
            f"the checkpoint's steps are of {before['ranks']} ranks x {before['accumulated']} "
            f"accumulated micro-batches, and this run's of {now['ranks']} x {now['accumulated']}; "
            f"a run goes on with the same {size} in all: {_fix(size, now['ranks'])}"
        )
    fit_loop = checkpoint["loops"]["fit_loop"]
    progress = fit_loop["epoch_loop.batch_progress"]
    current = progress["current"]
    if open_micro_batches(checkpoint):
        raise SparsifyError(
            f"the checkpoint was saved after {current['ready']} micro-batches of an epoch, within "
            f"a step of {before['accumulated']}; go on with {before['ranks']} ranks, or from one "
            "that was saved after a step"
        )
    # An epoch saved in its last micro-batch may have some left when fewer ranks resume.
    still_open = current["completed"] < current["processed"]
    for counts in (progress["total"], current):
        running = counts["processed"] - counts["completed"]
        counts.update({key: -(-n * before["ranks"] // now["ranks"]) for key, n in counts.items()})
        counts["completed"] = counts["processed"] - running
    if still_open or not progress["is_last_batch"]:
        progress["is_last_batch"] = current["ready"] >= epoch


def _fix(size: int, ranks: int) -> str:
    if size % ranks:
        return f"take a number of ranks that divides {size}"
    return f"give --trainer.accumulate_grad_batches {size // ranks}"
