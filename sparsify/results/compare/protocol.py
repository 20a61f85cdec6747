"""Refuses to compare what was measured in different ways."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from sparsify.common.errors import SparsifyError
from sparsify.results.compare.loading import RESULT, Run

FEW = 3


def check_protocol(runs: Sequence[Run]) -> dict[str, Any]:
    """The one protocol of all runs.

    Raises:
        SparsifyError: two runs differ; the message names the first fields that do, with their
            values.
    """
    fields = [
        dict(_fields("protocol", _compared(run.protocol)))
        | {"texts with a score": ", ".join(sorted(run.result["scores"]))}
        for run in runs
    ]
    names = dict.fromkeys(name for one in fields for name in one)
    differing = [name for name in names if len({one.get(name, "nothing") for one in fields}) > 1]
    if differing:
        shown = "; ".join(_values(name, runs, fields) for name in differing[:FEW])
        more = f"; and {len(differing) - FEW} more fields" if len(differing) > FEW else ""
        raise SparsifyError(
            "results of different protocols do not share a table: "
            f"{shown}{more}. Measure them alike (`sparsify test --ckpt_path FILE`), or compare "
            "each kind by itself"
        )
    return runs[0].protocol


def _compared(protocol: dict[str, Any]) -> dict[str, Any]:
    """Without what names a thing whose hash is there too."""
    base = {key: value for key, value in protocol["base"].items() if key != "name"}
    data = dict(protocol["data"])
    if isinstance(data.get("sources"), dict):
        data["sources"] = {name: _source(source) for name, source in data["sources"].items()}
    return protocol | {"base": base, "data": data}


def _source(source: Any) -> Any:
    if isinstance(source, dict) and source.get("sha256"):
        return {key: value for key, value in source.items() if key != "file"}
    return source


def _fields(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every leaf by its dotted path, as text."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _fields(f"{name}.{key}", part)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _values(name: str, runs: Sequence[Run], fields: Sequence[dict[str, str]]) -> str:
    by_value: dict[str, list[str]] = {}
    for run, own in zip(runs, fields, strict=True):
        place = run.path.parent if run.path.name == RESULT else run.path
        by_value.setdefault(own.get(name, "nothing"), []).append(str(place))
    parts = []
    for value, paths in by_value.items():
        short = f"{value[:12]}..." if len(value) > 40 else value
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        parts.append(f"{short} in {paths[0]}{others}")
    return f"{name}: {', '.join(parts)}"
