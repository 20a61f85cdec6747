"""Finds the checkpoint that a command reads: the newest one that is whole."""

import os
import sys
from pathlib import Path

from sparsify.common.errors import SparsifyError
from sparsify.common.printable import printable
from sparsify.training.checkpoints.files import FOLDER, LAST, damage, step_of, steps_in

_GIVE = "give the checkpoints/last.ckpt of a run, or the run's folder"


def newest_whole(path: Path) -> Path:
    """The checkpoint that ``--ckpt_path`` means.

    Args:
        path: a run's folder, its folder of checkpoints or ``last.ckpt``: each means the newest
            whole checkpoint there. Any other path means the checkpoint at that path.

    Returns:
        The path of a whole checkpoint. If newer ones are damaged, a warning names them.

    Raises:
        SparsifyError: there is no whole checkpoint.
    """
    candidates = _candidates(path)
    bad: list[str] = []
    for candidate in candidates:
        if not (reason := damage(candidate)):
            for line in bad if os.environ.get("LOCAL_RANK", "0") == "0" else ():
                warning = f"WARNING: {line}; going on from {_named(candidate)}"
                print(printable(warning), file=sys.stderr)
            return candidate
        bad.append(f"{_named(candidate)} is left aside: {reason}")
    if not bad:
        raise SparsifyError(
            f"--ckpt_path {path}: there is no checkpoint in it; {_GIVE}. A run that was stopped "
            "before its first checkpoint has to be started again"
        )
    reason = damage(candidates[0])
    if len(bad) > 1:
        reason = "no checkpoint there is whole: " + "; ".join(bad)
    elif candidates[0].exists():
        reason = (
            f"this is not a checkpoint that sparsify wrote, or it is damaged: {reason}"
            f"{_others(path)}"
        )
    raise SparsifyError(f"--ckpt_path {path}: {reason}; {_GIVE}")


def _candidates(path: Path) -> list[Path]:
    """The paths to try, best first."""
    if path.is_dir() and path.suffix != ".ckpt":
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
    elif path.name == LAST:
        folder = path.parent
    else:
        return [path]
    last, steps = folder / LAST, steps_in(folder)
    newest = last.resolve() if last.is_symlink() else None
    if newest is None or newest.parent != folder.resolve() or (at := step_of(newest)) is None:
        # Not our link: another program wrote the file, or the file system has no links.
        return [last, *steps] if last.exists() or not (steps or path.is_dir()) else steps
    # Later steps than the link's were not finished, or belong to another run.
    return [folder / newest.name, *(step for step in steps if (step_of(step) or 0) < at)]


def _others(path: Path) -> str:
    """For a message on a damaged checkpoint: the newest whole one beside it."""
    whole = next((other for other in steps_in(path.parent) if not damage(other)), None)
    return f"; {whole} is whole" if whole else ""


def _named(path: Path) -> str:
    step = step_of(path)
    return f"{path} (step {step})" if step is not None else str(path)
