"""The weights of a block as a strategy's results prune it.

Shapes: O out, I in.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from sparsify.calibration.placing import ExpertValues, Values
from sparsify.masking.experts import MaskedExperts, gathered
from sparsify.masking.layer import MaskedLinear
from sparsify.masking.strategy import LayerResult


def pruned_weights(
    results: Mapping[str, LayerResult], layers: Mapping[str, MaskedLinear]
) -> dict[str, Values]:
    """The pruned weights by Parameter name, as they are stored. Of experts each is made when it is
    used, as all together may not fit.

    Args:
        results: by layer, of experts one by one.
        layers: the masked layers by name.
    """
    weights: dict[str, Values] = {}
    for name, found in gathered(results.items(), layers):
        layer = layers[name]
        weights[layer.weight_name(name)] = (
            ExpertValues(layer, partial(_expert, layer, found))
            if isinstance(layer, MaskedExperts)
            else layer.as_stored(_pruned(layer.weight_OI, found[0]))
        )
    return weights


def _expert(layer: MaskedExperts, results: Sequence[LayerResult], expert: int) -> Tensor:
    return _pruned(layer.weight_OI[layer.rows(expert)], results[expert])


def _pruned(weight_OI: Tensor, result: LayerResult) -> Tensor:
    new_OI = weight_OI if result.weight is None else result.weight
    return torch.where(result.mask.to(new_OI.device), new_OI, 0).to(weight_OI)
