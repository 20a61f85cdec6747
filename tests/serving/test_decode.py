"""The backend over packed weights, on a CPU, where its operation is the reference product."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify import NMPattern, SparsifyError, serving
from sparsify.export.folder import export
from sparsify.serving import decode
from sparsify.serving.backends import BACKENDS
from sparsify.serving.decode import DECODE, MOST_TOKENS, Decode, PackedLinear
from tests.conftest import SIZES, word_tokenizer
from tests.export.test_folder import masked_module

OPERATION = torch.ops.sparsify.packed_linear.default


def layer(
    rows: int = 24, columns: int = 36, bias: bool = True, dtype: torch.dtype = torch.bfloat16
) -> tuple[PackedLinear, Tensor, Tensor | None]:
    weight = torch.randn(rows, columns, dtype=dtype)
    weight = torch.where(NMPattern(2, 4).top(weight.abs()), weight, 0)
    bias_O = torch.randn(rows, dtype=dtype) if bias else None
    return DECODE.compress(weight, bias_O), weight, bias_O


def test_any_shape_of_whole_groups_is_taken() -> None:
    assert DECODE in BACKENDS
    for dtype in (torch.float16, torch.bfloat16):
        assert DECODE.takes((1, 4), dtype)
        assert DECODE.takes((577, 1540), dtype, NMPattern(1, 4))
        assert not DECODE.takes((64, 66), dtype, NMPattern(1, 2))
        assert not DECODE.takes((64, 64), dtype, NMPattern(4, 8))
    for other in (torch.float32, torch.int8, torch.float8_e4m3fn):
        assert not DECODE.takes((64, 64), other)
    assert not DECODE.available(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(36,), (1, 36), (2, 3, 36), (0, 36), (MOST_TOKENS + 1, 36)])
def test_a_packed_layer_multiplies_as_a_dense_one(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    packed, weight, bias_O = layer(bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    for value in (x, x.transpose(0, 1)) if x.ndim == 3 else (x,):
        wanted = F.linear(value.reshape(-1, 36), weight, bias_O)  # in two dimensions, as is done
        assert torch.equal(packed(value), wanted.view(*value.shape[:-1], 24))
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert "in_features=36, out_features=24" in repr(packed)


def test_it_holds_nine_bits_a_weight() -> None:
    packed, weight, bias_O = layer(16, 128)
    assert bias_O is not None
    held = sum(tensor.nbytes for tensor in packed.state_dict().values())
    assert held - bias_O.nbytes == weight.numel() * 9 / 8


def test_a_weight_that_is_not_2_of_4_is_refused() -> None:
    with pytest.raises(SparsifyError, match="mask it first"):
        DECODE.compress(torch.ones(8, 8, dtype=torch.bfloat16), None)


def test_an_input_of_another_type_is_refused() -> None:
    packed, _, _ = layer()
    with pytest.raises(SparsifyError, match="input is torch.float32 .* weight torch.bfloat16"):
        packed(torch.randn(2, 36))


def test_the_operation_is_one_that_pytorch_can_compile() -> None:
    packed, weight, bias_O = layer()
    x = torch.randn(3, 36, dtype=torch.bfloat16)
    for bias in (None, bias_O):
        torch.library.opcheck(OPERATION, (x, packed.values, packed.metadata, bias))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, packed.values, packed.metadata)]
        y = OPERATION(*fakes, None)
    assert (y.shape, y.dtype) == ((3, 24), torch.bfloat16)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for tokens in (2, 5, 40):
            x = torch.randn(tokens, 36, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), F.linear(x, weight, bias_O))


def test_few_rows_go_to_the_kernel_and_others_to_the_dense_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, weight, bias_O = layer()
    called: list[str] = []

    def multiply(
        x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        assert x.is_contiguous()
        assert x.data_ptr() % 16 == 0
        assert (values is packed.values, metadata is packed.metadata, rows) == (True, True, 24)
        called.append("multiply")
        return F.linear(x, weight, bias)

    def unpack(values: Tensor, metadata: Tensor, rows: int, inputs: int) -> Tensor:
        called.append("unpack")
        return weight

    kernels = SimpleNamespace(multiply=multiply, unpack=unpack)
    monkeypatch.setitem(sys.modules, "sparsify.serving.decode_kernels", kernels)  # type: ignore[arg-type]
    monkeypatch.setitem(vars(serving), "decode_kernels", kernels)
    flat = torch.randn(18 * 36 + 1, dtype=torch.bfloat16)
    for tokens in (0, 1, MOST_TOKENS, MOST_TOKENS + 1):
        x = flat[1 : 1 + tokens * 36].view(tokens, 36)  # two bytes after a multiple of 16
        y = decode._on_gpu(x, packed.values, packed.metadata, bias_O)
        torch.testing.assert_close(y, F.linear(x, weight, bias_O))
    assert called == ["unpack", "multiply", "multiply", "unpack"]


@dataclass(frozen=True)
class OnCpu(Decode):
    """Its operation runs on a CPU too."""

    def available(self, device: torch.device) -> bool:
        return True


def test_a_model_loads_onto_packed_layers(tmp_path: Path) -> None:
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16)
    export(masked_module(model, word_tokenizer()).masked, tmp_path / "out", {})
    sparse = serving.load(tmp_path / "out", device="cpu", choose="sparse", backends=[OnCpu()])
    assert {choice.backend for choice in serving.choices(sparse).values()} == {"decode"}
    assert sum(isinstance(module, PackedLinear) for module in sparse.modules()) == 14
    dense = serving.load(tmp_path / "out", device="cpu", choose="dense")
    tokens = torch.arange(8)[None]
    assert torch.equal(sparse(input_ids=tokens).logits, dense(input_ids=tokens).logits)
