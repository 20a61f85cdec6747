"""Reads and writes JSON, explains full disks, and finds the cache folder."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsify.common.errors import DiskFull, SparsifyError
from sparsify.common.secrets import redacted

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON in one step: a reader sees the old file or the new one, never a part.
    Settings that are secrets are written as ``(redacted)``.

    Raises:
        SparsifyError: a number in it is not finite, which JSON cannot express; it is named.
    """
    if (odd := _not_finite(content)) is not None:
        raise SparsifyError(
            f"{path.name} was not written: {odd} is not finite; this is a fault in the program "
            "that computed it: please report it with the command"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(redacted(content), indent=2, allow_nan=False) + "\n"
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _not_finite(content: Any, where: str = "") -> str | None:
    """The keys, joined by dots, that lead to the first number that is not finite, or None."""
    if isinstance(content, float) and not math.isfinite(content):
        return where.removeprefix(".")
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, Mapping):
        parts = content.items()
    elif isinstance(content, list | tuple):
        parts = enumerate(content)
    found = (_not_finite(part, f"{where}.{key}") for key, part in parts)
    return next((odd for odd in found if odd is not None), None)


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        SparsifyError: the file is missing, or is not JSON.
    """
    if not path.is_file():
        raise SparsifyError(f"{path.name} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SparsifyError(f"{path.name}: not readable as JSON ({error})") from error


@contextmanager
def disk_full(folder: Path, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn any library's error about a full disk into one sentence.

    Args:
        folder: the folder that the block writes to.
        needed: counts the bytes that the block has to write.

    Raises:
        DiskFull: the block failed because of a full disk, a quota or a file size limit.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        cause = full_disk(error)
        if cause is None:
            raise
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        need = f"{_mib(needed())} are needed" if needed else "a checkpoint does not fit"
        raise DiskFull(
            f"{os.strerror(cause)}: {need} in {folder}, where {_mib(free)} are free"
        ) from error


def full_disk(error: BaseException | None) -> int | None:
    """The error number of a full disk, a quota or a file size limit, or None. It is looked for
    among an error's causes too, as torch wraps the system's error in its own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error.errno
        # safetensors states the number only in its message.
        if (match := re.search(r"\(os error (\d+)\)", str(error))) and int(match[1]) in _FULL:
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def cache_folder() -> Path:
    """``$SPARSIFY_CACHE``, or ``sparsify`` in the user's cache folder."""
    if own := os.environ.get("SPARSIFY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sparsify"
