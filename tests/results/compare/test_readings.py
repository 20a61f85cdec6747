"""The sentences above figures and the short answer, against results that never ran."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp
from typing import Any

import pytest

from sparsify.results.compare import Comparison
from sparsify.results.compare.answer import answers
from sparsify.results.compare.curves import Curve
from sparsify.results.compare.planned import Planned, PlannedCost
from sparsify.results.compare.readings import (
    leading,
    read_blocks,
    read_costs,
    read_differences,
    read_flips,
    read_learning,
    read_norms,
)
from sparsify.results.compare.rows import Row
from sparsify.results.compare.verdict import verdicts
from tests.results.compare.made import DENSE, MAGNITUDE, MASKLLM, PROTOCOL, SRSTE, row

NEAR, FAR = [3.00, 3.01, 3.02], [3.2, 3.21, 3.22]


def named(label: str, losses: Sequence[float], strategy: str = MASKLLM, **more: Any) -> Row:
    return replace(row(losses, strategy, **more), label=label)


def comparison(*rows: Row) -> Comparison:
    ranked = sorted(rows, key=lambda one: one.perplexity)
    return Comparison(PROTOCOL, ranked, verdicts(ranked), [])


def mean(losses: Sequence[float]) -> float:
    return sum(map(exp, losses)) / len(losses)


def test_a_winner_is_named_with_its_lead() -> None:
    found = comparison(named("x", NEAR), named("y", FAR), named("z", [4.0], MAGNITUDE))
    lead = mean(FAR) - mean(NEAR)
    assert read_costs(found, "tokens") == (
        "With at most 1,000 tokens, x is lowest of the 2:4 rows whose weights stay: "
        f"{mean(NEAR):.2f}, {lead:.2f} below y."
    )


def test_what_costs_more_than_the_best_does_not_compete() -> None:
    dear = {"tokens": 9000, "seconds": 500.0}
    found = comparison(named("x", NEAR), named("y", FAR, **dear), named("z", [4.0], MAGNITUDE))
    assert read_costs(found, "tokens").endswith(" below z.")
    assert read_costs(found, "seconds").endswith(" below z.")
    assert read_costs(found, "memory").endswith(" below y.")


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ([3.01, 3.2, 3.3], "their seeds do not lie apart"),
        ([3.2, 3.3], "some have fewer than 3 seeds"),
    ],
)
def test_a_tie_is_said_as_a_tie(losses: list[float], why: str) -> None:
    found = comparison(named("x", NEAR), named("y", losses))
    said = read_costs(found, "tokens")
    assert "lowest of the" in said
    assert f"x ({mean(NEAR):.2f}) and y ({mean(losses):.2f}) cannot be told apart" in said
    assert said.endswith(f"{why}.")
    assert " below " not in said


def test_one_row_alone_has_no_sentence() -> None:
    assert read_costs(comparison(named("x", NEAR)), "tokens") == ""
    assert read_costs(comparison(named("x", NEAR), named("d", [2.0], DENSE)), "tokens") == ""


def test_no_sentence_over_what_does_not_compare() -> None:
    found = comparison(named("x", NEAR), named("y", FAR, device="NVIDIA H100"))
    assert read_costs(found, "seconds") == ""
    assert read_costs(found, "tokens") != ""


def test_kinds_do_not_compete_and_the_larger_group_leads() -> None:
    trained = named("t", [2.5, 2.51, 2.52], SRSTE, weights="trained")
    other = named("u", FAR, SRSTE, weights="trained")
    single = named("p", [2.9, 2.91, 2.92], pattern="4:8")
    found = comparison(trained, other, single, named("x", NEAR), named("y", FAR))
    assert [[r.label for r in one.rows] for one in leading(found)] == [["x", "y"], ["t", "u"]]
    assert " x is lowest of the 2:4 rows whose weights stay" in read_costs(found, "tokens")
    changed = comparison(trained, other, named("x", NEAR))
    assert " t is lowest of the 2:4 rows whose weights change too" in read_costs(changed, "tokens")


def with_validation(label: str, ends: Sequence[float], tokens: int) -> Row:
    """Of each seed, perplexity falls from 100 to this end on a straight line."""
    one = named(label, [3 + k / 100 for k in range(len(ends))], tokens=tokens)
    for run, end in zip(one.runs, ends, strict=True):
        looks = [
            {"step": k, "tokens": k * tokens // 2, "seconds": k, "perplexity": value}
            for k, value in ((0, 100.0), (1, (100 + end) / 2), (2, end))
        ]
        run.result["history"] = {"validation": looks, "masks": []}
    return one


def learning(*rows: Row) -> str:
    return read_learning(comparison(*rows), "tokens")


def test_learning_is_read_where_the_first_curve_ends() -> None:
    """At 1,000 tokens the longer run is halfway, at 60."""
    said = learning(with_validation("x", [30, 31, 32], 1000), with_validation("y", [20] * 3, 2000))
    assert said == (
        "At 1,000 tokens, where the first of the learned 2:4 rows whose weights stay ends, x is "
        "lowest on validation text: 31.00, 29.00 below y."
    )
    said = learning(with_validation("x", [30, 31, 32], 1000), with_validation("y", [20] * 3, 1000))
    assert " y is lowest on validation text: 20.00, 11.00 below x." in said


@pytest.mark.parametrize(
    ("ends", "why"),
    [([31.5, 40, 40], "their seeds do not lie apart"), ([40, 40], "some have fewer than 3 seeds")],
)
def test_curves_that_meet_are_a_tie(ends: list[float], why: str) -> None:
    said = learning(with_validation("x", [30, 31, 32], 1000), with_validation("y", ends, 1000))
    assert "x (31.00) and y (" in said
    assert said.endswith(f"cannot be told apart as the lowest on validation text: {why}.")


def test_one_curve_has_no_sentence() -> None:
    assert learning(with_validation("x", [30, 31, 32], 1000), named("y", FAR)) == ""


def line(number: int, values: list[float]) -> Curve:
    steps = list(range(len(values)))
    return Curve(number, steps, list(map(float, steps)), values, values, values, 1)


def test_masks_that_change_most_and_least() -> None:
    rows = [named("x", NEAR), named("y", FAR)]
    assert read_flips(rows, [line(0, [0.9, 0.001]), line(1, [0.1, 0.0])]) == (
        "At their last look the masks of x change most, 0.1% of the groups a step, and those of y "
        "least, 0%."
    )
    assert "all 2 rows change alike" in read_flips(rows, [line(0, [0.1]), line(1, [0.1])])
    assert read_flips(rows, [line(0, [0.1])]) == ""


def test_the_norm_of_the_best_row() -> None:
    rows = [named(label, [loss]) for label, loss in (("x", 3.0), ("y", 3.1), ("z", 3.2))]
    assert read_norms(rows, {0: 0.95, 1: 0.97, 2: 0.9}) == (
        "x, the lowest in perplexity of these 3, keeps 0.950 of the largest norm; 1 of the others "
        "keeps more."
    )
    assert "none of the others keep more" in read_norms(rows, {1: 0.97, 2: 0.9})
    assert read_norms(rows, {0: 0.95}) == ""


def test_masks_that_are_nearest_and_farthest() -> None:
    rows = [named(label, [3.0]) for label in "xyz"]
    shares = {(0, 1): 0.1, (0, 2): 0.3, (1, 2): 0.2}
    assert read_differences(rows, shares) == (
        "The masks of x and y are nearest, 10.0% of the weights apart, and those of x and z "
        "farthest, 30.0%."
    )
    assert "Every two masks differ in 10.0%" in read_differences(rows, dict.fromkeys(shares, 0.1))
    assert (
        read_differences(rows, {(0, 1): 0.1})
        == "The masks of x and y differ in 10.0% of the weights."
    )


def test_the_block_that_costs_most() -> None:
    said = read_blocks([line(0, [0.1, 0.3, 0.2]), line(1, [0.3, 0.1, 0.6])], "costs")
    assert said == (
        "In the mean of 2 rows block 2 costs most, 0.400 nats a token, and block 0 least, 0.200."
    )
    assert read_blocks([line(0, [0.1, 0.1])], "costs") == ""


def test_the_short_answer() -> None:
    trained = named("t", [2.5, 2.51], SRSTE, weights="trained")
    cost = PlannedCost(24.0, {"A100 80GB SXM": 1150.4}, 8)
    planned = Planned("big (6.7 billion parameters)", "few steps", {"x": cost}, {"t": "odd"})
    rows = named("x", NEAR), named("y", FAR), named("z", [4.0], MAGNITUDE), trained
    stay, change = answers(comparison(*rows, named("d", [2.0], DENSE)), planned)
    assert stay.title == "Of the 3 2:4 rows whose weights stay"
    assert stay.first.startswith(f"x has the lowest perplexity: {mean(NEAR):.2f} ± ")
    assert stay.first.endswith("3 seeds. The dense model has 7.39.")
    assert (stay.certainty, stay.is_sure) == ("clear winner", True)
    told = dict(stay.lines)
    assert told["How sure"].endswith("is ahead of both others in every seed.")
    assert told["At equal time"] == (
        f"With at most 60 seconds: x ({mean(NEAR):.2f}, clear winner). "
        "With at most 0 seconds: z (54.60, no rival)."
    )
    assert told["At equal tokens"].startswith("With at most 1,000 tokens: x (")
    assert told["On big (6.7 billion parameters)"] == (
        "x would take 24.0 GiB on each of 8 GPUs, 1,150 GPU-hours (A100 80GB SXM). Computed, not "
        "measured."
    )
    assert (change.certainty, change.is_sure) == ("no rival", False)
    assert not any(heading.startswith("On ") for heading, _ in change.lines)


def test_where_time_does_not_compare_the_answer_says_why() -> None:
    found = comparison(named("x", NEAR), named("y", FAR, device="NVIDIA H100"))
    (one,) = answers(found)
    assert dict(one.lines)["At equal time"].startswith("No winner by time: ")
