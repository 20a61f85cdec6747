"""CUTLASS's layout, against PyTorch's converter and an index-by-index definition."""

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as from_dense,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_to_dense_cutlass as to_dense,
)

from sparsify import NMPattern, SparsifyError
from sparsify.masking.select import Selection, select
from sparsify.models.base import load_model
from sparsify.serving.backends import CUTLASS
from sparsify.serving.cutlass import cutlass_metadata, cutlass_values
from sparsify.serving.packed import pack

TWO_FOUR = NMPattern(2, 4)
CASES = [
    (dtype, shape)
    for dtype, shapes in {
        torch.float16: [(32, 64), (64, 64), (32, 192), (96, 320)],
        torch.bfloat16: [(32, 64), (64, 128), (160, 64)],
        torch.int8: [(16, 128), (32, 128), (48, 384)],
    }.items()
    for shape in shapes
]


def weight_and_mask(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """No weight is zero: PyTorch's converter takes the nonzeros for the mask."""
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    sign = 1 - 2 * torch.randint(0, 2, shape, generator=generator)
    weight = (torch.randint(1, 100, shape, generator=generator) * sign).to(dtype)
    return weight, TWO_FOUR.top(torch.rand(shape, generator=generator))


def check(weight: Tensor, mask: Tensor) -> None:
    masked = torch.where(mask, weight, 0)
    values, metadata = cutlass_values(weight, mask), cutlass_metadata(mask, weight.dtype)
    expected_values, expected_metadata = from_dense(masked)
    assert metadata.dtype == expected_metadata.dtype
    assert torch.equal(metadata, expected_metadata)
    assert torch.equal(values, expected_values)
    assert values.is_contiguous()
    assert metadata.is_contiguous()
    assert torch.equal(to_dense(values, metadata), masked)


@pytest.mark.parametrize(("dtype", "shape"), CASES)
def test_it_is_what_pytorch_makes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(*weight_and_mask(shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_every_eligible_layer_of_the_embedded_model(dtype: torch.dtype) -> None:
    model = load_model("embedded")
    count = 0
    for layer in select(model, Selection(TWO_FOUR))[0].values():
        assert isinstance(layer, torch.nn.Linear)
        weight = layer.weight.detach()
        mask = TWO_FOUR.top(weight.abs())
        assert weight.to(dtype).ne(0).all()
        if CUTLASS.takes((weight.shape[0], weight.shape[1]), dtype):
            check(weight.to(dtype), mask)
            count += 1
    assert count == 42  # 6 blocks of 7 layers; all their sides are multiples of 32 x 64


@pytest.mark.parametrize(("dtype", "shape"), CASES)
def test_words_are_the_packed_metadata_moved(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, mask = weight_and_mask(shape, dtype)
    rows, columns = shape
    inputs, block = (32, 16) if dtype == torch.int8 else (16, 32)
    found = cutlass_metadata(mask, dtype).flatten()
    stream = pack(weight.to(torch.float32), mask).metadata_OY[:, : columns // 8].contiguous()
    words = stream.view(found.dtype)
    for row in range(rows):
        for column in range(columns // inputs):
            to_row = row // block * block + row % 8 * (block // 8) + row % block // 8
            to_column = column
            if to_row % 2 != column % 2:  # the two corners off the diagonal change places
                to_row, to_column = to_row ^ 1, column ^ 1
            at = to_column // 2 * 2 * rows + to_row * 2 + to_column % 2
            assert found[at] == words[row, column], (row, column)


def test_a_kept_zero_stays_where_the_mask_has_it() -> None:
    weight, mask = weight_and_mask((32, 64), torch.bfloat16)
    weight[5, mask[5].nonzero()[3].item()] = -0.0
    values, metadata = cutlass_values(weight, mask), cutlass_metadata(mask, weight.dtype)
    assert torch.equal(metadata, from_dense(torch.where(mask, torch.ones_like(weight), 0))[1])
    dense = to_dense(values, metadata)
    assert torch.equal(dense.view(torch.int16), torch.where(mask, weight, 0).view(torch.int16))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((16, 64), torch.float16), ((32, 32), torch.bfloat16), ((32, 64), torch.float32)],
)
def test_what_cutlass_does_not_take_is_refused(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, mask = weight_and_mask(shape, dtype)
    message = f"CUTLASS takes no {shape[0]} x {shape[1]} weight of {dtype}.*float16 32 x 64"
    with pytest.raises(SparsifyError, match=message):
        cutlass_metadata(mask, dtype)
    with pytest.raises(SparsifyError, match=message):
        cutlass_values(weight, mask)


def test_a_mask_that_is_not_two_four_is_refused() -> None:
    weight, mask = weight_and_mask((32, 64), torch.float16)
    mask[7, 8:12] = torch.tensor([True, False, False, False])
    for make in (
        lambda: cutlass_metadata(mask, torch.float16),
        lambda: cutlass_values(weight, mask),
    ):
        with pytest.raises(SparsifyError, match="row 7, group 2 keeps 1 weights.*exactly 2 of 4"):
            make()
    with pytest.raises(SparsifyError, match="give a mask of the weight's shape"):
        cutlass_values(weight[:, :32], mask)
