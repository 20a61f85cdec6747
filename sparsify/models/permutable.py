"""Which channels of a model can be put in another order, found by a run on a few tokens."""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsify.models.channel_trace import ChannelTrace
from sparsify.models.expert_layout import is_transposed
from sparsify.models.permutation import Kind, Part, Place, inverse, permute

RESIDUAL = "residual"
_TOKENS = 8
# By how much logits may change, as a share of the largest, when channels are summed in another
# order: in 32 bits; and in 16 bits, where a rounding is that much, at most tokens.
_EXACT, _ROUGH = 1e-4, 0.05


def permutable(model: PreTrainedModel) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts of a model whose channels can be put in another order, and what has none.

    Args:
        model: the model, before layers are masked.

    Returns:
        The parts by name; and by the name of a layer, or ``residual``, why its inputs stay in
        their order.
    """
    with _quiet(model), ChannelTrace(model) as trace:
        trace.pin(model(input_ids=_tokens(model), use_cache=False).logits)
    return _Parts(model, trace).found()


class _Parts:
    """The parts of a model, from a trace of its channels."""

    def __init__(self, model: PreTrainedModel, trace: ChannelTrace) -> None:
        self._model, self._trace = model, trace
        labels = self._labels = trace.labels
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        count = len(labels.pinned)
        self._root = labels.roots()
        self._axis_of = torch.repeat_interleave(
            torch.arange(len(trace.axes)), torch.tensor([size for *_, size in trace.axes])
        )
        zero = torch.zeros(count, dtype=torch.int64)
        self._colour = zero.index_add(0, self._root, labels.colours)
        # What a channel consists of: how often it is on each axis.
        odd = (torch.arange(len(trace.axes)) + 1) * -7046029254386353131
        signs = (odd ^ (odd >> 29)) * -4658895280553007687
        self._sign = zero.index_add(0, self._root, signs[self._axis_of])
        self._pinned = zero.index_add(0, self._root, labels.pinned.long()) > 0
        self._mixed = zero.index_add(0, self._root, labels.mixed.long()) > 0
        # Modules in which tokens are mixed.
        mixed = self._axis_of[labels.mixed].unique().tolist()
        self._attention = {_owner(trace.axes[axis][0]) for axis in mixed}

    def found(self) -> tuple[dict[str, Part], dict[str, str]]:
        """All parts, and what has none."""
        groups: dict[int, list[int]] = defaultdict(list)  # the axes that a kind of channel reads
        for axis, (_, _, start, size) in enumerate(self._trace.axes):
            if self._layer(axis) is not None:
                for sign in self._sign[self._root[start : start + size]].unique().tolist():
                    groups[sign].append(axis)
        parts: dict[str, Part] = {}
        reasons: dict[str, str] = {}
        for sign, reads in groups.items():
            roots = self._order(sign, reads[0])
            axes = self._axes(roots)
            name, kind = self._name(roots, axes, reads, parts)
            reason, runs = (self._unread() if kind == RESIDUAL else None, self._runs(roots))
            if reason is None and runs:
                parts[name] = self._part(name, kind, roots, runs, axes, set(reads))
                continue
            for each in [name] if kind == RESIDUAL else map(self._layer, reads):
                reasons[str(each)] = reason or self._told_apart(roots)
        return parts, reasons

    def _layer(self, axis: int) -> str | None:
        """The layer whose inputs an axis counts, if it is one."""
        name, along, start, size = self._trace.axes[axis]
        if not bool(self._labels.read[start : start + size].any()):
            return None
        owner, _, key = name.rpartition(".")
        layer = self._model.get_submodule(owner)
        if self._parameters[name].ndim == 3:
            inputs_at = 1 if is_transposed(layer) else 2
            return name if along == inputs_at else None
        inputs = {nn.Linear: 1, Conv1D: 0}
        known = any(isinstance(layer, kind) and along == at for kind, at in inputs.items())
        return owner if known and key == "weight" else None

    def _order(self, sign: int, axis: int) -> Tensor:
        """The roots of channels of one kind, as they follow each other on an axis."""
        _, _, start, size = self._trace.axes[axis]
        roots = self._root[start : start + size]
        roots = roots[self._sign[roots] == sign]
        first = torch.full((len(self._root),), size).scatter_reduce(
            0, roots, torch.arange(len(roots)), "amin"
        )
        unique = roots.unique()
        return unique[first[unique].argsort()]

    def _axes(self, roots: Tensor) -> list[int]:
        member = torch.isin(self._root, roots)
        return [int(a) for a in self._axis_of[member].unique()]

    def _name(
        self, roots: Tensor, axes: list[int], reads: list[int], taken: Any
    ) -> tuple[str, Kind]:
        names = [self._trace.axes[axis][0] for axis in axes]
        embedding = self._model.get_input_embeddings()
        if any(self._model.get_submodule(n.rpartition(".")[0]) is embedding for n in names):
            return RESIDUAL, "residual"
        found = os.path.commonprefix([_owner(name).split(".") for name in names])
        name = ".".join(found)
        if not any(part.isdigit() for part in found):  # in several blocks
            name = _owner(self._trace.axes[reads[0]][0])
        attention = name in self._attention or bool(self._mixed[roots].any())
        if name in taken:
            name = str(self._layer(reads[0]))
        while name in taken:
            name += "_"
        return name, "heads" if attention else "mlp"

    def _unread(self) -> str | None:
        """A Parameter that may be used with the residual stream in ways that the run did not show,
        as a vision tower's.
        """
        used = self._trace.used
        unread = [name for name, p in self._parameters.items() if id(p) not in used]
        return f"{unread[0]} is not read when the model runs on text" if unread else None

    def _runs(self, roots: Tensor) -> int:
        """Into how many equal runs of two or more these channels are divided; 0 if into none."""
        _, lengths = self._colour[roots].unique_consecutive(return_counts=True)
        split = len(self._colour[roots].unique()) < len(lengths) or len(lengths.unique()) > 1
        pinned = bool(self._pinned[roots].any())
        return 0 if pinned or split or lengths[0] < 2 else len(lengths)

    def _told_apart(self, roots: Tensor) -> str:
        why = self._labels.why[torch.isin(self._root, roots)]
        step = self._labels.steps[int(why.max())] if bool((why >= 0).any()) else "their layers"
        return f"its channels are told apart by {step}"

    def _part(
        self, name: str, kind: Kind, roots: Tensor, runs: int, axes: list[int], reads: set[int]
    ) -> Part:
        places = []
        number = torch.full((len(self._root),), -1)
        number[roots] = torch.arange(len(roots))
        for axis in axes:
            parameter, along, start, size = self._trace.axes[axis]
            channel = number[self._root[start : start + size]]
            at = (channel >= 0).nonzero().flatten()
            at = at[channel[at].argsort(stable=True)].view(len(roots), -1).T
            places.append(Place(parameter, along, at, axis in reads, False))
        experts = {self._parameters[p.parameter].shape[0] for p in places if p.axis}
        stacks = all(p.axis and self._parameters[p.parameter].ndim > 1 for p in places) and any(
            self._parameters[p.parameter].ndim == 3 for p in places
        )
        size = len(roots)
        if stacks and len(experts) == 1 and runs == 1:
            runs = experts.pop()
            size *= runs
            places = [_each(p, self._parameters[p.parameter].shape[p.axis], runs) for p in places]
        inputs = tuple(str(self._layer(axis)) for axis in axes if axis in reads)
        return Part(name, kind, size, runs, inputs, tuple(places))


def _each(place: Place, length: int, experts: int) -> Place:
    """The same place in every expert, each with channels of its own."""
    at = torch.cat([place.at_KC + expert * length for expert in range(experts)], 1)
    return Place(place.parameter, place.axis, at, place.reads, True)


def proven(
    model: PreTrainedModel, parts: dict[str, Part]
) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts that do not change what a model computes, and why the others are refused.

    The model runs on a few tokens before and after random orders, which are undone. In 32 bits its
    logits may change by 1e-4 of the largest; in 16 bits by 5e-2 of it at the median token.
    """
    with _quiet(model):
        before = model(input_ids=_tokens(model), use_cache=False).logits
        if _change(model, parts, before) is None:
            return dict(parts), {}
        found = {name: _change(model, {name: part}, before) for name, part in parts.items()}
    reasons = {name: reason for name, reason in found.items() if reason}
    return {name: part for name, part in parts.items() if name not in reasons}, reasons


