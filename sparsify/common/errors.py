"""The error of this package."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHECKPOINT_ADVICE = (
    "this is not a checkpoint that sparsify wrote, or it is damaged; resume from another checkpoint"
)


class SparsifyError(ValueError):
    """Input that a user can mend; the message states the value, the rule and the fix.

    The command line prints the message alone.
    """


class DiskFull(SparsifyError):
    """A checkpoint found no space; what is there is as it was."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def restoring(path: Any) -> Iterator[None]:
    """Tell in one message that a checkpoint's content cannot be restored, whoever met it: what
    Lightning, torch and torchdata read of their own deep inside is checked by them alone.

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
