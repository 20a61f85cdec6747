"""The Triton kernels over packed 2:4 weights; docs/decode.md says how they work.

Shapes: T tokens, O out, I in, P panels of eight rows, C chunks of 16 inputs (four groups), E the
eight rows of a panel, R the rows of a program. Triton's interpreter runs all of it, so nothing here
is written in PTX.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_OF_MANY, CHUNKS_OF_MANY, WARPS_OF_MANY = 16, 32, 2
MOST_OF_FEW = 4
"""Up to so many tokens the products are summed by threads, beyond by matrix instructions."""
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}
"""Products and sums in one rounding; no copies to shared memory ahead, which took 67 KiB."""


@triton.jit
def halves(word, DTYPE: tl.constexpr):
    """The two 16-bit floats of a 32-bit word, as fp32."""
    if tl.bfloat16 == DTYPE:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def load_panel(values, metadata, row, chunk, rows, chunks):
    """Load a tile: the words of metadata ``[R, C]``, and the pairs of values ``[R, C, 4]``.

    A thread's 16 bytes of metadata are the words of eight rows for one chunk, and its 16 bytes of
    values are the pairs of one of those rows for the same chunk.
    """
    panel = (row // 8).to(tl.int64) * ((chunks + 7) // 8 * 64) + row % 8
    words_CR = tl.load(
        metadata + panel[None, :] + chunk[:, None] * 8, mask=(chunk < chunks)[:, None], other=0
    )
    start = row.to(tl.int64)[:, None, None] * (chunks * 4)
    pair = chunk[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    inside = (row < rows)[:, None, None] & (chunk < chunks)[None, :, None]
    pairs_RC4 = tl.load(values.to(tl.pointer_type(tl.int32)) + start + pair, mask=inside, other=0)
    return tl.trans(words_CR).to(tl.int32), pairs_RC4


@triton.jit
def add_group(acc_RC, pair_RC, nibble_RC, x_C, DTYPE: tl.constexpr):
    """Add one group's two products. Its four inputs are 64 bits of ``x_C``."""
    first, second = halves(pair_RC, DTYPE)
    x0, x1 = halves(x_C.to(tl.int32)[None, :], DTYPE)
    x2, x3 = halves((x_C >> 32).to(tl.int32)[None, :], DTYPE)
    low = tl.where((nibble_RC & 1) != 0, x1, x0)
    high = tl.where((nibble_RC & 4) != 0, x3, x2)
    x_first = tl.where((nibble_RC & 2) != 0, x2, low)
    x_second = tl.where((nibble_RC & 8) != 0, high, x1)
    return acc_RC + first * x_first + second * x_second


@triton.jit
def dense_groups(pairs_RC4, words_RC):
    """All four weights of every group, as 64 bits: ``[R, C, 4]``."""
    nibbles = words_RC[:, :, None] >> (4 * tl.arange(0, 4))[None, None, :]
    first = (pairs_RC4 & 65535).to(tl.int64) << ((nibbles << 4) & 48)
    second = ((pairs_RC4 >> 16) & 65535).to(tl.int64) << ((nibbles << 2) & 48)
    return first | second


