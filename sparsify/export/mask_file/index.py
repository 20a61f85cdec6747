"""The index of a mask file, which says what layers it holds, for which model, and from where.

It stands at the end of the file, as JSON, with its own SHA-256. The place of a layer's bytes is not
stored: it follows from the sizes of the layers before it, so it cannot contradict them. To read an
index need not wait for PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.common.errors import SparsifyError
from sparsify.export.mask_file.sizes import code_bytes, delta_bytes
from sparsify.masking.pattern import NMPattern

if TYPE_CHECKING:
    from sparsify.models.permutation_file import Permutation

SUFFIX = ".nmask"
FILE_NAME = f"masks{SUFFIX}"
VERSION = 2
_NAME = b"nmask\x00"
MAGIC = _NAME + VERSION.to_bytes(2, "big")
_TAIL_BYTES = 32 + 8 + len(MAGIC)
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LayerEntry:
    """The entry of one layer in the index.

    Attributes:
        shape: (O, I).
        pattern: the pattern.
        sha256: SHA-256 of the layer's whole code, in hexadecimal, also where only changes are
            stored.
        changed: the number of groups that differ from the prior, if only these are stored; None if
            the whole code is.
    """

    shape: tuple[int, int]
    pattern: NMPattern
    sha256: str
    changed: int | None = None

    @property
    def groups(self) -> int:
        """How many groups the layer has."""
        return self.shape[0] * self.shape[1] // self.pattern.m

    @property
    def stored_bytes(self) -> int:
        """How many bytes the file holds of the layer."""
        candidates = self.pattern.candidates
        if self.changed is None:
            return code_bytes(self.groups, candidates)
        return delta_bytes(self.changed, self.groups, candidates)

    def same_layer(self, other: LayerEntry | None) -> bool:
        """Whether the other entry has the same shape and pattern."""
        return other is not None and (other.shape, other.pattern) == (self.shape, self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """The entry as the index stores it."""
        entry = {"shape": self.shape, "pattern": str(self.pattern), "sha256": self.sha256}
        return entry if self.changed is None else {**entry, "changed": self.changed}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> LayerEntry:
        """Parse an entry; ValueError, KeyError or TypeError if it is not valid."""
        rows, columns = entry["shape"]
        pattern, changed = NMPattern.parse(str(entry["pattern"])), entry.get("changed")
        counts = [rows, columns] if changed is None else [rows, columns, changed]
        if any(type(count) is not int for count in counts) or min(rows, columns) < 1:
            raise ValueError(f"shape {entry['shape']!r}, changed {changed!r}")
        if columns % pattern.m:
            raise ValueError(f"{columns} columns do not divide into groups of {pattern.m}")
        result = cls((rows, columns), pattern, entry["sha256"], changed)
        if changed is not None and not 0 <= changed <= result.groups:
            raise ValueError(f"{changed} changed groups of {result.groups}")
        if not _HASH.fullmatch(result.sha256):
            raise ValueError(f"sha256 {result.sha256!r}")
        return result


@dataclass(frozen=True)
class Index:
    """The whole index.

    Attributes:
        base_hash: the hash of the model that the masks were made for; empty if it is not known.
        lineage: where the masks come from, as their maker stated it.
        prior: the digest of the prior of a delta file; None if the file is whole by itself.
        layers: the entries by layer name, in the order of the file.
        permutation: the orders of channels of the model that the masks were made for; None if they
            are those in which it is loaded.
    """

    base_hash: str
    lineage: Mapping[str, Any]
    prior: str | None
    layers: Mapping[str, LayerEntry]
    permutation: Permutation | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the masks' names, shapes, patterns and whole codes."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.layers.items()):
            content = [name, entry.shape, str(entry.pattern), entry.sha256]
            digest.update(json.dumps(content).encode())
        return digest.hexdigest()

    def offsets(self) -> dict[str, int]:
        """Where each layer's bytes begin."""
        at, offsets = len(MAGIC), {}
        for name, entry in self.layers.items():
            offsets[name] = at
            at += entry.stored_bytes
        return offsets

    def to_bytes(self) -> bytes:
        """The last part of a mask file: the index, its hash, its length and the magic bytes."""
        content = {
            "base": self.base_hash,
            "lineage": self.lineage,
            "prior": self.prior,
            "layers": {name: entry.to_dict() for name, entry in self.layers.items()},
        }
        if self.permutation is not None:
            content["permutation"] = self.permutation.to_dict()
        index = json.dumps(content, separators=(",", ":")).encode()
        length = len(index).to_bytes(8, "little")
        return index + hashlib.sha256(index).digest() + length + MAGIC


