import pytest

from sparsify.common.values import COUNT, NUMBER, SECONDS, SHARE, first_few, is_of, short


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        (0, {COUNT, SECONDS, NUMBER, SHARE}),
        (0.5, {SECONDS, NUMBER, SHARE}),
        (3, {COUNT, SECONDS, NUMBER}),
        (-3, {NUMBER}),
        (True, set()),
        ("3", set()),
        (float("nan"), set()),
        (float("inf"), set()),
        (2**54, {NUMBER}),
        (10**400, set()),
        (None, set()),
    ],
)
def test_numbers_are_of_their_kinds(value: object, kinds: set[str]) -> None:
    assert {kind for kind in (COUNT, SECONDS, NUMBER, SHARE) if is_of(kind, value)} == kinds


def test_values_are_shown_in_a_line_that_ends() -> None:
    assert short("a\n") == r"'a\n'"
    assert short("a" * 500) == "'" + "a" * 79 + "..."
    assert short(-(10**400)) == "an integer of 1329 bits"
    assert short([10**5000]) == "list with a number of thousands of digits"


def test_long_lists_are_cut() -> None:
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(["a", "b", "c"], 1) == "a and 2 more"
