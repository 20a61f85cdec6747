"""The masks of a model's layers for several patterns, and the model under any choice of them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.masker import FixedMasker
from sparsify.masking.sharded_rows import hard_mask
from sparsify.models.hashes import hash_tensor
from sparsify.results.budget.goal import Pattern
from sparsify.results.sensitivity import kept_dense

Masks = Mapping[str, FixedMasker | None]
"""By layer; None leaves it dense."""


class Bank:
    """Masks by layer and pattern.

    Args:
        masked: the model, whose strategy leaves the base weights as they are.
        calibrate: gives the model's maskers their first values.
    """

    def __init__(self, masked: MaskedModel, calibrate: Callable[[], object]) -> None:
        self._masked, self._calibrate = masked, calibrate
        self._layers = masked.layers
        self._first = {name: layer.masker for name, layer in self._layers.items()}
        self._made: dict[tuple[str, Pattern], FixedMasker | None] = {}
        self._digests: dict[FixedMasker, str] = {}

    def add(self, pattern: Pattern) -> None:
        """Calibrate the model with one pattern for all layers that it fits."""
        fits = {
            name: pattern if pattern is not None and layer.in_features % pattern.m == 0 else None
            for name, layer in self._layers.items()
        }
        for name, masker in self.calibrated(fits).items():
            self._made[name, pattern] = masker

    def masks(self, patterns: Mapping[str, Pattern]) -> Masks:
        """Of each layer those that :meth:`add` made."""
        return {name: None if p is None else self._made[name, p] for name, p in patterns.items()}

    def calibrated(self, patterns: Mapping[str, Pattern]) -> Masks:
        """The masks that the strategy makes for these patterns together, as ``fit`` does."""
        model, strategy = self._masked.model, self._masked.strategy
        if all(pattern is None for pattern in patterns.values()):
            return dict.fromkeys(patterns)
        maskers = {}
        for name, layer in self._layers.items():
            if (pattern := patterns[name]) is None:
                layer.leave(model, name)
                continue
            first = self._first[name]
            if first not in maskers:
                made = strategy.make_masker(first.name, first.shape, pattern)
                maskers[first] = made.to(layer.weight.device)
            layer.masker = maskers[first]
        try:
            self._calibrate()
            found = {}
            for first, masker in maskers.items():
                name = next(n for n, own in self._first.items() if own is first)
                found[first] = FixedMasker(masker.name, masker.shape, masker.pattern)
                found[first].to(self._layers[name].weight.device)
                found[first].set_mask(hard_mask(self._layers[name]))
            return {name: found.get(first) for name, first in self._first.items()}
        finally:
            for name, layer in self._layers.items():
                if patterns[name] is None:
                    layer.put(model, name)
                layer.masker = self._first[name]

    @contextmanager
    def use(self, masks: Masks) -> Iterator[None]:
        """Within this context the layers have these masks."""
        dense = [self._layers[name] for name, masker in masks.items() if masker is None]
        try:
            for name, masker in masks.items():
                if masker is not None:
                    self._layers[name].masker = masker
            with kept_dense(dense):
                yield
        finally:
            for name, layer in self._layers.items():
                layer.masker = self._first[name]

    def digest(self, masks: Masks) -> str:
        """A hash of the masks."""
        return _hash(
            *(f"{name} {self._digest(m)}" for name, m in sorted(masks.items()) if m is not None)
        )

    def _digest(self, masker: FixedMasker) -> str:
        if masker not in self._digests:
            self._digests[masker] = f"{masker.pattern} {hash_tensor(masker.rank_OG.data)}"
        return self._digests[masker]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
