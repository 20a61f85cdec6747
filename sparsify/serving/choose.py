"""Decides which layers run sparse, and says why.

A layer runs sparse if that was faster at every measured number of tokens.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sparsify.common.errors import SparsifyError
from sparsify.masking.pattern import NMPattern
from sparsify.models.layer_names import family
from sparsify.serving.backends import Backend
from sparsify.serving.measure import Clock, LayerKind, measure
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
        backend: the name of the backend that runs it, or ``dense``.
        reason: why this was chosen.
        seconds: the measured times, by backend.
    """

    kind: LayerKind
    backend: str
    reason: str
    seconds: Mapping[str, Seconds]


class Choices(dict[str, Choice]):
    """How each layer that was made sparse runs, by qualified name; all others are dense."""

    def describe(self) -> str:
        """A table of layer families, and a table of times."""
        counts: dict[tuple[str, LayerKind, str, str], int] = {}
        for name, choice in self.items():
            row = family(name), choice.kind, choice.backend, choice.reason
            counts[row] = counts.get(row, 0) + 1
        rows = [("layers", "number", "weight", "runs", "reason")]
        rows += [(f, str(n), str(kind), runs, why) for (f, kind, runs, why), n in counts.items()]
        times = {
            (str(choice.kind), backend, str(count)): (f"{dense * 1e6:.1f}", f"{sparse * 1e6:.1f}")
            for choice in self.values()
            for backend, seconds in choice.seconds.items()
            for count, (dense, sparse) in seconds.items()
        }
        parts = [_table(rows)]
        if times:
            head = ("weight", "backend", "tokens", "dense us", "sparse us")
            parts.append(_table([head, *((*key, *pair) for key, pair in times.items())]))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.describe()


def choose_layers(
    layers: Mapping[str, Layer],
    device: torch.device,
    choose: Choose,
    counts: Sequence[int],
    backends: Sequence[Backend],
    clock: Clock,
) -> Choices:
    """Decide for every layer; each kind is measured once.

    Raises:
        SparsifyError: ``choose`` is ``sparse``, and no backend runs here.
    """
    running = [b for b in backends if b.available(device)] if choose != DENSE else []
    if choose == "sparse" and not running:
        raise SparsifyError(
            f"choose='sparse': none of {', '.join(b.name for b in backends)} runs on {device}; "
            "choose 'measured' or 'dense', or another device"
        )
    timings = Timings(device)
    decided: dict[tuple[LayerKind, tuple[str, ...]], Choice] = {}
    choices = Choices()
    for name, layer in layers.items():
        kind = layer.kind
        fitting = [b for b in running if b.takes(kind.shape, kind.dtype, layer.pattern)]
        if (
            why_dense := _why_dense(layer, choose, bool(running), bool(fitting), device)
        ) is not None:
            choices[name] = Choice(kind, DENSE, why_dense, {})
        elif choose == "sparse":
            choices[name] = Choice(kind, fitting[0].name, "asked for", {})
        else:
            key = kind, tuple(b.name for b in fitting)
            if key not in decided:
                seconds = {
                    b.name: _seconds(kind, b, counts, device, clock, timings) for b in fitting
                }
                decided[key] = _decide(kind, seconds)
            choices[name] = decided[key]
    return choices


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


def _seconds(
    kind: LayerKind,
    backend: Backend,
    counts: Sequence[int],
    device: torch.device,
    clock: Clock,
    timings: Timings,
) -> Seconds:
    """The times, from the cache or measured now; empty if the device cannot run the layer."""
    known = timings.get(kind, backend.name, counts)
    if missing := [count for count in counts if count not in known]:
        try:
            new = measure(kind, backend, missing, device, clock)
        except RuntimeError as error:
            log.warning("%s cannot run %s and is not used for it: %s", backend.name, kind, error)
            return {}
        timings.add(kind, backend.name, new)
        known |= new
    return {count: known[count] for count in counts}


def _decide(kind: LayerKind, seconds: Mapping[str, Seconds]) -> Choice:
    """Choose the fastest backend of those that beat dense at every number of tokens."""
    measured = {backend: times for backend, times in seconds.items() if times}
    if not measured:
        return Choice(kind, DENSE, "no backend could run it; see the log", {})
    # Times of one token and of thousands differ by orders of magnitude, so compare shares.
    shares = {
        backend: {count: sparse / dense for count, (dense, sparse) in times.items()}
        for backend, times in measured.items()
    }
    lost = {
        backend: [str(count) for count, share in of.items() if share > 1 - MARGIN]
        for backend, of in shares.items()
    }
    winners = [backend for backend, where in lost.items() if not where]
    if winners:
        best = min(winners, key=lambda backend: sum(shares[backend].values()))
        return Choice(kind, best, "faster at every measured count", measured)
    where = "; ".join(f"{backend} at {', '.join(at)}" for backend, at in lost.items())
    return Choice(kind, DENSE, f"no faster: {where} tokens", measured)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
