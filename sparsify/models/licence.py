"""Finds the licence of a model, for the card of what is made of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsify.models.base import EMBEDDED

_KEYS = ("license", "license_name", "license_link")
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
# Words of a licence's text, and its name on the Hub.
_TEXTS = {
    ("apache license", "version 2.0"): "apache-2.0",
    ("mit license", "permission is hereby granted"): "mit",
}
_BEGINNING = 2000


def licence_of(name_or_path: str) -> dict[str, str]:
    """The licence as the Hub's cards name it: ``license``, and where that is ``other``,
    ``license_name`` and ``license_link`` if they are stated; empty if nothing says it.

    Args:
        name_or_path: as :func:`~sparsify.models.base.load_model` takes it. Of a model of the Hub,
            only what was downloaded with it is looked at: nothing is fetched.
    """
    from huggingface_hub import metadata_load

    if name_or_path == EMBEDDED:
        return {"license": "apache-2.0"}
    if not name_or_path:  # an object without a name; as a path it would be the current folder
        return {}
    for card in _found(name_or_path, "README.md"):
        try:
            stated: Any = metadata_load(card) or {}
        except Exception:  # whatever is wrong with somebody's card, it says no licence
            stated = {}
        if isinstance(stated.get("license"), str):
            return {key: stated[key] for key in _KEYS if isinstance(stated.get(key), str)}
    for file in _found(name_or_path, *_FILES):
        text = file.read_text(encoding="utf-8", errors="replace")[:_BEGINNING].lower()
        known = (name for words, name in _TEXTS.items() if all(word in text for word in words))
        return {"license": next(known, "other")}
    return {}


def _found(name_or_path: str, *names: str) -> Iterator[Path]:
    """Those of the files that are there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(name_or_path).expanduser()
    for name in names:
        if folder.is_dir():
            if (folder / name).is_file():
                yield folder / name
            continue
        try:
            cached = try_to_load_from_cache(name_or_path, name)
        except HFValidationError:  # a file, or an object's name
            return
        if isinstance(cached, str):
            yield Path(cached)
