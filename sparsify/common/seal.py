"""The hash by which a JSON file of ours tells whether it is as it was written.

It finds damage and careless edits; who means to deceive can compute it too.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with the hash of all the rest under ``sha256``."""
    return {**content, KEY: content_hash(content)}


def is_altered(content: Mapping[str, Any]) -> bool:
    """Whether the hash is of something else. Of what has none, as older files, it cannot be
    told.
    """
    return KEY in content and content[KEY] != content_hash(content)


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, less one under ``sha256``, whatever their order in tables."""
    rest = {key: value for key, value in content.items() if key != KEY}
    # As it is when it has been read back: JSON has no tuples, and its keys are all text.
    plain = json.loads(json.dumps(rest))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
