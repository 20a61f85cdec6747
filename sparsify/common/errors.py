"""The error of this package."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHECKPOINT_ADVICE = (
    "this is not a checkpoint that sparsify wrote, or it is damaged; resume from another checkpoint"
)


class SparsifyError(ValueError):
    """A fault in the input that a user can mend; the message states value, rule and fix.

    The command line prints the message alone.
    """


class DiskFull(SparsifyError):
    """There was no space for a checkpoint; the files on the disk are unchanged."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def restoring(path: Any) -> Iterator[None]:
    """Turn every error while a checkpoint is restored into one message. Lightning, torch and
    torchdata check their own parts of a checkpoint, and raise errors of any kind.

    Raises:
        SparsifyError: instead of any other exception.
    """
    try:
        yield
    except (SparsifyError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise SparsifyError(
            f"{path}: its content cannot be restored ({reason}); {CHECKPOINT_ADVICE}"
        ) from error
