"""Folders that change places: at once, on the disk, and without leftovers."""

import errno
import fcntl
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify import SparsifyError
from sparsify.common import replace
from sparsify.common.replace import partial_folder, replace_folder, whole_file


def fill(folder: Path, version: str) -> Path:
    """A folder with a file, and a file in a folder of its own."""
    (folder / "inner").mkdir(parents=True)
    for name in ("version", "inner/version"):
        (folder / name).write_text(version)
    return folder


def version(folder: Path) -> str:
    """Which version lies there, whole."""
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    assert found == ["inner", "inner/version", "version"]
    one, two = ((folder / name).read_text() for name in ("version", "inner/version"))
    assert one == two
    return one


def put(place: Path, name: str) -> None:
    with partial_folder(place) as partial:
        partial.rmdir()
        replace_folder(fill(partial, name), place)


def failing(number: int) -> Callable[..., Any]:
    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture(params=["exchange", "ENOSYS", "EINVAL", "ENOTSUP", "no symbol"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the exchange, and without it in all ways."""
    if request.param == "no symbol":
        monkeypatch.setattr(replace.ctypes, "CDLL", lambda *args, **kwargs: object())
    elif request.param != "exchange":
        monkeypatch.setattr(replace, "_exchange", failing(getattr(errno, request.param)))
    return request.param


def test_the_new_folder_takes_the_place(exchange: str, tmp_path: Path) -> None:
    place = tmp_path / "a" / "out"
    for name in ("first", "second", "third"):
        put(place, name)
        assert version(place) == name
        assert os.listdir(place.parent) == ["out"]


def test_two_entries_change_places(tmp_path: Path) -> None:
    one, two = fill(tmp_path / "one", "1"), fill(tmp_path / "zwei \u4e8c", "2")
    inodes = one.stat().st_ino, two.stat().st_ino
    replace._exchange(one, two)
    assert (version(one), version(two)) == ("2", "1")
    assert (two.stat().st_ino, one.stat().st_ino) == inodes
    with pytest.raises(FileNotFoundError) as caught:
        replace._exchange(one, tmp_path / "missing")
    assert caught.value.filename == str(one)
    assert caught.value.filename2 == str(tmp_path / "missing")


def test_a_reader_always_finds_a_folder(tmp_path: Path) -> None:
    place = tmp_path / "out"
    put(place, "0")
    seen, missing, stop = set(), 0, threading.Event()

    def poll() -> None:
        nonlocal missing
        while not stop.is_set():
            try:
                seen.add((place / "version").read_text())
            except FileNotFoundError:
                missing += 1

    reader = threading.Thread(target=poll)
    reader.start()
    for i in range(1, 60):
        put(place, str(i))
    stop.set()
    reader.join()
    assert missing == 0
    assert len(seen) > 5


def test_all_is_flushed_before_it_is_seen_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    flushed: list[str] = []
    real = os.fsync

    def record(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", record)
    for swap in (None, replace._exchange):
        flushed.clear()
        if swap is not None:

            def noted(one: Path, other: Path, swap: Callable[..., None] = swap) -> None:
                flushed.append("exchange")
                swap(one, other)

            monkeypatch.setattr(replace, "_exchange", noted)
        new = fill(tmp_path / "new", "1")
        replace_folder(new, place)
        inside = [str(new), *(f"{new}/{name}" for name in ("version", "inner", "inner/version"))]
        expected = sorted(inside) + ["exchange"] * (swap is not None) + [str(tmp_path)]
        assert sorted(flushed[: len(inside)]) + flushed[len(inside) :] == expected


def test_a_folder_that_cannot_be_flushed_is_no_failure_but_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def no_folders(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            failing(errno.EINVAL)()
        real(handle)

    put(tmp_path / "out", "1")
    monkeypatch.setattr(os, "fsync", no_folders)
    put(tmp_path / "out", "2")
    assert version(tmp_path / "out") == "2"
    for number in (errno.EIO, errno.ENOSPC, errno.EINVAL):
        monkeypatch.setattr(os, "fsync", failing(number))
        with pytest.raises(OSError, match=os.strerror(number)):
            put(tmp_path / "out", "3")
    assert version(tmp_path / "out") == "2"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EXDEV])
def test_a_refused_exchange_leaves_all_as_it_was(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "out", "1")
    monkeypatch.setattr(replace, "_exchange", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        put(tmp_path / "out", "2")
    assert version(tmp_path / "out") == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_without_exchange_a_refused_second_rename_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "out", "1")
    monkeypatch.setattr(replace, "_exchange", failing(errno.ENOSYS))
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "new":
            failing(errno.EACCES)()
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    new = fill(tmp_path / "new", "2")
    with pytest.raises(PermissionError):
        replace_folder(new, tmp_path / "out")
    assert version(tmp_path / "out") == "1"
    assert version(new) == "2"
    assert sorted(os.listdir(tmp_path)) == ["new", "out"]


def test_a_link_stays_and_its_folder_is_replaced(exchange: str, tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "real", tmp_path / "home" / "out"
    link.parent.mkdir()
    link.symlink_to("../disk/real")
    for name in ("first", "second"):  # at first it points to nothing
        with partial_folder(link) as partial:
            assert partial.parent == target.parent
            partial.rmdir()
            replace_folder(fill(partial, name), link)
        assert link.is_symlink()
        assert version(target) == version(link) == name
        assert os.listdir(target.parent) == ["real"]
        assert os.listdir(link.parent) == ["out"]


def test_what_killed_ones_left_goes_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path / "out", "1")
    dead = [".out.partial-abcd_f12", ".out.partial-aaaaaaaa", ".out.partial-aaaaaaaa.former"]
    others = [
        ".other.partial-abcdefgh",
        ".out.partial-abcdefgh.partial-abcdefgh",  # of a place of that odd name
        ".xout.partial-abcdefgh",
        ".out.partial-mine",
        "out.partial-abcdefgh",
    ]
    for name in dead + others:
        fill(tmp_path / name, "0")
    with partial_folder(tmp_path / "out") as partial:
        found = {path.name for path in tmp_path.iterdir()}
        assert found == {"out", ".out.lock", partial.name, *others}
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}
    assert version(tmp_path / "out") == "1"


def test_a_former_folder_without_a_successor_is_put_back(tmp_path: Path) -> None:
    place = tmp_path / "out"
    fill(tmp_path / ".out.partial-abcdefgh", "2")
    fill(tmp_path / ".out.partial-abcdefgh.former", "1")
    with partial_folder(place):
        assert version(place) == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_folders_that_are_being_made_stay(tmp_path: Path) -> None:
    place = tmp_path / "out"
    dead = fill(tmp_path / ".out.partial-abcdefgh", "0")
    with partial_folder(place) as one:
        assert not dead.exists()
        fill(dead, "0")
        with partial_folder(place) as two:
            assert one.exists()
            assert dead.exists()  # nobody can tell it from a live one
            (two / "version").write_text("2")
            replace_folder(two, place)
        assert (tmp_path / ".out.lock").exists()
        with partial_folder(place):
            assert one.exists()
        (one / "version").write_text("1")
        replace_folder(one, place)
    assert (place / "version").read_text() == "1"
    with partial_folder(place):
        assert not dead.exists()
    assert os.listdir(tmp_path) == ["out"]


def _put_often(place: Path, name: str) -> None:
    for _ in range(25):
        put(place, name)


def test_processes_that_write_to_one_place_do_not_disturb_each_other(tmp_path: Path) -> None:
    place = tmp_path / "out"
    put(place, "0")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_put_often, args=(place, str(i))) for i in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        assert (place / "version").exists()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert version(place) in "0123"
    put(place, "4")
    assert os.listdir(tmp_path) == ["out"]


def test_a_lock_that_was_unlinked_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = fcntl.flock, [True]

    def flock(handle: int, kind: int) -> None:
        if before:  # another process, the last at work, comes between open and lock
            before.clear()
            (tmp_path / ".out.lock").unlink()
            fill(tmp_path / ".out.partial-abcdefgh", "of a third, at work by now")
            third.append(os.open(tmp_path / ".out.lock", os.O_RDWR | os.O_CREAT))
            real(third[0], fcntl.LOCK_SH)
        real(handle, kind)

    third: list[int] = []
    monkeypatch.setattr(fcntl, "flock", flock)
    with partial_folder(tmp_path / "out"):
        assert (tmp_path / ".out.partial-abcdefgh" / "version").exists()
    os.close(third[0])


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))


@pytest.mark.usefixtures("no_locks")
def test_without_locks_nothing_is_removed(tmp_path: Path) -> None:
    dead = fill(tmp_path / ".out.partial-abcdefgh", "0")
    put(tmp_path / "out", "1")
    assert version(tmp_path / "out") == "1"
    assert sorted(os.listdir(tmp_path)) == [dead.name, "out"]


def test_other_failures_of_locks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        put(tmp_path / "out", "1")


def test_what_is_no_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "place").write_text("precious")
    with pytest.raises(NotADirectoryError, match="something other than a folder"):
        replace_folder(tmp_path / "new", tmp_path / "place")
    assert (tmp_path / "place").read_text() == "precious"


def test_a_file_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path: Path) -> None:
    for place in (tmp_path / "none" / "file", tmp_path / "folder"):
        if place.name == "folder":
            place.mkdir()
        with pytest.raises(OSError, match=f"{place}'$"), whole_file(place) as file:
            file.write(b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_meanwhile_stays_unless_it_may_be_replaced(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    place = tmp_path / "masks"
    with whole_file(place, overwrite=False) as file:
        file.write(b"first")
    with (
        pytest.raises(SparsifyError, match=f"{place} exists, and stays"),
        whole_file(place, overwrite=False) as file,
    ):
        file.write(b"second")
    assert place.read_bytes() == b"first"
    assert oct(place.stat().st_mode & 0o777) == oct(0o644)
    with whole_file(place) as file:
        file.write(b"third")
    assert place.read_bytes() == b"third"
    assert os.listdir(tmp_path) == ["masks"]


def test_a_folder_that_came_meanwhile_stays_unless_it_may_be_replaced(
    exchange: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    for overwrite in (False, True):
        with partial_folder(place) as partial:
            partial.rmdir()
            fill(partial, "mine")
            # As it is while another process puts its folder there after any look at the place.
            if not place.exists():
                fill(place, "theirs")
            with monkeypatch.context() as patch:
                patch.setattr(Path, "exists", lambda path: False)
                if overwrite:
                    replace_folder(partial, place, overwrite=True)
                else:
                    with pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY)):
                        replace_folder(partial, place, overwrite=False)
        assert version(place) == ("mine" if overwrite else "theirs")
        assert os.listdir(tmp_path) == ["out"]
