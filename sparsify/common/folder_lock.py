"""File locks, and the lock of a run's folder, so that no second run writes checkpoints there."""

import errno
import fcntl
import os
from pathlib import Path

from sparsify.common.errors import SparsifyError

NAME = ".run.lock"
NO_LOCKS = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK)


def locked(handle: int) -> bool:
    """Take the lock of an open file for this process alone, if it can be had at once.

    Raises:
        OSError: the file system has no locks (:data:`NO_LOCKS`), or the handle is no file's.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


class FolderLock:
    """A lock from construction to :meth:`release`, or to the end of the process, even by a kill.

    On a file system without locks this does nothing.

    Args:
        folder: the run's folder; it is made if it is missing.

    Raises:
        SparsifyError: another run holds it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / NAME
        self._handle: int | None = None
        while self._handle is None:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                free = locked(handle)
            except OSError as error:
                os.close(handle)
                if error.errno not in NO_LOCKS:
                    raise
                return
            if not free:
                os.close(handle)
                raise SparsifyError(
                    f"another run is at work in {folder}, and two would remove each other's "
                    "checkpoints; wait for it, or give another --trainer.default_root_dir"
                )
            if is_at(handle, self._path):
                self._handle = handle
            else:  # the former holder removed the file after this process had opened it
                os.close(handle)

    def release(self) -> None:
        """Give up the lock; a second call does nothing."""
        if self._handle is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None
