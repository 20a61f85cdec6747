"""Checks settings from an untrusted file: plain values pass, names of classes do not."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from sparsify.common.errors import SparsifyError
from sparsify.common.printable import is_printable
from sparsify.common.secrets import REDACTED

IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+\Z")
DEPTH = 20  # of settings in settings; ours have six

_WORD = re.compile(r"[\w-]+\Z")


def shown(value: str) -> str:
    """An untrusted text for a message: escaped, and cut if it is long."""
    return value if is_printable(value) and len(value) < 200 else ascii(value[:200])


def spec(given: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    """The class that a setting names, and its options."""
    if isinstance(given, str):
        given = {"class_path": given}
    given = mapping(given, where)
    path, options = given.get("class_path"), given.get("init_args") or {}
    if not isinstance(path, str) or not IMPORT_PATH.match(path) or not path.isascii():
        raise refused(where, f"class_path {path!r}", "the import path of a class")
    if odd := set(given) - {"class_path", "init_args"}:
        raise refused(where, f"it has {min(odd)!r}", "a class has class_path and init_args")
    options = mapping(options, f"{where}.init_args")
    if odd := {key for key in options if not key.isidentifier()}:
        raise refused(where, f"it has {min(odd)!r}", "an option is named by one word")
    return path, options


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A table with texts for keys.

    Raises:
        SparsifyError: it is not such a table.
    """
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise refused(where, f"it is of type {type(value).__name__}", "it maps names to values")
    return value


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """Check that a value names no class to instantiate, not even in a text: the parser reads it."""
    if depth > DEPTH:
        raise refused(where, f"more than {DEPTH} levels", "settings have few")
    if type(value) is dict:
        for key in mapping(value, where):
            _printable(key, where)
            if {"class_path", "init_args"} & set(key.split(".")):
                raise refused(where, f"it names a class ({key})", "no class belongs there")
        return {key: plain(part, f"{where}.{key}", depth + 1) for key, part in value.items()}
    if type(value) is list:
        return [plain(part, where, depth + 1) for part in value]
    if type(value) is str:
        _printable(value, where)
        _plain_text(value, where, depth)
    elif value is not None and type(value) not in (bool, int, float):
        raise refused(where, f"it is of type {type(value).__name__}", "settings are plain values")
    return value


def _printable(text: str, where: str) -> None:
    if not is_printable(text):
        raise refused(where, f"{text!r}", "names and texts have no control characters")


def _plain_text(text: str, where: str, depth: int) -> None:
    try:
        read = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return  # the parser cannot read it either, and leaves it a text
    if isinstance(read, dict | list):
        # Keys may be numbers here ("{1: 2}"); only what the parser takes for a class matters.
        plain(_with_text_keys(read), where, depth + 1)


def _with_text_keys(value: Any, depth: int = 0) -> Any:
    if depth > DEPTH:
        return None
    if isinstance(value, dict):
        return {str(key): _with_text_keys(part, depth + 1) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_text_keys(part, depth + 1) for part in value]
    return value if isinstance(value, str) else None


def scalars(value: Any, where: str) -> Any:
    """Check a scalar, or a list of scalars."""
    return [scalar(part, where) for part in value] if type(value) is list else scalar(value, where)


def scalar(value: Any, where: str) -> Any:
    """Check a number, truth value, None or word without a dot: none of these can be imported."""
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str and (_WORD.match(value) or value == REDACTED):
        return value
    if type(value) is str and re.fullmatch(r"[\d,. ]+", value):
        return value  # devices as "0,1"
    raise refused(where, repr(value)[:80], "a number or a word belongs there")


def refused(where: str, found: str, rule: str) -> SparsifyError:
    """The error for a setting that no run of this package would have saved."""
    return SparsifyError(
        f"the checkpoint's settings cannot be used: {shown(where)}: {found}; {rule}. Take a "
        "checkpoint that sparsify wrote and nobody changed"
    )
