"""Whether a checkpoint belongs to the run that loads it."""

from collections.abc import Mapping
from typing import Any

from sparsify.errors import SparsifyError


def check_fits(checkpoint: Mapping[str, Any], base_hash: str, keys: set[str]) -> None:
    """Check that a checkpoint was made for this base model and these masks.

    Args:
        checkpoint: what Lightning read.
        base_hash: the hash of the base model at hand.
        keys: the names of the tensors that this run would save.

    Raises:
        SparsifyError: it was not.
    """
    if checkpoint.get("base_hash") != base_hash:
        raise SparsifyError(
            f"the checkpoint belongs to base model {str(checkpoint.get('base_hash'))[:12]}, and "
            f"this one is {base_hash[:12]}; give the --model.name_or_path and --model.dtype of "
            "its run"
        )
    found = set(checkpoint["state_dict"])
    if keys != found:
        raise SparsifyError(
            f"the checkpoint's masks do not fit this run: {len(found - keys)} entries are unknown "
            f"and {len(keys - found)} are missing (first: {min(keys ^ found)}); give the strategy, "
            "pattern, include and exclude of its run"
        )


def check_resumes(checkpoint: Mapping[str, Any], steps: int) -> None:
    """Check that training can go on from a checkpoint, to ``steps`` optimizer steps in all.

    Raises:
        SparsifyError: its place in the data is lost, or nothing is left to do.
    """
    if not checkpoint["resumable"]:
        raise SparsifyError(
            "the checkpoint was saved after fit had returned and does not know its place in the "
            "data; resume from one that was saved during the run"
        )
    if checkpoint["global_step"] >= steps > 0:
        raise SparsifyError(
            f"the checkpoint is at step {checkpoint['global_step']} of {steps}, so nothing is left "
            "to learn; export it with sparsify export, or give more steps with --trainer.max_steps"
        )
