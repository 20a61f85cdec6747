"""Checkpoints on disk: writes them whole, tells whether they are, and lists them.

A run's folder ``checkpoints`` holds ``step-00000100.ckpt`` and so on, and ``last.ckpt``, a link to
the newest. A checkpoint is one file, or the folder that a sharded run writes. Either is written
under a hidden name, ``.step-00000100.ckpt.partial``, flushed, and renamed; then the link is moved.
Some file systems lose this order in a power cut, so a checkpoint also shows by itself whether it is
whole. A file is torch's zip archive: its directory is written last, and every record has a CRC-32.
A folder holds ``complete.json``, which is written last and lists the size of every file.
"""

import errno
import json
import re
import shutil
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from sparsify.common.errors import SparsifyError
from sparsify.common.file_hashes import file_hashes, hash_file
from sparsify.common.files import disk_full, write_json
from sparsify.common.replace import flush, flush_all, replace_folder

FOLDER = "checkpoints"
LAST = "last.ckpt"
COMPLETE = "complete.json"
METADATA = "meta.pt"  # Lightning's name, in a sharded checkpoint, for all but the tensors
_STEP = re.compile(r"step-(\d{8,})\.ckpt")
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP)


class _Counter:
    """A file that stores nothing and counts the bytes written to it."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        self.size += count
        return count

    def flush(self) -> None:
        """Nothing to do."""


def stored_size(checkpoint: dict[str, Any]) -> int:
    """How many bytes a checkpoint's file has."""
    counter = _Counter()
    torch.save(checkpoint, counter)  # type: ignore[arg-type]
    return counter.size


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint file whole or not at all, and refuses to read a damaged one.

    Lightning's class keeps the file's bytes in memory, writes them to the folder for temporary
    files and moves them (a copy, if that is another file system). It never flushes.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write the file. On a full disk, remove what was written and raise :class:`DiskFull`."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        partial = partial_path(place)
        try:
            with disk_full(place.parent, lambda: stored_size(checkpoint)):
                place.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as file:  # torch's own writer hides the system's error
                    torch.save(checkpoint, file)
                flush(partial)
                partial.replace(place)
                flush(place.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the file; raises :class:`SparsifyError` if it is damaged."""
        if "://" not in str(path):
            check_whole(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def stored_orders(path: Any) -> Any:
    """The orders of channels in a checkpoint, without reading its other tensors; None if its run
    had none. They are checked when they are applied.
    """
    file = Path(path) / METADATA if Path(path).is_dir() else path
    local = "://" not in str(path)
    if local:
        check_whole(Path(path))
    content = torch.load(file, "cpu", weights_only=True, mmap=local)
    return content.get("orders") if isinstance(content, dict) else None


def step_path(folder: Path, step: int) -> Path:
    """The path of an optimizer step's checkpoint."""
    return folder / f"step-{step:08d}.ckpt"


def step_of(path: Path) -> int | None:
    """The optimizer step in a checkpoint's name; None if it has none."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints of steps in a folder, newest first, damaged ones included."""
    found = {
        path: step for path in folder.glob("step-*.ckpt") if (step := step_of(path)) is not None
    }
    return sorted(found, key=lambda path: found[path], reverse=True)


def partial_path(place: Path) -> Path:
    """The hidden path under which a checkpoint is written; a path that is hidden already stays."""
    return place if place.suffix == ".partial" else place.with_name(f".{place.name}.partial")


def remove_partials(folder: Path) -> None:
    """Remove what killed saves left in a folder; no other process may be saving there."""
    for path in folder.glob(".step-*.ckpt.partial"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, file or folder; what cannot be removed stays, without an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def complete(partial: Path, place: Path) -> None:
    """Mark, flush and rename a written checkpoint; then point ``last.ckpt`` beside it to it.

    At every moment each of the two names stands for a whole checkpoint, the former or the new one.
    """
    if partial.is_dir():
        flush_all(partial)
        hashes = file_hashes(partial, but=COMPLETE)
        sizes = {name: (partial / name).stat().st_size for name in hashes}
        write_json(partial / COMPLETE, {"files": sizes, "sha256": hashes})
        replace_folder(partial, place)
    else:
        flush(partial)
        partial.replace(place)
        flush(place.parent)
    link = place.with_name(f".{LAST}.partial")
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(place.name)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return  # newest_whole finds the newest without the link
    link.replace(place.with_name(LAST))
    flush(place.parent)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, in a few words; empty if it is whole. Reads the whole file,
    but only once per process.
    """
    if not path.exists():
        return "there is no such file"
    if not path.is_dir():
        status = path.stat()
        return _zip_damage(path.resolve(), status.st_size, status.st_mtime_ns)
    if (path / COMPLETE).is_file():
        return _folder_damage(path)
    if step_of(path) is not None:
        return f"it is incomplete: there is no {COMPLETE} in it"
    # Another program wrote it, such as Lightning's ModelCheckpoint, which writes this file last.
    return damage(path / METADATA) and f"it is incomplete: there is no whole {METADATA} in it"


def check_whole(path: Path) -> None:
    """Refuse a checkpoint that is damaged.

    Raises:
        SparsifyError: it is damaged.
    """
    if reason := damage(path):
        raise SparsifyError(f"{path}: {reason}; resume from another checkpoint")


@lru_cache
def _zip_damage(path: Path, size: int, mtime_ns: int) -> str:
    """As :func:`damage`, for a file; size and age are part of the cache's key."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    except Exception as error:  # damaged headers raise errors of many kinds
        return f"it is cut off or damaged ({error or type(error).__name__})"
    return f"it is damaged (bad checksum of {bad})" if bad else ""


def _folder_damage(path: Path) -> str:
    try:
        content = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        sizes: dict[str, int] = content["files"]
        hashes: dict[str, str] = content.get("sha256", {})  # older checkpoints hold only sizes
        odd = [n for n, size in sizes.items() if _size(path / n) != size]
        if odd:
            return f"it is damaged ({odd[0]} is not of the size in {COMPLETE})"
        ages = {name: (path / name).stat().st_mtime_ns for name in hashes}
        odd = [n for n, sha in hashes.items() if _sha256_of((path / n).resolve(), ages[n]) != sha]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {COMPLETE} is damaged"
    if odd:
        return f"it is damaged (bad checksum of {odd[0]})"
    return damage(path / METADATA) if METADATA in sizes else ""


@lru_cache
def _sha256_of(path: Path, mtime_ns: int) -> str:
    """The hash of a file; it is read once per process unless its age changes."""
    return hash_file(path)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
