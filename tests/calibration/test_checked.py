"""Mistakes of authors of strategies in ``calibrate``, which must not pass in silence."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify import Block, Effect, LayerResult, Moments, SparsifyError, SparsityStrategy
from sparsify.calibration import Calibration
from tests.calibration.engine import masked
from tests.conftest import tiny_llama

FIRST = "model.layers.0.self_attn.q_proj"
Make = Callable[[str, Tensor, Tensor], object]


class Own(SparsityStrategy):
    """Yields what ``make`` gives for (name, mask, weight) of each layer."""

    def __init__(self, make: Make, updates: bool = False) -> None:
        super().__init__()
        self.make = make
        self.effect = Effect(weights="updated" if updates else "frozen")

    def calibrate(self, blocks: Iterable[Block]) -> Any:
        for block in blocks:
            for name, layer in block.layers.items():
                weight_OI = layer.weight_OI.detach()
                yield self.make(name, layer.masker.pattern.top(weight_OI.abs()), weight_OI)


def found(strategy: SparsityStrategy, activations: Any = "pruned") -> dict[str, LayerResult]:
    """What the engine passes on."""
    return dict(
        masked(tiny_llama(), Calibration(activations=activations, cache=False)).run(strategy)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda n, m, w: m, r"yields \(bool \[32, 32\]\); yield name, LayerResult"),
        (lambda n, m, w: (n, m), r"yields \(a str, bool \[32, 32\]\); yield name, Layer"),
        (lambda n, m, w: (n, LayerResult(m), w), r"yields \(a str, a LayerResult, float32"),
        (lambda n, m, w: None, r"yields \(None\)"),
        (lambda n, m, w: ("q_proj", LayerResult(m)), "'q_proj', which is no masked layer"),
        (lambda n, m, w: (n, LayerResult(m[:1])), rf"{FIRST} as mask bool \[1, 32\]; it must be"),
        (lambda n, m, w: (n, LayerResult(m[:, :16])), r"as mask bool \[32, 16\]"),
        (lambda n, m, w: (n, LayerResult(m.float())), r"as mask float32 \[32, 32\]; it must be b"),
        (lambda n, m, w: (n, LayerResult(None)), "as mask None"),
    ],
)
def test_a_result_of_another_form_is_refused(make: Make, words: str) -> None:
    with pytest.raises(SparsifyError, match=rf"Own.calibrate.*{words}"):
        found(Own(make))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w[:, :1], r"float32 \[32, 1\]; it must be floating point \[32, 32\]"),
        (lambda w: w.long(), r"int64 \[32, 32\]"),
        (lambda w: w.tolist(), "a list"),
    ],
)
def test_a_new_weight_of_another_form_is_refused(
    change: Callable[[Tensor], Any], words: str
) -> None:
    with pytest.raises(SparsifyError, match=f"{FIRST} as new weight {words}"):
        found(Own(lambda n, m, w: (n, LayerResult(m, change(w))), updates=True))


def test_new_weights_must_be_declared() -> None:
    def make(name: str, mask: Tensor, weight: Tensor) -> object:
        return name, LayerResult(mask, 2 * weight)

    with pytest.raises(SparsifyError, match=r'declare effect = Effect\(weights="updated"\)'):
        found(Own(make))
    assert len(found(Own(make, updates=True))) == 14


class Listed(SparsityStrategy):
    """Collects all results before it gives the first."""

    def __init__(self, statistics: bool) -> None:
        super().__init__()
        self.statistics = statistics

    def calibrate(self, blocks: Iterable[Block]) -> Any:
        results = []
        for block in blocks:
            if self.statistics:
                block.collect(Moments)
            for name, layer in block.layers.items():
                results.append((name, LayerResult(layer.masker.pattern.top(layer.weight_OI.abs()))))
        return results


def test_results_that_come_too_late_to_prune_are_refused() -> None:
    with pytest.raises(SparsifyError, match=f"{FIRST} after it took the next block"):
        found(Listed(statistics=True))
    # Where nothing is pruned meanwhile, nothing is late.
    expected = found(Listed(statistics=False))
    assert len(expected) == 14
    dense = found(Listed(statistics=True), activations="dense")
    assert all(torch.equal(dense[name].mask, result.mask) for name, result in expected.items())


def test_a_calibrate_that_returns_nothing_is_refused() -> None:
    class Silent(SparsityStrategy):
        def calibrate(self, blocks: Iterable[Block]) -> Any:
            return None

    with pytest.raises(SparsifyError, match="Silent.calibrate returned None; it must yield"):
        found(Silent())
