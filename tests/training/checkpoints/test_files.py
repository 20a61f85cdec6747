"""Whole files, and the recognition of those that are not."""

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from sparsify.common.errors import DiskFull, SparsifyError
from sparsify.common.files import disk_full
from sparsify.training.checkpoints.files import (
    COMPLETE,
    WholeFileIO,
    complete,
    damage,
    partial_path,
    remove_partials,
    step_path,
    stored_size,
)
from sparsify.training.checkpoints.shards import ShardedCheckpointIO
from sparsify.training.parallel.fsdp import Sharded

CONTENT = {"global_step": 3, "x": torch.arange(20_000.0), "y": {"z": torch.ones(3)}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a checkpoint's file."""
    path = tmp_path_factory.mktemp("whole") / "a.ckpt"
    WholeFileIO().save_checkpoint(CONTENT, path)
    assert os.listdir(path.parent) == ["a.ckpt"]
    return path.read_bytes()


def same(path: Path) -> bool:
    found = torch.load(path, weights_only=True)
    return (
        found["global_step"] == 3
        and torch.equal(found["x"], CONTENT["x"])
        and torch.equal(found["y"]["z"], torch.ones(3))
    )


def test_it_loads_and_its_size_can_be_told(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "b.ckpt"
    path.write_bytes(whole)
    assert damage(path) == ""
    assert torch.equal(WholeFileIO().load_checkpoint(path)["x"], CONTENT["x"])
    assert abs(stored_size(CONTENT) - len(whole)) < 200  # the archive's name is in it


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_torn_files_are_recognised(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    """Cut off, with a page that never came to the disk, or with another byte."""
    kind = data.draw(st.sampled_from(["cut", "hole", "byte"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    torn = bytearray(whole)
    if kind == "cut":
        del torn[at:]
    elif kind == "hole":
        page = at // 4096 * 4096
        end = min(page + 4096 * data.draw(st.integers(1, 5)), len(torn))
        torn[page:end] = bytes(end - page)
    else:
        torn[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path / f"{len(os.listdir(tmp_path))}.ckpt"
    path.write_bytes(torn)
    reason = damage(path)
    if reason:
        with pytest.raises(SparsifyError, match="resume from another checkpoint"):
            WholeFileIO().load_checkpoint(path)
    else:
        assert kind != "cut"
        assert same(path), "padding, which nobody reads"


def test_damage_is_looked_for_again_when_the_file_changed(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(whole[:-1])
    assert "cut off or damaged" in damage(path)
    path.write_bytes(whole)
    assert damage(path) == ""


def test_garbage_an_empty_file_and_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    assert damage(path) == "there is no such file"
    for content in (b"", b"garbage", b"PK\x03\x04"):
        path.write_bytes(content)
        assert "cut off or damaged" in damage(path)


def shards(folder: Path) -> Path:
    """A sharded checkpoint that is not complete yet."""
    partial = folder / ".step-00000007.ckpt.partial"
    (partial / "deep").mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"0123456789")
    (partial / "deep" / "b").write_bytes(b"01234")
    torch.save({"a": 1}, partial / "meta.pt")
    return partial


def test_a_folder_is_whole_with_all_files_of_their_sizes(tmp_path: Path) -> None:
    place = tmp_path / "step-00000007.ckpt"
    complete(shards(tmp_path), place)
    assert damage(place) == ""
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step-00000007.ckpt"]
    sizes = json.loads((place / COMPLETE).read_text())["files"]
    assert sizes["__0_0.distcp"] == 10
    assert sizes["deep/b"] == 5
    os.truncate(place / "deep" / "b", 4)
    assert "deep/b is not of the size" in damage(place)
    (place / "deep" / "b").unlink()
    assert "deep/b is not of the size" in damage(place)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 3}', '{"files": {"a"'])
def test_a_folder_whose_marker_is_damaged(tmp_path: Path, content: str) -> None:
    place = tmp_path / "step-00000007.ckpt"
    complete(shards(tmp_path), place)
    (place / COMPLETE).write_text(content)
    assert damage(place) == f"its {COMPLETE} is damaged"
    (place / COMPLETE).unlink()
    assert damage(place) == f"it is incomplete: there is no {COMPLETE} in it"


def test_a_folder_of_another_writer(tmp_path: Path) -> None:
    place = tmp_path / "epoch=0.ckpt"
    shards(tmp_path).rename(place)
    assert damage(place) == ""
    os.truncate(place / "meta.pt", 100)
    assert "no whole meta.pt" in damage(place)


def test_a_metadata_file_of_the_right_size_but_other_bytes(tmp_path: Path) -> None:
    place = tmp_path / "step-00000007.ckpt"
    complete(shards(tmp_path), place)
    size = (place / "meta.pt").stat().st_size
    (place / "meta.pt").write_bytes(bytes(size))
    assert "bad checksum of meta.pt" in damage(place)


def test_without_links_the_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    complete(shards(tmp_path), tmp_path / "step-00000007.ckpt")
    assert os.listdir(tmp_path) == ["step-00000007.ckpt"]


def check_full(folder: Path, reason: str) -> None:
    """The former file stays, nothing is left of the attempt, and the message tells."""
    former = (folder / "a.ckpt").read_bytes()
    with pytest.raises(DiskFull) as error:
        WholeFileIO().save_checkpoint({"x": torch.ones(1_000_000)}, folder / "a.ckpt")
    assert str(error.value).startswith(f"{reason}: 3.8 MiB are needed in {folder}, where ")
    assert str(error.value).endswith(" MiB are free")
    assert os.listdir(folder) == ["a.ckpt"]
    assert (folder / "a.ckpt").read_bytes() == former


@pytest.fixture
def file_limit() -> Iterator[None]:
    """No file may be larger than a MiB."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, former[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.usefixtures("file_limit")
def test_a_file_size_limit(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(whole)
    check_full(tmp_path, "File too large")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a MiB; it takes the rights to mount one."""
    folder, mount = tmp_path / "disk", shutil.which("mount")
    folder.mkdir()
    words = ["-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if mount is None or subprocess.run([mount, *words], capture_output=True).returncode:
        pytest.skip("no file system can be mounted")
    yield folder
    subprocess.run([str(shutil.which("umount")), str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, whole: bytes) -> None:
    (small_disk / "a.ckpt").write_bytes(whole)
    check_full(small_disk, "No space left on device")


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        WholeFileIO().save_checkpoint({"x": (i for i in range(3))}, tmp_path / "a.ckpt")
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        WholeFileIO().save_checkpoint(CONTENT, tmp_path / "file" / "a.ckpt")


def test_a_full_disk_that_only_a_text_tells_of(tmp_path: Path) -> None:
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(DiskFull, match="No space left on device"), disk_full(tmp_path):
        raise SafetensorError(text)
    with pytest.raises(SafetensorError), disk_full(tmp_path):
        raise SafetensorError(text.replace("28", "5"))


def test_shards_are_written_where_the_callback_will_look(tmp_path: Path) -> None:
    partial = partial_path(step_path(tmp_path, 20))
    for place in Sharded()._shard_folder(partial):
        (place / "meta.pt").write_bytes(b"")
    assert [path.name for path in tmp_path.iterdir()] == [".step-00000020.ckpt.partial"]
    remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loaders_refuse_what_is_damaged(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.arange(1000)}}, tmp_path / "one.ckpt")
    content = bytearray((tmp_path / "one.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "one.ckpt").write_bytes(content)
    folder = tmp_path / "step-00000020.ckpt"
    folder.mkdir()
    torch.save({"state_dict": {}}, folder / "meta.pt")
    for path, reason in ((tmp_path / "one.ckpt", "damaged"), (folder, "incomplete")):
        for loader in (Sharded(), ShardedCheckpointIO()):
            with pytest.raises(SparsifyError, match=reason):
                loader.load_checkpoint(path)


def test_a_flipped_bit_in_a_shard_is_found(tmp_path: Path) -> None:
    place = tmp_path / "step-00000007.ckpt"
    complete(shards(tmp_path), place)
    (place / "__0_0.distcp").write_bytes(b"0123456788")
    assert damage(place) == "it is damaged (bad checksum of __0_0.distcp)"


def test_a_folder_of_before_checksums_is_whole_by_its_sizes(tmp_path: Path) -> None:
    place = tmp_path / "step-00000007.ckpt"
    complete(shards(tmp_path), place)
    content = json.loads((place / COMPLETE).read_text())
    del content["sha256"]
    (place / COMPLETE).write_text(json.dumps(content))
    assert damage(place) == ""
