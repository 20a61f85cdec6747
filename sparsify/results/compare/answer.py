"""The short answer of a report: of each kind the best row, at equal time, and how sure that is."""

from dataclasses import dataclass

from sparsify.results.compare.comparison import Comparison
from sparsify.results.compare.planned import Planned
from sparsify.results.compare.readings import kind, leading
from sparsify.results.compare.verdict import Finding, Verdict, show_perplexity

EQUAL = {"seconds": "At equal time", "tokens": "At equal tokens"}


@dataclass(frozen=True)
class Answer:
    """What a reader in a hurry takes along.

    Attributes:
        title: which rows it is about.
        first: the best row, with its perplexity and the dense model's.
        certainty: how sure that is, in a few words.
        is_sure: whether it is sure.
        lines: more, as (heading, text).
    """

    title: str
    first: str
    certainty: str
    is_sure: bool
    lines: list[tuple[str, str]]


def answers(comparison: Comparison, planned: Planned | None = None) -> list[Answer]:
    """One answer for the rows whose weights stay, one for those whose weights change too."""
    dense = [row.perplexity for row in comparison.rows if row.is_dense]
    return [_answer(verdict, dense, planned) for verdict in leading(comparison)]


def _answer(verdict: Verdict, dense: list[float], planned: Planned | None) -> Answer:
    (overall,) = verdict.of("any")
    best = overall.best
    beside = f" The dense model has {dense[0]:,.2f}." if dense else ""
    lines = [("How sure", overall.statement)]
    for cost, heading in EQUAL.items():
        if said := _within(verdict.of(cost)) or verdict.caveats.get(cost, ""):
            lines.append((heading, said))
    if planned and (cost_there := planned.costs.get(best.label)):
        text = f"{best.label} would take {cost_there.sentence}. Computed, not measured."
        lines.append((f"On {planned.model}", text))
    return Answer(
        f"Of the {len(verdict.rows)} {kind(verdict)}",
        f"{best.label} has the lowest perplexity: {show_perplexity(best)}.{beside}",
        overall.certainty,
        overall.winner is not None,
        lines,
    )


def _within(findings: list[Finding]) -> str:
    """The best at its own cost, and the one at the next lower budget."""
    return " ".join(
        f"{one.condition}: {one.best.label} ({one.best.perplexity:,.2f}, {one.certainty})."
        for one in reversed(findings[-2:])
    )
