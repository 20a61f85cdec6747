"""Which row is best at which cost, where the spread over seeds allows to say so."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.results.compare.caveats import cost_caveats
from sparsify.results.compare.rows import COSTS, Row
from sparsify.results.result import pattern_text

SEEDS = 3
# What is measured is not the same twice: costs within this share of each other count as equal.
TOLERANCE = {"tokens": 0.0, "seconds": 0.05, "memory": 0.05}
RULE = (
    f"One row is ahead of another only if both have at least {SEEDS} seeds and every seed of the "
    "one is better than every seed of the other. If the two are equal, one or the other of three "
    "against three is ahead by chance once in 10. A row into which nothing random enters is known "
    f"exactly: another is ahead of it, or behind, if all of its seeds, at least {SEEDS}, lie on "
    "one side, and farther away than they lie from each other (by chance at most once in 16, if "
    "the two are equal and seeds scatter symmetrically around one peak)."
)
CAUTION = (
    "This is a rule for two rows: of many pairs, some are told apart by chance. One run, or two "
    "seeds, have no spread to judge by, and win or lose nothing."
)


@dataclass(frozen=True)
class Finding:
    """What can be said at one budget.

    Attributes:
        cost: tokens, seconds or memory; "any" where cost does not count.
        budget: the most that a row may cost; None where cost does not count.
        best: the row of lowest mean perplexity within it.
        ahead_of: the rows that it is surely ahead of.
        level_with: the rows that it cannot be told apart from.
    """

    cost: str
    budget: float | None
    best: Row
    ahead_of: list[Row]
    level_with: list[Row]

    @property
    def winner(self) -> Row | None:
        """The row that is surely best; None where that cannot be said."""
        return None if self.level_with or not self.ahead_of else self.best

    @property
    def certainty(self) -> str:
        """How sure it is that this row is best, in a few words."""
        if self.winner:
            return "clear winner"
        return "no clear winner" if self.level_with else "no rival"

    @property
    def condition(self) -> str:
        """The budget in words."""
        if self.budget is None:
            return "Whatever it costs"
        if self.cost == "tokens":
            return f"With at most {self.budget:,.0f} tokens"
        unit = "seconds" if self.cost == "seconds" else "GiB"
        return f"With at most {show_cost(self.cost, self.budget)} {unit}"

    @property
    def statement(self) -> str:
        """What holds under this condition."""
        best = f"{self.best.label} ({show_perplexity(self.best)})"
        if not (self.ahead_of or self.level_with):
            return f"{best} is the only one."
        seeds = "" if self.best.is_exact else " in every seed"
        if not self.level_with:
            return f"{best} is ahead of {_others(self.ahead_of, 'all')}{seeds}."
        near = self.level_with[0]
        more = f" and {len(self.level_with) - 1} more" if len(self.level_with) > 1 else ""
        ahead = f" It is ahead of {_others(self.ahead_of, 'the')}{seeds}."
        return (
            f"{best} has the lowest mean perplexity, but cannot be told apart from {near.label} "
            f"({show_perplexity(near)}){more}.{ahead if self.ahead_of else ''}"
            f"{_too_few([self.best, *self.level_with])}"
        )


@dataclass(frozen=True)
class Verdict:
    """What can be said of the rows that may stand beside each other.

    Attributes:
        title: what the rows have in common.
        rows: by rising mean perplexity.
        findings: one without regard to cost, and one for every budget at which another row is best.
        caveats: by cost, why it is no fair comparison.
    """

    title: str
    rows: list[Row]
    findings: list[Finding]
    caveats: dict[str, str]

    @property
    def keeps_base(self) -> bool:
        """Whether the kept weights are the base model's."""
        return self.rows[0].keeps_base

    def of(self, cost: str) -> list[Finding]:
        """The findings of one cost, by rising budget."""
        return [one for one in self.findings if one.cost == cost]


