import math
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from sparsify.results.compare.rows import Row
from sparsify.results.compare.verdict import RULE, Finding, frontier, is_ahead, spread, verdicts
from tests.results.compare.made import DENSE, MAGNITUDE, SRSTE, row


def named(losses: list[float], label: str, **more: Any) -> Row:
    one = row(losses, **more)
    return Row(label, one.settings, one.runs, one.samples)


def findings(rows: list[Row], cost: str = "any") -> list[Finding]:
    (one,) = verdicts(sorted(rows, key=lambda row: row.perplexity))
    return [finding for finding in one.findings if finding.cost == cost]


GOOD, OTHER = [3.0, 3.1, 3.2], [3.3, 3.4, 3.5]


@pytest.mark.parametrize(
    ("one", "other", "ahead"),
    [
        (GOOD, OTHER, True),
        (OTHER, GOOD, False),
        (GOOD, [3.15, 3.4, 3.5], False),  # one seed overlaps
        (GOOD, [3.2, 3.4, 3.5], False),  # a tie is no win
        (GOOD[:2], OTHER, False),  # two seeds
        (GOOD, OTHER[:2], False),
        ([3.0], [9.0], False),
        ([3.0], OTHER, False),
        (GOOD, [9.0], False),
    ],
)
def test_the_rule(one: list[float], other: list[float], ahead: bool) -> None:
    assert is_ahead(row(one), row(other)) is ahead


@pytest.mark.parametrize(
    ("exact", "seeds", "relation"),
    [
        (4.0, GOOD, "behind"),
        (3.3, GOOD, "level"),  # outside, but nearer than the seeds are to each other
        (3.1, GOOD, "level"),
        (2.9, GOOD, "level"),
        (2.5, GOOD, "ahead"),
        (4.0, GOOD[:2], "level"),
    ],
)
def test_the_rule_against_what_is_exact(exact: float, seeds: list[float], relation: str) -> None:
    known, sampled = row([exact], MAGNITUDE), row(seeds)
    assert is_ahead(known, sampled) is (relation == "ahead")
    assert is_ahead(sampled, known) is (relation == "behind")


def test_two_exact_rows_are_told_apart_by_any_difference() -> None:
    low, high = row([3.0], MAGNITUDE), row([3.0001], MAGNITUDE)
    assert is_ahead(low, high)
    assert not is_ahead(high, low)
    assert not is_ahead(low, low)


@dataclass
class Drawn:
    """What the rule reads of a row."""

    values: list[float]
    is_exact: bool

    def perplexities(self) -> list[float]:
        return self.values


@pytest.mark.parametrize("spread", ["uniform", "normal"])
def test_the_chances_that_the_rule_names(spread: str) -> None:
    """Of rows that are equal: one or the other comes out ahead, whichever it is."""
    rng = random.Random(0)  # noqa: S311
    draw = partial(rng.uniform, -1, 1) if spread == "uniform" else partial(rng.gauss, 0, 1)
    tries = 20_000

    def share(exact: bool) -> float:
        told = 0
        for _ in range(tries):
            first = Drawn([0.0] if exact else [draw() for _ in range(3)], exact)
            rows: Any = first, Drawn([draw() for _ in range(3)], False)
            told += is_ahead(*rows) or is_ahead(*reversed(rows))
        return told / tries

    noise = 4 * math.sqrt(0.1 * 0.9 / tries)
    assert share(exact=False) == pytest.approx(1 / 10, abs=noise)
    assert share(exact=True) < 1 / 16 + noise
    if spread == "uniform":  # the worst case
        assert share(exact=True) == pytest.approx(1 / 16, abs=noise)
    assert "once in 10" in RULE
    assert "once in 16" in RULE


def test_the_frontier_is_that_of_brute_force() -> None:
    rng = random.Random(1)  # noqa: S311
    for _ in range(30):
        rows = [
            named(
                [rng.choice((3.0, 3.2, 3.4, 3.6, 3.8)) + k / 1000], str(k), tokens=rng.randrange(5)
            )
            for k in range(8)
        ]
        expected = {
            one.label
            for one in rows
            if not any(
                other is not one
                and (other.cost("tokens") or 0) <= (one.cost("tokens") or 0)
                and other.perplexity <= one.perplexity
                for other in rows
            )
        }
        found = frontier(rows, "tokens")
        assert {one.label for one in found} == expected
        assert [one.cost("tokens") for one in found] == sorted(
            one.cost("tokens") or 0 for one in found
        )


