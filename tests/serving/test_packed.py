"""Packed 2:4 weights, against loops over single groups, bytes and bits."""

import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify import NMPattern, SparsifyError
from sparsify.serving.packed import DTYPES, PackedWeight, pack, product

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
SHAPES = [(1, 4), (3, 8), (2, 20), (5, 64), (4, 132), (2, 256), (7, 576)]


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(BITS[values.dtype])


def random_mask(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return NMPattern(2, 4).top(torch.rand(rows, columns, generator=generator))


def slow_pack(weight: Tensor, mask: Tensor) -> tuple[list[bytes], list[bytes]]:
    """Rows of values and panels of metadata as bytes, group by group."""
    code = {torch.float32: "<i", torch.float16: "<h", torch.bfloat16: "<h"}[weight.dtype]
    all_values, all_metadata = [], []
    for row, kept in zip(bits(weight).tolist(), mask.tolist(), strict=True):
        values, stream = b"", []
        for start in range(0, len(row), 4):
            chosen = [i for i in range(4) if kept[start + i]]
            chosen += [i for i in range(4) if i not in chosen][: 2 - len(chosen)]
            first, second = sorted(chosen)
            for i in (first, second):
                values += struct.pack(code, row[start + i] if kept[start + i] else 0)
            stream.append(first + 4 * second)
        stream += [0] * (len(stream) % 2)
        metadata = bytes(a + 16 * b for a, b in zip(stream[::2], stream[1::2], strict=True))
        all_values.append(values + bytes(-len(values) % 16))
        all_metadata.append(metadata + bytes(-len(metadata) % 16))
    all_metadata += [bytes(len(all_metadata[0]))] * (-len(all_metadata) % 8)
    panels = [
        b"".join(row[i : i + 2] for i in range(0, len(panel[0]), 2) for row in panel)
        for panel in (all_metadata[k : k + 8] for k in range(0, len(all_metadata), 8))
    ]
    return all_values, panels


def row_bytes(rows: Tensor) -> list[bytes]:
    return [row.flatten().view(torch.uint8).numpy().tobytes() for row in rows]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_are_those_of_a_slow_loop(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).to(dtype)
    mask = random_mask(*shape, seed=2)
    mask &= torch.rand(shape, generator=generator) < 0.8  # some groups keep one, some none
    packed = pack(weight, mask)
    values, metadata = slow_pack(weight, mask)
    assert row_bytes(packed.values_OV) == values
    assert row_bytes(packed.metadata_PCE) == metadata
    assert packed.shape == shape
    assert packed.values_OV.dtype == dtype
    masked = torch.where(mask, weight, 0)
    assert torch.equal(bits(packed.unpack()), bits(masked))
    again = pack(masked)
    assert row_bytes(again.values_OV) == values
    assert row_bytes(again.metadata_PCE) == metadata


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_any_bits_survive(dtype: torch.dtype, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3), label="rows")
    columns = 4 * data.draw(st.integers(1, 40), label="groups")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, columns * dtype.itemsize), dtype=np.uint8)
    weight = torch.from_numpy(raw).view(dtype)
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan]).to(dtype)
    weight[0, : min(5, columns)] = special[: min(5, columns)]
    mask = random_mask(rows, columns, seed)
    out = pack(weight, mask).unpack()
    assert torch.equal(bits(out)[mask], bits(weight)[mask])
    assert not bits(out)[~mask].any()


