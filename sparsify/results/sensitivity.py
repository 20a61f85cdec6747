"""Which decoder blocks lose most by their masks.

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
    """What one block's masks do; scores are by text, and overall.

    Attributes:
        name: the block's qualified name.
        alone_pruned: scores with every other block dense.
        alone_dense: scores with every other block pruned.
        loss_increase: what pruning it adds to the loss of the dense model, nats a token.
        loss_decrease: what keeping it dense takes off the loss of the pruned model, nats a token.
    """

    name: str
    alone_pruned: Scores
    alone_dense: Scores
    loss_increase: float
    loss_decrease: float


@dataclass(frozen=True)
class Sensitivity:
    """What all cases gave.

    Attributes:
        dense: scores of the base model.
        pruned: scores under all masks.
        blocks: each block by itself, in the model's order.
        kept_dense: scores by which blocks were kept dense: "first 1", "last 4".
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
    """Measure a masked model under every case; two cases that are the same are measured once.

    Args:
        model: with masked layers. Those outside its blocks are dense where a block is pruned alone,
            and pruned where one is kept dense.
        measure: gives the scores of the model as it is, under hard masks.
        watch: wraps the iteration over the cases, each the names of the dense layers, to show how
            far it is.
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
    """Let some layers use all their weights for a while, however the model is run."""
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
