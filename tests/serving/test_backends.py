"""Which backends take what; the layer around a compressed weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify import NMPattern, serving
from sparsify.export.folder import export
from sparsify.serving.backends import (
    BACKENDS,
    CUSPARSELT,
    CUTLASS,
    SemiStructured,
    SparseLinear,
    eligible,
)
from tests.conftest import SIZES, word_tokenizer
from tests.export.test_folder import masked_module

TORCH = {
    CUSPARSELT.name: SparseSemiStructuredTensorCUSPARSELT,
    CUTLASS.name: SparseSemiStructuredTensorCUTLASS,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_shapes_are_those_of_the_installed_pytorch(dtype: torch.dtype) -> None:
    for backend in (CUSPARSELT, CUTLASS):
        assert getattr(torch.sparse, backend.subclass) is TORCH[backend.name]
        rule = TORCH[backend.name]._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
        for rows in (16, 32, 48, 64):
            for columns in (16, 32, 64, 96, 128):
                wanted = rule is not None and not (
                    rows % rule.sparse_min_rows or columns % rule.sparse_min_cols
                )
                assert backend.takes((rows, columns), dtype) == wanted


def test_patterns_within_two_of_four_are_taken() -> None:
    taken = {str(p) for p in map(NMPattern.parse, ("2:4", "1:4", "1:2", "4:8", "2:8", "3:4"))}
    found = {text for text in taken if eligible((64, 64), torch.bfloat16, NMPattern.parse(text))}
    assert found == {"2:4", "1:4", "1:2", "2:8"}
    assert eligible((64, 64), torch.float32) == []  # PyTorch's fp32 kernel is 1:2 of other zeros


def test_nothing_runs_on_the_cpu() -> None:
    assert not any(backend.available(torch.device("cpu")) for backend in BACKENDS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8), (0, 8)])
def test_a_sparse_layer_multiplies_in_two_dimensions(bias: bool, shape: tuple[int, ...]) -> None:
    weight, bias_O = torch.randn(4, 8), torch.randn(4) if bias else None
    layer = SparseLinear(weight, bias_O)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias_O))
    if x.ndim == 3:
        turned = x.transpose(0, 1)  # not contiguous
        torch.testing.assert_close(layer(turned), F.linear(turned, weight, bias_O))
    assert "in_features=8, out_features=4" in repr(layer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.fixture
def cutlass_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's tensor class with its own packing and dispatch, and a product that a CPU has."""
    kind = SparseSemiStructuredTensorCUTLASS

    def product(self: Any, B: Tensor, *, bias: Any = None, should_transpose_dense: bool) -> Tensor:
        assert should_transpose_dense  # x W^T
        assert B.ndim == 2
        weight = sparse_semi_structured_to_dense_cutlass(self.packed, self.meta)
        return F.linear(B, weight, bias)

    monkeypatch.setattr(kind, "_validate_device_dim_dtype_shape", lambda weight: None)
    monkeypatch.setattr(kind, "_mm", product)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [False, True])
def test_pytorchs_compressed_tensor_runs_in_a_layer(
    mode: Any, bias: bool, cutlass_on_cpu: None
) -> None:
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    weight = torch.where(NMPattern(2, 4).top(weight.abs()), weight, 0)
    bias_O = torch.randn(32, dtype=torch.bfloat16) if bias else None
    layer = CUTLASS.compress(weight, bias_O)
    assert type(layer.weight) is SparseSemiStructuredTensorCUTLASS
    assert dict(layer.named_parameters()).keys() == ({"weight", "bias"} if bias else {"weight"})
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    with mode():
        for value in (x, x.transpose(0, 1), x[0], x[0, 0]):
            wanted = F.linear(value, weight, bias_O)
            torch.testing.assert_close(layer(value), wanted, rtol=2e-2, atol=5e-2)
    assert layer.to("cpu") is layer


def test_a_model_loads_onto_pytorchs_compressed_tensors(
    cutlass_on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(SemiStructured, "available", lambda self, device: True)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    # Made in this type: .bfloat16() would round the rotary frequencies too, as no loader does.
    model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), dtype=torch.bfloat16)
    export(masked_module(model, word_tokenizer()).masked, tmp_path / "out", {})
    sparse = serving.load(tmp_path / "out", device="cpu", choose="sparse", backends=[CUTLASS])
    assert {choice.backend for choice in serving.choices(sparse).values()} == {"cutlass"}
    dense = serving.load(tmp_path / "out", device="cpu", choose="dense")
    tokens = torch.arange(8)[None]
    assert torch.equal(sparse(input_ids=tokens).logits, dense(input_ids=tokens).logits)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(sparse.generate(tokens, **options), dense.generate(tokens, **options))
