"""Finds the classes that a command line names. The user is trusted, so they may be imported."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from sparsify.masking.registry import find_strategy, import_path

STRATEGY_FLAGS = ("--strategy", "--model.strategy")
# The options that may name a class by its import path.
_FLAGS = ("--model.strategy", "--model.optimizer", "--trainer.", "--data.tokenizer")
_IMPORT_PATH = re.compile(r"class_path|(^|[\[\s,'\"])[^\W\d]\w*(\.[^\W\d]\w*)+")


def names_code(words: Iterable[str]) -> bool:
    """Whether the words name a class by its import path, or a config file, which may name some."""
    return any(
        flag == "--config" or (flag.startswith(_FLAGS) and _IMPORT_PATH.search(value))
        for flag, value in _options(words)
    )


def named_classes(words: Iterable[str]) -> set[str]:
    """The import paths given for the strategy and the optimizer, in words or in config files.

    Raises:
        SparsifyError: there is no such strategy.
    """
    found: set[str] = set()
    for flag, value in _options(words):
        if flag in STRATEGY_FLAGS and not value.startswith("{"):
            found.add(import_path(find_strategy(value)))
        elif flag.startswith(_FLAGS[:2]):
            found |= set(_texts(_read(value)))
        elif flag == "--config":
            config = _read(_content(value))
            model = config.get("model") if isinstance(config, dict) else None
            if isinstance(model, dict):
                found |= set(_texts([model.get("strategy"), model.get("optimizer")]))
    return found


def _options(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield every flag with its value, also if the value is the next word."""
    waiting = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            waiting = "" if equals else flag
            yield flag.removesuffix("+"), value
        elif waiting:
            yield waiting.removesuffix("+"), word
            waiting = ""


def _content(config: str) -> str:
    """The text of a config, which is given as a file name or directly."""
    try:
        return Path(config).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return config


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None  # the parser will report what is wrong


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _texts(part)
