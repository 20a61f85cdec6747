"""Statistics of many architectures, against plain hooks on the whole model."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsify import LayerResult
from sparsify.calibration import Calibration, Hessian, Layerwise, Moments, collecting
from sparsify.masking.experts import matrices
from sparsify.masking.select import Selection, decoder_blocks
from tests.architectures import ARCHITECTURES, HYBRID, tiny
from tests.calibration.engine import TWO_FOUR, Probe
from tests.conftest import masked_model

TEXT = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(0))

# Blocks that cannot run one by one, as the model calls them several times.
SLOW = {"hrm_text"}
# Blocks that are called in ways of their own; these run with dense activations too.
OWN_WAYS = [*HYBRID, "llama", "gemma3n_text", "gemma4_text", "hrm_text", "mixtral", "zaya"]


def expert_inputs(name: str, owner: Any, x: Tensor, chosen: Any = None) -> dict[str, Tensor]:
    """What enters each matrix of each expert, in a loop over experts as their block is defined."""
    found: dict[str, Tensor] = {}
    if "weight" in owner._parameters:  # JetMoe: a module for each stack, tokens sorted by expert
        found = {f"{name}.weight.{e}": part for e, part in enumerate(x.split(chosen))}
        return {key: part.double() for key, part in found.items()}
    first = "gate_up_proj" if hasattr(owner, "gate_up_proj") else "up_proj"
    for e in range(len(owner.down_proj)):
        if chosen is None:  # Llama 4: all tokens for every expert, zero if routed elsewhere
            own_TI = x.view(owner.num_experts, -1, x.shape[-1])[e]
            own_TI = own_TI[own_TI.any(-1)]
        else:
            own_TI = x[(chosen == e).any(-1)]
        y_TF = own_TI @ as_IO(owner, first, e)
        if getattr(owner, "has_bias", False):
            y_TF = y_TF + getattr(owner, f"{first}_bias")[e]
        found[f"{name}.{first}.{e}"] = own_TI
        found[f"{name}.down_proj.{e}"] = between(owner, y_TF)
    for e in range(len(owner.down_proj), len(getattr(owner, first))):
        found[f"{name}.{first}.{e}"] = x[:0]  # Longcat's experts that compute nothing
    return {key: part.detach().double() for key, part in found.items()}


def between(owner: Any, y_TF: Tensor) -> Tensor:
    """What an expert does between its two products."""
    if hasattr(owner, "_apply_gate"):
        return owner._apply_gate(y_TF) if owner.has_gate else owner.act_fn(y_TF)
    gate_TF, up_TF = y_TF.chunk(2, -1)
    return owner.act_fn(gate_TF) * up_TF


def as_IO(owner: Any, key: str, expert: int) -> Tensor:
    """A view of an expert's matrix, inputs first."""
    stack = owner._parameters[key].data
    transposed = getattr(owner, "is_transposed", type(owner).__name__ == "Llama4TextExperts")
    return stack[expert] if transposed else stack[expert].T


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
        linear = [name for name in inside if name in dict(model.named_modules())]
        routed = sorted({name.rsplit(".", 2)[0] for name in inside if name not in linear})
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, x, name=name: seen[name].append(x[0].flatten(0, -2).double())
            )
            for name in linear
        ]

        def see_experts(name: str, owner: nn.Module, args: Any) -> None:
            for key, x_TI in expert_inputs(name, owner, *args[:2]).items():
                seen[key].append(x_TI)

        hooks += [
            model.get_submodule(name).register_forward_pre_hook(partial(see_experts, name))
            for name in routed
        ]
        with torch.no_grad():
            for tokens in TEXT:
                model(input_ids=tokens[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for name in set() if dense else set(inside) - set(linear):
            owner, key, expert = name.rsplit(".", 2)
            as_IO(model.get_submodule(owner), key, int(expert)).mul_(results[name].mask.T)
        for name in () if dense else linear:
            layer, mask_OI = model.get_submodule(name), results[name].mask
            mask = mask_OI.T if isinstance(layer, Conv1D) else mask_OI
            layer.weight = nn.Parameter(layer.weight.detach() * mask)
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


@pytest.mark.parametrize(
    ("kind", "activations"),
    [*((kind, "pruned") for kind in ARCHITECTURES), *((kind, "dense") for kind in OWN_WAYS)],
)
def test_statistics_are_those_of_hooks_on_the_whole_model(
    kind: str, activations: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "MIN_TOKENS", 1)
    model = tiny(kind)
    masked = masked_model(copy.deepcopy(model), Probe(), Selection(TWO_FOUR))
    masked.check_called()
    settings, device = Calibration(cache=False, activations=activations), torch.device("cpu")
    probe = Probe(Moments, Hessian)
    results = dict(Layerwise(masked, lambda: TEXT, settings, device).run(probe))
    assert results.keys() == matrices(masked.layers).keys()
    assert ("calibration runs all blocks" in caplog.text) == (kind in SLOW)
    for name, x_TI in by_hooks(model, results, activations == "dense").items():
        moments, hessian = probe.found[Moments][name], probe.found[Hessian][name]
        if not len(x_TI):  # an expert without tokens
            x_TI = torch.eye(x_TI.shape[1], dtype=torch.float64)
        if kind != "zaya":  # one of its layers sees a zero vector besides the input that it shares
            assert moments.tokens == hessian.tokens == len(x_TI) > 0, name
        for found, expected in (
            (moments.sum_I, x_TI.sum(0)),
            (moments.square_I, x_TI.square().sum(0)),
            (hessian.matrix_II, x_TI.T @ x_TI),
        ):
            error = (found.double() - expected).norm()
            assert error <= 1e-5 * expected.norm(), f"{name}: {error}"
