"""Two runs in one folder are told, and none removes what the other has saved."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from sparsify.common.errors import SparsifyError
from sparsify.common.folder_lock import NAME, FolderLock
from tests.conftest import Cli


def test_one_run_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    lock = FolderLock(folder)
    with pytest.raises(SparsifyError, match="another run is at work in .*x, and two would"):
        FolderLock(folder)
    FolderLock(tmp_path).release()
    lock.release()
    lock.release()
    assert list(folder.iterdir()) == []
    FolderLock(folder).release()


def test_what_a_killed_run_left_does_not_count(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("")
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_nothing_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.release()
    second.release()


def test_a_second_run_is_refused_and_changes_nothing(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("fit", "--strategy=maskllm", "--trainer.logger=false", "--output.enabled=false")
    cli(*words)
    saved = sorted(Path("runs/checkpoints").iterdir())
    assert saved
    assert not Path("runs", NAME).exists()
    lock = FolderLock(Path("runs"))
    partial = Path("runs/checkpoints/.step-00000009.ckpt.partial")
    partial.write_text("the other run writes this now")
    with pytest.raises(SystemExit) as stop:
        cli(*words)
    assert stop.value.code == 2
    assert "another run is at work in runs" in capsys.readouterr().err
    assert sorted(Path("runs/checkpoints").iterdir()) == sorted([*saved, partial])
    lock.release()
    cli(*words)
    assert not partial.exists()
    assert not Path("runs", NAME).exists()
