"""A resumed run takes what the user says now, and refuses what it cannot take."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from sparsify import SparsifyError
from sparsify.training.checkpoints.new_settings import OwnSchedule, keep_settings
from tests.conftest import Cli

AT, STEPS = 2, 5


@pytest.fixture
def half(cli: Cli) -> Path:
    """The checkpoint of step AT of a run, and what it goes on from."""
    cli("fit", "--strategy=maskllm", f"--checkpoint.every_n_steps={AT}", *OPTIONS, steps=AT + 1)
    return cli.runs()[0] / "checkpoints" / f"step-{AT:08}.ckpt"


OPTIONS = ["--model.optimizer.init_args.lr=0.05", "--model.calibration.samples=16"]
OPTIONS += ["--trainer.limit_val_batches=0", "--trainer.gradient_clip_val=null"]
LR = "--model.optimizer.init_args.lr"


def last(cli: Cli) -> dict[str, Any]:
    return torch.load(cli.runs()[-1] / "checkpoints" / "last.ckpt", weights_only=True)


def moved(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest distance of two checkpoints' logits."""
    a, b = one["state_dict"], other["state_dict"]
    names = [name for name in a if "logits" in name]
    return max(float((a[name] - b[name]).abs().max()) for name in names)


def test_the_new_learning_rate_and_weight_decay_are_what_trains(cli: Cli, half: Path) -> None:
    before = torch.load(half, weights_only=True)
    words = [LR, "0", "--model.optimizer.init_args.weight_decay", "0.3"]
    words += [
        "--model.optimizer.init_args.betas=[0.8,0.99]",
        "--model.optimizer.init_args.eps=1e-6",
    ]
    cli("fit", f"--ckpt_path={half}", *words, steps=STEPS)
    after = last(cli)
    assert after["global_step"] == STEPS
    assert moved(before, after) == 0
    (group,) = after["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["initial_lr"]) == (0, 0)
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.3, (0.8, 0.99), 1e-6)
    said = after["hyper_parameters"]["config"]["model"]["optimizer"]["init_args"]
    assert all(group[name] == said[name] for name in ("lr", "weight_decay", "eps"))
    assert after["optimizer_states"][0]["state"][0]["step"] == STEPS


def test_the_step_after_a_resume_is_that_of_the_formula(cli: Cli, half: Path) -> None:
    before = torch.load(half, weights_only=True)
    lr, decay, b1, b2, eps = 0.02, 0.3, 0.9, 0.95, 1e-8
    words = [f"{LR}={lr}", f"--model.optimizer.init_args.weight_decay={decay}"]
    words += ["--model.lr_final=0.5", "--model.warmup_steps=3"]
    cli("fit", f"--ckpt_path={half}", *words, steps=AT + 1)
    after = last(cli)
    share = 0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * AT / (AT + 1)))
    rate = lr * min(1.0, (AT + 1) / 4) * share
    old, new = before["optimizer_states"][0]["state"], after["optimizer_states"][0]["state"]
    for number, name in enumerate(before["state_dict"]):
        mean, square = new[number]["exp_avg"], new[number]["exp_avg_sq"]
        gradient = (mean - b1 * old[number]["exp_avg"]) / (1 - b1)
        torch.testing.assert_close(
            square, b2 * old[number]["exp_avg_sq"] + (1 - b2) * gradient**2, rtol=1e-3, atol=1e-12
        )
        step = mean / (1 - b1 ** (AT + 1)) / ((square / (1 - b2 ** (AT + 1))).sqrt() + eps)
        expected = before["state_dict"][name] * (1 - rate * decay) - rate * step
        torch.testing.assert_close(after["state_dict"][name], expected, rtol=1e-5, atol=1e-6)


def test_another_optimizer_is_refused_by_name(
    cli: Cli, half: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        cli("fit", f"--ckpt_path={half}", "--model.optimizer=torch.optim.SGD", f"{LR}=1", steps=4)
    message = capfd.readouterr().err
    assert "this run's optimizer is SGD, and the checkpoint's is AdamW" in message
    assert "leave --model.optimizer" in message
    assert "Traceback" not in message


def test_the_rate_of_an_optimizer_of_a_strategys_own(cli: Cli) -> None:
    words = ["--strategy=maskpro", "--model.calibration.samples=16"]
    cli("fit", *words, "--checkpoint.every_n_steps=2", steps=3)
    path = cli.runs()[0] / "checkpoints" / "step-00000002.ckpt"
    cli("fit", f"--ckpt_path={path}", "--model.strategy.init_args.lr=0.0", steps=4)
    after = last(cli)
    assert moved(torch.load(path, weights_only=True), after) == 0
    assert after["optimizer_states"][0]["param_groups"][0]["lr"] == 0


class Estimating(SGD):
    """Keeps in its group what it learns, as some optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1, d: float = 1.0) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["d"] = d

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["d"] *= 2
        return super().step(closure)


def made(make: Any) -> tuple[nn.Parameter, Any, OwnSchedule]:
    param = nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    optimizer = make([param])
    keep_settings(optimizer, make)
    return param, optimizer, OwnSchedule(optimizer, lambda step: 1 / (step + 1))


def test_what_an_optimizer_learned_within_its_settings_stays() -> None:
    _, former, _ = made(Estimating)
    former.step()
    former.step()
    _, same, _ = made(Estimating)
    same.load_state_dict(former.state_dict())
    assert same.param_groups[0]["d"] == 4
    _, other, schedule = made(lambda params: Estimating(params, lr=0.8, d=3.0))
    other.load_state_dict(former.state_dict())
    schedule.load_state_dict({"last_epoch": 1})
    assert (other.param_groups[0]["d"], other.param_groups[0]["lr"]) == (3, 0.4)


def damaged(change: Any) -> str:
    _, former, _ = made(AdamW)
    former.step()
    state = former.state_dict()
    change(state)
    with pytest.raises(SparsifyError) as caught:
        made(AdamW)[1].load_state_dict(state)
    return str(caught.value)


def test_a_state_that_does_not_fit_is_named() -> None:
    def change(key: str, value: Any) -> Any:
        return lambda state: state["state"][0].update({key: value})

    nan = torch.full((2, 2), math.nan)
    assert "exp_avg is float32 (4,) and must be float32 (2, 2)" in damaged(
        change("exp_avg", torch.zeros(4))
    )
    assert "exp_avg is float16 (2, 2)" in damaged(change("exp_avg", torch.zeros(2, 2).half()))
    assert "exp_avg_sq is not finite" in damaged(change("exp_avg_sq", nan))
    assert "step is missing" in damaged(lambda state: state["state"][0].pop("step"))
    assert "step is -1.0" in damaged(change("step", torch.tensor(-1.0)))
    assert "state is incomplete" in damaged(lambda state: state["state"].clear())
    assert "is list instead of dict" in damaged(lambda state: state["state"].update({0: []}))
    assert "belongs to none of 1" in damaged(
        lambda state: state["state"].update({7: state["state"].pop(0)})
    )
    assert "groups of [0] tensors" in damaged(
        lambda state: state["param_groups"][0].update(params=[])
    )
    assert "no list of settings" in damaged(lambda state: state.pop("param_groups"))
