"""Which layers stay dense without being asked, and the reason that is told."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from sparsify.masking.dense_layers import default_reason
from sparsify.masking.select import Selection, select
from tests.conftest import tiny_llama
from tests.tiny_models import (
    tied_llama,
    tiny_dbrx,
    tiny_gpt_oss,
    tiny_mamba,
    tiny_mixtral,
    tiny_qwen2_moe,
)

# By model: a part of the name of what stays dense, and of its reason.
REASONS = {
    tiny_mixtral: {
        "layers.0.mlp.gate": "router",
    },
    tiny_qwen2_moe: {
        "layers.0.mlp.gate": "router",
        "layers.0.mlp.shared_expert_gate": "gate of the shared expert",
    },
    tiny_gpt_oss: {
        "layers.0.mlp.router": "router",
        "layers.0.mlp.experts": "biases of experts",
    },
    tiny_dbrx: {
        "blocks.0.ffn.router.layer": "router",
        "blocks.1.ffn.experts.mlp": "experts: 2-D parameter of DbrxExpertGLU",
    },
    tiny_mamba: {
        "layers.0.mixer.x_proj": "Mamba's time steps",
        "layers.1.mixer.dt_proj": "Mamba's time steps",
        "layers.0.mixer.conv1d": "Conv1d is not a plain linear layer",
    },
    tied_llama: {"lm_head": "output head, shared with the embedding"},
}


@pytest.mark.parametrize("make", REASONS)
def test_what_stays_dense_has_its_reason(make: Callable[[], PreTrainedModel]) -> None:
    dense = select(make(), Selection())[1]
    for part, reason in REASONS[make].items():
        found = [why for name, why in dense.items() if name.endswith(part)]
        assert len(found) == 1
        assert found[0].startswith(reason)


def test_the_rest_of_the_block_is_masked() -> None:
    chosen, _ = select(tiny_qwen2_moe(), Selection())
    parts = [f"self_attn.{kind}_proj" for kind in "qkvo"]
    parts += [f"mlp.shared_expert.{kind}_proj" for kind in ("gate", "up", "down")]
    parts += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert set(chosen) == {f"model.layers.{i}.{n}" for i in (0, 1) for n in parts}
    chosen, _ = select(tiny_mamba(), Selection())
    assert {name.rpartition(".")[2] for name in chosen} == {"in_proj", "out_proj"}


def test_include_overrides_the_list() -> None:
    chosen, dense = select(tiny_qwen2_moe(), Selection(include=["*shared_expert_gate", "*q_proj"]))
    assert len(chosen) == 4
    assert dense["model.layers.0.self_attn.k_proj"] == "not in include"


@pytest.mark.parametrize(
    "name",
    [
        *("mlp.gate", "block_sparse_moe.gate", "mlp.gate.wg", "mlp.gate.router_mlp.fc1"),
        *("ffn.router.layer", "feed_forward.router", "mlp.router.classifier"),
        *("self_attention.experts.router.layer", "mlp.shared_expert_gate"),
        *("mamba.x_proj", "mixer.dt_proj", "linear_attn.in_proj_ba", "linear_attn.in_proj_a"),
        *("linear_attn.b_proj", "self_attn.b_proj", "mlstm_layer.igate_preact"),
        *("altup.modality_router", "self_attn.indexer.wq_b"),
        "self_attn.compressor.indexer.scorer.weights_proj",
    ],
)
def test_names_of_transformers_5_are_in_the_list(name: str) -> None:
    assert default_reason(f"model.layers.3.{name}") is not None


@pytest.mark.parametrize(
    "name",
    [
        *("mlp.gate_proj", "mlp.gate_up_proj", "self_attn.q_a_proj", "self_attn.kv_b_proj"),
        *("self_attn.gate_proj", "mlp.shared_experts.gate_proj", "mamba.out_proj", "mamba.in_proj"),
        *("linear_attn.in_proj_qkvz", "linear_attn.in_proj_z", "per_layer_input_gate"),
    ],
)
def test_names_of_large_layers_are_not(name: str) -> None:
    assert default_reason(f"model.layers.3.{name}") is None


@torch.no_grad()
def test_a_matrix_of_a_module_that_nobody_knows_is_named_by_its_class() -> None:
    model = tiny_llama()
    model.model.layers[0].table = nn.Embedding(4, 8)
    why = select(model, Selection())[1]["model.layers.0.table"]
    assert why == "Embedding is not a plain linear layer"


class Experts(nn.Module):
    """Does not say how it stores its matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.zeros(4, 8, 8))


def test_experts_that_do_not_say_how_they_are_stored_are_named_by_their_class() -> None:
    model = tiny_llama()
    model.model.layers[0].experts = Experts()
    why = select(model, Selection())[1]["model.layers.0.experts"]
    assert why == "experts: 3-D parameter of Experts"
