"""The code of a mask that differs from another: which groups, and what they are now."""

import torch
from torch import Tensor

from sparsify.export.mask_file.codes import decode, decode_positions, encode, encode_positions
from sparsify.export.mask_file.sizes import positions_bytes


def encode_delta(former: Tensor, ranks: Tensor, candidates: int) -> tuple[int, Tensor]:
    """Code the groups whose candidate changed.

    Args:
        former: the candidate of every group before, flat.
        ranks: and now.
        candidates: how many there are.

    Returns:
        The number of groups that changed, and the code, uint8.
    """
    positions = (former != ranks).nonzero().flatten()
    before, after = former[positions], ranks[positions]
    # A group that changed is not what it was, which leaves one candidate fewer.
    others = after - (after > before).to(after.dtype)
    code = encode_positions(positions, len(ranks))
    return len(positions), torch.cat([code, encode(others, candidates - 1)])


def decode_delta(code: Tensor, changed: int, former: Tensor, candidates: int) -> Tensor:
    """The candidate of every group now.

    Raises:
        ValueError: :func:`encode_delta` makes no such bytes.
    """
    split = positions_bytes(changed, len(former))
    positions = decode_positions(code[:split], changed, len(former))
    others = decode(code[split:], changed, candidates - 1)
    ranks = former.clone()
    before = former[positions]
    ranks[positions] = (others + (others >= before)).to(former.dtype)
    return ranks
