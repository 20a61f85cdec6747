"""Measures which decoder blocks lose most by their masks.

The model is measured with some of its blocks dense and the others pruned: each block pruned alone,
each kept dense alone, and the first or the last few kept dense (Fang et al. 2024, arXiv 2409.17481,
appendix G: figure 7, table 15).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sparsify.masking.layer import MaskedLinear, MaskScope, masked_layers
from sparsify.masking.select import decoder_blocks
from sparsify.models.perplexity import OVERALL, Score

SENSITIVITY_SCHEMA = "sparsify.sensitivity/1"
LAST = (1, 4, 8)

Scores = Mapping[str, Score]


@dataclass(frozen=True)
class BlockSensitivity:
    """The effect of one block's masks; scores are by text, and overall.

    Attributes:
        name: the block's qualified name.
        alone_pruned: scores with every other block dense.
        alone_dense: scores with every other block pruned.
        loss_increase: by how much pruning only this block raises the dense model's loss, nats per
            token.
        loss_decrease: by how much keeping only it dense lowers the pruned model's loss, nats per
            token.
    """

    name: str
    alone_pruned: Scores
    alone_dense: Scores
    loss_increase: float
    loss_decrease: float


@dataclass(frozen=True)
class Sensitivity:
    """The scores of all cases.

    Attributes:
        dense: scores of the base model.
        pruned: scores under all masks.
        blocks: each block by itself, in the model's order.
        kept_dense: scores by the blocks that were kept dense: "first 1", "last 4".
    """

    dense: Scores
    pruned: Scores
    blocks: list[BlockSensitivity]
    kept_dense: dict[str, Scores]

    def describe(self) -> dict[str, Any]:
        """All numbers, as plain values."""
        return asdict(self)


def measure_sensitivity(
    model: nn.Module,
    measure: Callable[[], Scores],
    watch: Callable[[Sequence[frozenset[str]]], Iterable[frozenset[str]]] = iter,
) -> Sensitivity:
    """Measure a masked model in every case; equal cases are measured once.

    Args:
        model: a model with masked layers. Layers outside its blocks are dense when one block alone
            is pruned, and pruned when one alone is kept dense.
        measure: returns the scores of the model as it is, under hard masks.
        watch: wraps the iteration over the cases, to show progress; a case is the set of names of
            its dense layers.
    """
    layers = masked_layers(model)
    everything = frozenset(layers)
    blocks = {
        name: frozenset(layer for layer in layers if layer.startswith(f"{name}."))
        for name in decoder_blocks(model)
    }
    parts = list(blocks.values())
    few = {f"last {k}": parts[-k:] for k in LAST if k < len(parts)}
    if len(parts) > 1:
        few = {"first 1": parts[:1]} | few
    kept = {name: frozenset[str]().union(*some) for name, some in few.items()}

    cases = [everything, frozenset[str](), *(everything - own for own in parts), *parts]
    scores: dict[frozenset[str], Scores] = {}
    for case in watch(list(dict.fromkeys([*cases, *kept.values()]))):
        with kept_dense(layers[name] for name in case):
            scores[case] = measure()

    dense, pruned = scores[everything], scores[frozenset()]
    found = []
    for name, own in blocks.items():
        alone_pruned, alone_dense = scores[everything - own], scores[own]
        increase = alone_pruned[OVERALL].loss - dense[OVERALL].loss
        decrease = pruned[OVERALL].loss - alone_dense[OVERALL].loss
        found.append(BlockSensitivity(name, alone_pruned, alone_dense, increase, decrease))
    return Sensitivity(dense, pruned, found, {name: scores[case] for name, case in kept.items()})


@contextmanager
def kept_dense(layers: Iterable[MaskedLinear]) -> Iterator[None]:
    """Within this context some layers use all their weights, under any masking of the model."""
    scope = MaskScope()
    scope.masking = "dense"
    before = [(layer, layer.scope) for layer in layers]
    try:
        for layer, _ in before:
            layer.scope = scope
        yield
    finally:
        for layer, own in before:
            layer.scope = own
