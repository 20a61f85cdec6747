"""Masks as bits: against Python's own, for any number of columns."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify.masking import mask_bits
from sparsify.masking.mask_bits import pack, unpack


@pytest.mark.parametrize("columns", [4, 8, 12, 16, 20, 96])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_eight_weights_are_one_byte_and_come_back(rows: int, columns: int) -> None:
    mask_OI = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    bytes_OJ = pack(mask_OI)
    assert bytes_OJ.dtype == torch.uint8
    assert bytes_OJ.shape == (rows, -(-columns // 8))
    for row, found in zip(mask_OI.tolist(), bytes_OJ.tolist(), strict=True):
        number = sum(kept << place for place, kept in enumerate(row))
        assert bytes(found) == number.to_bytes(len(found), "little")
    assert torch.equal(unpack(bytes_OJ, columns), mask_OI)
    assert unpack(bytes_OJ, columns).dtype == torch.bool


def test_every_byte_comes_back() -> None:
    bytes_OJ = torch.arange(256, dtype=torch.uint8).view(8, 32)
    assert torch.equal(pack(unpack(bytes_OJ, 256)), bytes_OJ)


def test_bytes_that_were_first_unpacked_without_values_have_values_later() -> None:
    mask_bits._bytes.cache_clear()
    with FakeTensorMode():
        assert unpack(torch.zeros(1, 1, dtype=torch.uint8), 8).shape == (1, 8)
    assert unpack(torch.tensor([[0b101]], dtype=torch.uint8), 4).tolist() == [[1, 0, 1, 0]]
