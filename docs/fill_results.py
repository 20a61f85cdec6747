"""Tables of what was measured, made from the newest results; ``fill_pages.py`` writes them."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsify.common.errors import SparsifyError
from sparsify.masking.registry import find_strategy, import_path

# Of each the newest file of the first kind that has rows of the strategy, else of the last kind.
TABLES = (
    ("compare-*.json",),
    ("real_models_smollm2-*.json", "smollm2_maskpro-*.json", "smollm2_table-*.json"),
)
# The texts whose perplexities are shown: of the embedded model the mean over its three, of SmolLM2
# each, since not all files have both.
TEXTS = {"overall": "test perplexity", "wikitext": "WikiText-2", "c4": "held-out C4"}
REFERENCES = ("dense", "magnitude")
COLUMNS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "tokens trained on": lambda result: result["run"]["tokens"],
    "training, s": lambda result: result["run"]["seconds"],
    "calibration, s": lambda result: _calibration(result["run"]),
    "peak GiB": lambda result: result["run"].get("peak_memory_gib"),
}
DIGITS = dict(zip(COLUMNS, (0, 0, 0, 2), strict=True))

Results = dict[str, list[dict[str, Any]]]


def _calibration(run: dict[str, Any]) -> float | None:
    """Seconds of calibration and of the search for channel orders; None where there was neither."""
    parts = [run.get(part) or {} for part in ("calibration", "permutation")]
    seconds = [part["seconds"] for part in parts if "seconds" in part]
    return sum(seconds) if seconds else None


def result_tables(name: str, folder: Path) -> list[str]:
    """What was measured of a strategy, a Markdown table for each model.

    Args:
        name: the strategy's short name.
        folder: with the files that the benchmarks saved.
    """
    tables = []
    for kinds in TABLES:
        newest = [file for kind in kinds for file in sorted(folder.glob(kind))[-1:]]
        having = [file for file in newest if _own(name, _rows(file))]
        tables += [result_table(name, file) for file in (having or newest[::-1])[:1]]
    return tables


def _rows(file: Path) -> Results:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows = {row: v if isinstance(v, list) else [v] for row, v in content.items()}
    return {row: results for row, results in rows.items() if "run" in results[0]}


def _own(name: str, results: Results) -> list[str]:
    return [row for row, (result, *_) in results.items() if _is_of(name, result)]


def result_table(name: str, file: Path) -> str:
    """One file's rows of a strategy, beside dense and magnitude, with how they were measured.

    Raises:
        SparsifyError: the rows were measured under different protocols.
    """
    results = _rows(file)
    own = _own(name, results)
    shown = dict.fromkeys([*(row for row in REFERENCES if row in results), *own])
    measured = [result for row in shown for result in results[row]]
    texts = _texts(measured[0])
    columns = [*(TEXTS[text] for text in texts), *COLUMNS]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in shown:
        cells = [_spread([_perplexity(one, text) for one in results[row]], 2) for text in texts]
        cells += [_spread(map(get, results[row]), DIGITS[name]) for name, get in COLUMNS.items()]
        lines.append(f"| {f'**{row}**' if row in own else row} | {' | '.join(cells)} |")
    if not own:
        lines.append(f"| **{name}** | not measured |" + " |" * (len(columns) - 1))
    link = f"[results](../../benchmarks/results/{file.name})"
    return "\n".join([*lines, "", f"{_protocol(measured, file)} ({link})."]) + "\n"


def _texts(result: dict[str, Any]) -> list[str]:
    """Those whose perplexities are shown."""
    single = [text for text in TEXTS if text in result["scores"] and text != "overall"]
    return single or ["overall"]


def _perplexity(result: dict[str, Any], text: str) -> float:
    found: float = result["scores"][text]["perplexity"]
    return found


def _is_of(name: str, result: dict[str, Any]) -> bool:
    described: str = result["run"]["strategy"]["class"]
    return described == import_path(find_strategy(name))


def _spread(values: Any, digits: int) -> str:
    """Mean ± standard deviation; nothing where a value is missing."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):,.{digits}f}"
    deviation = statistics.stdev(known) if len(known) > 1 else 0
    return f"{mean} ± {deviation:,.{digits}f}" if deviation else mean


def _protocol(results: list[dict[str, Any]], file: Path) -> str:
    """How all of these were measured, in a line."""
    first, *others = [result["protocol"] for result in results]
    if any(other != first for other in others):
        raise SparsifyError(
            f"{file.name}: its results were measured under different protocols, which share no "
            "table; measure all of them again"
        )
    base, windows = first["base"], first["windows"]["overall"]
    texts = ", ".join(first["data"]["sources"])
    size = first["data"]["block_size"]
    seeds = len({result["run"]["seed"] for result in results})
    pattern = results[-1]["run"]["pattern"]
    spread = f"mean ± standard deviation of up to {seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"Model {base['name']} (hash `{base['hash'][:12]}`), {base['dtype']}; {pattern}; test text "
        f"{texts}: {windows} windows of {size} tokens; {results[0]['run']['device']}; {spread}"
    )
