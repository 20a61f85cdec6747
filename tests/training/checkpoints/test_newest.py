"""Which checkpoint is read; damaged ones never are."""

import os
import shutil
from pathlib import Path

import pytest

from sparsify.callbacks.checkpoints import Checkpoints
from sparsify.common.errors import SparsifyError
from sparsify.training.checkpoints.newest import newest_whole
from tests.callbacks.fake_trainer import FakeTrainer, saved_step

Err = pytest.CaptureFixture[str]


@pytest.fixture(params=[False, True], ids=["file", "folder"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """``checkpoints`` of a run, with steps 10, 20 and 30."""
    trainer = FakeTrainer(tmp_path / "run", sharded=request.param)
    callback = Checkpoints(keep=3)
    for trainer.global_step in (10, 20, 30):
        callback.save(trainer)
    return tmp_path / "run" / "checkpoints"


def step(folder: Path, number: int) -> Path:
    return folder / f"step-{number:08d}.ckpt"


def tear(path: Path) -> None:
    """Cut a checkpoint's end off: of a folder, that of one of its files."""
    file = path / "__0_0.distcp" if path.is_dir() else path
    os.truncate(file, file.stat().st_size - 2)


def test_the_run_its_checkpoints_and_last_mean_the_newest(folder: Path, capsys: Err) -> None:
    for path in (folder.parent, folder, folder / "last.ckpt"):
        assert newest_whole(path) == step(folder, 30)
    assert newest_whole(step(folder, 10)) == step(folder, 10)
    assert capsys.readouterr().err == ""


def test_a_torn_one_is_left_aside_with_a_warning(folder: Path, capsys: Err) -> None:
    tear(step(folder, 30))
    assert newest_whole(folder / "last.ckpt") == step(folder, 20)
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"WARNING: {step(folder, 30)} (step 30) is left aside: it is ")
    assert warning.endswith(f"; going on from {step(folder, 20)} (step 20)")
    tear(step(folder, 20))
    assert newest_whole(folder.parent) == step(folder, 10)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_none_is_whole(folder: Path) -> None:
    for number in (10, 20, 30):
        tear(step(folder, number))
    with pytest.raises(SparsifyError, match="no checkpoint there is whole") as error:
        newest_whole(folder / "last.ckpt")
    assert all(f"(step {number}) is left aside" in str(error.value) for number in (10, 20, 30))


def test_a_damaged_one_that_is_named_is_an_error(folder: Path) -> None:
    tear(step(folder, 20))
    with pytest.raises(SparsifyError, match="not a checkpoint that sparsify wrote, or") as error:
        newest_whole(step(folder, 20))
    assert f"{step(folder, 30)} is whole" in str(error.value)


def test_without_the_link_the_newest_is_found(folder: Path, capsys: Err) -> None:
    (folder / "last.ckpt").unlink()
    for path in (folder.parent, folder, folder / "last.ckpt"):
        assert newest_whole(path) == step(folder, 30)
    assert capsys.readouterr().err == ""


def test_the_link_says_which_is_newest(folder: Path) -> None:
    """A higher number is of another run in the same folder."""
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").symlink_to(step(folder, 20).name)
    assert newest_whole(folder) == step(folder, 20)
    tear(step(folder, 20))
    assert newest_whole(folder) == step(folder, 10)


def test_a_link_to_a_checkpoint_that_was_removed(folder: Path, capsys: Err) -> None:
    path = step(folder, 30)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert newest_whole(folder / "last.ckpt") == step(folder, 20)
    assert "(step 30) is left aside: there is no such file" in capsys.readouterr().err


def test_a_last_checkpoint_that_is_no_link_of_ours(folder: Path, tmp_path: Path) -> None:
    (folder / "last.ckpt").unlink()
    last = folder / "last.ckpt"
    if step(folder, 10).is_dir():
        shutil.copytree(step(folder, 10), last)
    else:
        shutil.copy(step(folder, 10), last)
    assert saved_step(newest_whole(folder)) == 10
    tear(last)
    assert newest_whole(folder) == step(folder, 30)
    # Copied to another place, alone.
    (tmp_path / "moved").mkdir()
    step(folder, 20).rename(tmp_path / "moved" / "last.ckpt")
    assert newest_whole(tmp_path / "moved" / "last.ckpt") == tmp_path / "moved" / "last.ckpt"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match="x.ckpt: there is no such file; give the checkpoints"):
        newest_whole(tmp_path / "x.ckpt")
    with pytest.raises(SparsifyError, match="last.ckpt: there is no such file; give the check"):
        newest_whole(tmp_path / "last.ckpt")
    with pytest.raises(SparsifyError, match="first checkpoint has to be started again"):
        newest_whole(tmp_path)
