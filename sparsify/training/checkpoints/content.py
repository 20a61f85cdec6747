"""Checks what a checkpoint holds, before anything is restored from it.

A checkpoint that was cut off, edited or made by other software is refused; the message names the
first field that differs from what a run writes, by its dotted path.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import lightning
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sparsify.common.errors import CHECKPOINT_ADVICE, SparsifyError
from sparsify.common.values import COUNT, FLAG, LARGEST, LIST, NUMBER, TABLE, TEXT, is_of, short

# What every command reads, and what training reads on top.
ALWAYS = {
    "epoch": COUNT,
    "global_step": COUNT,
    "pytorch-lightning_version": TEXT,
    "state_dict": TABLE,
    "base_hash": TEXT,
    "hyper_parameters": TABLE,
}
TRAINING = {
    "resumable": FLAG,
    "step_shape": TABLE,
    "step_shape.ranks": COUNT,
    "step_shape.accumulated": COUNT,
    "loops": TABLE,
    "loops.fit_loop": TABLE,
    "callbacks": TABLE,
    "optimizer_states": LIST,
    "lr_schedulers": LIST,
}
# These may be missing; checkpoints of one-shot runs do not have the first.
POSSIBLE = {
    "calibration": TABLE,
    "schedule_values": TABLE,
    "loops": TABLE,
    "orders": TABLE,
    "searched": TABLE,
}


def check_content(checkpoint: Any, path: Any) -> None:
    """Check the fields of a checkpoint that every command reads.

    Args:
        checkpoint: what was read from ``path``.
        path: names the checkpoint in messages.

    Raises:
        SparsifyError: a field is missing, or is of another kind.
    """
    if not isinstance(checkpoint, dict):
        raise SparsifyError(f"{path}: it holds {type(checkpoint).__name__}; {CHECKPOINT_ADVICE}")
    for field, kind in ALWAYS.items():
        _check(checkpoint, field, kind, path)
    for field, kind in POSSIBLE.items():
        if checkpoint.get(field) is not None:
            _check(checkpoint, field, kind, path)
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            _refuse(path, f"state_dict.{name}", type(value).__name__, "a tensor")
        # Values that are not finite cannot be ranked or multiplied.
        local = value.to_local() if isinstance(value, DTensor) else value
        if local.is_floating_point() and not torch.isfinite(local).all():
            _refuse(path, f"state_dict.{name}", "not finite", "finite in every element")
    for name, value in (checkpoint.get("orders") or {}).items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            _refuse(path, f"orders.{name}", _shown(value), "a tensor")
    for name, value in (checkpoint.get("schedule_values") or {}).items():
        _check_number(path, f"schedule_values.{name}", value)


def check_training(checkpoint: Mapping[str, Any], trainer: Any) -> None:
    """Check the fields that resumed training reads, against what this run would save.

    Raises:
        SparsifyError: a field is missing, or is of another kind.
    """
    path = trainer.ckpt_path
    for field, kind in TRAINING.items():
        _check(checkpoint, field, kind, path)
    for field in ("ranks", "accumulated"):
        if checkpoint["step_shape"][field] < 1:
            _refuse(path, f"step_shape.{field}", 0, "1 or more")
    for field in ("optimizer_states", "lr_schedulers"):
        if [type(value) for value in checkpoint[field]] != [dict]:
            _refuse(path, field, short(checkpoint[field]), "a list of one table")
    _check(checkpoint["lr_schedulers"][0], "last_epoch", COUNT, path, "lr_schedulers[0].")
    loops = checkpoint["loops"]["fit_loop"]
    same_version = checkpoint["pytorch-lightning_version"] == lightning.__version__
    own = {k: v for k, v in trainer.fit_loop.state_dict().items() if not k.endswith("state_dict")}
    # Lightning ignores missing fields, and would start again at the beginning of the data.
    _check_like(path, "loops.fit_loop", loops, own, complete=same_version)
    steps = _at(loops, ("epoch_loop.automatic_optimization.optim_progress", "optimizer", "step"))
    counted = _at(steps, ("total", "completed"))
    if isinstance(counted, int) and counted != checkpoint["global_step"]:
        _refuse(path, "global_step", checkpoint["global_step"], f"{counted}, as its loops count")
    _check_place(path, loops)
    for callback in trainer.callbacks:
        if type(callback).__module__.startswith("sparsify.") and (own := callback.state_dict()):
            field = f"callbacks.{callback.state_key}"
            state = checkpoint["callbacks"].get(callback.state_key)
            _check_like(path, field, state, own, complete=False)


def _check_place(path: Any, loops: Mapping[str, Any]) -> None:
    """Check that the checkpoint says how far the run was in its data."""
    place = _at(loops, ("state_dict", "combined_loader"))
    if not (isinstance(place, list) and len(place) == 1 and isinstance(place[0], dict)):
        field = "loops.fit_loop.state_dict.combined_loader"
        _refuse(path, field, _shown(place), "a list of one table")


def _check_like(path: Any, field: str, found: Any, own: Any, complete: bool) -> None:
    """Check that a checkpoint's value has the structure of this run's own: tables, counts, flags,
    and lists of tables of numbers.

    Args:
        path: the checkpoint's path.
        field: the dotted path of the value.
        found: the value in the checkpoint.
        own: the value that this run would save at its start.
        complete: whether the checkpoint's tables must hold every key of this run's.
    """
    if isinstance(own, dict):
        _check_kind(path, field, found, TABLE)
        for key, value in own.items():
            if key in found:
                _check_like(path, f"{field}.{key}", found[key], value, complete)
            elif complete:
                _refuse(path, f"{field}.{key}", "missing", "there")
    elif isinstance(own, bool):
        _check_kind(path, field, found, FLAG)
    elif isinstance(own, int):
        _check_kind(path, field, found, COUNT)
    elif isinstance(own, float):
        _check_number(path, field, found, least=0)
    elif isinstance(own, list):
        _check_kind(path, field, found, LIST)
        for where, value in _numbers(path, field, found):
            _check_number(path, where, value)


def _numbers(path: Any, field: str, rows: list[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows):
        _check_kind(path, f"{field}[{number}]", row, TABLE)
        yield f"{field}[{number}].step", row.get("step")
        yield from ((f"{field}[{number}].{key}", value) for key, value in row.items())


def _at(table: Any, keys: tuple[str, ...]) -> Any:
    """The value at the end of a chain of keys; None if a key is missing."""
    for key in keys:
        table = table.get(key) if isinstance(table, dict) else None
    return table


def _check_number(path: Any, field: str, value: Any, least: float = -math.inf) -> None:
    if not is_of(NUMBER, value) or not max(-LARGEST, least) <= value <= LARGEST:
        _refuse(path, field, _shown(value), "a finite number")


def _check(table: Mapping[str, Any], field: str, kind: str, path: Any, above: str = "") -> None:
    """Check the value at a dotted path within a table."""
    value: Any = table
    for key in field.split("."):
        if not isinstance(value, dict) or key not in value:
            _refuse(path, f"{above}{field}", "missing", kind)
        value = value[key]
    _check_kind(path, f"{above}{field}", value, kind)


def _check_kind(path: Any, field: str, value: Any, kind: str) -> None:
    if not is_of(kind, value):
        _refuse(path, field, _shown(value), kind)


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else short(value)


def _refuse(path: Any, field: str, found: Any, wanted: str) -> NoReturn:
    raise SparsifyError(f"{path}: {field} is {found}, and must be {wanted}; {CHECKPOINT_ADVICE}")
