"""What is kept of a run, and what happens where there is no space for it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from sparsify.callbacks.checkpoints import Checkpoints
from sparsify.callbacks.mask_logging import MaskLogging
from sparsify.cli.main import main
from sparsify.common.errors import DiskFull, SparsifyError
from sparsify.training.checkpoints.files import WholeFileIO
from sparsify.training.checkpoints.newest import newest_whole
from tests.callbacks.fake_trainer import FakeTrainer, saved_step
from tests.conftest import Cli


def names(*steps: int) -> list[str]:
    return ["last.ckpt", *(f"step-{step:08d}.ckpt" for step in steps)]


@pytest.mark.parametrize("sharded", [False, True])
def test_the_last_ones_are_kept(tmp_path: Path, sharded: bool) -> None:
    trainer, callback = FakeTrainer(tmp_path, sharded), Checkpoints(keep=2)
    folder = tmp_path / "checkpoints"
    kept: list[int] = []
    for trainer.global_step in (5, 10, 15, 15, 120_000_000):
        assert callback.save(trainer) == folder / "last.ckpt"
        kept = [*kept, *{trainer.global_step} - set(kept)][-2:]
        assert sorted(os.listdir(folder)) == names(*kept)
        assert saved_step(folder / "last.ckpt") == trainer.global_step
        assert os.readlink(folder / "last.ckpt") == f"step-{trainer.global_step:08d}.ckpt"


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    trainer, callback = FakeTrainer(tmp_path), Checkpoints()
    trainer.global_step = 4
    callback.save(trainer)
    inode = (tmp_path / "checkpoints" / "step-00000004.ckpt").stat().st_ino
    callback.save(trainer)
    assert (tmp_path / "checkpoints" / "step-00000004.ckpt").stat().st_ino == inode


def test_another_run_in_the_same_folder_takes_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    trainer, callback = FakeTrainer(tmp_path), Checkpoints()
    for trainer.global_step in (100, 200):
        callback.save(trainer)
    trainer.global_step, other = 10, Checkpoints()
    other.save(trainer)
    # Until it has two of its own, the former run's stay.
    assert sorted(os.listdir(folder)) == names(10, 100, 200)
    assert newest_whole(folder) == folder / "step-00000010.ckpt"
    trainer.global_step = 20
    other.save(trainer)
    assert sorted(os.listdir(folder)) == names(10, 20)


def test_a_run_that_goes_on_in_its_folder_keeps_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    trainer, callback = FakeTrainer(tmp_path), Checkpoints(keep=3)
    for trainer.global_step in (100, 200, 300):
        callback.save(trainer)
    trainer.ckpt_path, trainer.global_step = folder / "step-00000200.ckpt", 250
    Checkpoints(keep=3).save(trainer)
    assert sorted(os.listdir(folder)) == names(100, 200, 250)


def test_files_of_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("epoch=0-step=5.ckpt", "step-5.ckpt", "step-00000005.ckpt.bak"):
        (folder / name).write_text("x")
    trainer = FakeTrainer(tmp_path)
    trainer.global_step = 7
    Checkpoints(keep=1).save(trainer)
    assert len(os.listdir(folder)) == 5


def test_keeping_none_is_refused() -> None:
    with pytest.raises(SparsifyError, match="checkpoint.keep is 0; it must be 1 or more"):
        Checkpoints(keep=0)


@pytest.mark.parametrize("kind", [Checkpoints, MaskLogging])
def test_every_zero_steps_is_refused(kind: type) -> None:
    with pytest.raises(SparsifyError, match="every_n_steps is 0; it must be 1 or more"):
        kind(every_n_steps=0)


def test_a_users_own_way_of_writing_stays(tmp_path: Path) -> None:
    trainer = FakeTrainer(tmp_path)
    own: TorchCheckpointIO
    for own in (TorchCheckpointIO(), type("Own", (TorchCheckpointIO,), {})()):
        trainer.strategy.checkpoint_io = own
        Checkpoints().setup(trainer, None, "fit")
        assert (trainer.strategy.checkpoint_io is own) == (type(own) is not TorchCheckpointIO)
    trainer.strategy.checkpoint_io = AsyncCheckpointIO(TorchCheckpointIO())
    with pytest.raises(SparsifyError, match="AsyncCheckpointIO"):
        Checkpoints().setup(trainer, None, "fit")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_full_disk_leaves_the_former_and_is_tried_again(tmp_path: Path, sharded: bool) -> None:
    trainer, callback = FakeTrainer(tmp_path, sharded), Checkpoints()
    folder = tmp_path / "checkpoints"
    trainer.global_step = 1
    callback.save(trainer)
    trainer.full, trainer.global_step, trainer.barriers = True, 2, 0
    with pytest.raises(DiskFull, match="^the checkpoint of step 2 was not saved: No space left"):
        callback.save(trainer)
    assert trainer.barriers == 2, "as many as the ranks that did not fail meet"
    assert sorted(os.listdir(folder)) == names(1)
    trainer.full = False
    callback.save(trainer)
    assert sorted(os.listdir(folder)) == names(1, 2)


def test_a_full_disk_at_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, callback = FakeTrainer(tmp_path), Checkpoints()
    trainer.global_step = 1
    callback.save(trainer)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer.global_step = 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", full)
        with pytest.raises(DiskFull, match="step 2"):
            callback.save(trainer)
    assert saved_step(newest_whole(tmp_path / "checkpoints" / "last.ckpt")) == 1
    callback.save(trainer)
    assert saved_step(tmp_path / "checkpoints" / "last.ckpt") == 2


def test_all_ranks_learn_that_one_could_not_save(tmp_path: Path) -> None:
    trainer = FakeTrainer(tmp_path)
    trainer.is_global_zero = False
    trainer.strategy.reduce_boolean_decision = lambda decision, all: True
    with pytest.raises(DiskFull, match="the disk of another rank is full"):
        Checkpoints().save(trainer)


# -- through the command line ----------------------------------------------------------------------

FIT = ["fit", "--strategy=maskllm", "--checkpoint.every_n_steps=2"]


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the disk be full for the checkpoint of a step."""

    def install(step: int) -> None:
        write = torch.save

        def limited(content: Any, file: Any) -> None:
            counts_only = not hasattr(file, "fileno")
            if not counts_only and content.get("global_step") == step:
                file.write(bytes(1000))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(content, file)

        monkeypatch.setattr(torch, "save", limited)

    return install


