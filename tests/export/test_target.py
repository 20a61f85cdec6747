"""Where an export may go, and what of a former one stays."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sparsify import SparsifyError
from sparsify.export import target
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST
from sparsify.export.target import check_target, keep_others, put_export
from tests.conftest import tiny_llama
from tests.export.test_folder import masked_module


def an_export(folder: Path, listed: bool = True) -> Path:
    """A folder as an export leaves it, less the model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    content = {"files": {"config.json": digest}} if listed else {}
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder


def test_overwriting_keeps_what_the_user_added(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    module, out = masked_module(tiny_llama(), tokenizer), tmp_path / "out"
    export(module.masked, out, {})
    (out / "README.md").write_text("mine")
    os.chmod(out / "README.md", 0o640)
    os.utime(out / "README.md", ns=(10**18, 10**18 + 1))
    (out / ".git" / "refs").mkdir(parents=True)
    (out / ".git" / "HEAD").write_text("ref: main")
    (out / "nowhere").symlink_to("missing")
    os.utime(out / ".git", ns=(10**18, 10**18))
    export(module.masked, out, {"note": "second"}, overwrite=True)
    assert json.loads((out / MANIFEST).read_text())["note"] == "second"
    status = (out / "README.md").stat()
    assert (status.st_mode & 0o777, status.st_mtime_ns) == (0o640, 10**18 + 1)
    assert (out / "README.md").read_text() == "mine"
    assert (out / ".git" / "HEAD").read_text() == "ref: main"
    assert (out / ".git" / "refs").is_dir()
    assert (out / ".git").stat().st_mtime_ns == 10**18
    assert os.readlink(out / "nowhere") == "missing"
    assert os.listdir(tmp_path) == ["out"]


def test_where_files_have_one_name_only_they_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "no links")

    former, new = an_export(tmp_path / "former"), tmp_path / "new"
    (former / "notes.txt").write_text("mine")
    os.utime(former / "notes.txt", ns=(10**18, 10**18))
    new.mkdir()
    monkeypatch.setattr(os, "link", refuse)
    keep_others(former, new)
    assert (new / "notes.txt").stat().st_mtime_ns == 10**18
    assert os.listdir(new) == ["notes.txt"]


def test_an_export_that_came_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, late = tmp_path / "out", tmp_path / "late"
    monkeypatch.setattr(target, "add_card", lambda _: an_export(place))  # after the last check
    with pytest.raises(SparsifyError, match="out holds an earlier export; replace it with overwri"):
        put_export(an_export(late), place, False, "base")
    assert (place / MANIFEST).is_file()
    (late / "late.txt").write_text("")
    monkeypatch.setattr(target, "add_card", lambda _: None)
    put_export(late, place, True, "base")
    assert (place / "late.txt").is_file()


def test_the_users_file_is_not_replaced_by_one_of_its_name(tmp_path: Path) -> None:
    former, new = an_export(tmp_path / "former"), tmp_path / "new"
    for folder in (former, new):
        folder.mkdir(exist_ok=True)
        (folder / "vocab.json").write_text(folder.name)
    with pytest.raises(SparsifyError, match="vocab.json was not written by the export"):
        keep_others(former, new)
    assert (former / "vocab.json").read_text() == "former"


def test_a_file_that_was_changed_since_is_refused(tmp_path: Path) -> None:
    out = an_export(tmp_path / "out")
    check_target(out, True)
    (out / "config.json").write_text("{'mine': 1}")
    with pytest.raises(SparsifyError, match="config.json was changed since"):
        check_target(out, True)
    check_target(an_export(tmp_path / "old", listed=False), True)


@pytest.mark.parametrize("where", ["same", "link", "above"])
def test_the_base_itself_is_refused(where: str, tmp_path: Path) -> None:
    base = an_export(tmp_path / "models" / "base")
    (tmp_path / "link").symlink_to(base)
    an_export(tmp_path / "models2")
    target = {"same": base, "link": tmp_path / "link", "above": tmp_path / "models"}[where]
    with pytest.raises(SparsifyError, match="the run's base model"):
        check_target(target, True, str(base))


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    outer = an_export(tmp_path / "outer")
    cases = {
        tmp_path / "a.txt" / "x" / "export": "a.txt is a file, not a folder",
        tmp_path / "loop" / "export": "symbolic link",
        tmp_path / "loop": "symbolic link",
        tmp_path / ("n" * 240): "take a shorter name",
        tmp_path / ("n" * 300): "too long",
        outer / "inner": "is an export itself",
    }
    for path, reason in cases.items():
        with pytest.raises(SparsifyError, match=reason):
            check_target(path, True)
    check_target(tmp_path / "new" / "deep" / "out", False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_right_to_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(SparsifyError, match="no right to write"):
            check_target(tmp_path / "out", False)
    finally:
        tmp_path.chmod(0o700)
