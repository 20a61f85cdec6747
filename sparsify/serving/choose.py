"""Decides which layers run sparse, and says why."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sparsify.common.errors import SparsifyError
from sparsify.masking.pattern import NMPattern
from sparsify.models.layer_names import family
from sparsify.serving.backends import Backend
from sparsify.serving.measure import Clock, LayerKind, in_turns, measure
from sparsify.serving.timings import Timings

log = logging.getLogger("sparsify")

Choose = Literal["measured", "sparse", "dense"]
DENSE = "dense"
MARGIN = 0.02
"""Repeated measurements differ by about this much, so a smaller gain does not count."""

Seconds = dict[int, tuple[float, float]]  # by tokens: dense, sparse


@dataclass(frozen=True)
class Layer:
    """A layer that was made sparse.

    Attributes:
        kind: what its speed depends on.
        pattern: the pattern of its weight.
        obstacle: why it cannot be compressed, whatever its shape; None if it can.
    """

    kind: LayerKind
    pattern: NMPattern
    obstacle: str | None = None


@dataclass(frozen=True)
class Choice:
    """How one layer runs.

    Attributes:
        kind: what its speed depends on.
        backend: the name of the backend that runs it, or ``dense``; with ``steps``, all of them in
            words.
        reason: why this was chosen.
        seconds: the measured times, by backend.
        steps: if the number of tokens decides, the least number for each backend, from 1 up.
    """

    kind: LayerKind
    backend: str
    reason: str
    seconds: Mapping[str, Seconds]
    steps: tuple[tuple[int, str], ...] = ()

    def at(self, tokens: int) -> str:
        """What runs for so many tokens: the name of a backend, or ``dense``."""
        names = (name for least, name in reversed(self.steps) if least <= max(tokens, 1))
        return next(names, self.backend)

    @property
    def used(self) -> tuple[str, ...]:
        """All that runs for some number of tokens, each once."""
        return tuple(dict.fromkeys(name for _, name in self.steps)) or (self.backend,)


Decide = Callable[[LayerKind, Mapping[str, Seconds]], Choice]
"""Makes a choice from the times of at least one backend."""


class Choices(dict[str, Choice]):
    """How each layer that was made sparse runs, by qualified name; all others are dense."""

    def families(self) -> str:
        """A table of layer families: how each runs, and why."""
        counts: dict[tuple[str, LayerKind, str, str], int] = {}
        for name, choice in self.items():
            row = family(name), choice.kind, choice.backend, choice.reason
            counts[row] = counts.get(row, 0) + 1
        rows = [("layers", "number", "weight", "runs", "reason")]
        rows += [(f, str(n), str(kind), runs, why) for (f, kind, runs, why), n in counts.items()]
        return _table(rows)

    def describe(self) -> str:
        """A table of layer families, and a table of times."""
        times = {
            (str(choice.kind), backend, str(count)): (f"{dense * 1e6:.1f}", f"{sparse * 1e6:.1f}")
            for choice in self.values()
            for backend, seconds in choice.seconds.items()
            for count, (dense, sparse) in seconds.items()
        }
        parts = [self.families()]
        if times:
            head = ("weight", "backend", "tokens", "dense us", "sparse us")
            parts.append(_table([head, *((*key, *pair) for key, pair in times.items())]))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.describe()


class Chooser:
    """Decides for one layer after the other; each kind is measured once.

    Args:
        device: where the layers run.
        choose: ``sparse`` and ``dense`` measure nothing.
        counts: the numbers of tokens at which layers are measured.
        backends: those that may be chosen, best first.
        clock: measures the times that are not known yet.
        decide: makes the choice from the times.

    Raises:
        SparsifyError: ``choose`` is ``sparse``, and no backend runs here.
    """

    def __init__(
        self,
        device: torch.device,
        choose: Choose,
        counts: Sequence[int],
        backends: Sequence[Backend],
        clock: Clock = in_turns,
        decide: Decide | None = None,
    ) -> None:
        self._device, self._choose, self._counts, self._clock = device, choose, counts, clock
        self._decide = decide or always
        self._running = [b for b in backends if b.available(device)] if choose != DENSE else []
        if choose == "sparse" and not self._running:
            raise SparsifyError(
                f"choose='sparse': none of {', '.join(b.name for b in backends)} runs on {device}; "
                "choose 'measured' or 'dense', or another device"
            )
        self._timings = Timings(device)
        self._decided: dict[tuple[LayerKind, tuple[str, ...]], Choice] = {}

    def __call__(self, layer: Layer) -> Choice:
        kind = layer.kind
        fitting = [b for b in self._running if b.takes(kind.shape, kind.dtype, layer.pattern)]
        why_dense = _why_dense(
            layer, self._choose, bool(self._running), bool(fitting), self._device
        )
        if why_dense is not None:
            return Choice(kind, DENSE, why_dense, {})
        if self._choose == "sparse":
            return Choice(kind, fitting[0].name, "asked for", {})
        key = kind, tuple(b.name for b in fitting)
        if key not in self._decided:
            times = {b.name: found for b in fitting if (found := self._seconds(kind, b))}
            nothing = Choice(kind, DENSE, "no backend could run it; see the log", {})
            self._decided[key] = self._decide(kind, times) if times else nothing
        return self._decided[key]

    def _seconds(self, kind: LayerKind, backend: Backend) -> Seconds:
        """The times, from the cache or measured now; empty if the device cannot run the layer."""
        known = self._timings.get(kind, backend.name, self._counts)
        if missing := [count for count in self._counts if count not in known]:
            try:
                new = measure(kind, backend, missing, self._device, self._clock)
            except RuntimeError as error:
                log.warning(
                    "%s cannot run %s and is not used for it: %s", backend.name, kind, error
                )
                return {}
            self._timings.add(kind, backend.name, new)
            known |= new
        return {count: known[count] for count in self._counts}


def choose_layers(
    layers: Mapping[str, Layer],
    device: torch.device,
    choose: Choose,
    counts: Sequence[int],
    backends: Sequence[Backend],
    clock: Clock,
) -> Choices:
    """Decide for every layer: sparse if that is faster at every count.

    Raises:
        SparsifyError: ``choose`` is ``sparse``, and no backend runs here.
    """
    chooser = Chooser(device, choose, counts, backends, clock)
    return Choices({name: chooser(layer) for name, layer in layers.items()})


def _why_dense(
    layer: Layer, choose: Choose, running: bool, fitting: bool, device: torch.device
) -> str | None:
    """Why a layer is dense without a measurement."""
    if choose == DENSE:
        return "asked for"
    if layer.obstacle is not None:
        return layer.obstacle
    if not running:
        return f"no backend runs on {device}"
    if not fitting and layer.kind.dtype == torch.float32:
        return "no backend takes float32; load with dtype=torch.bfloat16"
    return None if fitting else f"no backend takes this shape or type at {layer.pattern}"


def always(kind: LayerKind, seconds: Mapping[str, Seconds]) -> Choice:
    """Choose the fastest backend of those that beat dense at every number of tokens."""
    shares = shares_of_dense(seconds)
    lost = {
        backend: [str(count) for count, share in of.items() if share > 1 - MARGIN]
        for backend, of in shares.items()
    }
    winners = [backend for backend, where in lost.items() if not where]
    if winners:
        best = min(winners, key=lambda backend: sum(shares[backend].values()))
        return Choice(kind, best, "faster at every measured count", seconds)
    where = "; ".join(f"{backend} at {', '.join(at)}" for backend, at in lost.items())
    return Choice(kind, DENSE, f"no faster: {where} tokens", seconds)


def shares_of_dense(seconds: Mapping[str, Seconds]) -> dict[str, dict[int, float]]:
    """The time of each backend as a share of dense, by tokens. Times of one token and of thousands
    differ by orders of magnitude; their shares can be compared.
    """
    return {
        backend: {count: sparse / dense for count, (dense, sparse) in times.items()}
        for backend, times in seconds.items()
    }


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