def groups(rows: Sequence[Row]) -> dict[tuple[bool, str, float], list[Row]]:
    """The rows that may stand beside each other, by what they have in common: whether base weights
    are kept, which come first, the pattern, and the sparsity.
    """
    found: dict[tuple[bool, str, float], list[Row]] = {}
    for row in rows:
        if not row.is_dense:
            key = (row.keeps_base, pattern_text(row.record), round(row.record["sparsity"], 3))
            found.setdefault(key, []).append(row)
    return dict(sorted(found.items(), key=lambda one: one[0], reverse=True))


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """One verdict for each kind of change, pattern and sparsity."""
    found = []
    for (keeps_base, pattern, sparsity), own in groups(rows).items():
        kind = "Base weights kept" if keeps_base else "Weights changed too"
        title = f"{kind}, {pattern}, {sparsity:.1%} of the blocks' weights zero"
        found.append(_verdict(title, own))
    return found


def _verdict(title: str, rows: list[Row]) -> Verdict:
    caveats, refused = cost_caveats(rows)
    findings = [_finding("any", None, rows)]
    for cost in COSTS:
        if cost not in refused:
            findings += _budgets(cost, rows)
    return Verdict(title, rows, findings, caveats)


def frontier(rows: Sequence[Row], cost: str) -> list[Row]:
    """The rows that no other beats at the same or a lower mean cost, by rising cost; a row of
    unknown cost is not among them.
    """
    priced = [(price, row.perplexity, row) for row in rows if (price := row.cost(cost)) is not None]
    found: list[Row] = []
    for _, perplexity, row in sorted(priced, key=lambda one: one[:2]):
        if not found or perplexity < found[-1].perplexity:
            found.append(row)
    return found


def is_ahead(one: Row, other: Row) -> bool:
    """Whether the first row's perplexity is lower beyond what seeds do; see :data:`RULE`."""
    a, b = one.perplexities(), other.perplexities()
    if max(a) >= min(b):
        return False
    if one.is_exact and other.is_exact:
        return True
    if one.is_exact or other.is_exact:
        sampled = b if one.is_exact else a
        gap = min(b) - max(a)
        return len(sampled) >= SEEDS and gap > max(sampled) - min(sampled)
    return min(len(a), len(b)) >= SEEDS


def _finding(cost: str, budget: float | None, rows: Sequence[Row]) -> Finding:
    best, *others = sorted(rows, key=lambda row: row.perplexity)
    ahead_of = [row for row in others if is_ahead(best, row)]
    return Finding(cost, budget, best, ahead_of, [row for row in others if row not in ahead_of])


def _budgets(cost: str, rows: Sequence[Row]) -> list[Finding]:
    found: list[Finding] = []
    for row in frontier(rows, cost):
        budget = row.cost(cost) or 0.0
        most = budget * (1 + TOLERANCE[cost])
        # A row is too dear only if each of its runs was.
        within = [r for r in rows if min(r.costs(cost), default=most + 1) <= most]
        finding = _finding(cost, budget, within)
        # Where a better row comes so near that it competes too, its own budget follows.
        if finding.best is row:
            found.append(finding)
    return found


def show_perplexity(row: Row) -> str:
    """Overall perplexity with its spread, and what that comes from."""
    return f"{spread(row.perplexities())}, {row.spread}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean, with the standard deviation (n - 1) where there are several."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def show_cost(cost: str, value: float) -> str:
    """A cost without its unit, as precise as it can be read."""
    if cost == "memory":
        return f"{value:.2f}"
    if value == 0:
        return "0"
    return f"{value:,.1f}" if cost == "seconds" and value < 10 else f"{value:,.0f}"


def _others(rows: Sequence[Row], many: str) -> str:
    if len(rows) == 1:
        return rows[0].label
    return "both others" if many == "all" and len(rows) == 2 else f"{many} {len(rows)} others"


def _too_few(rows: Sequence[Row]) -> str:
    few = [row.label for row in rows if not row.is_exact and len(row.samples) < SEEDS]
    count = f"all {len(few)}" if len(few) == len(rows) else f"{len(few)} of these {len(rows)}"
    named = "; ".join(few) if len(few) <= 3 else count
    return f" Fewer than {SEEDS} seeds: {named}." if few else ""
