"""Put a whole folder in the place of another, so that a crash mixes nothing and loses nothing.

The new folder is made beside its place under a hidden name, ``.NAME.partial-XXXXXXXX``, and then
changes places with the former one. While it is made, a shared lock is held on ``.NAME.lock``: who
can take that lock for itself alone knows that what lies there in hidden folders is of the dead.
A lock, not a process number, because other nodes may write to the same file system.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sparsify.common.folder_lock import NO_LOCKS, is_at, locked

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux, <linux/fs.h>
_RENAME_SWAP = 2  # macOS, <sys/stdio.h>
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_FORMER = ".former"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside its place; it gets there, flushed and readable by all, when the block
    ends, and not at all if the block fails.
    """
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


@contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """Make an empty hidden folder beside ``place``; whatever is under its name at the end goes.

    First, unless another process is making a folder for the same place, it removes what killed
    ones left there. Where the file system has no locks, nothing is removed.

    Args:
        place: where the folder will go; if that is a symbolic link, beside what it points to.

    Yields:
        The folder, readable by its owner only.
    """
    place = place.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    with _at_work(place):
        partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, place: Path) -> None:
    """Put a complete folder in its place, and remove the one that was there.

    At every moment ``place`` is the former folder or the new one, whole; all of the new one is
    on the disk before it is seen. What is killed after the exchange leaves the former under the
    name of ``new``.

    Where two folders cannot be exchanged (NFS, old kernels), the former is renamed to
    ``new``'s name and ``.former``, then the new one takes the place. A kill between the two leaves
    nothing at ``place`` and both folders whole under their hidden names; the next
    :func:`partial_folder` puts the former back.

    Args:
        new: on the same file system, as :func:`partial_folder` makes it.
        place: a symbolic link stays, and the folder that it points to is replaced.

    Raises:
        OSError: the disk is full, or the place cannot be written; it is as it was.
    """
    place = place.resolve()
    flush_all(new)
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "something other than a folder is there", place)
    if not place.exists():
        new.rename(place)
        flush(place.parent)
        return
    former = new
    try:
        _exchange(new, place)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        former = _rename_twice(new, place)
    flush(place.parent)
    shutil.rmtree(former, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directory entries in one step."""
    paths = os.fsencode(one), os.fsencode(other)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(*paths, ctypes.c_uint(_RENAME_SWAP))
        else:
            here = ctypes.c_int(_AT_FDCWD)
            failed = libc.renameat2(here, paths[0], here, paths[1], ctypes.c_uint(_RENAME_EXCHANGE))
    except AttributeError as error:
        raise OSError(errno.ENOSYS, "no exchange of folders in the C library") from error
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def _rename_twice(new: Path, place: Path) -> Path:
    former = new.with_name(new.name + _FORMER)
    place.rename(former)
    try:
        new.rename(place)
    except OSError:
        former.rename(place)
        raise
    return former


def flush_all(folder: Path) -> None:
    """Have all of a folder on the disk; links and what is no file have nothing to flush."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if stat.S_ISREG(path.lstat().st_mode):
                flush(path)
        flush(Path(root))


def flush(path: Path) -> None:
    """Have a file's contents, or a folder's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


@contextmanager
def _at_work(place: Path) -> Iterator[None]:
    """Share the place's lock with all others at work; tidy up first if there are none."""
    path = place.with_name(f".{place.name}.lock")
    handle = _open_lock(path, place)
    try:
        yield
    finally:
        if handle is not None:
            if locked(handle):
                path.unlink(missing_ok=True)
            os.close(handle)


def _open_lock(path: Path, place: Path) -> int | None:
    """A handle on the locked file, or None where the file system has no locks."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's, at work or killed
            return None
        try:
            if locked(handle) and is_at(handle, path):
                _tidy(place)
            # Waits for another that tidies. Between the two locks others may come and go: this
            # process has no folder yet.
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError as error:
            os.close(handle)
            if error.errno not in NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return None
        # The last one at work unlinks the file, maybe before this process had its lock.
        if is_at(handle, path):
            return handle
        os.close(handle)


def _tidy(place: Path) -> None:
    """Remove what killed processes left; put a former folder back where there is no other."""
    hidden = re.compile(re.escape(f".{place.name}.partial-") + rf"\w{{8}}({_FORMER})?")
    left = [path for path in place.parent.iterdir() if hidden.fullmatch(path.name)]
    for former in (path for path in left if path.name.endswith(_FORMER)):
        if not place.exists():
            former.rename(place)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
