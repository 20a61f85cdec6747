"""The hash that a JSON file of ours holds of itself, to show whether it was changed.

It finds damage and careless edits, but no forgery: anybody can compute it.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the content with its hash added under ``sha256``."""
    return {**content, KEY: content_hash(content)}


def is_altered(content: Mapping[str, Any]) -> bool:
    """Whether the hash does not fit the content; False for content without one, as in old files."""
    return KEY in content and content[KEY] != content_hash(content)


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of plain values without the key ``sha256``; the order of keys does not matter."""
    rest = {key: value for key, value in content.items() if key != KEY}
    # Hash what a reader gets back: JSON makes lists of tuples, and text of all keys.
    plain = json.loads(json.dumps(rest))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