def random_order(part: Part, generator: torch.Generator) -> Tensor:
    """A random order of a part's channels, ``[C]``."""
    length = part.size // part.runs
    runs = [torch.randperm(length, generator=generator) + r * length for r in range(part.runs)]
    return torch.cat(runs)


def _change(model: PreTrainedModel, parts: dict[str, Part], before: Tensor) -> str | None:
    """Why parts are refused, if they are."""
    generator = torch.Generator().manual_seed(0)
    orders = {name: random_order(part, generator) for name, part in parts.items()}
    permute(model, parts, orders)
    try:
        after = model(input_ids=_tokens(model), use_cache=False).logits
    finally:
        permute(model, parts, inverse(orders))
    errors = (after - before).float().abs().amax(-1) / before.float().abs().amax()
    exact = before.dtype in (torch.float32, torch.float64)
    error = float(errors.max() if exact else errors.median())
    if error < (_EXACT if exact else _ROUGH):
        return None
    return f"another order changes the model's logits by {error:.1e} of the largest"


def _tokens(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    words = int(model.config.get_text_config().vocab_size)
    tokens = torch.randint(words, (1, _TOKENS), generator=generator)
    return tokens.to(model.device)


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Without gradients, and without dropout."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _owner(parameter: str) -> str:
    """The module that holds the layer that holds a Parameter."""
    return ".".join(parameter.split(".")[:-2])
