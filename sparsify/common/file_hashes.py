"""Hashes the files of a folder, and parses hashes that somebody may have changed."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sparsify.common.values import short

_PIECE = 2**20
_SHA256 = re.compile("[0-9a-f]{64}")


def file_hashes(folder: Path, but: str) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its path relative to the folder, sorted.

    Args:
        folder: the folder.
        but: the relative path of the file that will hold the hashes, which is left out.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: hash_file(path)
        for name, path in sorted(paths.items())
        if path.is_file() and name != but
    }


def hash_file(path: Path) -> str:
    """SHA-256 of a file; it is read in pieces, as it may not fit into memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def parse_hashes(entries: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Check entries that should be the result of :func:`file_hashes`.

    Returns:
        The hashes whose paths stay in the folder, and a sentence on each entry that is wrong.
    """
    files, problems = {}, []
    for name, value in entries.items():
        if not _stays(name):
            problems.append(f"{short(name)} is no path of a file within the folder")
        elif not isinstance(value, str) or not _SHA256.fullmatch(value):
            problems.append(f"{short(name)} is {short(value)}; it must be a SHA-256 in hexadecimal")
        else:
            files[name] = value
    return files, problems


def _stays(name: str) -> bool:
    path = PurePosixPath(name)
    plain = str(path) == name and name.isprintable()
    return plain and not path.is_absolute() and not {".", ".."} & {*path.parts, name}