def open_index(path: Path) -> Index:
    """The index of a mask file, of a delta file, or of the mask file in an exported folder.

    Raises:
        SparsifyError: the file is missing, not a mask file, of another version, or damaged.
    """
    path = find_file(path)
    try:
        return read_index(path)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise unreadable(path, error) from error


def find_file(path: Path) -> Path:
    """The path, or that of the mask file in it if it is an exported folder."""
    return path / FILE_NAME if path.is_dir() else path


def unreadable(path: Path, reason: object) -> SparsifyError:
    """The error for a file that is not a mask file, or is damaged."""
    return SparsifyError(
        f"{path}: not a readable mask file ({reason}); `sparsify export` writes {FILE_NAME}"
    )


def read_index(path: Path) -> Index:
    """Read and check the index of a file.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: the file cannot be
            read, or :meth:`Index.to_bytes` cannot have written its index.
    """
    content, size = _read_json(path)
    layers = {name: LayerEntry.from_dict(entry) for name, entry in content["layers"].items()}
    if odd := next((name for name in layers if not name.isprintable()), None):
        raise ValueError(f"the layer name {odd!r} holds control characters")
    permutation = None
    if (stored := content.get("permutation")) is not None:
        from sparsify.models.permutation_file import Permutation

        permutation = Permutation.from_dict(stored, path)
    index = Index(content["base"], content["lineage"], content["prior"], layers, permutation)
    if not isinstance(index.base_hash, str) or not isinstance(index.lineage, dict):
        raise ValueError("base or lineage of a wrong type")
    if index.prior is None and any(entry.changed is not None for entry in layers.values()):
        raise ValueError("it holds changes, but names no prior")
    end = len(MAGIC) + sum(entry.stored_bytes for entry in layers.values())
    if end != size:
        raise ValueError(f"its layers end at byte {end}, but its index begins at {size}")
    return index


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """The parsed index, and the number of bytes before it."""
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        _check_start(file.read(len(MAGIC)))
        size = file.seek(0, os.SEEK_END)
        if size < len(MAGIC) + _TAIL_BYTES:
            raise ValueError(f"it ends after {size} bytes")
        file.seek(size - _TAIL_BYTES)
        tail = file.read(_TAIL_BYTES)
        if tail[-len(MAGIC) :] != MAGIC:
            raise ValueError("it does not end like a mask file: it was cut off or appended to")
        length = int.from_bytes(tail[32:40], "little")
        start = size - _TAIL_BYTES - length
        if start < len(MAGIC):
            raise ValueError(f"it has {size} bytes, too few for an index of {length}")
        file.seek(start)
        index = file.read(length)
    if hashlib.sha256(index).digest() != tail[:32]:
        raise ValueError("its index has changed")
    return json.loads(index), start


def _check_start(start: bytes) -> None:
    if start[: len(_NAME)] != _NAME:
        raise ValueError("it does not begin like a mask file")
    if start != MAGIC:
        raise ValueError(
            f"it is of version {int.from_bytes(start[len(_NAME) :], 'big')}, and this sparsify "
            f"reads version {VERSION}: install the one that wrote it, or export again"
        )
