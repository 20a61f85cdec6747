"""Enumerative codes and Elias-Fano codes against numbers of any size and plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify.export.mask_file import codes
from sparsify.export.mask_file.codes import (
    code_bytes,
    decode,
    decode_positions,
    digit_dtype,
    encode,
    encode_positions,
    positions_bytes,
    word_size,
)
from sparsify.export.mask_file.delta import decode_delta, encode_delta
from sparsify.export.mask_file.sizes import delta_bytes

#: candidates of patterns up to 8:16, and other numbers
BASES = [1, 2, 3, 4, 5, 6, 16, 28, 70, 252, 256, 257, 286, 12870, 2**15 + 1, 2**31]


def slow_encode(digits: list[int], base: int) -> bytes:
    """The definition in Python's integers: words of some digits, lowest first, without gaps."""
    bits, count = word_size(base)
    stream, length = 0, 0
    for start in range(0, len(digits), count):
        word = sum(digit * base**i for i, digit in enumerate(digits[start : start + count]))
        stream |= word << length
        length += bits
    return stream.to_bytes(-(-length // 8), "little")


def slow_positions(positions: list[int], universe: int) -> bytes:
    """Elias-Fano by its definition."""
    low = int(math.log2(universe / len(positions)))
    code = slow_encode([p % 2**low for p in positions], 2**low) if low else b""
    bitmap = 0
    for i, position in enumerate(positions):
        bitmap |= 1 << (position >> low) + i
    return code + bitmap.to_bytes(-(-(len(positions) + (universe >> low) + 1) // 8), "little")


def tensor(digits: list[int], base: int) -> Tensor:
    return torch.tensor(digits, dtype=digit_dtype(base))


@pytest.mark.parametrize("base", BASES[1:])
def test_a_word_is_the_densest_there_is(base: int) -> None:
    sizes = [
        (max(8, (base**digits - 1).bit_length()) / digits, digits)
        for digits in range(1, 63)
        if (base**digits - 1).bit_length() <= 62
    ]
    bits, digits = word_size(base)
    assert 8 <= bits <= 62
    assert base**digits <= 2**bits
    assert bits / digits == min(sizes)[0]


def test_words_of_common_patterns_by_eye() -> None:
    assert word_size(6) == (44, 17)  # 2:4
    assert word_size(4) == (8, 4)  # 1:4
    assert word_size(70) == (43, 7)  # 4:8
    assert word_size(12870) == (41, 3)  # 8:16
    assert encode(tensor([1, 2, 3], 6), 6).tolist() == [1 + 2 * 6 + 3 * 36, 0, 0, 0, 0, 0]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_codes_are_the_definition_and_come_back(data: st.DataObject) -> None:
    base = data.draw(st.sampled_from(BASES))
    digits = data.draw(st.lists(st.integers(0, base - 1), max_size=400))
    code = encode(tensor(digits, base), base)
    assert code.dtype == torch.uint8
    assert len(code) == code_bytes(len(digits), base)
    assert bytes(code.tolist()) == (slow_encode(digits, base) if base > 1 else b"")
    found = decode(code, len(digits), base)
    assert found.dtype == digit_dtype(base)
    assert found.tolist() == digits


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_positions_are_the_definition_and_come_back(data: st.DataObject) -> None:
    universe = data.draw(st.sampled_from([1, 2, 7, 8, 9, 100, 4096, 2**33]))
    chosen = data.draw(st.sets(st.integers(0, universe - 1), max_size=min(universe, 200)))
    positions = sorted(chosen)
    code = encode_positions(torch.tensor(positions, dtype=torch.int64), universe)
    assert len(code) == positions_bytes(len(positions), universe)
    if positions:
        assert bytes(code.tolist()) == slow_positions(positions, universe)
    assert decode_positions(code, len(positions), universe).tolist() == positions


def test_positions_take_little_more_than_they_must() -> None:
    universe, count = 10**6, 50_000
    bound = math.log2(math.comb(universe, count))
    assert 8 * positions_bytes(count, universe) < bound + 0.6 * count


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_bytes_are_refused_or_are_the_code_of_what_they_give(data: st.DataObject) -> None:
    base = data.draw(st.sampled_from([2, 3, 6, 70, 12870]))
    count = data.draw(st.integers(0, 60))
    size = code_bytes(count, base)
    code = torch.tensor(list(data.draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    try:
        found = decode(code, count, base)
    except ValueError:
        return
    assert torch.equal(encode(found, base), code)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_bytes_are_refused_or_are_the_code_of_the_positions(data: st.DataObject) -> None:
    universe = data.draw(st.integers(1, 60))
    count = data.draw(st.integers(0, min(4, universe)))
    size = positions_bytes(count, universe)
    code = torch.tensor(list(data.draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    try:
        found = decode_positions(code, count, universe)
    except ValueError:
        return
    assert torch.equal(encode_positions(found, universe), code)


def test_bytes_that_nothing_encodes_to_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes for 3 digits of base 6"):
        decode(torch.zeros(5, dtype=torch.uint8), 3, 6)
    word = list((6**17).to_bytes(6, "little"))
    with pytest.raises(ValueError, match="larger than its digits"):
        decode(torch.tensor(word, dtype=torch.uint8), 17, 6)
    with pytest.raises(ValueError, match="padding"):
        decode(torch.tensor([0, 0, 0, 1, 0, 0], dtype=torch.uint8), 3, 6)
    with pytest.raises(ValueError, match="last bits"):
        decode(torch.tensor([0, 0, 0, 0, 0, 16], dtype=torch.uint8), 17, 6)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_delta_gives_what_changed(data: st.DataObject) -> None:
    base = data.draw(st.sampled_from([2, 4, 6, 70, 12870]))
    former = data.draw(st.lists(st.integers(0, base - 1), min_size=1, max_size=100))
    ranks = [data.draw(st.sampled_from([rank, rank, 0, base - 1])) for rank in former]
    before, after = tensor(former, base), tensor(ranks, base)
    changed, code = encode_delta(before, after, base)
    assert changed == sum(a != b for a, b in zip(former, ranks, strict=True))
    assert len(code) == delta_bytes(changed, len(former), base)
    assert decode_delta(code, changed, before, base).tolist() == ranks
    assert before.tolist() == former


def test_a_table_that_was_first_asked_for_without_values_has_values_later() -> None:
    codes._split_table.cache_clear()
    with FakeTensorMode():
        codes._split_table(6, 6)
    digits = torch.arange(6, dtype=torch.uint8).repeat(9)
    assert torch.equal(decode(encode(digits, 6), len(digits), 6), digits)
