"""Whether a checkpoint belongs to the run that loads it."""

from collections.abc import Mapping
from typing import Any

import torch

from sparsify.errors import SparsifyError


def check_fits(
    checkpoint: Mapping[str, Any], base_hash: str, state: Mapping[str, torch.Tensor]
) -> None:
    """Check that a checkpoint was made for this base model and these masks.

    Args:
        checkpoint: what Lightning read.
        base_hash: the hash of the base model at hand.
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
    if odd := sorted(set(found.items()) ^ set(wanted.items())):
        name = odd[0][0]
        raise SparsifyError(
            f"the checkpoint's masks do not fit this run: {name} is {found.get(name, 'missing')} "
            f"in it and {wanted.get(name, 'unknown')} here; give the strategy, pattern, include, "
            "exclude and overrides of its run"
        )


def check_resumes(checkpoint: Mapping[str, Any], steps: int, path: Any) -> None:
    """Check that training can go on from the checkpoint at ``path``, to ``steps`` optimizer steps
    in all.

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
            f"to learn; test and export it with sparsify export --ckpt_path {path}, or give more "
            "steps with --trainer.max_steps"
        )
