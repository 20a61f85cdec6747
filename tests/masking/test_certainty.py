"""Numbers about distributions over masks, against pairs of samples and group by group."""

import math

import pytest
import torch

from sparsify import NMPattern
from sparsify.masking.certainty import describe_distribution


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 5)])
def test_numbers_are_those_of_a_recount(n: int, m: int) -> None:
    table = NMPattern(n, m).table()
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, len(table), 3, generator=generator, dtype=torch.float64)
    p /= p.sum(1, keepdim=True)
    found = {name: float(value) for name, value in describe_distribution(p, table).items()}
    entropy = largest = change = 0.0
    for row in p.movedim(1, -1).reshape(-1, len(table)).tolist():
        entropy += -sum(x * math.log(x) for x in row) / 6
        largest += max(row) / 6
        # Every pair of masks, weighted by the probability to sample the two.
        for x, a in zip(row, table.tolist(), strict=True):
            for y, b in zip(row, table.tolist(), strict=True):
                differ = sum(i != j for i, j in zip(a, b, strict=True))
                change += x * y * differ / m / 6
    expected = {"entropy": entropy, "max_probability": largest, "sample_change": change}
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_certain_mask_has_no_entropy_and_does_not_change() -> None:
    p = torch.zeros(1, 6, 2)
    p[0, 3] = 1.0
    found = describe_distribution(p, NMPattern(2, 4).table())
    assert [float(v) for v in found.values()] == [0.0, 1.0, 0.0]
