"""What runs at which number of tokens."""

import pytest
import torch

from sparsify.serving.by_tokens import by_tokens, one_weight
from sparsify.serving.choose import Choice
from sparsify.serving.measure import LayerKind

KIND = LayerKind((8, 8), torch.bfloat16, False)
COUNTS = (1, 2, 4, 8)


def times(**shares: tuple[float, ...]) -> dict[str, dict[int, tuple[float, float]]]:
    """Seconds by backend; dense takes longer the more tokens there are."""
    return {
        name: {n: (float(n), n * share) for n, share in zip(COUNTS, of, strict=True)}
        for name, of in shares.items()
    }


def runs(choice: Choice) -> list[str]:
    return [choice.at(tokens) for tokens in range(1, 10)]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        # Tokens: 1 to 9, of which 1, 2, 4 and 8 were measured; a is sparse, d dense.
        ({"a": (2, 2, 0.5, 0.5)}, "dddaaaaaa"),
        ({"a": (0.5, 0.5, 2, 2)}, "aaddddddd"),
        ({"a": (0.5, 2, 2, 0.5)}, "addddddaa"),
        ({"a": (2, 0.99, 0.97, 2)}, "dddaddddd"),
        ({"a": (0.5, 0.5, 0.9, 0.9), "b": (2, 2, 0.7, 0.7)}, "aabbbbbbb"),
        ({"a": (0.5, 2, 2, 2), "b": (2, 2, 2, 0.7)}, "addddddbb"),
    ],
)
def test_each_number_of_tokens_runs_what_was_fastest(
    shares: dict[str, tuple[float, ...]], expected: str
) -> None:
    choice = by_tokens(KIND, times(**shares))
    assert "".join(name[0] for name in runs(choice)) == expected
    assert {name[0] for name in choice.used} == set(expected)
    assert choice.at(0) == choice.at(1)


def test_one_winner_needs_no_steps() -> None:
    dense = by_tokens(KIND, times(a=(2, 1, 1, 0.99)))
    assert (dense.backend, dense.steps, dense.used) == ("dense", (), ("dense",))
    assert dense.reason == "no faster: a at 1, 2, 4, 8 tokens"
    sparse = by_tokens(KIND, times(a=(0.9, 0.9, 0.9, 0.9), b=(0.8, 0.8, 0.8, 0.8)))
    assert (sparse.backend, sparse.used) == ("b", ("b",))


def test_the_words_name_every_step() -> None:
    choice = by_tokens(KIND, times(a=(0.5, 2, 2, 2), b=(2, 2, 2, 0.7)))
    assert choice.backend == "a from 1, dense from 2, b from 8 tokens"


@pytest.mark.parametrize(
    ("shares", "backend", "reason"),
    [
        ({"a": (2, 2, 1, 0.99)}, "dense", "no faster: a at 1, 2, 4, 8 tokens"),
        ({"a": (2, 2, 0.9, 0.5)}, "a", "one weight; faster at 4, 8 tokens"),
        ({"a": (2, 2, 0.9, 0.5), "b": (1, 1, 1, 1)}, "a", "one weight; faster at 4, 8 tokens"),
        ({"a": (2, 2, 0.9, 0.5), "b": (1, 1, 1, 0.9)}, "b", "one weight; faster at 8 tokens"),
        ({"a": (0.9, 0.9, 0.9, 0.9)}, "a", "faster at every measured count"),
    ],
)
def test_one_weight_is_sparse_if_that_is_faster_anywhere(
    shares: dict[str, tuple[float, ...]], backend: str, reason: str
) -> None:
    choice = one_weight(KIND, times(**shares))
    assert (choice.backend, choice.reason, choice.steps) == (backend, reason, ())
