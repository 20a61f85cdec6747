"""Token counts, and a clock that is right about what takes longer."""

import time

import pytest
import torch

from sparsify.serving.measure import LayerKind, in_turns, measure, token_counts
from tests.serving.fake import FakeBackend, FakeClock

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("ends", "counts"),
    [
        ((1, 1), [1]),
        ((1, 8), [1, 2, 4, 8]),
        ((3, 17), [3, 4, 8, 16, 17]),
        ((5, 7), [5, 7]),
        ((2048, 2048), [2048]),
    ],
)
def test_token_counts(ends: tuple[int, int], counts: list[int]) -> None:
    assert token_counts(*ends) == counts


def test_the_clock_tells_a_long_call_from_a_short_one() -> None:
    slow, fast = in_turns([lambda: time.sleep(2e-3), lambda: time.sleep(2e-4)], CPU)
    assert 2e-3 <= slow < 4e-2
    assert 2e-4 <= fast < slow


@pytest.mark.parametrize("bias", [False, True])
def test_dense_and_sparse_are_measured_on_the_same_product(bias: bool) -> None:
    clock = FakeClock(lambda tokens, rows: tokens / rows)
    backend = FakeBackend()
    kind = LayerKind((16, 8), torch.float32, bias)
    assert measure(kind, backend, [1, 4], CPU, clock) == {1: (1.0, 1 / 16), 4: (1.0, 4 / 16)}
    assert clock.asked == [(1, 16), (4, 16)]
    assert backend.packed == [(16, 8)]


def test_a_kind_is_readable() -> None:
    assert str(LayerKind((16, 8), torch.bfloat16, True)) == "16 x 8 bfloat16, bias"
    assert str(LayerKind((16, 8), torch.float16, False)) == "16 x 8 float16"
