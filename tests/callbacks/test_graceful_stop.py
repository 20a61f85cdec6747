"""Every signal, in every phase of a run, ends it with its status and loses nothing."""

import json
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from sparsify.calibration import Layerwise
from sparsify.cli.main import main
from sparsify.common import signals
from sparsify.export.mask_file.file import read_masks
from sparsify.masking.registry import CALLBACK_ORDER, CALLBACKS, plugins
from sparsify.training.module import SparseCausalLM
from tests.conftest import Cli

STATUS = {signal.SIGINT: "^130$", signal.SIGTERM: "^143$", signal.SIGUSR1: "^143$"}
OPTIONS = [
    "--strategy=maskllm",
    "--model.optimizer.init_args.lr=0.1",
    "--model.calibration.cache=false",
    "--trainer.val_check_interval=2",
    "--data.eval_batch_size=4",
]
STEPS = 6


def send(number: int) -> None:
    os.kill(os.getpid(), number)


class AtBatch(Callback):
    """Sends this process a signal in training or validation."""

    def __init__(self, number: int, validation: bool = False) -> None:
        self.number, self.validation = signal.Signals(number), validation

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if not self.validation and trainer.global_step == 2:
            send(self.number)

    def on_validation_batch_start(
        self, trainer: Any, module: Any, batch: Any, index: int, *_: Any
    ) -> None:
        if self.validation and trainer.global_step == 4 and index == 1:
            send(self.number)


def sending(number: int, validation: bool = False) -> list[str]:
    name = f"{__name__}.AtBatch"
    return [
        f"--trainer.callbacks={name}",
        f"--trainer.callbacks.number={int(number)}",
        f"--trainer.callbacks.validation={str(validation).lower()}",
    ]


@contextmanager
def ends(number: int) -> Iterator[None]:
    """The command ends with the signal's status, and puts back the handlers."""
    before = [signal.getsignal(one) for one in STATUS]
    with pytest.raises(SystemExit, match=STATUS[signal.Signals(number)]):
        yield
    assert [signal.getsignal(one) for one in STATUS] == before


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def check_same(whole: Path, other: Path) -> None:
    assert read_masks(whole / "export").digest == read_masks(other / "export").digest
    a, b = (torch.load(r / "checkpoints/last.ckpt", weights_only=True) for r in (whole, other))
    assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())
    assert result(whole)["scores"] == result(other)["scores"]
    rows = [result(run)["history"]["validation"] for run in (whole, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [2, 4, 6]
    losses = [[row["loss"] for row in some] for some in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_training_and_validation_stop_and_go_on(
    cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    cli("fit", *OPTIONS, steps=STEPS)
    [whole] = cli.runs()
    for number, validation, step in (
        (signal.SIGTERM, False, 3),
        (signal.SIGUSR1, True, 4),
        (signal.SIGTERM, True, 4),
    ):
        capfd.readouterr()
        with ends(number):
            cli("fit", *OPTIONS, *sending(number, validation), steps=STEPS)
        stopped = cli.runs()[-1]
        command = f"sparsify fit --ckpt_path runs/maskllm/{stopped.name}/checkpoints/last.ckpt"
        assert f"stopped after step {step}; resume with {command}" in capfd.readouterr().err
        assert not (stopped / "result.json").exists()
        main([*command.split()[1:], "--trainer.callbacks=[]"])
        check_same(whole, cli.runs()[-1])


def test_a_validation_within_a_step_does_not_stop_before_it_is_taken(
    cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=3"]
    cli("fit", *OPTIONS, *options, steps=STEPS)
    [whole] = cli.runs()
    with ends(signal.SIGTERM):  # in the validation after the ninth micro-batch
        cli("fit", *OPTIONS, *options, *sending(signal.SIGTERM, True), steps=STEPS)
    assert "stopped after step 5; resume" in capfd.readouterr().err
    main(["fit", f"--ckpt_path={cli.runs()[-1]}/checkpoints/last.ckpt", "--trainer.callbacks=[]"])
    last = [torch.load(run / "checkpoints/last.ckpt") for run in (whole, cli.runs()[-1])]
    tensors = [checkpoint["state_dict"] for checkpoint in last]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


@pytest.mark.parametrize("number", STATUS)
def test_calibration_stops_at_once(
    cli: Cli, number: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    collect = Layerwise.collect
    monkeypatch.setattr(Layerwise, "collect", lambda *args: (send(number), collect(*args))[1])
    with ends(number):
        cli("fit", *OPTIONS)
    assert "stopped before the first step; start the same command again" in capfd.readouterr().err


def test_the_end_of_a_run_stops_at_once(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    step = SparseCausalLM.window_losses

    def sent(self: Any, *args: Any) -> Any:
        if self.trainer.global_step == 2 and not self.trainer.validating:
            send(signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SparseCausalLM, "window_losses", sent)
        with ends(signal.SIGTERM):
            cli("fit", *OPTIONS)
    command = "sparsify export --ckpt_path runs/maskllm/version_0/checkpoints/last.ckpt"
    assert f"stopped in the test or the export; go on with {command}" in capfd.readouterr().err
    main(command.split()[1:])
    assert (cli.runs()[-1] / "export" / "masks.nmask").exists()


@pytest.mark.parametrize("command", ["validate", "test", "export", "sensitivity"])
def test_other_commands_stop_at_once(
    cli: Cli, command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SparseCausalLM, "window_losses", lambda *_: send(signal.SIGTERM))
    with ends(signal.SIGTERM):
        cli(command, "--strategy=magnitude")
    assert "stopped before its end; start the same command again" in capfd.readouterr().err


def test_a_second_signal_ends_a_held_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(signals.os, "_exit", left.append)

    @signals.stoppable()
    def command() -> None:
        signals.hold()
        send(signal.SIGTERM)
        send(signal.SIGINT)  # within the second it is the same request
        assert left == []
        monkeypatch.setattr(signals, "SAME", 0.0)
        send(signal.SIGINT)
        assert left == [143]

    with pytest.raises(SystemExit, match="^143$"):
        command()


def test_a_command_off_the_main_thread_takes_no_signals() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with signals.stoppable():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_callbacks_run_in_the_declared_order() -> None:
    assert tuple(plugins(CALLBACKS)) == CALLBACK_ORDER


@pytest.mark.parametrize("loaded", [None, types.ModuleType("torch.distributed")])
def test_a_signal_may_come_in_the_midst_of_an_import(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loaded is None:
        monkeypatch.delitem(sys.modules, "torch.distributed")
    else:
        monkeypatch.setitem(sys.modules, "torch.distributed", loaded)

    def importing(name: str, *args: Any) -> Any:
        raise AttributeError("partially initialized module")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.__import__", importing)
        with pytest.raises(SystemExit) as stop, signals.stoppable():
            raise signals.stop(signal.SIGTERM)
    assert stop.value.code == 143
