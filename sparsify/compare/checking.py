"""Checks that a result file holds what a comparison reads of it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from sparsify.evaluation import OVERALL

NUMBER, TEXT, TABLE, LIST = "a number", "text", "a table", "a list"
NEEDED = {
    "run": TABLE,
    "run.strategy": TABLE,
    "run.strategy.class": TEXT,
    "run.strategy.weights": TEXT,
    "run.strategy.settings": TABLE,
    "run.pattern": TEXT,
    "run.sparsity": NUMBER,
    "run.steps": NUMBER,
    "run.tokens": NUMBER,
    "run.seconds": NUMBER,
    "protocol": TABLE,
    "protocol.base": TABLE,
    "protocol.base.hash": TEXT,
    "protocol.data": TABLE,
    "scores": TABLE,
    f"scores.{OVERALL}": TABLE,
}
# May lack, or be null where what they are in allows it.
POSSIBLE = {
    "run.calibration": TABLE,
    "run.calibration.samples": NUMBER,
    "run.calibration.block_size": NUMBER,
    "run.calibration.tokens": NUMBER,
    "run.calibration.seconds": NUMBER,
    "run.calibration.device": TEXT,
    "run.calibration.sources": TABLE,
    "run.overrides": TABLE,
    "run.distillation": TABLE,
    "run.peak_memory_gib": NUMBER,
    "run.device": TEXT,
    "run.cpu": TEXT,
    "run.processes": NUMBER,
    "run.threads": NUMBER,
    "run.command": TEXT,
    "protocol.windows": TABLE,
    "history": TABLE,
    "history.validation": LIST,
    "history.masks": LIST,
    "masks": TABLE,
    "masks.retained_norm": NUMBER,
    "masks.layers": TABLE,
}
# Of the history.
DRAWN = (
    "tokens",
    "seconds",
    "perplexity",
    "flips",
    "sample_change",
    "max_probability",
    "distance",
)


def check(result: Mapping[str, Any]) -> None:
    """See that everything a comparison reads is there, and of its type.

    Raises:
        KeyError: something lacks.
        TypeError: something is of another type.
    """
    for path, kind in NEEDED.items():
        _check(path, _at(result, path), kind)
    for path, kind in POSSIBLE.items():
        try:
            value = _at(result, path)
        except KeyError:
            continue
        if value is not None:
            _check(path, value, kind)
    if "versions" in result:
        _check("versions", result["versions"], TABLE)
    for path, look, kind in _parts(result):
        _check(path, look, kind)


def _parts(result: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """What stands in tables and lists of any length."""
    for text, score in result["scores"].items():
        yield f"scores.{text}", score, TABLE
        for key in ("loss", "perplexity"):
            # Whether they are finite is another question, with another answer.
            number = score[key]
            yield f"scores.{text}.{key}", 0 if isinstance(number, float) else number, NUMBER
    for text, source in ((result["run"].get("calibration") or {}).get("sources") or {}).items():
        yield f"run.calibration.sources.{text}", source, TABLE
    for part in ("validation", "masks"):
        for number, look in enumerate((result.get("history") or {}).get(part) or []):
            path = f"history.{part}[{number}]"
            yield path, look, TABLE
            yield f"{path}.step", look["step"], NUMBER
            for key in DRAWN:
                yield f"{path}.{key}", _number(look.get(key)), NUMBER
    for layer, state in ((result.get("masks") or {}).get("layers") or {}).items():
        yield f"masks.layers.{layer}", state, TABLE
        yield f"masks.layers.{layer}.retained_norm", _number(state.get("retained_norm")), NUMBER


def _number(value: Any) -> Any:
    """The value, where there is one."""
    return 0 if value is None else value


def _at(result: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path."""
    value: Any = result
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise KeyError(path)
        value = value[key]
    return value


def _check(path: str, value: Any, kind: str) -> None:
    right = {
        NUMBER: isinstance(value, int | float) and math.isfinite(value),
        TEXT: isinstance(value, str),
        TABLE: isinstance(value, dict),
        LIST: isinstance(value, list),
    }[kind]
    if not right:
        raise TypeError(f"{path} is {str(value)[:40]!r} instead of {kind}")
