"""Statistics of many architectures, against plain hooks on the whole model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsify import LayerResult
from sparsify.calibration import Calibration, Hessian, Layerwise, Moments
from sparsify.masking.layer import masked_layers
from sparsify.masking.select import Selection, decoder_blocks
from tests.architectures import ARCHITECTURES, HYBRID, tiny
from tests.calibration.engine import TWO_FOUR, Probe
from tests.conftest import masked_model

TEXT = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(0))

# Blocks that cannot run one by one, as the model calls them several times.
SLOW = {"hrm_text"}
# Blocks that are called in ways of their own; these run with dense activations too.
OWN_WAYS = [*HYBRID, "llama", "gemma3n_text", "gemma4_text", "hrm_text", "mixtral", "zaya"]


def by_hooks(
    model: PreTrainedModel, results: dict[str, LayerResult], dense: bool
) -> dict[str, Tensor]:
    """What enters each layer, ``[tokens, I]`` in float64, when the whole model runs over the text.

    It runs once for each block; then the block's layers, unless activations stay dense, get their
    masked weights as Parameters of their own, which no other layer shares.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in results}
    for block in decoder_blocks(model):
        inside = [name for name in results if name.startswith(f"{block}.")]
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, x, name=name: seen[name].append(x[0].flatten(0, -2).double())
            )
            for name in inside
        ]
        with torch.no_grad():
            for tokens in TEXT:
                model(input_ids=tokens[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for name in () if dense else inside:
            layer, mask_OI = model.get_submodule(name), results[name].mask
            mask = mask_OI.T if isinstance(layer, Conv1D) else mask_OI
            layer.weight = nn.Parameter(layer.weight.detach() * mask)
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


@pytest.mark.parametrize(
    ("kind", "activations"),
    [*((kind, "pruned") for kind in ARCHITECTURES), *((kind, "dense") for kind in OWN_WAYS)],
)
def test_statistics_are_those_of_hooks_on_the_whole_model(
    kind: str, activations: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(kind)
    masked = masked_model(copy.deepcopy(model), Probe(), Selection(TWO_FOUR))
    masked.check_called()
    settings, device = Calibration(cache=False, activations=activations), torch.device("cpu")
    probe = Probe(Moments, Hessian)
    results = dict(Layerwise(masked, lambda: TEXT, settings, device).run(probe))
    assert results.keys() == masked_layers(masked.model).keys()
    assert ("calibration runs all blocks" in caplog.text) == (kind in SLOW)
    for name, x_TI in by_hooks(model, results, activations == "dense").items():
        moments, hessian = probe.found[Moments][name], probe.found[Hessian][name]
        if kind != "zaya":  # one of its layers sees a zero vector besides the input that it shares
            assert moments.tokens == hessian.tokens == len(x_TI) > 0, name
        for found, expected in (
            (moments.sum_I, x_TI.sum(0)),
            (moments.square_I, x_TI.square().sum(0)),
            (hessian.matrix_II, x_TI.T @ x_TI),
        ):
            error = (found.double() - expected).norm()
            assert error <= 1e-5 * expected.norm(), f"{name}: {error}"
