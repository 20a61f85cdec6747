"""``sparsify cache``, and what goes when there is no room."""

import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from sparsify import SparsifyError
from sparsify.calibration.cache import entries, make_room
from sparsify.calibration.results import INDEX, LOCK
from sparsify.cli.commands.cache import clear_cache, show_cache
from sparsify.cli.main import main
from sparsify.strategies.sparsegpt import SparseGPT
from sparsify.strategies.wanda import Wanda
from tests.calibration.test_cache import run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two results, the first used longest ago."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    for days, strategy in ((9, Wanda()), (3, SparseGPT())):
        run(strategy)
        for entry in (tmp_path / "cache").iterdir():
            if time.time() - (entry / INDEX).stat().st_mtime < 86400:
                os.utime(entry / INDEX, (0, time.time() - days * 86400))
    return tmp_path / "cache"


def call(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["cache", *words])
    assert not stop.value.code


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    call("show", "--format=json")
    content = json.loads(capsys.readouterr().out)
    assert content["bytes"] == sum(entry["bytes"] for entry in content["entries"])
    return [entry["strategy"] for entry in content["entries"]]


def test_what_there_is_is_shown(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert shown(capsys) == ["Wanda", "SparseGPT"]
    call("show")
    out = capsys.readouterr().out
    assert f"{folder}: 2 results, 0.00 GiB of 20.00 GiB" in out.replace("\n", "")
    assert "LlamaForCausalLM" in out
    (folder / "timings").mkdir()  # of the runtime
    assert shown(capsys) == ["Wanda", "SparseGPT"]


def test_a_result_that_is_used_stays_longest(capsys: pytest.CaptureFixture[str]) -> None:
    assert not run(Wanda())[1]
    assert shown(capsys) == ["SparseGPT", "Wanda"]


def test_what_is_old_is_cleared(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    call("clear", "--older_than=5")
    assert "removed 1 results" in capsys.readouterr().out
    assert shown(capsys) == ["SparseGPT"]
    call("clear", "--partial")
    assert shown(capsys) == ["SparseGPT"]
    call("clear")
    assert shown(capsys) == []
    with pytest.raises(SystemExit):
        main(["cache", "clear", "--older_than=-1"])
    assert "it is a number of days, 0 or more" in capsys.readouterr().err


def test_parts_and_what_former_versions_left(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    part = folder / ("a" * 64 + ".partial")
    for path in (part, folder / ".partial-abcd_123"):
        path.mkdir()
    handle = os.open(part / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    call("clear", "--partial")
    assert "1 stay: a run writes them" in capsys.readouterr().out
    assert part.exists()
    assert not (folder / ".partial-abcd_123").exists()
    os.close(handle)
    call("clear", "--partial")
    assert not part.exists()
    assert shown(capsys) == ["Wanda", "SparseGPT"]


def test_what_was_used_longest_ago_makes_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = entries()
    monkeypatch.setenv("SPARSIFY_CACHE_SIZE", str((first.size + second.size) / 2**30))
    make_room()
    assert len(entries()) == 2
    monkeypatch.setenv("SPARSIFY_CACHE_SIZE", str((first.size + second.size - 1) / 2**30))
    make_room()
    assert shown(capsys) == ["SparseGPT"]
    monkeypatch.setenv("SPARSIFY_CACHE_SIZE", "1e-9")
    assert run(Wanda())[1]
    assert shown(capsys) == ["Wanda"]  # the newest stays, whatever its size


@pytest.mark.parametrize("size", ["x", "0", "-1", "nan", "inf"])
def test_a_size_that_is_none_is_told_before_the_work(
    size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE_SIZE", size)
    with pytest.raises(SystemExit):
        main(["cache", "show"])
    assert f"SPARSIFY_CACHE_SIZE is '{size}'" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_cache_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("SPARSIFY_CACHE", str(file))
    for command in (show_cache, clear_cache):
        with pytest.raises(SparsifyError, match=f"{file} is no folder.* in SPARSIFY_CACHE, or uns"):
            command()
