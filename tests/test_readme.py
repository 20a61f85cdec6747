"""The tables of the README and of docs/results.md hold what the newest `make compare` measured."""

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def newest(files: str) -> Path:
    return max((ROOT / "benchmarks" / "results").glob(files))


NEWEST = newest("compare-*.json")
RESULTS: dict[str, list[dict[str, Any]]] = json.loads(NEWEST.read_text())


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def spent(run: dict[str, Any]) -> float:
    """Seconds of calibration and training."""
    return float(run["seconds"] + (run["calibration"] or {}).get("seconds", 0))


def loss(name: str) -> float:
    return statistics.mean(run["scores"]["overall"]["loss"] for run in RESULTS[name])


def first_table(page: Path) -> list[dict[str, str]]:
    """Its rows, by the heads of its columns."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    head, _, *rows = [line[1:-1].replace("`", "").replace("*", "") for line in lines[start:end]]
    columns = [cell.strip() for cell in head.split("|")]
    return [
        dict(zip(columns, (cell.strip() for cell in row.split("|")), strict=True)) for row in rows
    ]


def check(page: Path) -> list[str]:
    """Check the first table's figures, and give its rows' names."""
    found = []
    for cells in first_table(page):
        own = RESULTS[name := cells.pop("test perplexity")]
        found.append(name)
        cells.pop("what changes")
        seconds = [spent(one["run"]) for one in own]
        assert cells.pop("seconds") == (spread(seconds, 0) if any(seconds) else ""), name
        memory = [one["run"]["peak_memory_gib"] for one in own]
        assert cells.pop("peak GiB") == spread(memory, 2), name
        assert "overall" in cells
        for part, value in cells.items():
            scores = [one["scores"][part]["perplexity"] for one in own]
            assert value == spread(scores, 2), (name, part)
    assert NEWEST.name in page.read_text(encoding="utf-8")
    return found


def test_the_first_table_of_the_results_is_the_newest_results() -> None:
    assert check(ROOT / "docs" / "results.md") == sorted(RESULTS, key=loss)
    assert len(first_table(ROOT / "docs" / "results.md")[0]) == 8


def test_the_first_table_of_the_readme_is_part_of_it() -> None:
    found = check(README)
    assert found == sorted(found, key=loss)
    assert {"dense", "magnitude"} < set(found)
    assert len(found) <= 6
    assert f"({NEWEST.relative_to(ROOT)})" in README.read_text(encoding="utf-8")
    assert f"Six of {len(RESULTS)} rows" in README.read_text(encoding="utf-8")


def test_the_decision_table_holds_them() -> None:
    rows = first_table(ROOT / "docs" / "which.md")
    assert len(rows) > 10
    for row in rows:
        scores = [one["scores"]["overall"]["perplexity"] for one in RESULTS[row["take"]]]
        assert row["embedded model"] == spread(scores, 2), row["take"]
    assert NEWEST.name in (ROOT / "docs" / "which.md").read_text(encoding="utf-8")


def test_the_decision_table_has_what_7b_would_cost() -> None:
    file = newest("plan_7b-*.json")
    costs = json.loads(file.read_text())["rows"]
    shown = [row for row in first_table(ROOT / "docs" / "which.md") if row["7B, GiB"]]
    assert {row["take"] for row in shown} > {"wanda", "maskllm", "selfmask"}
    for row in shown:
        cost = costs[row["take"]]
        digits = 0 if cost["hours"] > 1 else 2
        assert row["7B, GiB"] == f"{cost['peak'] / 2**30:.1f}", row["take"]
        assert row["7B, hours"] == f"{cost['hours']:,.{digits}f}", row["take"]
    assert file.name in (ROOT / "docs" / "which.md").read_text(encoding="utf-8")


def test_the_readme_is_short_and_says_at_once_what_was_not_measured() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert "Nothing has run on a GPU" in " ".join(lines[:12])
