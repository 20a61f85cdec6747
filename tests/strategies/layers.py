"""Single layers for one-shot strategies, random and real, and obvious arithmetic to check them by.

Shapes: S windows, T tokens, O out, I in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsify import Block, FixedMasker, LayerResult, NMPattern, SparsityStrategy
from sparsify.data import TextDataModule
from sparsify.masking.experts import masked
from sparsify.masking.layer import MaskScope
from sparsify.models.base import EMBEDDED, EMBEDDED_FOLDER, load_model, load_tokenizer

Array = NDArray[Any]
PATTERNS = ["2:4", "1:4", "2:8", "4:8", "3:5"]


@dataclass(frozen=True)
class Layer:
    """A layer, what enters it, and the norms of its gradient; and what enters it in the dense model
    if that is something else.
    """

    name: str
    weight_OI: Tensor
    x_STI: Tensor
    gradient_OI: Tensor
    dense_STI: Tensor | None = None

    @cached_property
    def w(self) -> Array:
        """The weight in float64."""
        return self.weight_OI.double().numpy()

    @cached_property
    def x(self) -> Array:
        """The input, all tokens after one another, in float64."""
        return self.x_STI.flatten(0, 1).double().numpy()

    @cached_property
    def h(self) -> Array:
        """X^T X."""
        return self.x.T @ self.x

    @cached_property
    def g(self) -> Array:
        """The gradient's norms in float64."""
        return self.gradient_OI.double().numpy()


def random_layer(
    rows: int = 12, columns: int = 320, windows: int = 8, tokens: int = 80, seed: int = 0
) -> Layer:
    """Correlated inputs of very different sizes; no column is zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shared = normal(windows, tokens, 4) @ normal(4, columns)
    x_STI = (normal(windows, tokens, columns) + 0.5 * shared + 0.3 * normal(columns)) * (
        0.7 * normal(columns)
    ).exp()
    return Layer("layer", normal(rows, columns), x_STI, normal(rows, columns).abs() * 0.01)


REAL = ["model.layers.0.self_attn.q_proj", "model.layers.4.mlp.gate_proj"]
WIDE = "model.layers.2.mlp.down_proj"


@cache
def real_layers() -> dict[str, Layer]:
    """Layers of the embedded model on four windows of its own text."""
    model = load_model(EMBEDDED)
    text = EMBEDDED_FOLDER / "text" / "shakespeare" / "validation.jsonl.gz"
    windows = TextDataModule(train=str(text), tokenizer=load_tokenizer(EMBEDDED)).calibration(4)
    names = [*REAL, WIDE]
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    squares: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0][0].detach())
        )
    for tokens in windows:
        model.zero_grad()
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], tokens[1:]).backward()
        for name in names:
            squares[name] = squares.get(name, 0) + model.get_parameter(f"{name}.weight").grad ** 2
    return {
        name: Layer(
            name,
            model.get_parameter(f"{name}.weight").detach(),
            torch.stack(inputs[name]),
            squares[name].sqrt(),
        )
        for name in names
    }


class Given:
    """Statistics of inputs that are at hand."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def collect(self, kind: Callable[[int, torch.device], Any]) -> dict[str, Any]:
        found = kind(self.layer.x_STI.shape[-1], torch.device("cpu"))
        dense_STI = self.layer.x_STI if self.layer.dense_STI is None else self.layer.dense_STI
        for x_TI, dense_TI in zip(self.layer.x_STI, dense_STI, strict=True):
            found.add(*((x_TI, dense_TI) if getattr(kind, "paired", False) else (x_TI,)))
        return {self.layer.name: found}

    def gradient_norms(self) -> dict[str, Tensor]:
        return {self.layer.name: self.layer.gradient_OI}


def block_of(layer: Layer, pattern: str) -> Block:
    """A block of this one layer."""
    rows, columns = layer.weight_OI.shape
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(layer.weight_OI.clone(), requires_grad=False)
    masker = FixedMasker(layer.name, (rows, columns), NMPattern.parse(pattern))
    return Block("block", {layer.name: masked(linear, masker, MaskScope())}, Given(layer))


def result_of(strategy: SparsityStrategy, layer: Layer, pattern: str = "2:4") -> LayerResult:
    """What the strategy finds for one layer; exactly N:M."""
    block = block_of(layer, pattern)
    [(name, result)] = list(strategy.calibrate([block]))
    assert name == layer.name
    NMPattern.parse(pattern).rank(result.mask)  # raises if a group does not hold N
    assert torch.equal(block.layers[name].weight_OI, layer.weight_OI)  # the caller applies results
    if result.weight is not None:
        assert result.weight.dtype == layer.weight_OI.dtype
        assert bool(result.weight.isfinite().all())
        assert not bool(result.weight[~result.mask].any())
    return result


def keep_largest(score: Array, pattern: str) -> Array:
    """Row by row, group by group: the N largest; of equal ones the first."""
    n, m = map(int, pattern.split(":"))
    mask = np.zeros(score.shape, bool)
    for row, values in enumerate(score.tolist()):
        for start in range(0, len(values), m):
            order = sorted(range(start, start + m), key=lambda k: (-values[k], k))
            mask[row, order[:n]] = True
    return mask


def error(change: Array, hessian: Array) -> float:
    """The squared change of the layer's output, tr(dW H dW^T)."""
    return float(np.einsum("oi,ij,oj->", change, hessian, change))


def check(result: LayerResult, layer: Layer, pattern: str, mask: Array, weight: Array) -> None:
    """At least 999 of 1000 groups are those of the reference, and errors are within a thousandth.

    Args:
        result: what was found.
        layer, pattern: for what.
        mask: the reference's.
        weight: the reference's new weight, zero where it is dropped.
    """
    m = int(pattern.partition(":")[2])
    found = result.mask.numpy()
    same = (found == mask).reshape(len(mask), -1, m).all(-1)
    assert same.mean() >= 0.999, f"{same.mean():.5f} of the groups are equal"
    kept = layer.weight_OI if result.weight is None else result.weight
    new = np.where(found, kept.double().numpy(), 0)
    ours, theirs = (error(w - layer.w, layer.h) for w in (new, weight))
    assert theirs > 0
    assert abs(ours / theirs - 1) < 1e-3, f"errors {ours} and {theirs}"


def check_mask(result: LayerResult, layer: Layer, pattern: str, mask: Array) -> None:
    """As :func:`check`, for a strategy that leaves weights as they are."""
    assert result.weight is None
    check(result, layer, pattern, mask, np.where(mask, layer.w, 0))


def check_scores(
    strategy: SparsityStrategy, layer: Layer, pattern: str, score: Array
) -> LayerResult:
    """As :func:`check_mask`, for one that keeps the largest of these scores; what it found."""
    result = result_of(strategy, layer, pattern)
    check_mask(result, layer, pattern, keep_largest(score, pattern))
    return result
