"""Whether one stored weight keeps the rules of its pattern.

Shapes: O out, I in, G groups of M.
"""

from torch import Tensor

from sparsify.common.bits import bits
from sparsify.masking.pattern import NMPattern


def nonzero(tensor: Tensor) -> Tensor:
    """Where the value is not zero of either sign, for any type: bool of the same shape."""
    # Types of eight bits have no comparison.
    return (tensor.float() if tensor.element_size() == 1 else tensor) != 0


def nonzero_share(tensor: Tensor) -> float:
    """The share of values that are not zero."""
    return int(nonzero(tensor).sum()) / max(1, tensor.numel())


def plainly_dense(weight_OI: Tensor, pattern: NMPattern) -> bool:
    """Whether more than half of the groups break the pattern: no damage, but a dense weight."""
    full = too_full(nonzero(weight_OI), pattern)
    return int(full.sum()) > full.numel() / 2


def not_finite(tensor: Tensor) -> str | None:
    """How many values are infinite or not a number, if any are."""
    values = tensor.float() if tensor.element_size() == 1 else tensor
    count = int((~values.isfinite()).sum())
    return f"{count} values are not finite (NaN or infinite)" if count else None


def too_full(kept_OI: Tensor, pattern: NMPattern) -> Tensor:
    """The groups with more than N True: bool ``[O, G]``."""
    return pattern.groups(kept_OI).sum(-1) > pattern.n


def check_pattern(weight_OI: Tensor, pattern: NMPattern) -> str | None:
    """The first group with too many nonzeros, and how many there are, if there are any."""
    if weight_OI.shape[1] % pattern.m:
        return f"in_features={weight_OI.shape[1]} is not a multiple of m={pattern.m} of {pattern}"
    wrong = too_full(nonzero(weight_OI), pattern)
    if not (count := int(wrong.sum())):
        return None
    row, group = wrong.nonzero()[0].tolist()
    start = group * pattern.m
    return (
        f"{count} of {wrong.numel()} groups hold more than {pattern.n} nonzeros of {pattern.m}; "
        f"the first is row {row}, inputs {start} to {start + pattern.m - 1}"
    )


def check_mask(weight_OI: Tensor, mask_OI: Tensor, pattern: NMPattern) -> list[str]:
    """Where the weight and its stored mask disagree."""
    problems = []
    if wrong := int((pattern.groups(mask_OI).sum(-1) != pattern.n).sum()):
        problems.append(f"{wrong} groups of its stored mask do not keep {pattern}")
    if outside := int((nonzero(weight_OI) & ~mask_OI).sum()):
        problems.append(f"{outside} nonzeros are where its stored mask drops")
    return problems


def check_signs(
    weight_OI: Tensor, mask_OI: Tensor | None, pattern: NMPattern
) -> tuple[str | None, str | None]:
    """Look for -0.0, which compressors count as a nonzero.

    Where a weight is dropped, or in a group that it fills beyond N, it breaks the pattern for them.
    In a kept place it is the base's own value and breaks nothing.

    Returns:
        A problem and a note.
    """
    is_set = bits(weight_OI) != 0
    negative = is_set & ~nonzero(weight_OI)
    if mask_OI is not None:
        dropped = ~mask_OI
    else:
        dropped = too_full(is_set, pattern).repeat_interleave(pattern.m, dim=-1)
    bad = int((negative & dropped).sum())
    left = int(negative.sum()) - bad
    problem = (
        f"{bad} dropped weights are -0.0, which compressors count as nonzero; "
        "write +0.0 (adding 0.0 does)"
    )
    note = f"{left} kept weights are -0.0, the base's own value"
    return problem if bad else None, note if left else None
