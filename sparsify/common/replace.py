"""Puts a new folder in the place of another, so that a crash neither mixes nor loses files.

The new folder is made beside its place under a hidden name, ``.NAME.partial-XXXXXXXX``, and then
changes places with the former one. Meanwhile its process holds a shared lock on ``.NAME.lock``.
Whoever gets the lock exclusively knows that the hidden folders belong to dead processes.
It is a lock, not a process number, because other nodes may write to the same file system.
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

from sparsify.common.errors import SparsifyError
from sparsify.common.folder_lock import NO_LOCKS, is_at, locked

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux, <linux/fs.h>
_RENAME_SWAP = 2  # macOS, <sys/stdio.h>
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV, errno.EMLINK)
_FORMER = ".former"


@contextmanager
def whole_file(path: Path, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Write a file under a hidden name. When the block ends, the file is flushed, made readable by
    all and put at ``path``; if the block fails, it is removed.

    Raises:
        OSError: it cannot be written; the error names ``path``, not the hidden file.
        SparsifyError: something is there at the end, and ``overwrite`` is False.
    """
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        try:
            if overwrite:
                os.replace(partial, path)
            else:
                put_new(Path(partial), path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        Path(partial).unlink(missing_ok=True)


def put_new(partial: Path, path: Path) -> None:
    """Put a file at a path where nothing is; it may keep its former name too.

    Raises:
        SparsifyError: something is there; it stays, even if it came at the last moment.
    """
    try:
        try:
            os.link(partial, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if os.path.lexists(path):
                raise FileExistsError from error
            partial.rename(path)
    except FileExistsError as error:
        raise SparsifyError(f"{path} exists, and stays; name another file") from error


@contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """Make an empty hidden folder beside ``place``; what has its name at the end is removed.

    Before that it removes hidden folders that killed processes left, unless another process is
    making a folder for the same place, or the file system has no locks.

    Args:
        place: where the folder will go; a symbolic link is followed first.

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


def replace_folder(new: Path, place: Path, overwrite: bool = True) -> None:
    """Put a complete folder in its place, and remove the one that was there.

    At every moment ``place`` is the whole former folder or the whole new one, and the new one is
    flushed to disk before it appears there. A process that is killed after the exchange leaves the
    former folder under the name of ``new``.

    Where two folders cannot be exchanged (NFS, old kernels), the former is first renamed to the
    name of ``new`` with ``.former`` appended, then the new one is moved to ``place``. A kill
    between the two leaves nothing at ``place`` and both folders whole under their hidden names;
    the next :func:`partial_folder` puts the former back.

    Args:
        new: the complete folder from :func:`partial_folder`, on the same file system.
        place: if it is a symbolic link, the link stays and the folder it points to is replaced.
        overwrite: whether a folder that holds something may be replaced.

    Raises:
        OSError: the disk is full, or ``place`` cannot be written or must not be replaced; it is
            unchanged.
    """
    place = place.resolve()
    flush_all(new)
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "something other than a folder is there", place)
    former = None
    try:
        new.rename(place)  # the system refuses it if a folder there holds something
    except OSError as error:
        if error.errno not in _NOT_EMPTY or not overwrite:
            raise
        former = _swap(new, place)
    flush(place.parent)
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)


def _swap(new: Path, place: Path) -> Path:
    """Let two folders change places; gives the path at which the former one is then."""
    try:
        _exchange(new, place)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        return _rename_twice(new, place)
    return new


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
    """Flush a folder and its regular files to disk; links and pipes have nothing to flush."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if stat.S_ISREG(path.lstat().st_mode):
                flush(path)
        flush(Path(root))


def flush(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to disk."""
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
    """Hold the shared lock of ``place``; if no other process does, tidy up first."""
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
    """A handle on the lock file, locked, or None where it cannot be opened or locked."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # the file belongs to another user
            return None
        try:
            if locked(handle) and is_at(handle, path):
                _tidy(place)
            # Waits while another process tidies. The lock may change hands before this call: that
            # does no harm, as this process has no folder yet.
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError as error:
            os.close(handle)
            if error.errno not in NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return None
        # The last process to leave unlinks the file, maybe before this one had its lock.
        if is_at(handle, path):
            return handle
        os.close(handle)


def _tidy(place: Path) -> None:
    """Remove what killed processes left; if ``place`` is empty, first put a former folder back."""
    hidden = re.compile(re.escape(f".{place.name}.partial-") + rf"\w{{8}}({_FORMER})?")
    left = [path for path in place.parent.iterdir() if hidden.fullmatch(path.name)]
    for former in (path for path in left if path.name.endswith(_FORMER)):
        if not place.exists():
            former.rename(place)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
