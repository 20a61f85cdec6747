"""Prints for commands, and refuses to overwrite files."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Any, Literal

from sparsify.common.errors import SparsifyError
from sparsify.common.printable import SafeConsole

Format = Literal["table", "json"]


def check_free(out: Path) -> None:
    """Refuse to write to a path that exists, or where the system says that nothing can be made."""
    from sparsify.export.target import check_writable  # takes seconds: it imports PyTorch

    check_writable(out)
    if out.exists() or out.is_symlink():  # writing to a dangling link would create its target
        raise SparsifyError(f"{out} exists, and stays; name another file")


def say_written(out: Path) -> None:
    """Say that a file or folder was written."""
    size = f" ({out.stat().st_size:,} bytes)" if out.is_file() else ""
    say(f"wrote {out}{size}")


def say_json(content: Any) -> None:
    """Print plain values as indented JSON."""
    print(dumps(content, indent=2))


def say(content: Any) -> None:
    """Print text or a table, without the control characters that files may hold."""
    # Print text unchanged: do not wrap paths, and do not read brackets as markup.
    SafeConsole().print(content, soft_wrap=isinstance(content, str), markup=False, highlight=False)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """End quietly if the reader of our output closes the pipe early, as ``head`` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
