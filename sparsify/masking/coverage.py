"""Which share of a model's weights is N:M sparse, and what stays dense and why."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsify.masking.dense_layers import BY_SETTING, is_block_weight
from sparsify.models.layer_names import family

LOW = 0.5
VECTORS = "vectors"
_SHOWN = 5

Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class DenseKind:
    """Modules of one name, but for the numbers in it, that stay dense for one reason.

    Attributes:
        name: the qualified name with ``*`` for numbers; ``vectors`` for norms, biases and such.
        count: how many modules there are; of vectors, how many tensors.
        weights: their weights, biases not among them.
        reason: why they stay dense.
    """

    name: str
    count: int
    weights: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.count}), {self.weights:,} weights: {self.reason}"


@dataclass(frozen=True)
class Coverage:
    """How much of a model is N:M. Weights are counted whole, zeros and kept ones.

    Attributes:
        model: the share of all parameters.
        blocks: the share of the decoder blocks' matrices and stacks of matrices.
        dense: all others, the largest first; with the N:M weights they are the whole model.
        largest: the dense kind with the most weights in decoder blocks; None if there is none.
    """

    model: float
    blocks: float
    dense: tuple[DenseKind, ...]
    largest: DenseKind | None

    def describe(self) -> dict[str, Any]:
        """Plain values for records."""
        return {
            "model": round(self.model, 6),
            "blocks": round(self.blocks, 6),
            "dense": [asdict(kind) for kind in self.dense],
        }

    def lines(self) -> list[str]:
        """A few lines for people."""
        shares = f"{self.blocks:.1%} of the block weights, {self.model:.1%} of all parameters"
        shown, rest = self.dense[:_SHOWN], self.dense[_SHOWN:]
        lines = [f"N:M in {shares}", *(f"  dense: {kind}" for kind in shown)]
        if rest:
            weights = sum(kind.weights for kind in rest)
            lines.append(f"  dense: {len(rest)} more kinds, {weights:,} weights")
        return lines

    def warning(self) -> str | None:
        """What to know if less than half of the block weights are N:M."""
        if self.blocks >= LOW or self.largest is None:
            return None
        fix = (
            "change that setting to mask it"
            if self.largest.reason.startswith(BY_SETTING)
            else "state this share beside the pattern, or take a model without such layers"
        )
        return (
            f"only {self.blocks:.1%} of the block weights are N:M; what is dense is above all "
            f"{self.largest}; {fix}"
        )


def coverage(
    sizes: Sizes, masked: Collection[str], blocks: str, reasons: Mapping[str, str]
) -> Coverage:
    """Count.

    Args:
        sizes: the shape of each tensor by name; one that several modules share once.
        masked: the names of those that are N:M.
        blocks: the qualified name of the list of decoder blocks.
        reasons: why a tensor stays dense, by its own name or that of a module that holds it.
    """
    weights: Counter[tuple[str, str]] = Counter()
    of_blocks: Counter[tuple[str, str]] = Counter()
    owners: dict[tuple[str, str], set[str]] = {}
    covered = covered_blocks = 0
    for name, shape in sizes.items():
        size = math.prod(shape)
        in_blocks = name.startswith(f"{blocks}.") and is_block_weight(shape)
        if name in masked:
            covered += size
            covered_blocks += size if in_blocks else 0
            continue
        key, owner = (VECTORS, "norms, biases and other vectors"), name
        if len(shape) > 1:
            owner, why = _reason(name, reasons)
            key = family(owner), why
        owners.setdefault(key, set()).add(owner)
        weights[key] += size
        of_blocks[key] += size if in_blocks else 0
    kinds = {
        key: DenseKind(key[0], len(owners[key]), count, key[1])
        for key, count in weights.most_common()
    }
    largest = max(of_blocks, key=lambda key: of_blocks[key], default=None)
    total, total_blocks = covered + weights.total(), covered_blocks + of_blocks.total()
    return Coverage(
        covered / max(1, total),
        covered_blocks / max(1, total_blocks),
        tuple(kinds.values()),
        kinds[largest] if largest and of_blocks[largest] else None,
    )


def largest_list(sizes: Sizes) -> str:
    """The name of the list of decoder blocks in a folder's tensors: the numbered modules that hold
    most weights; empty if there are none.
    """
    lists: Counter[str] = Counter()
    for name, shape in sizes.items():
        if match := re.match(r"(.*?)\.\d+\.", name):
            lists[match[1]] += math.prod(shape)
    return lists.most_common(1)[0][0] if lists else ""


def _reason(tensor: str, reasons: Mapping[str, str]) -> tuple[str, str]:
    """The module or tensor for which a reason is stated, and the reason."""
    owner = tensor
    while owner:
        if owner in reasons:
            return owner, reasons[owner]
        owner = owner.rpartition(".")[0]
    return tensor.removesuffix(".weight"), "no reason is stated"
