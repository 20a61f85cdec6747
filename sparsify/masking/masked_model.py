"""A base model with masked layers, and the strategy whose maskers make the masks.

Training, export, records and plans all work on this object; it needs neither text nor a Trainer.
Shapes: O out, I in.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.common.values import first_few
from sparsify.masking.coverage import Coverage, coverage
from sparsify.masking.dense_layers import is_block_weight
from sparsify.masking.experts import gathered
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
from sparsify.models.load_checks import check_called, not_called


class MaskedModel:
    """Replaces the selected layers of a base model, in place, by masked ones.

    The maskers have no values until :meth:`calibrate` is called.

    Args:
        base: the dense model.
        strategy: makes the maskers.
        selection: which layers, and their patterns.

    Attributes:
        base: the argument; its model now holds the masked layers.
        model: that model.
        strategy: the argument.
        selection: the argument.
        scope: says how all layers mask at present.
        dense: why a matrix is not masked, for each that is not.

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
        """Leave layers dense that the model's forward pass does not call: it reads their weights by
        itself, or not at all, so that a mask would be exported and not measured.

        Raises:
            SparsifyError: the selection includes such a layer by name, or no layer is left; or the
                model changes its own weights.
        """
        parameters = base_parameters(self.model)
        versions = {name: p._version for name, p in parameters.items()}
        with self.scope.use("dense"):
            names = not_called(self.model, self.layers, decoder_blocks(self.model))
        if changed := [name for name, p in parameters.items() if p._version != versions[name]]:
            raise SparsifyError(
                f"{type(self.model).__name__} changes its own weights when it runs "
                f"({first_few(changed)}), so that what is exported would not be what is measured; "
                'switch that off in its config.json (of RWKV: "rescale_every": 0)'
            )
        if self.selection.include is not None or len(names) == len(self.layers):
            check_called(self.model, names)
        layers = self.layers
        for name in names:
            layers[name].leave(self.model, name)
        shared = {id(layer.weight) for layer in self.layers.values()}
        for name in names:
            if id(layers[name].weight) not in shared:
                self.dense[name] = (
                    "never called: the model reads its weight elsewhere, or not at all"
                )

    def calibrate(self, results: Iterable[tuple[str, LayerResult]] = ()) -> None:
        """Give every masker its first values, and every layer the weight that was found for it.

        Args:
            results: (layer name, result) as calibration finds them, of experts one by one; for
                other layers the strategy is told that there is no result.
        """
        layers, left = self.layers, self.maskers
        for name, found in gathered(results, layers):
            layer, result = layers[name], _joined(found, layers[name])
            self.strategy.init_masker(layer.masker, layer.weight_OI, result)
            if result.weight is not None:
                layer.weight_OI.data.copy_(result.weight)
            left.pop(layer.masker, None)
        for masker, weight_OI in left.items():
            self.strategy.init_masker(masker, weight_OI, None)

    @contextmanager
    def hard(self) -> Iterator[None]:
        """Within this context the model computes as its export will, without a graph."""
        with torch.no_grad(), self.scope.use("hard"):
            yield

    def hard_masks(self) -> dict[str, Tensor]:
        """The masks that are exported, by layer name: bool ``[O, I]``, True = kept. If the model is
        sharded, every rank gets the whole masks.
        """
        return dict(hard_masks(self.model))

    def fold(self) -> None:
        """Multiply the masks into the weights and restore the plain layers, in place."""
        fold(self.model)

    def coverage(self) -> Coverage:
        """Which share of the model's weights is N:M, and what stays dense and why."""
        blocks = next(iter(decoder_blocks(self.model))).rpartition(".")[0]
        parameters = base_parameters(self.model)
        sizes = {name: tuple(p.shape) for name, p in parameters.items()}
        shared = {id(layer.weight) for layer in self.layers.values()}
        masked = {name for name, p in parameters.items() if id(p) in shared}
        return coverage(sizes, masked, blocks, self.dense)

    def sparsity(self) -> float:
        """Weights that the masks set to zero, as a share of the decoder blocks' weights. These are
        all matrices and stacks of matrices (experts); depthwise convolutions do not count, and what
        several modules share counts once.
        """
        zeros = sum(math.prod(m.shape) * (1 - m.pattern.density) for m in self.maskers)
        weights = {
            parameter
            for block in decoder_blocks(self.model).values()
            for parameter in base_parameters(block).values()
            if is_block_weight(parameter.shape)
        }
        return zeros / sum(weight.numel() for weight in weights)


def _joined(results: Sequence[LayerResult], layer: MaskedLinear) -> LayerResult:
    """The result of a layer from those of its experts; of other layers their only one."""
    if len(results) == 1:
        return results[0]
    weight = inputs = None
    if any(result.weight is not None for result in results):
        own = layer.weight_OI.detach().chunk(len(results))
        weights = [o if r.weight is None else r.weight for r, o in zip(results, own, strict=True)]
        weight = torch.cat([w.to(own[0].dtype) for w in weights])
    if all(result.inputs is not None for result in results):
        inputs = torch.cat([cast(Tensor, r.inputs).expand(r.mask.shape) for r in results])
    return LayerResult(torch.cat([result.mask for result in results]), weight, inputs)
