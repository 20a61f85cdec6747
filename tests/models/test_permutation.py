"""A model computes the same with its channels in another order, and gets its own order back."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.common.errors import SparsifyError
from sparsify.models.expert_layout import is_transposed
from sparsify.models.permutable import permutable, proven, random_order
from sparsify.models.permutation import Part, inverse, permute
from tests.architectures import tiny
from tests.conftest import tiny_llama
from tests.vision import tiny_vision

TOKENS = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(0))
# Biases, fused layers, parallel and post-norm blocks, no gate, Conv1D, latent heads, experts.
KINDS = (
    *("bloom", "cohere", "falcon", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gptj"),
    *("llama", "mpt", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2"),
    *("deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe"),
)
ALL = {"mlp", "heads", "residual"}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def uneven(kind: str) -> PreTrainedModel:
    """A tiny model whose norms and biases are random too, so that each must move."""
    model = tiny(kind)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def orders_of(parts: dict[str, Part]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: random_order(part, generator) for name, part in parts.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_and_every_part_moves(kind: str) -> None:
    model = uneven(kind)
    parts, _ = permutable(model)
    kinds = {part.kind for part in parts.values()}
    assert kinds == ALL
    before, base = logits(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    orders = orders_of(parts)
    permute(model, parts, orders)
    for part in parts.values():
        for place in part.places:
            moved = model.get_parameter(place.parameter)
            assert not torch.equal(moved, base[place.parameter]), place.parameter
        assert part.inputs
    assert float((logits(model) - before).abs().max()) < 1e-4 * float(before.abs().max())
    for name, part in parts.items():
        for layer in part.inputs:
            _check_columns(model, base, part, layer, orders[name])
    permute(model, parts, inverse(orders))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base[name]), name
    assert torch.equal(logits(model), before)


def _check_columns(
    model: nn.Module, base: dict[str, Tensor], part: Part, layer: str, order: Tensor
) -> None:
    """The columns of a layer are those that ``columns`` names, whatever became of its rows."""
    [place] = [p for p in part.places if p.reads and p.parameter in (layer, f"{layer}.weight")]
    old, new = base[place.parameter], model.get_parameter(place.parameter).detach()
    old, new = (w.movedim(place.axis, -1) for w in (old, new))
    columns = part.columns(layer, order, old.shape[-1])
    expected = (
        old.gather(-1, columns[:, None].expand_as(old)) if columns.ndim > 1 else (old[..., columns])
    )
    # Rows may be in another order: every column holds the same numbers.
    assert torch.equal(expected.sort(-2).values, new.detach().sort(-2).values)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "mixtral"])
def test_of_experts_only_the_axis_of_inputs_is_a_layers(kind: str) -> None:
    model = tiny(kind)
    for part in permutable(model)[0].values():
        for place in part.places:
            parameter = model.get_parameter(place.parameter)
            if parameter.ndim == 3:
                owner = model.get_submodule(place.parameter.rpartition(".")[0])
                assert place.reads == (place.axis == (1 if is_transposed(owner) else 2))


def test_the_parts_of_a_llama_are_those_of_the_equations() -> None:
    parts, reasons = permutable(tiny_llama())
    assert reasons == {}
    blocks = [f"model.layers.{i}" for i in range(2)]
    assert parts.keys() == {
        "residual",
        *(f"{b}.mlp" for b in blocks),
        *(f"{b}.self_attn" for b in blocks),
    }
    heads, mlp = parts["model.layers.1.self_attn"], parts["model.layers.1.mlp"]
    assert (heads.kind, heads.size, heads.runs) == ("heads", 16, 2)
    assert heads.inputs == ("model.layers.1.self_attn.o_proj",)
    assert (mlp.kind, mlp.size, mlp.runs) == ("mlp", 64, 1)
    assert mlp.inputs == ("model.layers.1.mlp.down_proj",)
    reads = [
        f"{b}.{x}_proj"
        for b in blocks
        for x in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    ]
    assert set(parts["residual"].inputs) == {*reads, "lm_head"}
    # Two query heads share each of two KV heads of 8 channels; the first two channels change.
    order = torch.tensor([1, 0, *range(2, 16)])
    columns = heads.columns(heads.inputs[0], order, 32)
    assert columns.tolist() == [1, 0, *range(2, 8), 9, 8, *range(10, 32)]


def test_a_bias_that_stays_is_found() -> None:
    model = uneven("qwen2")
    parts, _ = permutable(model)
    name = "model.layers.0.self_attn"
    whole = parts[name]
    kept = tuple(p for p in whole.places if not p.parameter.endswith(".bias"))
    assert len(kept) < len(whole.places)
    wrong = Part(whole.name, whole.kind, whole.size, whole.runs, whole.inputs, kept)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    good, reasons = proven(model, parts | {name: wrong})
    assert good.keys() == parts.keys() - {name}
    assert reasons.keys() == {name}
    assert "logits" in reasons[name]
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


def test_tied_embeddings_move_once() -> None:
    model = uneven("gemma")
    model.lm_head.weight = model.model.embed_tokens.weight
    parts, _ = permutable(model)
    before, order = logits(model), {"residual": torch.randperm(32)}
    base = model.lm_head.weight.detach().clone()
    permute(model, parts, order)
    assert torch.equal(model.lm_head.weight, base[:, order["residual"]])
    assert float((logits(model) - before).abs().max()) < 1e-4 * float(before.abs().max())


def test_the_proof_in_sixteen_bits_keeps_good_parts_and_refuses_bad_ones() -> None:
    model = uneven("llama").to(torch.bfloat16)
    parts, _ = permutable(model)
    assert proven(model, parts) == (parts, {})
    whole = parts["residual"]
    wrong = Part("residual", "residual", 32, 1, whole.inputs, whole.places[1:])
    assert proven(model, {"residual": wrong})[1].keys() == {"residual"}


def test_what_cannot_be_permuted_has_a_reason() -> None:
    # Its positions are no Parameter.
    parts, reasons = permutable(tiny("xglm"))
    assert "residual" not in parts
    assert reasons == {"residual": "its channels are told apart by add"}
    parts, reasons = permutable(tiny("mamba2"))
    assert parts.keys() == {"residual"}
    assert reasons.keys() == {f"backbone.layers.{i}.mixer.out_proj" for i in range(2)}


def test_what_an_image_becomes_is_not_known() -> None:
    parts, reasons = permutable(tiny_vision("llava"))
    assert {part.kind for part in parts.values()} == {"mlp", "heads"}
    assert all("language_model" in name for name in parts)
    assert "is not read when the model runs on text" in reasons["residual"]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(15), "must be 16 integers"),
        (torch.arange(16.0), "must be 16 integers"),
        (torch.tensor([0, 0, *range(2, 16)]), "names a channel twice"),
        (torch.tensor([8, *range(1, 8), 0, *range(9, 16)]), "in another run"),
    ],
)
def test_a_wrong_order_is_refused_before_anything_moves(order: Tensor, message: str) -> None:
    model = tiny_llama()
    parts, _ = permutable(model)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    orders = {"model.layers.0.mlp": torch.arange(64).flip(0), "model.layers.0.self_attn": order}
    with pytest.raises(SparsifyError, match=message):
        permute(model, parts, orders)
    with pytest.raises(SparsifyError, match="no part that can be permuted"):
        permute(model, parts, {"model.layers.9.mlp": order})
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    with pytest.raises(SparsifyError, match="holds no inputs of"):
        parts["model.layers.0.mlp"].columns("lm_head", torch.arange(64), 64)
