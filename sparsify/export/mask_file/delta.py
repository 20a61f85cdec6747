"""Stores a mask as its difference from another: which groups changed, and what they are now."""

import torch
from torch import Tensor

from sparsify.export.mask_file.codes import decode, decode_positions, encode, encode_positions
from sparsify.export.mask_file.sizes import positions_bytes


def encode_delta(former: Tensor, ranks: Tensor, candidates: int) -> tuple[int, Tensor]:
    """Encode the groups whose candidate changed.

    Args:
        former: the former candidate of every group, flat.
        ranks: the present candidate of every group, flat.
        candidates: the number of candidates.

    Returns:
        The number of groups that changed, and the code, uint8.
    """
    positions = (former != ranks).nonzero().flatten()
    before, after = former[positions], ranks[positions]
    # A changed group cannot have its former candidate, so there is one candidate fewer to encode.
    others = after - (after > before).to(after.dtype)
    code = encode_positions(positions, len(ranks))
    return len(positions), torch.cat([code, encode(others, candidates - 1)])


def decode_delta(code: Tensor, changed: int, former: Tensor, candidates: int) -> Tensor:
    """Decode the present candidate of every group.

    Raises:
        ValueError: :func:`encode_delta` cannot have made these bytes.
    """
    split = positions_bytes(changed, len(former))
    positions = decode_positions(code[:split], changed, len(former))
    others = decode(code[split:], changed, candidates - 1)
    ranks = former.clone()
    before = former[positions]
    ranks[positions] = (others + (others >= before)).to(former.dtype)
    return ranks
