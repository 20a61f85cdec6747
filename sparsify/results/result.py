"""Makes the result of a run, and checks what a result must hold."""

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from sparsify.common.printable import is_printable
from sparsify.common.values import (
    COUNT,
    LIST,
    NUMBER,
    SECONDS,
    SHARE,
    TABLE,
    TEXT,
    is_of,
    short,
)
from sparsify.common.version import version
from sparsify.models.base import BaseModel
from sparsify.models.perplexity import OVERALL, Score

PLAIN = "text without control characters"
DEEPEST = 40
NEEDED = {
    "run": TABLE,
    "run.strategy": TABLE,
    "run.strategy.class": TEXT,
    "run.strategy.weights": TEXT,
    "run.strategy.settings": TABLE,
    "run.pattern": TEXT,
    "run.sparsity": SHARE,
    "run.steps": COUNT,
    "run.tokens": COUNT,
    "run.seconds": SECONDS,
    "protocol": TABLE,
    "protocol.base": TABLE,
    "protocol.base.hash": TEXT,
    "protocol.data": TABLE,
    "scores": TABLE,
    f"scores.{OVERALL}": TABLE,
}
# These may be missing; some may also be null.
POSSIBLE = {
    "run.calibration": TABLE,
    "run.calibration.samples": COUNT,
    "run.calibration.block_size": COUNT,
    "run.calibration.tokens": COUNT,
    "run.calibration.seconds": SECONDS,
    "run.calibration.device": TEXT,
    "run.calibration.sources": TABLE,
    "run.coverage": TABLE,
    "run.coverage.model": SHARE,
    "run.coverage.blocks": SHARE,
    "run.coverage.dense": LIST,
    "run.overrides": TABLE,
    "run.distillation": TABLE,
    "run.permutation": TABLE,
    "run.permutation.parts": LIST,
    "run.permutation.seconds": SECONDS,
    "run.permutation.device": TEXT,
    "run.peak_memory_gib": SECONDS,
    "run.device": TEXT,
    "run.cpu": TEXT,
    "run.processes": COUNT,
    "run.threads": COUNT,
    "run.command": TEXT,
    "protocol.windows": TABLE,
    "history": TABLE,
    "history.validation": LIST,
    "history.masks": LIST,
    "masks": TABLE,
    "masks.retained_norm": NUMBER,
    "masks.layers": TABLE,
}
# Fields of the history.
DRAWN = {
    "tokens": COUNT,
    "seconds": SECONDS,
    "perplexity": NUMBER,
    "flips": NUMBER,
    "sample_change": NUMBER,
    "max_probability": NUMBER,
    "distance": NUMBER,
}

RESULT_SCHEMA = "sparsify.result/2"
UNSEALED_SCHEMA = "sparsify.result/1"  # version 0.1.0 wrote the same without a hash of the content
METRIC = (
    "token perplexity: exp of the mean over windows of the mean cross-entropy of the next token"
)


def describe_protocol(
    base: BaseModel, dtype: str, text: Mapping[str, Any], split: str
) -> dict[str, Any]:
    """How scores on a split are measured; two scores are comparable only if this is equal.

    Args:
        base: the dense model.
        dtype: the type in which scores are computed.
        text: the split's text, as :meth:`~sparsify.data.TextDataModule.describe` describes it.
        split: the split's name.
    """
    return {
        "metric": METRIC,
        "split": split,
        "base": {"name": base.name, "hash": base.original_hash, "dtype": dtype},
        "data": dict(text),
    }


def make_result(
    run: Mapping[str, Any], protocol: Mapping[str, Any], scores: Mapping[str, Score]
) -> dict[str, Any]:
    """Make a result, with everything that says with which other results it may be compared.

    Args:
        run: what was done: strategy, pattern, steps, tokens, seconds.
        protocol: how it was measured; results of different protocols never share a column.
        scores: the scores, from :meth:`PerplexityMeter.scores`.
    """
    packages = ("sparsify", "torch", "lightning", "transformers")
    return {
        "schema": RESULT_SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in packages}
        | {"python": platform.python_version()},
        "run": dict(run),
        # A run that measured only part of the text counts as measured on another text.
        "protocol": {**protocol, "windows": {name: s.windows for name, s in scores.items()}},
        "scores": {name: asdict(score) for name, score in scores.items()},
    }


def pattern_text(run: Mapping[str, Any]) -> str:
    """The pattern of a result's run, for a title."""
    return f"{run['pattern']} with overrides" if run.get("overrides") else str(run["pattern"])


def check(result: Mapping[str, Any]) -> None:
    """Check that every field that a comparison reads is present and of the right type.

    Raises:
        KeyError: a field is missing.
        TypeError: a field is of another type.
    """
    check_plain(result)
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
    """The fields within tables and lists of any length."""
    for text, score in result["scores"].items():
        yield f"scores.{text}", score, TABLE
        for key in ("loss", "perplexity"):
            # Whether they are finite is checked elsewhere, with its own message.
            number = score[key]
            yield f"scores.{text}.{key}", 0 if isinstance(number, float) else number, NUMBER
    for text, source in ((result["run"].get("calibration") or {}).get("sources") or {}).items():
        yield f"run.calibration.sources.{text}", source, TABLE
    for part in ("validation", "masks"):
        for number, look in enumerate((result.get("history") or {}).get(part) or []):
            path = f"history.{part}[{number}]"
            yield path, look, TABLE
            yield f"{path}.step", look["step"], COUNT
            for key, kind in DRAWN.items():
                yield f"{path}.{key}", _number(look.get(key)), kind
    for layer, state in ((result.get("masks") or {}).get("layers") or {}).items():
        yield f"masks.layers.{layer}", state, TABLE
        yield f"masks.layers.{layer}.retained_norm", _number(state.get("retained_norm")), NUMBER


def _number(value: Any) -> Any:
    """The value, if there is one."""
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
    if not is_of(kind, value):
        raise TypeError(f"{path} is {short(value)} instead of {kind}")


def check_plain(value: Any, path: str = "", depth: int = 0) -> None:
    """Check that no text in a value holds control characters, that no integer is too long for a
    table, and that the value is not nested too deeply for recursion.

    Raises:
        TypeError: one of these does not hold.
    """
    if depth > DEEPEST:
        raise TypeError(f"{path[:80]} is nested {depth} deep instead of at most {DEEPEST}")
    if isinstance(value, dict):
        for key, part in value.items():
            check_plain(key, path)
            check_plain(part, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            check_plain(part, f"{path}[{number}]", depth + 1)
    elif isinstance(value, str) and not is_printable(value):
        raise TypeError(f"{path[:80]} is {short(value)} instead of {PLAIN}")
    elif isinstance(value, int) and abs(value) > 2**64:
        raise TypeError(f"{path[:80]} is {short(value)} instead of a number that can be shown")
