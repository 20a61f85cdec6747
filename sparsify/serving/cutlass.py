"""2:4 weights as CUTLASS reads them, made from a mask.

PyTorch's own converter sees only the masked weight. A kept weight that is zero is not among its
nonzeros, so for such a group it may store other positions; here the mask alone decides, and a
product is the same.

The metadata is the stream of nibbles of ``docs/packed.md``, cut into words that each cover a
row's next inputs: 16-bit words (16 inputs) for 16-bit types, 32-bit words (32 inputs) for int8.
The words ``[O, W]`` are stored in this order, from slowest to fastest:

- pairs of columns of words (CUTLASS's column-major layout, interleaved by two);
- blocks of 32 rows (16 for int8), which are made of runs of 8 rows;
- the row within a run;
- pairs of runs, of which 32 rows have two and 16 rows have one;
- the column of the pair, and then the run of the pair: each 2 x 2 square is transposed.

Shapes: O out, I in, G groups = I / 4, W words of metadata a row.
"""

import torch
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.serving.backends import CUTLASS
from sparsify.serving.packed import join_nibbles, kept_values, nibbles

_RUN = 8


def cutlass_metadata(mask_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """The metadata of a mask, reordered.

    Args:
        mask_OI: bool ``[O, I]``, exactly two True in every group.
        dtype: of the weight: float16, bfloat16 or int8.

    Returns:
        int16 ``[O, I / 16]``, for int8 int32 ``[O, I / 32]``.

    Raises:
        SparsifyError: CUTLASS takes no such layer, or a group does not keep exactly two.
    """
    _check(mask_OI, dtype)
    word = torch.int32 if dtype == torch.int8 else torch.int16
    words_OW = join_nibbles(nibbles(mask_OI)).view(word)
    pairs_of_runs = 1 if dtype == torch.int8 else 2
    # (block, pair of runs, run, row of the run, pair of columns, column)
    squares = words_OW.view(-1, pairs_of_runs, 2, _RUN, words_OW.shape[1] // 2, 2)
    return squares.permute(4, 0, 3, 1, 5, 2).reshape(words_OW.shape)


def cutlass_values(weight_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """The kept values of every row in order: ``[O, I / 2]``, of the weight's type.

    Args:
        weight_OI: float16, bfloat16 or int8 ``[O, I]``; what the mask drops is not looked at.
        mask_OI: bool ``[O, I]``, exactly two True in every group.

    Raises:
        SparsifyError: CUTLASS takes no such layer, or a group does not keep exactly two.
    """
    _check(mask_OI, weight_OI.dtype)
    if mask_OI.shape != weight_OI.shape:
        raise SparsifyError(
            f"the mask is {tuple(mask_OI.shape)} and the weight {tuple(weight_OI.shape)}; "
            "give a mask of the weight's shape"
        )
    return kept_values(weight_OI, nibbles(mask_OI))


def _check(mask_OI: Tensor, dtype: torch.dtype) -> None:
    rows, columns = mask_OI.shape
    if not CUTLASS.takes((rows, columns), dtype):
        tiles = "; ".join(f"{t} {o} x {i}" for t, (o, i) in CUTLASS.tiles.items())
        raise SparsifyError(
            f"CUTLASS takes no {rows} x {columns} weight of {dtype}: its sides must be multiples "
            f"of ({tiles}); leave this layer dense or use another backend"
        )