def test_without_a_mask_what_is_not_zero_is_kept() -> None:
    weight = torch.tensor([[0.0, -0.0, torch.nan, torch.inf, 0, 0, 0, -0.0, 0, 0, 3, -0.0]])
    packed = pack(weight)
    assert int(packed.metadata_PCE[0, 0, 0]) == 0x084E  # 2 and 3; 0 and 1; 0 and 2
    out = packed.unpack()
    assert torch.equal(bits(out)[0, 2:4], bits(weight)[0, 2:4])
    assert bits(out)[0, [0, 1, 4, 5, 6, 7, 8, 9, 11]].eq(0).all()
    assert bits(out)[0, 10] == bits(weight)[0, 10]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_gathered_by_the_metadata_give_the_product(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rows, columns = shape
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-3, 4, shape, generator=generator)
    x = torch.randint(-3, 4, (2, columns), generator=generator)
    mask = random_mask(rows, columns, seed=4)
    packed = pack(weight.to(dtype), mask)
    y = np.zeros((2, rows))
    values, metadata = packed.values_OV.float().numpy(), packed.metadata_PCE.int().numpy()
    for row in range(rows):
        for group in range(columns // 4):
            word = metadata[row // 8, group // 4, row % 8]
            nibble = word >> (4 * (group % 4)) & 15
            for k, position in enumerate((nibble & 3, nibble >> 2)):
                y[:, row] += values[row, 2 * group + k] * x[:, 4 * group + position].numpy()
    exact = x.double() @ (weight * mask).double().T
    assert np.array_equal(y, exact.numpy())
    if exact.abs().max() <= 256:  # what bf16 holds exactly
        assert torch.equal(product(x.to(dtype), packed).double(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_dense_weight(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 72, generator=generator).to(dtype)
    mask = random_mask(24, 72, seed=6)
    x = torch.randn(2, 3, 72, generator=generator).to(dtype)
    bias_O = torch.randn(24, generator=generator).to(dtype) if bias else None
    expected = F.linear(x, torch.where(mask, weight, 0), bias_O)
    assert torch.equal(product(x, pack(weight, mask), bias_O), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_start_at_16_bytes_and_panels_at_128(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    packed = pack(torch.ones(shape, dtype=dtype), random_mask(*shape, seed=7))
    for rows, bytes_ in ((packed.values_OV, 16), (packed.metadata_PCE, 128)):
        assert rows.is_contiguous()
        assert rows.stride(0) * rows.itemsize % bytes_ == 0
        assert rows.data_ptr() % 16 == 0
    groups = shape[1] // 4
    assert not packed.values_OV[:, 2 * groups :].any()
    assert not packed.metadata_PCE[:, (groups + 3) // 4 :].any()
    assert not packed.metadata_PCE[-1, :, (shape[0] - 1) % 8 + 1 :].any()


def test_bits_a_weight() -> None:
    def of(columns: int, dtype: torch.dtype) -> float:
        weight = torch.zeros(8, columns, dtype=dtype)
        return pack(weight).bits_per_weight

    assert of(4096, torch.bfloat16) == of(128, torch.float16) == 9
    assert of(4096, torch.float32) == 17
    assert of(576, torch.bfloat16) == 8 + 8 * 80 / 576


def test_the_worked_example_of_the_documentation() -> None:
    weight = torch.tensor(
        [
            [0, 1, 0, 2, 3, 4, 0, 0, 0, 0, 5, 0],
            [6, 0, 0, 7, 0, 0, 8, 9, 0, 0, 0, 0],
        ],
        dtype=torch.float16,
    )
    packed = pack(weight)
    assert packed.values_OV.tolist() == [[1, 2, 3, 4, 0, 5, 0, 0], [6, 7, 8, 9, 0, 0, 0, 0]]
    assert packed.metadata_PCE[0, 0].tolist() == [0x084D, 0x04EC, 0, 0, 0, 0, 0, 0]
    assert packed.metadata_PCE.shape == (1, 8, 8)
    assert row_bytes(packed.values_OV)[0].hex(" ", 2) == "003c 0040 0042 0044 0000 0045 0000 0000"


@pytest.mark.parametrize(
    ("weight", "mask", "message"),
    [
        (torch.zeros(2, 6), None, r"shape \(2, 6\).*in a multiple of 4; leave this layer dense"),
        (torch.zeros(8), None, r"shape \(8,\) cannot be packed"),
        (torch.zeros(2, 8).double(), None, "float64 cannot be packed; convert it to float32"),
        (torch.zeros(2, 8, dtype=torch.int8), None, "int8 cannot be packed"),
        (
            torch.tensor([[1.0] * 2 + [0] * 6, [0, 0, 0, 0, 1, 0, 2, 3]]),
            None,
            r"row 1, group 1 \(inputs 4 to 7\) keeps 3 weights.*at most 2 of every 4: mask it",
        ),
        (torch.zeros(1, 4), torch.ones(1, 4).bool(), "row 0, group 0 .* keeps 4 weights"),
        (torch.zeros(1, 4), torch.ones(1, 8).bool(), r"mask is torch.bool \(1, 8\) and the weight"),
        (torch.zeros(1, 4), torch.ones(1, 4), "give a bool mask"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    weight: Tensor, mask: Tensor | None, message: str
) -> None:
    with pytest.raises(SparsifyError, match=message):
        pack(weight, mask)


def test_a_weight_and_its_transpose_pack_alike() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(8))
    mask = random_mask(16, 8, seed=9)
    packed: PackedWeight = pack(weight.T, mask)
    assert torch.equal(packed.unpack(), torch.where(mask, weight.T, 0))
