"""A run that was stopped and goes on is the run that was not stopped, bit for bit."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sparsify.cli.main import main
from sparsify.export.mask_file.file import read_masks
from tests.conftest import Cli

STEPS = 8  # of two micro-batches; an epoch has eleven, so its sixth step has one

RUN = [
    "--strategy=maskllm",
    "--logger=csv",
    "--trainer.log_every_n_steps=1",
    "--masks.every_n_steps=2",
    "--model.calibration.samples=16",
]


@pytest.fixture
def options(cli: Cli, text: Path) -> list[str]:
    """A run of STEPS steps over more than an epoch."""
    words = (text / "train.txt").read_text().split()[: 44 * 16]
    Path("short.txt").write_text(" ".join(words))
    return [
        *RUN,
        "--data.train=short.txt",
        "--trainer.accumulate_grad_batches=2",
        "--model.optimizer.init_args.lr=0.1",
    ]


def logged(run: Path) -> dict[tuple[int, str], str]:
    """Every logged number but those of speed, by step and name."""
    with (run / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    return {
        (int(row["step"]), name): value
        for row in rows
        for name, value in row.items()
        if value and not name.startswith(("speed", "run/seconds", "run/peak", "epoch", "step"))
    }


def check_same(
    whole: Path,
    resumed: Path,
    at: int,
    steps: int = STEPS,
    batches: int = 2 * 11 - 2 - 5,
    due: bool = True,
) -> None:
    """The resumed run logged what the whole one did from step ``at``, and has the same masks; so
    it does for a validation that was due when the checkpoint was saved.
    """
    expected = {
        key: value
        for key, value in logged(whole).items()
        if key[0] >= at or (due and key[0] == at - 1 and key[1].startswith(("val/", "run/")))
    }
    found = logged(resumed)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = float(found[key]) == pytest.approx(float(value), rel=1e-6)
        assert same if key[0] < at else found[key] == value
    histories = [json.loads((r / "result.json").read_text())["history"] for r in (whole, resumed)]
    of_whole, of_resumed = ([row["step"] for row in h["validation"]] for h in histories)
    assert of_whole == of_resumed
    assert {step for step, name in expected if name == "train/task_loss"} == set(range(at, steps))
    a, b = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, resumed)
    )
    assert a["global_step"] == b["global_step"] == steps
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())
    a, b = (read_masks(run / "export") for run in (whole, resumed))
    assert a.digest == b.digest
    a, b = (json.loads((run / "result.json").read_text()) for run in (whole, resumed))
    assert a["scores"] == b["scores"]
    assert a["run"]["tokens"] == b["run"]["tokens"] == batches * 4 * 16


KEEP = [
    "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks.filename={step}",
    "--trainer.callbacks.dirpath=kept",
]
KEEP_EVERY = [*KEEP, "--trainer.callbacks.every_n_train_steps=1"]


# Of the callback that kept all.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_is_the_uninterrupted_one(cli: Cli, options: list[str]) -> None:
    cli("fit", *options, *KEEP_EVERY, steps=STEPS)
    whole = cli.runs()[0]
    assert len({logged(whole)[step, "train/task_loss"] for step in range(STEPS)}) == STEPS
    assert any(float(v) > 0 for (_, name), v in logged(whole).items() if name == "masks/flips"), (
        "nothing was learned"
    )
    # In mid-epoch, before and after the epoch's odd last step, and in the next epoch.
    for at in (1, 5, 6, 7):
        again = [f"--ckpt_path=kept/step={at}.ckpt", "--trainer.callbacks=[]"]
        cli("fit", *options, *again, steps=STEPS)
        check_same(whole, cli.runs()[-1], at)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("steps", "batches"), [(-1, 22), (9, 17)])
def test_so_is_a_resumed_run_of_epochs(
    cli: Cli, options: list[str], steps: int, batches: int
) -> None:
    options = [*options, "--trainer.max_epochs=2"]
    cli("fit", *options, *KEEP_EVERY, steps=steps)
    for at in (2, 5, 6, 7):
        again = [f"--ckpt_path=kept/step={at}.ckpt", "--trainer.callbacks=[]"]
        cli("fit", *options, *again, steps=steps)
        check_same(cli.runs()[0], cli.runs()[-1], at, 12 if steps < 0 else steps, batches)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("interval", "at"), [("4", (2, 3, 4)), ("1.0", (5, 6))])
def test_early_stopping_sees_the_validation_that_was_due(
    cli: Cli, options: list[str], interval: str, at: tuple[int, ...]
) -> None:
    stop = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"
    stops = [stop, "--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.patience=1000"]
    stops += ["--trainer.callbacks.min_delta=100", f"--trainer.val_check_interval={interval}"]
    cli("fit", *options, *KEEP_EVERY, *stops, steps=STEPS)

    def state(run: Path) -> Any:
        saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
        return next(value for key, value in saved.items() if key.startswith("EarlyStopping"))

    assert state(cli.runs()[0])["wait_count"] == (2 if interval == "4" else 1)
    for step in at:
        again = [f"--ckpt_path=kept/step={step}.ckpt", "--trainer.callbacks=[]", *stops]
        cli("fit", *options, *again, steps=STEPS)
        assert state(cli.runs()[-1]) == state(cli.runs()[0])
        check_same(cli.runs()[0], cli.runs()[-1], step)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("epochs", [False, True])
@pytest.mark.parametrize(
    ("more", "at"),
    [
        (["--trainer.callbacks.monitor=val/loss", "--trainer.val_check_interval=4"], (2, 8)),
        (["--trainer.callbacks.monitor=val/loss", "--trainer.val_check_interval=11"], (6,)),
        (["--trainer.callbacks.save_on_train_epoch_end=true"], (6,)),
    ],
)
def test_so_is_one_saved_after_a_validation_or_an_epoch(
    cli: Cli, options: list[str], more: list[str], at: tuple[int, ...], epochs: bool
) -> None:
    steps, length = (-1, ["--trainer.max_epochs=2"]) if epochs else (9, [])
    cli("fit", *options, *KEEP, *more, *length, steps=steps)
    for step in at:
        again = [f"--ckpt_path=kept/step={step}.ckpt", "--trainer.callbacks=[]"]
        again += [option for option in more if "callbacks" not in option]
        cli("fit", *options, *again, *length, steps=steps)
        done = (12, 22) if epochs else (9, 17)
        check_same(cli.runs()[0], cli.runs()[-1], step, *done, due=False)


def test_a_run_of_epochs_that_is_over_says_so(
    cli: Cli, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    epochs = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4"]
    cli("fit", *options, *epochs, steps=-1)
    checkpoint = cli.runs()[-1] / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit, match="^2$"):
        main(["fit", f"--ckpt_path={checkpoint}"])
    said = " ".join(capsys.readouterr().err.split())
    assert "at the end of epoch 1 of 1, so nothing is left to learn" in said
    main(["fit", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2"])
    assert json.loads((cli.runs()[-1] / "result.json").read_text())["run"]["steps"] == 4


class Seen(Callback):
    """Notes what each micro-batch was."""

    batches: ClassVar[list[tuple[int, int, int, int]]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> None:
        self.batches.append((trainer.global_step, trainer.current_epoch, i, int(batch.sum())))


@pytest.mark.parametrize(("at", "interval"), [(4, 4), (5, 4), (6, 11), (8, 4)])
@pytest.mark.parametrize("epochs", [[], ["--trainer.max_epochs=3"]])
def test_a_finished_run_with_more_steps_goes_on_in_its_data(
    cli: Cli, options: list[str], at: int, interval: int, epochs: list[str]
) -> None:
    options = [*options, f"--trainer.callbacks={__name__}.Seen", *epochs]
    options.append(f"--trainer.val_check_interval={interval}")
    cli("fit", *options, steps=at)
    Seen.batches.clear()
    cli("fit", *options, f"--ckpt_path={cli.runs()[0]}", steps=10)
    more = list(Seen.batches)
    Seen.batches.clear()
    cli("fit", *options, steps=10)
    assert more == [batch for batch in Seen.batches if batch[0] >= at]
    resumed, whole = (logged(run).keys() for run in cli.runs()[1:])
    assert resumed == {(step, name) for step, name in whole if step >= at}


class Ends(Callback):
    """Ends a run after three micro-batches."""

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        trainer.should_stop = i == 2


def test_what_is_lost_of_a_step_is_said(
    cli: Cli, options: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    ends = [f"--trainer.callbacks={__name__}.Ends", "--trainer.accumulate_grad_batches=2"]
    cli("fit", *options, *ends, steps=STEPS)
    assert "within a step" not in caplog.text
    checkpoint = cli.runs()[-1] / "checkpoints" / "last.ckpt"
    main(["fit", f"--ckpt_path={checkpoint}", "--trainer.callbacks=[]"])
    assert "saved within a step: the gradients of its first 1 micro-batch(es)" in caplog.text


class PressCtrlC(Callback):
    """Sends this process a SIGINT before one micro-batch."""

    def __init__(self, micro_batch: int) -> None:
        self.left = micro_batch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        self.left -= 1


def test_ctrl_c_finishes_the_step_and_saves(
    cli: Cli, options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    cli("fit", *options, steps=STEPS)
    whole = cli.runs()[0]
    handler = signal.getsignal(signal.SIGINT)
    for micro_batch, step in ((4, 3), (5, 3), (10, 6)):
        press = ["--trainer.callbacks=tests.training.test_resume.PressCtrlC"]
        press += [f"--trainer.callbacks.micro_batch={micro_batch}"]
        with pytest.raises(SystemExit, match="^130$"):
            cli("fit", *options, *press, steps=STEPS)
        assert signal.getsignal(signal.SIGINT) is handler
        stopped = cli.runs()[-1]
        checkpoint = stopped / "checkpoints" / "last.ckpt"
        shown = f"runs/maskllm/{stopped.name}/checkpoints/last.ckpt"
        say = f"stopped after step {step}; resume with sparsify fit --ckpt_path {shown}"
        assert say in capfd.readouterr().err
        assert torch.load(checkpoint, weights_only=True)["global_step"] == step
        assert not (stopped / "export").exists()
        assert not (stopped / "result.json").exists()
        main(["fit", "--ckpt_path", str(checkpoint), "--trainer.callbacks=[]"])
        check_same(whole, cli.runs()[-1], step)


def test_a_checkpoint_holds_what_is_learned_and_no_base_weight(
    cli: Cli, model_folder: Path
) -> None:
    cli("fit", "--strategy=maskllm", "--checkpoint.every_n_steps=2", steps=3)
    saved = torch.load(cli.runs()[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert len(saved["state_dict"]) == 14
    assert all(name.endswith("masker.logits_OKG") for name in saved["state_dict"])
    assert len(saved["base_hash"]) == 64