def test_the_run_goes_on_past_a_full_disk(
    cli: Cli, full_at: Callable[[int], None], capfd: pytest.CaptureFixture[str]
) -> None:
    full_at(4)
    cli(*FIT, "--checkpoint.keep=3", steps=6)
    folder = cli.runs()[0] / "checkpoints"
    assert sorted(os.listdir(folder)) == names(2, 6)
    [warning] = [line for line in capfd.readouterr().err.splitlines() if "WARNING" in line]
    assert "the checkpoint of step 4 was not saved: No space left on device: 0.3 MiB" in warning
    assert "are needed in runs/maskllm/version_0/checkpoints, where" in warning
    assert warning.endswith("the run goes on, and saves again after 2 more steps")


@pytest.mark.parametrize("exports", [True, False])
def test_a_full_disk_at_the_end_is_an_error_after_the_export(
    cli: Cli, full_at: Callable[[int], None], capfd: pytest.CaptureFixture[str], exports: bool
) -> None:
    full_at(3)
    with pytest.raises(SystemExit, match="^2$"):
        cli(*FIT, f"--output.enabled={str(exports).lower()}", steps=3)
    [run] = cli.runs()
    assert (run / "export" / "model.safetensors").is_file() == exports
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the checkpoint of step 3 was not saved: No space left on dev")
    end = "exported all the same" if exports else "lost since the former checkpoint"
    assert error.endswith(f"; what was learned is {end}")
    assert sorted(os.listdir(run / "checkpoints")) == names(2)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_lightnings_checkpoints_beside_ours(cli: Cli) -> None:
    """In the same folder, with a ``last.ckpt`` of its own; whole, and damaged."""
    beside = ["--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint"]
    own = ("every_n_train_steps=2", "save_top_k=-1", "filename={step}", "save_last=True")
    beside += [f"--trainer.callbacks.{option}" for option in own]
    cli(*FIT, *beside, steps=4)
    [run] = cli.runs()
    folder = run / "checkpoints"
    assert {"step=2.ckpt", "step=4.ckpt", *names(2, 4)} <= set(os.listdir(folder))
    assert not [name for name in os.listdir(folder) if "partial" in name]
    assert saved_step(newest_whole(run)) == 4
    main(["fit", "--ckpt_path", str(folder / "step=2.ckpt"), "--trainer.callbacks=[]"])
    last, resumed = (
        torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (run, cli.runs()[1])
    )
    assert resumed["global_step"] == 4
    for name, value in last["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name])
    os.truncate(folder / "step=2.ckpt", 5000)
    with pytest.raises(SystemExit, match="^2$"):
        main(["fit", "--ckpt_path", str(folder / "step=2.ckpt")])


def test_every_command_reads_the_newest_whole_one(
    cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    cli(*FIT, steps=4)
    [run] = cli.runs()
    newest = run / "checkpoints" / "step-00000004.ckpt"
    os.truncate(newest, newest.stat().st_size // 2)
    for command in ("fit", "validate", "test", "export", "sensitivity"):
        words = [command, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
        main([*words, "--trainer.max_steps=3"])
        err = capfd.readouterr().err
        assert "step-00000004.ckpt (step 4) is left aside" in err
        assert "step-00000002.ckpt (step 2)" in err
        if command == "fit":
            saved = torch.load(cli.runs()[-1] / "checkpoints" / "last.ckpt", weights_only=True)
            assert saved["global_step"] == 3


def test_the_reader_itself_refuses_a_torn_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    WholeFileIO().save_checkpoint({"x": torch.ones(9)}, path)
    os.truncate(path, 900)
    with pytest.raises(SparsifyError, match="a.ckpt: it is cut off or damaged"):
        WholeFileIO().load_checkpoint(path)
