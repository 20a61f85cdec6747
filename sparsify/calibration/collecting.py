"""Collects statistics of layer inputs while the calibration windows run through a block.

Shapes: B any leading dimensions, I in.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from sparsify.calibration.statistics import Statistic
from sparsify.common.errors import SparsifyError
from sparsify.masking.experts import Expert, MaskedExperts
from sparsify.masking.layer import MaskedLinear

log = logging.getLogger("sparsify")

#: An expert that got fewer tokens is pruned as if its inputs were independent and of equal size.
MIN_TOKENS = 32
# Bytes of experts' statistics of a block at one time: it may have hundreds of large Hessians.
AT_ONCE = 1 << 30
_ROWS = 1024

Layers = Mapping[str, MaskedLinear | Expert]
Kind = Callable[[int, torch.device], Any]


class Statistics(Mapping[str, Any]):
    """One statistic for every layer of a block, by layer name.

    Layers with the same input tensor share one object. Of experts only the present ones and others
    near them are held; the block runs again when a name is asked for that is not.

    An expert that got fewer than :data:`MIN_TOKENS` tokens gets, in place of them, the rows of the
    identity matrix: weights that are scored by their inputs are then scored by their own size.

    Args:
        layers: the layers.
        kind: makes a statistic, given the number of inputs and a device.
        device: where the layers run.
        run: runs the layers over one window at each step.
        run_dense: the same, on what enters the block in the dense model; None where this is what
            enters it. Only a paired statistic needs it, which gets both inputs of a window. Of
            experts it gets the present input twice, as other tokens may come in the dense model.
        few: here the tokens of experts that got too few are noted, by name.

    Raises:
        SparsifyError: a layer got no token.
    """

    def __init__(
        self,
        layers: Layers,
        kind: Kind,
        device: torch.device,
        run: Callable[[], Iterable[object]],
        run_dense: Callable[[], Iterable[object]] | None,
        few: dict[str, int],
    ) -> None:
        self._layers, self._kind, self._device = layers, kind, device
        self._run, self._run_dense, self._few = run, run_dense, few
        self._paired = getattr(kind, "paired", False)
        self._dense = False  # whether the dense model's inputs are passing at present
        experts = {n: layer for n, layer in layers.items() if isinstance(layer, Expert)}
        self._parts = list(_parts(experts, kind, device))
        always = {name: layer for name, layer in layers.items() if name not in experts}
        first = self._collect(always | (self._parts[0] if self._parts else {}))
        self._always = {name: first.pop(name) for name in always}
        self._present = first

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, name: str) -> Any:
        if name in self._always:
            return self._always[name]
        if name not in self._present:
            part = next((part for part in self._parts if name in part), None)
            if part is None:
                raise KeyError(name)
            self._present = {}  # free the others first
            self._present = self._collect(part)
        return self._present[name]

    def _collect(self, layers: Layers) -> dict[str, Any]:
        statistics: dict[str, Statistic] = {}
        tokens = {name: 0 for name, layer in layers.items() if isinstance(layer, Expert)}
        owners: set[str] = set()  # the first layer with each input
        window: list[tuple[Tensor, Statistic]] = []  # inputs of this window, to find shared ones
        linear = len(layers) - len(tokens)
        dense: dict[str, Tensor] = {}  # inputs of this window in the dense model

        def see(name: str, x_BI: Tensor) -> None:
            if name not in statistics:
                shared = next((stat for x, stat in window if x.is_set_to(x_BI)), None)
                if shared is None:
                    owners.add(name)
                    shared = self._kind(x_BI.shape[-1], x_BI.device)
                statistics[name] = shared
            if name in owners and self._dense:
                dense[name] = x_BI.flatten(0, -2)
            elif name in owners:
                x_TI = x_BI.flatten(0, -2)
                self._add(statistics[name], x_TI, dense.get(name, x_TI))
                if len(statistics) < linear:
                    window.append((x_BI, statistics[name]))

        def see_expert(names: Mapping[int, str], x_BI: Tensor, number: int) -> None:
            if (name := names.get(number)) is None or self._dense:
                return
            x_TI = x_BI.flatten(0, -2)
            x_TI = x_TI[(x_TI != 0).any(-1)]  # some blocks give zeros for tokens routed elsewhere
            if name not in routed:
                routed[name] = self._kind(x_TI.shape[-1], x_TI.device)
            self._add(routed[name], x_TI, x_TI)
            tokens[name] += len(x_TI)

        routed: dict[str, Statistic] = {}
        stacks: dict[MaskedExperts, dict[int, str]] = {}
        with ExitStack() as stack:
            for name, layer in layers.items():
                if isinstance(layer, Expert):
                    stacks.setdefault(layer.layer, {})[layer.number] = name
                    continue
                hook = layer.register_forward_pre_hook(
                    lambda _, args, name=name: see(name, args[0])
                )
                stack.callback(hook.remove)
            for experts, names in stacks.items():
                hook = experts.register_forward_pre_hook(
                    lambda _, args, names=names: see_expert(names, *args)
                )
                stack.callback(hook.remove)
            for _ in self._passes():
                window.clear()
        for name, count in tokens.items():
            if count < MIN_TOKENS:
                self._few[name] = count
                routed.pop(name, None)  # free it first
                routed[name] = self._of_equal_inputs(layers[name].masker.shape[1])
        statistics |= routed
        if missing := [name for name in layers if name not in statistics]:
            raise SparsifyError(
                f"no calibration token reached {', '.join(missing)}; every masked layer must be "
                "used: raise --model.calibration.samples, or leave it dense with --model.exclude"
            )
        return statistics

    def _passes(self) -> Iterator[None]:
        """Run window by window; where both inputs are needed, first that of the dense model."""
        own, done = iter(self._run()), object()
        dense = iter(self._run_dense()) if self._paired and self._run_dense else iter(())
        while True:
            self._dense = True
            next(dense, done)
            self._dense = False
            if next(own, done) is done:
                return
            yield

    def _add(self, statistic: Any, x_TI: Tensor, dense_TI: Tensor) -> None:
        statistic.add(*((x_TI, dense_TI) if self._paired else (x_TI,)))

    def _of_equal_inputs(self, inputs: int) -> Statistic:
        statistic: Statistic = self._kind(inputs, self._device)
        for row in range(0, inputs, _ROWS):
            rows = torch.arange(row, min(row + _ROWS, inputs), device=self._device)
            x_TI = torch.zeros(len(rows), inputs, dtype=torch.float32, device=self._device)
            x_TI.scatter_(1, rows[:, None], 1.0)
            self._add(statistic, x_TI, x_TI)
        return statistic


def _parts(
    experts: Mapping[str, Expert], kind: Kind, device: torch.device
) -> Iterator[dict[str, Expert]]:
    """The experts in parts whose statistics fit in memory together."""
    sizes: dict[int, int] = {}
    part: dict[str, Expert] = {}
    held = 0
    for name, expert in experts.items():
        inputs = expert.masker.shape[1]
        if inputs not in sizes:
            own = vars(kind(inputs, device)).values()
            sizes[inputs] = sum(value.nbytes for value in own if isinstance(value, Tensor))
        if part and held + sizes[inputs] > AT_ONCE:
            yield part
            part, held = {}, 0
        part[name] = expert
        held += sizes[inputs]
    if part:
        yield part


def warn_of_few(few: Mapping[str, int], layers: Layers) -> None:
    """Say how many experts got too few tokens, if some did.

    Args:
        few: the tokens of those, by name.
        layers: all layers.
    """
    if few:
        log.warning(
            "%d of %d experts' matrices got fewer than %d calibration tokens, and are pruned as if "
            "all inputs were of equal size; raise --model.calibration.samples",
            len(few),
            sum(isinstance(layer, Expert) for layer in layers.values()),
            MIN_TOKENS,
        )
