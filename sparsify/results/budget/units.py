"""What gets one pattern, and what each pattern of it costs.

Shapes: O out, I in.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sparsify.common.errors import SparsifyError
from sparsify.masking.layer import MaskedLinear
from sparsify.masking.overrides import DENSE
from sparsify.models.layer_names import block_and_kind
from sparsify.results.budget.goal import Goal, Pattern, Unit
from sparsify.serving.backends import BACKENDS
from sparsify.serving.measure import LayerKind
from sparsify.serving.packed import ALIGNMENT, PANEL
from sparsify.serving.timings import Timings

Choice = tuple[Pattern, ...]
"""A pattern for each unit, in their order."""


@dataclass(frozen=True)
class Units:
    """The units of a model.

    Attributes:
        layers: the names of each unit's layers, by the unit's name.
        weights: how many weights each unit has.
        costs: by unit, what each pattern that fits its layers costs: of that which is limited.
        sizes: by unit, how many bytes each of these patterns takes.
    """

    layers: Mapping[str, tuple[str, ...]]
    weights: Sequence[int]
    costs: Sequence[Mapping[Pattern, int]]
    sizes: Sequence[Mapping[Pattern, int]]

    def cost(self, choice: Choice) -> int:
        """What a choice costs."""
        return sum(of[p] for of, p in zip(self.costs, choice, strict=True))

    def size(self, choice: Choice) -> int:
        """The bytes of the units' layers."""
        return sum(of[p] for of, p in zip(self.sizes, choice, strict=True))

    def kept(self, choice: Choice) -> float:
        """The share of the units' weights that is kept."""
        kept = (n * density(p) for n, p in zip(self.weights, choice, strict=True))
        return sum(kept) / sum(self.weights)

    def patterns(self, choice: Choice) -> dict[str, Pattern]:
        """The pattern of every layer."""
        own = zip(self.layers.values(), choice, strict=True)
        return {layer: pattern for layers, pattern in own for layer in layers}


def density(pattern: Pattern) -> float:
    """The share of weights that is kept."""
    return 1.0 if pattern is None else pattern.density


def stored_bytes(shape: tuple[int, int], itemsize: int, pattern: Pattern) -> int:
    """The bytes of a packed weight, rows filled up as docs/packed.md says. With the kept values
    goes the position of each, or one bit a weight if that is less; for 2:4 both are four bits a
    group.
    """
    rows, columns = shape
    if pattern is None:
        return rows * columns * itemsize
    groups = columns // pattern.m
    bits = min(pattern.n * math.ceil(math.log2(pattern.m)), pattern.m) * groups
    values = _filled(groups * pattern.n * itemsize, ALIGNMENT)
    return rows * values + _filled(rows, PANEL) * _filled(math.ceil(bits / 8), ALIGNMENT)


def _filled(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def make_units(
    layers: Mapping[str, MaskedLinear], goal: Goal, itemsize: int, device: torch.device
) -> Units:
    """Divide a model's masked layers into units. Layers that share a weight are one unit.

    Args:
        layers: by qualified name.
        goal: says what a unit is, and what its cost is.
        itemsize: bytes of a stored weight.
        device: whose times count.

    Raises:
        SparsifyError: no pattern fits a layer, or there are no times of it.
    """
    first: dict[int, str] = {}
    groups: dict[str, dict[str, MaskedLinear]] = {}
    for name, layer in layers.items():
        unit = _unit(first.setdefault(id(layer.weight), name), goal.unit)
        groups.setdefault(unit, {})[name] = layer

    def bytes_of(layer: MaskedLinear, pattern: Pattern) -> int:
        return stored_bytes(layer.masker.shape, itemsize, pattern)

    def kept_of(layer: MaskedLinear, pattern: Pattern) -> int:
        return int(math.prod(layer.masker.shape) * density(pattern))

    cost_of: Callable[[MaskedLinear, Pattern], int] = bytes_of
    if goal.name == "kept":
        cost_of = kept_of
    elif goal.name == "milliseconds":
        cost_of = _nanoseconds(device, goal.tokens)

    def costs(unit: str, of: Callable[[MaskedLinear, Pattern], int]) -> dict[Pattern, int]:
        own = list({id(layer.weight): layer for layer in groups[unit].values()}.values())
        fitting = [
            p for p in goal.patterns if p is None or all(x.in_features % p.m == 0 for x in own)
        ]
        if not fitting:
            raise SparsifyError(
                f"{unit}: none of {', '.join(map(str, goal.patterns))} divides its inputs; allow "
                f"it to stay dense: --patterns {DENSE} ..."
            )
        return {p: sum(of(layer, p) for layer in own) for p in fitting}

    weights = [costs(unit, lambda layer, _: math.prod(layer.masker.shape)) for unit in groups]
    return Units(
        {unit: tuple(own) for unit, own in groups.items()},
        [next(iter(counts.values())) for counts in weights],
        [costs(unit, cost_of) for unit in groups],
        [costs(unit, bytes_of) for unit in groups],
    )


def _unit(name: str, unit: Unit) -> str:
    block, kind = block_and_kind(name)
    parts = {"layer": [kind], "module": kind.split(".")[:-1][:1], "block": []}[unit]
    return ".".join([block, *parts])


def _nanoseconds(device: torch.device, tokens: int) -> Callable[[MaskedLinear, Pattern], int]:
    """Reads the times that were kept when an export was loaded on this device."""
    timings = Timings(device)

    def cost(layer: MaskedLinear, pattern: Pattern) -> int:
        shape, dtype = layer.masker.shape, layer.weight.dtype
        kind = LayerKind(shape, dtype, layer.bias is not None)
        found = [(b, timings.get(kind, b.name, [tokens]).get(tokens)) for b in BACKENDS]
        times = [(backend, pair) for backend, pair in found if pair is not None]
        if not times or layer.experts is not None:
            raise SparsifyError(
                f"milliseconds: no times of a layer {kind} for {tokens} tokens are kept for "
                f"{device.type} in {timings.path.name}; load an export of this model on the device "
                "with sparsify.serving, which measures them, name a number of tokens that was "
                "measured with --tokens, or give another budget"
            )
        dense = min(pair[0] for _, pair in times)
        if pattern is None:
            return round(dense * 1e9)
        sparse = [pair[1] for b, pair in times if b.takes(shape, dtype, pattern)]
        return round(min([dense, *sparse]) * 1e9)

    return cost


def describe(choice: Choice) -> list[str]:
    """The patterns of a choice, as text."""
    return [str(pattern or DENSE) for pattern in choice]


def uniform(units: Units, pattern: Pattern) -> Choice | None:
    """The choice of one pattern for all units; None if it does not fit them all."""
    fits = all(pattern in of for of in units.costs)
    return (pattern,) * len(units.costs) if fits else None
