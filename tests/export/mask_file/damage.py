"""Ways to damage a mask file that its checksums do not notice."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from sparsify.export.mask_file.index import MAGIC

TAIL = 32 + 8 + len(MAGIC)


def split(content: bytes) -> tuple[bytes, bytes]:
    """The codes with what is before them, and the index."""
    length = int.from_bytes(content[-16:-8], "little")
    return content[: -TAIL - length], content[-TAIL - length : -TAIL]


def signed(codes: bytes, index: bytes) -> bytes:
    """A file whose index has the right checksum."""
    return codes + index + hashlib.sha256(index).digest() + len(index).to_bytes(8, "little") + MAGIC


def reindexed(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with a changed index, signed again."""
    codes, index = split(content)
    fields = json.loads(index)
    change(fields)
    return signed(codes, json.dumps(fields).encode())
