"""Says in one sentence what a figure shows, as far as the data support one."""

import statistics
from collections.abc import Mapping, Sequence

import numpy

from sparsify.results.compare.comparison import Comparison
from sparsify.results.compare.curves import Curve, paths
from sparsify.results.compare.rows import Row
from sparsify.results.compare.verdict import SEEDS, Verdict
from sparsify.results.result import pattern_text


def leading(comparison: Comparison) -> list[Verdict]:
    """Of each kind, base weights kept and changed, the verdict of the most rows."""
    kinds: dict[bool, Verdict] = {}
    for verdict in comparison.verdicts:
        former = kinds.get(verdict.keeps_base)
        if former is None or len(verdict.rows) > len(former.rows):
            kinds[verdict.keeps_base] = verdict
    return list(kinds.values())


def read_costs(comparison: Comparison, cost: str) -> str:
    """Which row is lowest where all may cost as much as it, and by how much."""
    for verdict in leading(comparison):
        for finding in verdict.of(cost)[-1:]:
            rivals = finding.level_with or finding.ahead_of
            if rivals:
                best, next_ = (
                    (row.label, row.perplexity) for row in (finding.best, min(rivals, key=_lower))
                )
                level = len(finding.level_with)
                few = any(
                    not row.is_exact and len(row.samples) < SEEDS
                    for row in (finding.best, *finding.level_with)
                )
                where = f"{finding.condition},"
                return _lowest(where, f"of the {kind(verdict)}", best, next_, level, few)
    return ""


def read_learning(comparison: Comparison, over: str) -> str:
    """Which row was lowest on validation text when the first run of those that learned ended; each
    run is read there on the straight line between two looks.
    """
    for verdict in leading(comparison):
        learned = {row.label: paths(row, "validation", "perplexity", over) for row in verdict.rows}
        end = min((x[-1] for runs in learned.values() for x, _ in runs), default=0.0)
        values = {
            label: [float(numpy.interp(end, x, y)) for x, y in runs]
            for label, runs in learned.items()
            if runs and all(x[0] <= end for x, _ in runs)
        }
        if len(values) < 2:
            continue
        mean = {label: statistics.fmean(own) for label, own in values.items()}
        best, *rest = sorted(values, key=lambda label: mean[label])
        few = {label for label, own in values.items() if len(own) < SEEDS}
        level = [n for n in rest if {best, n} & few or max(values[best]) >= min(values[n])]
        next_ = (level or rest)[0]
        return _lowest(
            f"At {end:,.0f} {over}, where the first of the learned {kind(verdict)} ends,",
            "on validation text",
            (best, mean[best]),
            (next_, mean[next_]),
            len(level),
            bool({best, *level} & few),
        )
    return ""


def _lower(row: Row) -> float:
    return row.perplexity


def kind(verdict: Verdict) -> str:
    """The rows of a verdict, in words."""
    weights = "stay" if verdict.keeps_base else "change too"
    return f"{pattern_text(verdict.rows[0].record)} rows whose weights {weights}"


def _lowest(
    where: str, among: str, best: tuple[str, float], next_: tuple[str, float], level: int, few: bool
) -> str:
    """The sentence of a best row, of the next or of one that it cannot be told apart from."""
    (label, value), (other, worse) = best, next_
    if not level:
        return (
            f"{where} {label} is lowest {among}: {value:,.2f}, {worse - value:,.2f} below {other}."
        )
    also = f" and {level - 1} more" if level > 1 else ""
    why = f"some have fewer than {SEEDS} seeds" if few else "their seeds do not lie apart"
    return (
        f"{where} {label} ({value:,.2f}) and {other} ({worse:,.2f}){also} cannot be told apart as "
        f"the lowest {among}: {why}."
    )


def read_flips(rows: Sequence[Row], curves: Sequence[Curve]) -> str:
    """Whose masks change the most, and the least, at the end."""
    if len(curves) < 2:
        return ""
    ends = sorted((one.mean[-1], rows[one.number].label) for one in curves)
    (low, least), (high, most) = ends[0], ends[-1]
    if low == high:
        return f"At their last look the masks of all {len(ends)} rows change alike."
    return (
        f"At their last look the masks of {most} change most, {100 * high:.2g}% of the groups a "
        f"step, and those of {least} least, {100 * low:.2g}%."
    )


def read_norms(rows: Sequence[Row], norms: Mapping[int, float]) -> str:
    """Where the row of lowest perplexity lies among the norms of what rows keep."""
    if len(norms) < 2:
        return ""
    best = min(norms, key=lambda number: rows[number].perplexity)
    more = sum(norm > norms[best] for norm in norms.values())
    return (
        f"{rows[best].label}, the lowest in perplexity of these {len(norms)}, keeps "
        f"{norms[best]:.3f} of the largest norm; {more or 'none'} of the others "
        f"{'keeps' if more == 1 else 'keep'} more."
    )


def read_differences(rows: Sequence[Row], shares: Mapping[tuple[int, int], float]) -> str:
    """The two rows whose masks are nearest, and the two that are farthest apart.

    Args:
        rows: all rows.
        shares: of the weights whose state differs, by the numbers of two rows.
    """

    def say(pair: tuple[int, int]) -> str:
        return f"{rows[pair[0]].label} and {rows[pair[1]].label}"

    near, far = min(shares, key=lambda p: shares[p]), max(shares, key=lambda p: shares[p])
    if len(shares) == 1:
        return f"The masks of {say(near)} differ in {shares[near]:.1%} of the weights."
    if shares[near] == shares[far]:
        return f"Every two masks differ in {shares[near]:.1%} of the weights."
    return (
        f"The masks of {say(near)} are nearest, {shares[near]:.1%} of the weights apart, and those "
        f"of {say(far)} farthest, {shares[far]:.1%}."
    )


def read_blocks(curves: Sequence[Curve], what: str) -> str:
    """Which block matters most, in the mean over the rows.

    Args:
        curves: of all rows, over block numbers.
        what: what the blocks do, such as "costs".
    """
    blocks = sorted(set.intersection(*(set(one.steps) for one in curves)))
    mean = {
        block: sum(one.mean[one.steps.index(block)] for one in curves) / len(curves)
        for block in blocks
    }
    if len(set(mean.values())) < 2:
        return ""
    most, least = max(mean, key=lambda b: mean[b]), min(mean, key=lambda b: mean[b])
    rows = "one row" if len(curves) == 1 else f"the mean of {len(curves)} rows"
    return (
        f"In {rows} block {most} {what} most, {mean[most]:.3f} nats a token, and block {least} "
        f"least, {mean[least]:.3f}."
    )
