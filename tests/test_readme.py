"""The README's first table holds what the newest `make compare` measured."""

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NEWEST = sorted((ROOT / "benchmarks" / "results").glob("compare-*.json"))[-1]


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def spent(run: dict[str, Any]) -> float:
    """Seconds of calibration and training."""
    return float(run["seconds"] + (run["calibration"] or {}).get("seconds", 0))


def test_the_first_table_is_the_newest_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [line.strip("| ").replace("`", "").replace("*", "") for line in lines]
    columns = [cell.strip() for cell in head.strip("| ").split("|")]
    results: dict[str, list[dict[str, Any]]] = json.loads(NEWEST.read_text())
    found = []
    for line in table[: len(results)]:
        cells = dict(zip(columns, (cell.strip() for cell in line.split("|")), strict=True))
        own = results[name := cells.pop("test perplexity")]
        found.append(name)
        cells.pop("what changes")
        seconds = [spent(one["run"]) for one in own]
        assert cells.pop("seconds") == (spread(seconds, 0) if any(seconds) else ""), name
        memory = [one["run"]["peak_memory_gib"] for one in own]
        assert cells.pop("peak GiB") == spread(memory, 2), name
        for part, value in cells.items():
            scores = [one["scores"][part]["perplexity"] for one in own]
            assert value == spread(scores, 2), (name, part)
    losses = {name: [r["scores"]["overall"]["loss"] for r in own] for name, own in results.items()}
    assert found == sorted(results, key=lambda name: statistics.mean(losses[name]))
    assert f"({NEWEST.relative_to(ROOT)})" in text