def test_a_winner_is_named_where_seeds_allow() -> None:
    (finding,) = findings([named(GOOD, "good"), named(OTHER, "other")])
    assert finding.winner is not None
    assert finding.winner.label == "good"
    assert finding.condition == "Whatever it costs"
    assert finding.statement == "good (22.27 ± 2.22, 3 seeds) is ahead of other in every seed."


def test_no_winner_is_named_where_seeds_overlap() -> None:
    rows = [named(GOOD, "good"), named([3.1, 3.2, 3.3], "near"), named([5.0, 5.1, 5.2], "far")]
    (finding,) = findings(rows)
    assert finding.winner is None
    assert [one.label for one in finding.level_with] == ["near"]
    assert finding.statement == (
        "good (22.27 ± 2.22, 3 seeds) has the lowest mean perplexity, but cannot be told apart "
        "from near (24.61 ± 2.46, 3 seeds). It is ahead of far in every seed."
    )


def test_one_run_wins_nothing_and_is_said_to_be_one() -> None:
    (finding,) = findings([named([1.0], "lucky"), named(OTHER, "other")])
    assert finding.winner is None
    assert finding.statement.startswith(
        "lucky (2.72, one run) has the lowest mean perplexity, but cannot be"
    )
    assert finding.statement.endswith("(30.06 ± 3.00, 3 seeds). Fewer than 3 seeds: lucky.")
    few = [named([k], str(k)) for k in (1.0, 2.0, 3.0, 4.0)]
    (finding,) = findings(few)
    assert finding.statement.endswith("and 2 more. Fewer than 3 seeds: all 4.")
    (finding,) = findings([*few, named(OTHER, "other")])
    assert finding.statement.endswith("and 3 more. Fewer than 3 seeds: 4 of these 5.")


def test_budgets_admit_what_costs_no_more() -> None:
    rows = [
        named(GOOD, "dear", tokens=500),
        named(OTHER, "cheap", tokens=100),
        named([4.0, 4.1, 4.2], "poor", tokens=300),
    ]
    found = findings(rows, "tokens")
    assert [(f.budget, f.best.label, [o.label for o in f.ahead_of]) for f in found] == [
        (100, "cheap", []),
        (500, "dear", ["cheap", "poor"]),
    ]
    assert found[0].condition == "With at most 100 tokens"
    assert found[0].statement.endswith("is the only one.")
    assert found[1].statement.endswith("is ahead of both others in every seed.")


def test_a_row_is_too_dear_only_if_each_of_its_runs_was() -> None:
    wide = named(GOOD, "better", seconds=[50.0, 100.0, 120.0])
    rows = [wide, named(OTHER, "worse", seconds=60.0)]
    assert [finding.best.label for finding in findings(rows, "seconds")] == ["better"]
    rows = [named(GOOD, "better", seconds=62.0), named(OTHER, "worse", seconds=60.0)]
    assert [f.best.label for f in findings(rows, "seconds")] == ["better"]  # within 5 %
    rows = [named(GOOD, "better", tokens=1001), named(OTHER, "worse", tokens=1000)]
    assert [f.best.label for f in findings(rows, "tokens")] == ["worse", "better"]


def test_kept_and_changed_weights_patterns_and_sparsities_are_ranked_apart() -> None:
    rows = [
        named([3.0], "kept"),
        named([2.0], "changed", strategy=SRSTE, weights="trained"),
        named([2.5], "other pattern", pattern="4:8"),
        named([2.6], "less sparse", sparsity=0.4),
        named([2.7], "mixed", overrides={"*": "4:8"}),
        named([1.0], "dense", strategy=DENSE),
    ]
    found = {one.title: [row.label for row in one.rows] for one in verdicts(rows)}
    assert found == {
        "Base weights kept, 2:4, 50.0% of the blocks' weights zero": ["kept"],
        "Base weights kept, 2:4 with overrides, 50.0% of the blocks' weights zero": ["mixed"],
        "Base weights kept, 2:4, 40.0% of the blocks' weights zero": ["less sparse"],
        "Base weights kept, 4:8, 50.0% of the blocks' weights zero": ["other pattern"],
        "Weights changed too, 2:4, 50.0% of the blocks' weights zero": ["changed"],
    }


