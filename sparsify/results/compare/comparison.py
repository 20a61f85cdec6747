"""The comparison of runs: rows, verdicts, and what to know about them."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from sparsify.models.perplexity import OVERALL
from sparsify.results.compare.loading import load_runs
from sparsify.results.compare.protocol import check_protocol
from sparsify.results.compare.rows import COSTS, Row, make_rows
from sparsify.results.compare.verdict import (
    CAUTION,
    RULE,
    Finding,
    Verdict,
    show_cost,
    show_perplexity,
    spread,
    verdicts,
)

COMPARE_SCHEMA = "sparsify.compare/1"


@dataclass(frozen=True)
class Comparison:
    """Runs that were measured alike.

    Attributes:
        protocol: how all were measured.
        rows: by rising mean perplexity.
        verdicts: what can be said of them.
        remarks: what was left out or is not known.
    """

    protocol: dict[str, Any]
    rows: list[Row]
    verdicts: list[Verdict]
    remarks: list[str]

    @property
    def texts(self) -> list[str]:
        """The measured texts, the mean over all of them last; one text alone is that mean."""
        names = [name for name in self.rows[0].runs[0].losses() if name != OVERALL]
        return [*names, OVERALL] if len(names) > 1 else [OVERALL]

    @property
    def one_pattern(self) -> str | None:
        """The pattern of all rows but dense ones; None where there are several."""
        patterns = {row.settings["pattern"] for row in self.rows if not row.is_dense}
        return patterns.pop() if len(patterns) == 1 else None

    def about(self) -> str:
        """The protocol in one line."""
        base, data = self.protocol["base"], self.protocol["data"]
        windows = (self.protocol.get("windows") or {}).get(OVERALL)
        return (
            f"{str(self.protocol.get('split')).capitalize()} perplexity of {base.get('name')} "
            f"(hash {base['hash'][:12]}, {base.get('dtype')}), "
            f"{windows} windows of {data.get('block_size')} tokens"
        )

    def table(self, width: int = 100) -> Table:
        """The rows.

        Args:
            width: of the terminal; where single texts do not fit, there is the overall score alone.
        """
        pattern = self.one_pattern
        texts = self.texts if width >= 64 + 9 * len(self.texts) else [OVERALL]
        hidden = "; by text in --format json" if len(texts) < len(self.texts) else ""
        table = Table(
            # Text, since words in brackets would be read as markup.
            title=Text(self.about() + (f"; {pattern}" if pattern else ""), "table.title"),
            caption="± standard deviation over seeds; tokens and seconds with calibration" + hidden,
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for column in ("strategy", "changes", *([] if pattern else ["pattern"])):
            table.add_column(column)
        for column in (*texts, "tokens", "seconds", "GiB", "seeds"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            means = [_mean(row.perplexities(text)) for text in texts[:-1]]
            table.add_row(
                row.label,
                row.changes,
                *([] if pattern else [row.settings["pattern"]]),
                *means,
                spread(row.perplexities()),
                *(_cost(row, what) for what in COSTS),
                row.spread.removesuffix(" seeds").replace("one run", "1"),
            )
        return table

    def sentences(self) -> list[str]:
        """The verdicts as lines of text."""
        lines = []
        for verdict in self.verdicts:
            lines += ["", verdict.title]
            lines += [f"- {one.condition}: {one.statement}" for one in verdict.findings]
            lines += [f"- {caveat}" for caveat in dict.fromkeys(verdict.caveats.values())]
        lines += ["", f"{RULE} {CAUTION}"]
        return lines + [f"Remark: {remark}" for remark in self.remarks]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {
            "schema": COMPARE_SCHEMA,
            "protocol": self.protocol,
            "rows": [_row(row) for row in self.rows],
            "verdicts": [
                {
                    "title": verdict.title,
                    "rows": [row.label for row in verdict.rows],
                    "findings": [_finding(one) for one in verdict.findings],
                    "caveats": verdict.caveats,
                }
                for verdict in self.verdicts
            ],
            "rule": f"{RULE} {CAUTION}",
            "remarks": self.remarks,
        }


def compare(paths: Iterable[Path]) -> Comparison:
    """Compare the runs below some paths.

    Args:
        paths: result files, run folders, or folders of runs.

    Raises:
        SparsifyError: there is no result, or they were not measured alike.
    """
    runs, amiss = load_runs(paths)
    protocol = check_protocol(runs)
    rows, remarks = make_rows(runs)
    return Comparison(protocol, rows, verdicts(rows), [*amiss, *remarks])


def _mean(values: list[float]) -> str:
    return f"{statistics.fmean(values):,.2f}"


def _cost(row: Row, what: str) -> str:
    cost = row.cost(what)
    return "?" if cost is None else show_cost(what, cost)


def _row(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "strategy": row.record["strategy"]["class"],
        "settings": row.settings,
        "changes": row.changes,
        "pattern": row.record["pattern"],
        "sparsity": row.record["sparsity"],
        "covered": row.covered,
        "spread": row.spread,
        "losses": row.losses,
        "mean_perplexity": row.perplexity,
        "perplexity": {text: row.perplexities(text) for text in row.samples[0].result["scores"]},
        **{what: row.costs(what) or None for what in COSTS},
        "runs": [str(run.path) for run in row.runs],
    }


def _finding(one: Finding) -> dict[str, Any]:
    return {
        "cost": one.cost,
        "budget": one.budget,
        "best": one.best.label,
        "perplexity": show_perplexity(one.best),
        "winner": one.winner.label if one.winner else None,
        "ahead_of": [row.label for row in one.ahead_of],
        "level_with": [row.label for row in one.level_with],
        "sentence": f"{one.condition}: {one.statement}",
    }
