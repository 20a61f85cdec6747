"""A checkpoint that lacks a field, or holds it as something else, is refused by its name."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from sparsify import SparsifyError
from sparsify.common.errors import restoring
from sparsify.training.checkpoints.content import check_content, check_training
from tests.conftest import Cli

Change = Any


class Loops:
    """As Lightning's fit loop, before it has begun."""

    def state_dict(self) -> dict[str, Any]:
        counts = {"total": {"ready": 0, "completed": 0}, "is_last_batch": False}
        return {"state_dict": {}, "epoch_loop.batch_progress": counts}


class Callback:
    """A callback of ours."""

    state_key = "Cost"
    __module__ = "sparsify.callbacks.cost"

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": 0, "seconds": 0.0, "looks": []}


class FakeTrainer:
    ckpt_path = "x.ckpt"
    fit_loop = Loops()
    callbacks = (Callback(),)


def whole() -> dict[str, Any]:
    loops = Loops().state_dict() | {"state_dict": {"combined_loader": [{"of": 1}]}}
    return {
        "epoch": 0,
        "global_step": 2,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": {"a": torch.ones(2), "mask": torch.ones(2, dtype=torch.uint8)},
        "base_hash": "h",
        "hyper_parameters": {},
        "schedule_values": {"tau": 0.5},
        "resumable": True,
        "step_shape": {"ranks": 1, "accumulated": 2},
        "loops": {"fit_loop": loops},
        "callbacks": {"Cost": {"tokens": 3, "seconds": 0.5, "looks": [{"step": 1, "flips": 0.5}]}},
        "optimizer_states": [{"state": {}}],
        "lr_schedulers": [{"last_epoch": 2}],
    }


def refused(change: Change) -> str:
    checkpoint = whole()
    change(checkpoint)
    with pytest.raises(SparsifyError, match="^x.ckpt: .*resume from another checkpoint$") as caught:
        check_both(checkpoint)
    return str(caught.value)


def check_both(checkpoint: dict[str, Any]) -> None:
    check_content(checkpoint, "x.ckpt")
    check_training(checkpoint, FakeTrainer())


def put(path: str, value: Any) -> Change:
    def change(checkpoint: dict[str, Any]) -> None:
        *above, key = path.split("/")
        for name in above:
            checkpoint = checkpoint[name]
        checkpoint[key] = value

    return change


def test_a_whole_one_passes_and_stays_as_it_is() -> None:
    checkpoint = whole()
    kept = copy.deepcopy(checkpoint)
    check_content(checkpoint, "x.ckpt")
    check_training(checkpoint, FakeTrainer())
    assert str(checkpoint) == str(kept)


@pytest.mark.parametrize("field", sorted(set(whole()) - {"schedule_values"}))
def test_every_field_is_needed_and_has_its_kind(field: str) -> None:
    assert f"{field} is missing" in refused(lambda checkpoint: checkpoint.pop(field))
    for value in (None, b"x", math.nan, -1, 10**400, torch.ones(2)):
        assert f"{field} is " in refused(put(field, value))


def test_numbers_are_counts_and_finite() -> None:
    assert "epoch is -1, and must be a number, whole" in refused(put("epoch", -1))
    assert "global_step is True, and must be a number, whole" in refused(put("global_step", True))
    assert "an integer of 1329 bits" in refused(put("global_step", 10**400))
    assert "schedule_values.tau is nan" in refused(put("schedule_values/tau", math.nan))
    assert "step_shape.ranks is 0" in refused(put("step_shape/ranks", 0))
    nan = torch.full((2,), math.nan)
    assert "state_dict.a is not finite" in refused(put("state_dict/a", nan))
    assert "state_dict.a is list" in refused(put("state_dict/a", [1.0]))


def test_loops_and_callbacks_are_built_like_the_runs_own() -> None:
    progress = "loops/fit_loop/epoch_loop.batch_progress"
    assert "total.ready is 'x', and must be a number, whole" in refused(
        put(f"{progress}/total/ready", "x")
    )
    assert "is_last_batch is 1" in refused(put(f"{progress}/is_last_batch", 1))
    assert "batch_progress is missing" in refused(
        lambda checkpoint: checkpoint["loops"]["fit_loop"].pop("epoch_loop.batch_progress")
    )
    assert "combined_loader is missing" in refused(put("loops/fit_loop/state_dict", {}))
    assert "callbacks.Cost is missing" in refused(put("callbacks", {}))
    assert "Cost.tokens is 1.5, and must be a number, whole" in refused(
        put("callbacks/Cost/tokens", 1.5)
    )
    assert "Cost.looks is {}, and must be a list" in refused(put("callbacks/Cost/looks", {}))
    rows = [{"step": 1, "flips": "x"}]
    assert "Cost.looks[0].flips is 'x'" in refused(put("callbacks/Cost/looks", rows))


def test_whatever_fails_while_restoring_is_one_message() -> None:
    with (
        pytest.raises(SparsifyError, match=r"x.ckpt: its content .* \(KeyError: 'a'\)") as caught,
        restoring("x.ckpt"),
    ):
        raise KeyError("a")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(SparsifyError, match="^mine$"), restoring("x.ckpt"):
        raise SparsifyError("mine")


def test_fit_and_test_refuse_a_damaged_one_with_a_message(
    cli: Cli, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cli("fit", "--strategy=maskllm", "--checkpoint.every_n_steps=2", steps=3)
    good = torch.load(cli.runs()[0] / "checkpoints" / "step-00000002.ckpt", weights_only=True)
    path = tmp_path / "damaged.ckpt"

    def message(command: str, change: Change) -> str:
        checkpoint = copy.deepcopy(good)
        change(checkpoint)
        torch.save(checkpoint, path)
        capfd.readouterr()
        with pytest.raises(SystemExit, match="^2$"):
            cli(command, "--strategy=maskllm", f"--ckpt_path={path}", steps=4)
        return capfd.readouterr().err.splitlines()[-1]

    assert "loops is missing" in message("fit", lambda checkpoint: checkpoint.pop("loops"))
    assert "optimizer_states" in message("fit", lambda c: c.pop("optimizer_states"))
    assert "pytorch-lightning_version" in message(
        "test", lambda c: c.pop("pytorch-lightning_version")
    )
    assert "state_dict is missing" in message("test", lambda c: c.pop("state_dict"))
    assert "must be torch.float32" in message(
        "test", lambda c: c["state_dict"].update({k: v.half() for k, v in c["state_dict"].items()})
    )

    def misplaced(checkpoint: dict[str, Any]) -> None:
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["position"] = [1]

    assert "its content cannot be restored" in message("fit", misplaced)
