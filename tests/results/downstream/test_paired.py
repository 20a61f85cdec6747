"""Standard errors of differences and of means."""

import math
import random

import pytest

from sparsify.results.downstream.paired import Difference, Estimate, Metric, difference, mean


def of(examples: list[float]) -> Metric:
    return Metric(sum(examples) / len(examples), 9.0, True, examples)


def test_a_worked_example_of_paired_answers() -> None:
    """Of 8, two are lost and one is won: two differences of -1, and one of 1."""
    dense = of([1, 1, 1, 1, 0, 0, 0, 0])
    sparse = of([1, 1, 0, 0, 1, 0, 0, 0])
    # sum of squares 3, mean -1/8: variance (3 - 8/64) / 7.
    expected = math.sqrt((3 - 1 / 8) / 7 / 8)
    assert difference(dense, sparse) == Difference(-1 / 8, pytest.approx(expected), "paired")


def test_equal_answers_have_no_error_though_each_model_has_one() -> None:
    assert difference(of([1, 0, 1]), of([1, 0, 1])) == Difference(0, 0, "paired")


def test_the_paired_error_is_that_of_drawing_examples_anew() -> None:
    rng = random.Random(0)  # noqa: S311
    dense = [float(rng.random() < 0.6) for _ in range(200)]
    sparse = [value if rng.random() < 0.8 else 1 - value for value in dense]
    pairs = list(zip(dense, sparse, strict=True))
    draws = []
    for _ in range(2000):
        drawn = rng.choices(pairs, k=len(pairs))
        draws.append(sum(b - a for a, b in drawn) / len(drawn))
    centre = sum(draws) / len(draws)
    spread = math.sqrt(sum((draw - centre) ** 2 for draw in draws) / len(draws))
    found = difference(of(dense), of(sparse)).stderr
    assert found == pytest.approx(spread, rel=0.06)
    assert found is not None
    assert found < 0.75 * math.sqrt((0.24 + 0.24) / 200)  # independent ones would have more


def test_without_examples_the_models_count_as_independent() -> None:
    dense, sparse = Metric(3.0, 0.3), Metric(5.0, 0.4)
    assert difference(dense, sparse) == Difference(2.0, pytest.approx(0.5), "independent")
    assert difference(dense, Metric(5.0, None)).stderr is None
    assert difference(of([1, 0]), sparse).method == "independent"


def test_one_example_says_nothing_of_the_error() -> None:
    assert difference(of([1]), of([0])) == Difference(-1, None, "paired")


def test_examples_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        difference(of([1, 0]), of([1, 0, 1]))


def test_the_mean_has_each_task_once() -> None:
    found = mean([Estimate(0.2, 0.03), Estimate(0.6, 0.04)])
    assert (found.value, found.stderr) == (pytest.approx(0.4), pytest.approx(0.025))
    assert mean([Estimate(0.2, 0.03), Estimate(0.6, None)]).stderr is None
