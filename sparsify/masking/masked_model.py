"""A base model with masked layers, and the strategy whose maskers make the masks.

It knows neither text nor Trainer: what learns, exports, records or plans works on this object.
Shapes: O out, I in.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsify.masking.inject import fold, hard_masks, inject
from sparsify.masking.layer import (
    MaskedLinear,
    MaskScope,
    base_parameters,
    masked_layers,
    maskers,
)
from sparsify.masking.masker import Masker
from sparsify.masking.select import Selection, decoder_blocks, select
from sparsify.masking.strategy import LayerResult, SparsityStrategy
from sparsify.models.base import BaseModel
from sparsify.models.load_checks import check_called


class MaskedModel:
    """Replaces the selected layers of a base model, in place, by masked ones.

    Until :meth:`calibrate` the maskers have no values.

    Args:
        base: the dense model.
        strategy: makes the maskers.
        selection: which layers, and their patterns.

    Attributes:
        base: what was given; its model is the masked one now.
        model: that model.
        strategy: what was given.
        selection: what was given.
        scope: the masking under which all layers run.
        dense: for each matrix that is not masked, the reason.

    Raises:
        SparsifyError: the selection does not fit the model.
    """

    def __init__(
        self, base: BaseModel, strategy: SparsityStrategy, selection: Selection = Selection()
    ) -> None:
        self.base, self.strategy, self.selection = base, strategy, selection
        self.model = base.model
        layers, self.dense = select(self.model, selection)
        self.model.requires_grad_(strategy.effect.trains_base)
        self.scope = MaskScope()
        if strategy.effect.prunes:
            self.scope = inject(self.model, layers, selection, strategy.make_masker)
        else:
            reason = f"{type(strategy).__name__} masks nothing"
            self.dense |= dict.fromkeys(layers, reason)

    @property
    def layers(self) -> dict[str, MaskedLinear]:
        """The masked layers by qualified name."""
        return masked_layers(self.model)

    @property
    def maskers(self) -> dict[Masker, Tensor]:
        """Each masker once, and the weight ``[O, I]`` that it masks."""
        return maskers(self.layers)

    def check_called(self) -> None:
        """Refuse layers whose weight the model reads without calling them.

        Raises:
            SparsifyError: there is one; it is named.
        """
        with self.scope.use("dense"):
            check_called(self.model, self.layers)

    def calibrate(self, results: Iterable[tuple[str, LayerResult]] = ()) -> None:
        """Give every masker its first values, and every layer the weight that was found for it.

        Args:
            results: by layer name, as calibration finds them; layers that it does not name start
                from nothing.
        """
        layers, left = self.layers, self.maskers
        for name, result in results:
            layer = layers[name]
            self.strategy.init_masker(layer.masker, layer.weight_OI, result)
            if result.weight is not None:
                layer.weight_OI.data.copy_(result.weight)
            left.pop(layer.masker, None)
        for masker, weight_OI in left.items():
            self.strategy.init_masker(masker, weight_OI, None)

    @contextmanager
    def hard(self) -> Iterator[None]:
        """Within it the model computes what will be exported, without a graph."""
        with torch.no_grad(), self.scope.use("hard"):
            yield

    def hard_masks(self) -> dict[str, Tensor]:
        """The masks that ship, by layer name: bool ``[O, I]``, True = kept; of a sharded model
        whole, on every rank.
        """
        return dict(hard_masks(self.model))

    def fold(self) -> None:
        """Multiply the masks into the weights and restore the plain layers, in place."""
        fold(self.model)

    def sparsity(self) -> float:
        """The share of zeros that the masks make, of the blocks' weights: of all their matrices,
        and of stacks of matrices, as which experts may be held; not of depthwise convolutions.
        """
        maskers = [layer.masker for layer in self.layers.values()]
        zeros = sum(math.prod(masker.shape) * (1 - masker.pattern.density) for masker in maskers)
        total = sum(
            parameter.numel()
            for block in decoder_blocks(self.model).values()
            for parameter in base_parameters(block).values()
            if parameter.ndim == 2 or (parameter.ndim == 3 and min(parameter.shape[1:]) > 1)
        )
        return zeros / total