def test_no_winner_by_time_or_memory_across_devices() -> None:
    rows = [named(GOOD, "good"), named(OTHER, "other", device="NVIDIA H100")]
    assert findings(rows, "tokens")
    assert not findings(rows, "seconds")
    assert not findings(rows, "memory")
    caveats = verdicts(rows)[0].caveats
    assert (
        "No winner by time: the runs used different devices (NVIDIA H100, cpu)"
        in (caveats["seconds"])
    )
    assert "No winner by memory" in caveats["memory"]


def test_no_winner_by_time_across_versions_of_torch() -> None:
    rows = [named(GOOD, "good"), named(OTHER, "other")]
    for run in rows[1].runs:
        run.result["versions"]["torch"] = "2.6.0"
    assert not findings(rows, "seconds")
    assert findings(rows, "memory")
    assert "different versions of torch (2.13.0, 2.6.0)" in verdicts(rows)[0].caveats["memory"]


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("cpu", ("A", "B"), "different CPUs (A, B)"),
        ("processes", (10, 2), "different numbers of processes (2, 10)"),
        ("threads", (1, 2), "different numbers of threads (1, 2)"),
    ],
)
def test_no_winner_by_time_where_machines_differ(
    key: str, values: tuple[Any, Any], said: str
) -> None:
    rows = [named(GOOD, "good", **{key: values[0]}), named(OTHER, "other", **{key: values[1]})]
    assert not findings(rows, "seconds")
    assert findings(rows, "memory")
    caveats = verdicts(rows)[0].caveats
    assert caveats["seconds"] == f"No winner by time: the runs used {said}."
    assert caveats.get("memory") == (
        "Peak memory is that of one process, and the runs used different numbers of them (2, 10)."
        if key == "processes"
        else None
    )


def test_what_older_results_do_not_tell_is_no_difference() -> None:
    rows = [named(GOOD, "old"), named(OTHER, "new", processes=1, threads=8, cpu="A")]
    assert findings(rows, "seconds")
    assert verdicts(rows)[0].caveats == {}


def test_all_that_differs_is_named() -> None:
    rows = [
        named(GOOD, "good", cpu="A", threads=1),
        named(OTHER, "other", cpu="B", threads=2),
    ]
    assert verdicts(rows)[0].caveats["seconds"] == (
        "No winner by time: the runs used different CPUs (A, B), "
        "different numbers of threads (1, 2)."
    )


def test_rough_and_missing_times_are_said() -> None:
    rows = [named(GOOD, "rough", seconds=[60.0, 61.0, 90.0]), named(OTHER, "even")]
    assert verdicts(rows)[0].caveats["seconds"] == (
        "Seconds differ by more than 20% between seeds of rough: the machine may have done other "
        "work, and times are rough."
    )
    for most, uneven in ((1.4, False), (1.55, True)):
        rows = [named(GOOD, "short", seconds=[0.5, 0.6, most])]
        assert bool(verdicts(rows)[0].caveats) is uneven
    rows = [named(GOOD, "bare", peak_memory_gib=None), named(OTHER, "other")]
    assert verdicts(rows)[0].caveats["memory"] == "Not known, and so not compared by memory: bare."
    assert [finding.best.label for finding in findings(rows, "memory")] == ["other"]


def test_the_best_is_that_of_lowest_mean_perplexity() -> None:
    rows = [named([2.0, 4.0], "scattered"), named([3.05, 3.05], "even", tokens=2000)]
    assert findings(rows)[0].best.label == "even"
    assert [f.best.label for f in findings(rows, "tokens")] == ["scattered", "even"]


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 4.0]) == "2.33 ± 1.53"
    assert spread([1234.5]) == "1,234.50"
