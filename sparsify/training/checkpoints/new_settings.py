"""Lets a resumed run keep its own optimizer settings when it loads its checkpoint's state.

The checkpoint gives what was learned: moments, and the number of the step. The resumed run's own
settings give the rest: learning rate, weight decay, betas, the schedule. An optimizer's
``load_state_dict`` would overwrite both kinds; a scheduler's would restore the former schedule.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sparsify.common.errors import SparsifyError

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
_HINT = (
    "this is not a checkpoint that sparsify wrote for these settings, or it is damaged; resume "
    "from another checkpoint, or with the optimizer of its run"
)


class OwnSchedule(LambdaLR):
    """A schedule that loads only the step's number from a checkpoint. The learning rate at each
    step follows the present settings.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        for group, base, factor in zip(
            self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True
        ):
            lr = base * factor(self.last_epoch)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def keep_settings(optimizer: Optimizer, make: MakeOptimizer) -> None:
    """Make ``load_state_dict`` keep an optimizer's settings, and refuse states that do not fit it.

    Its ``state_dict`` gets three more entries: ``class``; ``given``, the settings with which the
    run began; and ``states``, the number of Parameters that have a state.

    Args:
        optimizer: a new optimizer that has taken no step.
        make: makes another optimizer; if it is of the same class, it shows what states hold.
    """
    given = _settings(optimizer)

    def describe(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        own = {"class": _path(optimizer), "given": given, "states": len(state["state"])}
        return {**state, **own}

    def take(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        _check_class(optimizer, state)
        _check_states(optimizer, state, make)
        groups = [
            {**_merged(optimizer, group, number, state, given), "params": stored["params"]}
            for number, (group, stored) in enumerate(
                zip(optimizer.param_groups, state["param_groups"], strict=True)
            )
        ]
        return {"state": state["state"], "param_groups": groups}

    optimizer.register_state_dict_post_hook(describe)
    optimizer.register_load_state_dict_pre_hook(take)


def keep_patience(states: Mapping[Any, Any], callbacks: Sequence[Any]) -> None:
    """Let early stopping keep the patience of this run: its saved state would restore the former
    one, so it is rewritten here. No other callback of Lightning's or ours saves a setting.
    """
    for callback in callbacks:
        state = states.get(getattr(callback, "state_key", None))
        if isinstance(callback, EarlyStopping) and isinstance(state, dict):
            state["patience"] = callback.patience


def _path(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Each group's settings, without those that a checkpoint cannot hold."""
    plain = (bool, int, float, str, tuple, type(None))
    return [
        {key: value for key, value in group.items() if isinstance(value, plain)}
        for group in optimizer.param_groups
    ]


def _merged(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    number: int,
    state: Mapping[str, Any],
    given: list[dict[str, Any]],
) -> dict[str, Any]:
    """The settings of one group after a resume: those of this run. Some other packages' optimizers
    keep learned values in a group, such as an estimated learning rate: unless set anew, these stay.
    """
    if type(optimizer).__module__.startswith(("torch.", "sparsify.")) or "given" not in state:
        return dict(group)
    then, stored = state["given"][number], state["param_groups"][number]
    same = (
        key
        for key, value in given[number].items()
        if key not in ("lr", "initial_lr") and key in then and then[key] == value and key in stored
    )
    return {**group, **{key: stored[key] for key in same}}


def _check_class(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    groups = state.get("param_groups")
    if not (isinstance(groups, list) and all(isinstance(group, dict) for group in groups)):
        raise SparsifyError(
            f"the checkpoint's optimizer's param_groups are no list of settings; {_HINT}"
        )
    own, name = optimizer.param_groups, type(optimizer).__qualname__
    former = state.get("class")
    alien = {key for group in groups for key in group} - {key for group in own for key in group}
    if former not in (None, _path(optimizer)) or (former is None and alien):
        then = str(former).rpartition(".")[2] if former else f"one with {', '.join(sorted(alien))}"
        raise SparsifyError(
            f"this run's optimizer is {name}, and the checkpoint's is {then}: what the one has "
            "learned of the gradients is nothing to the other; leave --model.optimizer (and the "
            "strategy's settings that choose it) as in the checkpoint's run, or start a new run"
        )
    counts = [_count(group.get("params")) for group in groups]
    if counts != [len(group["params"]) for group in own]:
        raise SparsifyError(
            f"the checkpoint's optimizer has groups of {counts} tensors, and this run's of "
            f"{[len(group['params']) for group in own]}; give the strategy, pattern, include, "
            "exclude and overrides of its run"
        )
    numbers = [number for group in groups for number in group["params"]]
    if numbers != list(range(len(numbers))):
        raise SparsifyError(
            f"the checkpoint's optimizer's tensors are not numbered from 0; {_HINT}"
        )


def _count(params: Any) -> int:
    return len(params) if isinstance(params, list) else -1


def _check_states(optimizer: Optimizer, state: Mapping[str, Any], make: MakeOptimizer) -> None:
    """Check each Parameter's saved state against the states that this optimizer keeps."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states, wanted = state.get("state"), _kept(optimizer, make)
    if not isinstance(states, dict) or len(states) != state.get("states", len(states)):
        raise SparsifyError(f"the checkpoint's optimizer's state is incomplete; {_HINT}")
    for number, values in states.items():
        where = f"the checkpoint's optimizer's state of tensor {number}"
        if not isinstance(number, int) or not 0 <= number < len(params):
            raise SparsifyError(f"{where} belongs to none of {len(params)}; {_HINT}")
        if not isinstance(values, dict):
            raise SparsifyError(f"{where} is {type(values).__name__} instead of dict; {_HINT}")
        for key, whole in (wanted or {}).items():
            _check_value(f"{where}: {key}", values.get(key), params[number] if whole else None)
        for key, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not _finite(value):
                raise SparsifyError(f"{where}: {key} is not finite; {_HINT}")


def _check_value(where: str, value: Any, like: Tensor | None) -> None:
    """Check one value: it must be a tensor like ``like``, or a number if that is None."""
    if like is None:
        number = isinstance(value, Tensor) and value.numel() == 1
        if not number and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise SparsifyError(f"{where} is {_kind(value)} and must be one number; {_HINT}")
        if value < 0:
            raise SparsifyError(f"{where} is {float(value)} and must not be negative; {_HINT}")
    elif not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        raise SparsifyError(f"{where} is {_kind(value)} and must be {_kind(like)}; {_HINT}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "missing" if value is None else type(value).__name__


def _finite(value: Tensor) -> bool:
    local = value.to_local() if isinstance(value, DTensor) else value
    return bool(torch.isfinite(local).all())


def _kept(optimizer: Optimizer, make: MakeOptimizer) -> dict[str, bool] | None:
    """What this optimizer keeps for a Parameter, found by one step on a small tensor. For each
    entry by name: whether it has the Parameter's shape (else it is a number). None if unknown.
    """
    param = nn.Parameter(torch.zeros(2, 3))
    param.grad = torch.zeros(2, 3)
    try:
        trial = make([param])
        if type(trial) is not type(optimizer):
            return None
        trial.step()
    except Exception:  # another package's optimizer may need more than this
        return None
    values = {key: torch.as_tensor(v) for key, v in trial.state[param].items() if v is not None}
    return {
        key: value.shape == param.shape
        for key, value in values.items()
        if value.shape == param.shape or value.numel() == 1
    }
