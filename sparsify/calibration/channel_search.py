"""Finds the orders of all of a model's channels, block by block, as other strategies find masks.

Shapes: C channels of a part, K columns of a channel, I in.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsify.calibration.channel_orders import Inputs, find_order
from sparsify.calibration.statistics import Hessian
from sparsify.masking.experts import Expert, MaskedExperts
from sparsify.masking.layer import MaskedLinear
from sparsify.masking.strategy import Block, LayerResult, SparsityStrategy
from sparsify.models.permutation import Part, Place

log = logging.getLogger("sparsify")


class ChannelSearch(SparsityStrategy):
    """Searches orders of channels; it yields no masks.

    Channels within a block are searched when the block is reached. Of those that several blocks
    share, every block's X^T X is kept in main memory until :meth:`finish`.

    Args:
        strategy: whose masks count.
        parts: the parts to permute, by name.
        device: where to compute.

    Attributes:
        orders: what was found so far: int64 ``[C]`` by part.
    """

    def __init__(
        self, strategy: SparsityStrategy, parts: Mapping[str, Part], device: torch.device
    ) -> None:
        super().__init__()
        self._scores = strategy.input_scale, strategy.order_score
        self._parts, self._device = parts, device
        # Of parts that several blocks share.
        self._shared: dict[str, list[tuple[MaskedLinear, Inputs]]] = {}
        self._reads: dict[str, list[tuple[Part, Place]]] = {}
        for part in parts.values():
            for place in part.places:
                name = place.parameter.removesuffix(".weight")
                name = name if name in part.inputs else place.parameter  # experts'
                if place.reads:
                    self._reads.setdefault(name, []).append((part, place))
        self.orders: dict[str, Tensor] = {}

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            self._search(block)
        yield from ()

    def _search(self, block: Block) -> None:
        grams = block.collect(Hessian)
        kept: dict[int, Tensor] = {}
        own: dict[str, list[Inputs]] = {}
        scales: dict[int, Tensor] = {}
        stacks: dict[str, tuple[MaskedExperts, Tensor]] = {}
        for name, layer in block.layers.items():
            stack = layer.stack if isinstance(layer, Expert) else name
            if stack not in self._reads:
                continue
            gram_II = grams[name].matrix_II
            if not isinstance(layer, Expert):
                if id(gram_II) not in scales:
                    scales[id(gram_II)] = self._scores[0](gram_II)
                for part, place in self._reads[name]:
                    inputs = self._inputs(layer, gram_II, scales[id(gram_II)], place.at_KC)
                    self._add(own, part, layer, inputs, kept)
            elif all(place.stacked for _, place in self._reads[stack]):
                columns_KC = torch.arange(len(gram_II))[None]
                inputs = self._inputs(layer, gram_II, self._scores[0](gram_II), columns_KC)
                for part, _ in self._reads[stack]:
                    self._find(part, [inputs], layer.number)
            elif stack in stacks:  # all experts share the channels
                stacks[stack][1].add_(gram_II)
            else:
                stacks[stack] = layer.layer, gram_II.clone()
        for stack, (experts, gram_II) in stacks.items():
            for part, place in self._reads[stack]:
                scale_I = self._scores[0](gram_II)
                inputs = self._inputs(experts, gram_II, scale_I, place.at_KC)
                self._add(own, part, experts, inputs, kept)
        for name, layers in own.items():
            self._find(self._parts[name], layers)

    def _inputs(
        self, layer: MaskedLinear | Expert, gram_II: Tensor, scale_I: Tensor, columns_KC: Tensor
    ) -> Inputs:
        weight_OI, pattern = layer.weight_OI.detach(), layer.masker.pattern
        return Inputs(weight_OI, gram_II, scale_I, self._scores[1], columns_KC, pattern)

    def _add(
        self,
        own: dict[str, list[Inputs]],
        part: Part,
        layer: MaskedLinear,
        inputs: Inputs,
        kept: dict[int, Tensor],
    ) -> None:
        if part.kind != "residual":
            own.setdefault(part.name, []).append(inputs)
            return
        gram_II = kept.setdefault(id(inputs.gram_II), inputs.gram_II.cpu())
        scale_I = inputs.scale_I.cpu()
        inputs = replace(inputs, weight_OI=torch.empty(0), gram_II=gram_II, scale_I=scale_I)
        self._shared.setdefault(part.name, []).append((layer, inputs))

    def finish(self) -> dict[str, Tensor]:
        """Search the channels that several blocks share; returns all orders that were found."""
        for name, found in self._shared.items():
            # While their block was reached, weights were on the device.
            layers = [replace(i, weight_OI=layer.weight_OI.detach()) for layer, i in found]
            self._find(self._parts[name], layers)
        self._shared.clear()
        return self.orders

    def _find(self, part: Part, layers: Sequence[Inputs], expert: int | None = None) -> None:
        """Search one part's order, or that of one expert's channels in it."""
        width = math.lcm(*(layer.pattern.m for layer in layers))
        run = part.size // part.runs
        if run % width:
            log.info("%s stays: %d channels are no multiple of M = %d", part.name, run, width)
            return
        if run == width:
            log.info("%s stays: its %d channels are one group, in any order", part.name, run)
            return
        order_C, errors = find_order(layers, part.runs if expert is None else 1, self._device)
        log.info("%s: layer error %g, was %g", part.name, errors[-1], errors[0])
        if expert is not None:
            whole_C = self.orders.get(part.name, torch.arange(part.size))
            whole_C[expert * run : (expert + 1) * run] = expert * run + order_C
            order_C = whole_C
        if not torch.equal(order_C, torch.arange(part.size)):
            self.orders[part.name] = order_C
