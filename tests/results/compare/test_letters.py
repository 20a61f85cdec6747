import itertools
import random
import re

import pytest

pytest.importorskip("matplotlib")

from sparsify.results.compare.drawing import chart
from sparsify.results.compare.letters import LINE, columns, put_letters, spread_apart


def test_values_far_apart_stay() -> None:
    assert spread_apart([5.0, 1.0, 9.0], 2.0, 0.0, 10.0) == [5.0, 1.0, 9.0]


def test_values_that_are_near_make_way_evenly() -> None:
    assert spread_apart([5.0, 5.0], 2.0, 0.0, 10.0) == [4.0, 6.0]
    assert spread_apart([5.1, 5.0, 9.0], 2.0, 0.0, 10.0) == pytest.approx([6.05, 4.05, 9.0])


def test_values_stay_within_their_limits() -> None:
    assert spread_apart([0.0, 0.1, 0.2], 2.0, 1.0, 10.0) == [1.0, 3.0, 5.0]
    assert spread_apart([10.0, 9.9], 2.0, 1.0, 10.0) == [10.0, 8.0]


def test_spread_values_are_the_nearest_that_are_apart() -> None:
    """Among all whole numbers, by brute force."""
    rng = random.Random(0)  # noqa: S311
    for _ in range(20):
        values = [float(rng.randrange(9)) for _ in range(3)]
        found = spread_apart(values, 3.0, -20.0, 20.0)
        ordered = sorted(found)
        assert all(b - a >= 3 - 1e-9 for a, b in itertools.pairwise(ordered))

        def moved(places: tuple[float, ...], values: list[float] = values) -> float:
            return sum((a - b) ** 2 for a, b in zip(places, values, strict=True))

        best = min(
            moved(places)
            for places in itertools.product(range(-6, 16), repeat=3)
            if min(abs(a - b) for a, b in itertools.combinations(places, 2)) >= 3
        )
        assert moved(tuple(found)) <= best + 1e-9


def test_points_near_along_x_share_a_column() -> None:
    assert columns({0: 100.0, 1: 5.0, 2: 20.0, 3: 35.0}) == [[1, 2, 3], [0]]


def test_letters_of_points_in_one_place_are_lines_apart() -> None:
    with chart("Ends", "") as (axes, svg):
        points = {0: (1.0, 5.0), 1: (1.0, 5.01), 2: (1.0, 5.02), 3: (0.0, 0.0), 4: (1.0, 10.0)}
        for point in points.values():
            axes.plot(*point, "o")
        put_letters(axes, points)
        drawing = svg()
    found = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*>([A-E])</text>', drawing)
    x = {letter: float(one) for one, _, letter in found}
    y = {letter: float(one) for _, one, letter in found}
    assert sorted(y) == list("ABCDE")
    heights = sorted((y[letter] for letter in "ABC"), reverse=True)
    assert heights == [y["A"], y["B"], y["C"]]  # as the points do; SVG counts from above
    assert min(a - b for a, b in itertools.pairwise(heights)) >= LINE - 0.1
    assert len({x[letter] for letter in "ABC"}) <= 3
    assert max(x.values()) < 4.8 * 72