@triton.jit(do_not_specialize=["tokens"])
def few_tokens(
    y_TO,
    x_TI,
    values_OV,
    metadata_PCE,
    bias_O,
    tokens,
    rows,
    groups,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A program multiplies one panel; each thread sums its own inputs, in registers.

    EVEN: whether the number of groups is, so that 16 bytes of ``x`` are aligned.
    """
    DTYPE: tl.constexpr = x_TI.dtype.element_ty
    chunks = (groups + 3) // 4
    if EVEN:
        groups = groups // 2 * 2  # what tells the compiler
    row = tl.program_id(0) * 8 + tl.arange(0, 8)
    x = x_TI.to(tl.pointer_type(tl.int64))
    sums = (tl.zeros([8, BLOCK_C], tl.float32),) * BLOCK_T
    for start in range(0, chunks, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        words, pairs = load_panel(values_OV, metadata_PCE, row, chunk, rows, chunks)
        pairs_02, pairs_13 = tl.split(tl.reshape(pairs, [8, BLOCK_C, 2, 2]))
        pair_0, pair_2 = tl.split(pairs_02)
        pair_1, pair_3 = tl.split(pairs_13)
        group = chunk[:, None] * 4 + tl.arange(0, 2)[None, :]
        new = ()
        for t in tl.static_range(BLOCK_T):
            here = x + tl.minimum(t, tokens - 1) * groups + group
            x_01 = tl.load(here, mask=group < groups, other=0)
            x_23 = tl.load(here + 2, mask=group + 2 < groups, other=0)
            x_0, x_1 = tl.split(x_01)
            x_2, x_3 = tl.split(x_23)
            acc = add_group(sums[t], pair_0, words, x_0, DTYPE)
            acc = add_group(acc, pair_1, words >> 4, x_1, DTYPE)
            acc = add_group(acc, pair_2, words >> 8, x_2, DTYPE)
            new = new + (add_group(acc, pair_3, words >> 12, x_3, DTYPE),)
        sums = new
    if BIAS:
        bias = tl.load(bias_O + row, mask=row < rows, other=0).to(tl.float32)
    for t in tl.static_range(BLOCK_T):
        out = tl.sum(sums[t], 1)
        if BIAS:
            out += bias
        tl.store(y_TO + t * rows + row, out.to(DTYPE), mask=row < tl.where(tokens > t, rows, 0))


@triton.jit(do_not_specialize=["tokens"])
def many_tokens(
    y_TO,
    x_TI,
    values_OV,
    metadata_PCE,
    bias_O,
    tokens,
    rows,
    groups,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A program makes dense tiles of its rows in shared memory, for matrix instructions with up to
    16 tokens. Its warps share the inputs: each sums one of PARTS.
    """
    DTYPE: tl.constexpr = x_TI.dtype.element_ty
    PART: tl.constexpr = BLOCK_C // PARTS * 16
    chunks = (groups + 3) // 4
    inputs = groups * 4
    if EVEN:
        inputs = groups // 2 * 8
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = tl.arange(0, 16)
    part = tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    acc = tl.zeros([PARTS, BLOCK_R, 16], tl.float32)
    for start in range(0, chunks, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        words, pairs = load_panel(values_OV, metadata_PCE, row, chunk, rows, chunks)
        dense = dense_groups(pairs, words)
        low, high = dense.to(tl.int32), (dense >> 32).to(tl.int32)
        w_02 = tl.join(low.to(tl.int16), high.to(tl.int16))
        w_13 = tl.join((low >> 16).to(tl.int16), (high >> 16).to(tl.int16))
        w = tl.reshape(tl.join(w_02, w_13), [BLOCK_R, PARTS, PART]).to(DTYPE, bitcast=True)
        i = start * 16 + part
        inside = (token < tokens)[None, :, None] & (i < inputs)[:, None, :]
        x = tl.load(x_TI + token[None, :, None] * inputs + i[:, None, :], mask=inside, other=0)
        acc = tl.dot(tl.permute(w, [1, 0, 2]), tl.permute(x, [0, 2, 1]), acc)
    out = tl.sum(acc, 0)
    if BIAS:
        out += tl.load(bias_O + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(y_TO + token[None, :] * rows + row[:, None], out.to(DTYPE), mask=inside)


@triton.jit
def unpack_panel(weight_OI, values_OV, metadata_PCE, rows, groups, BLOCK_C: tl.constexpr):
    """Write the dense weight of one panel and BLOCK_C chunks."""
    chunks = (groups + 3) // 4
    row = tl.program_id(0) * 8 + tl.arange(0, 8)
    chunk = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    words, pairs = load_panel(values_OV, metadata_PCE, row, chunk, rows, chunks)
    group = chunk[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    start = row.to(tl.int64)[:, None, None] * groups
    inside = (row < rows)[:, None, None] & (group < groups)
    out = weight_OI.to(tl.pointer_type(tl.int64)) + start + group
    tl.store(out, dense_groups(pairs, words), mask=inside)


def multiply(
    x_TI: Tensor, values_OV: Tensor, metadata_PCE: Tensor, bias_O: Tensor | None, rows: int
) -> Tensor:
    """The product ``[T, O]`` of 1 to 16 tokens; ``x_TI`` is contiguous."""
    tokens, inputs = x_TI.shape
    y_TO = x_TI.new_empty(tokens, rows)
    bias = y_TO if bias_O is None else bias_O  # not read, but a kernel wants a pointer
    arguments = y_TO, x_TI, values_OV, metadata_PCE, bias, tokens, rows, inputs // 4
    kernel, block_rows, constants, warps = configure(tokens, inputs)
    even = inputs % 8 == 0
    with _on(x_TI):
        kernel[(triton.cdiv(rows, block_rows),)](
            *arguments, **constants, BIAS=bias_O is not None, EVEN=even, num_warps=warps, **OPTIONS
        )
    return y_TO


def configure(tokens: int, inputs: int) -> tuple[Any, int, dict[str, int], int]:
    """Which kernel runs: it, its rows a program, its constants, and its warps a program.

    Nothing here was tuned. The numbers follow from the registers that a compiler reports, and from
    the bytes that must be in flight.
    """
    if tokens > MOST_OF_FEW:
        constants = {"BLOCK_R": ROWS_OF_MANY, "BLOCK_C": CHUNKS_OF_MANY, "PARTS": WARPS_OF_MANY}
        return many_tokens, ROWS_OF_MANY, constants, WARPS_OF_MANY
    # Each lane takes one chunk, and short rows get fewer lanes.
    warps = next((n for n in (1, 2) if inputs <= n * 32 * 16), 4)
    block_t = triton.next_power_of_2(tokens)
    return few_tokens, 8, {"BLOCK_T": block_t, "BLOCK_C": 32 * warps}, warps


def unpack(values_OV: Tensor, metadata_PCE: Tensor, rows: int, inputs: int) -> Tensor:
    """The dense weight ``[O, I]``."""
    weight_OI = values_OV.new_empty(rows, inputs)
    grid = len(metadata_PCE), triton.cdiv(inputs, 64 * 16)
    with _on(values_OV):
        unpack_panel[grid](
            weight_OI, values_OV, metadata_PCE, rows, inputs // 4, BLOCK_C=64, num_warps=2
        )
    return weight_OI


def _on(values: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(values)
