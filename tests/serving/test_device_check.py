"""Products and times of sparse layers, with a compressor that runs anywhere; and on a GPU."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsify import NMPattern, SparseCausalLM, SparsifyError
from sparsify.export.folder import export
from sparsify.serving.backends import SparseLinear
from sparsify.serving.device_check import TOKENS, DeviceCheck, cuda_check
from sparsify.serving.verify import verify
from sparsify.strategies.magnitude import Magnitude
from sparsify.training.build import calibrate
from tests.conftest import tiny_llama, word_tokenizer

CPU = torch.device("cpu")


def sparse_weight(rows: int = 32, columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return torch.where(NMPattern(2, 4).top(weight.abs()), weight, 0).to(dtype)


def ticking(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """A clock that counts the outputs, in milliseconds: sparse and dense have as many."""
    return [cast(Tensor, call()).numel() / 1e3 for call in calls]


class Fake:
    """A backend that packs by a function."""

    name = "cusparselt"

    def __init__(self, pack: Callable[[Tensor], Tensor]) -> None:
        self.pack = pack

    def compress(self, weight_OI: Tensor, bias_O: Tensor | None) -> nn.Module:
        return SparseLinear(self.pack(weight_OI), bias_O)


def check(pack: Callable[[Tensor], Tensor]) -> DeviceCheck:
    return DeviceCheck(CPU, "a fake", cast(Any, Fake(pack)), ticking)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_right_product_is_within_the_types_rounding(dtype: torch.dtype) -> None:
    product = check(torch.clone).run(sparse_weight(dtype=dtype))
    assert product.problem is None
    assert product.tolerance == 2 * torch.finfo(dtype).eps
    assert product.error is not None
    assert 0 < product.error < product.tolerance


def test_a_wrong_product_is_a_problem() -> None:
    def drop_one(weight_OI: Tensor) -> Tensor:
        packed = weight_OI.clone()
        packed[3, weight_OI[3].abs().argmax()] = 0
        return packed

    product = check(drop_one).run(sparse_weight())
    assert product.problem is not None
    assert "its sparse product is off by" in product.problem
    assert "the tolerance is 0.016" in product.problem


def test_pytorchs_own_packing_drops_what_is_too_much_and_that_shows() -> None:
    def pack(weight_OI: Tensor) -> Tensor:
        packed = sparse_semi_structured_from_dense_cutlass(weight_OI)
        return sparse_semi_structured_to_dense_cutlass(*packed)

    weight = sparse_weight()
    assert check(pack).run(weight).problem is None
    weight[3, :4] = 3
    assert "is off by" in str(check(pack).run(weight).problem)


def test_a_kernel_that_refuses_or_gives_no_numbers_is_a_problem() -> None:
    def refuse(weight_OI: Tensor) -> Tensor:
        raise NotImplementedError("no such kernel\nlong trace")

    assert check(refuse).run(sparse_weight()).problem == (
        "its sparse product failed on the device (no such kernel)"
    )
    broken = check(lambda w: w * torch.nan).run(sparse_weight())
    assert broken.problem == "its sparse product failed on the device (its output is not finite)"


def test_each_shape_is_timed_once() -> None:
    it = check(torch.clone)
    for rows, columns in ((32, 64), (32, 64), (64, 32)):
        it.run(sparse_weight(rows, columns))
    it.run(sparse_weight(dtype=torch.float16))
    timings = it.report.timings
    assert [(t.kind, t.tokens) for t in timings] == [
        (kind, tokens)
        for kind in ("32 x 64 bfloat16", "64 x 32 bfloat16", "32 x 64 float16")
        for tokens in TOKENS
    ]
    assert all(t.sparse_ms == t.dense_ms == t.tokens * int(t.kind[:2]) for t in timings)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(it.report.table())
    assert "2048" in shown.get()
    assert "1.00x" in shown.get()


def test_verify_runs_the_layers_that_hold_their_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def fake(weight_OI: Tensor) -> Tensor:
        seen.append(weight_OI.dtype)
        return weight_OI * (2 if weight_OI.shape[0] == 16 else 1)

    monkeypatch.setattr("sparsify.serving.verify.folder.cuda_check", lambda device: check(fake))
    module = SparseCausalLM.from_model(
        tiny_llama(), word_tokenizer(), Magnitude(), overrides={"*.mlp.*": "4:8"}
    )
    module.configure_model()
    calibrate(module)
    export(module.masked, tmp_path / "out", {})
    report = verify(tmp_path / "out", device="cuda")
    # Eight layers of attention are 2:4 in fp32, to be packed as bf16; 4:8 is not run.
    assert len(seen) == 8 + 2  # and a random one of each shape is timed
    assert set(seen) == {torch.bfloat16}
    wrong = {row.name.rpartition(".")[2] for row in report.layers if row.problems}
    assert wrong == {"k_proj", "v_proj"}
    assert report.device is not None
    assert {t.kind for t in report.device.timings} == {"32 x 32 bfloat16", "16 x 32 bfloat16"}
    found = report.to_dict()
    assert found["device"]["backend"] == "cusparselt"
    assert found["layers"][0]["product"]["tolerance"] == 2 * torch.finfo(torch.bfloat16).eps


def test_types_that_have_no_plain_product_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sparsify.serving.verify.folder.cuda_check", lambda device: check(torch.clone)
    )
    weight = sparse_weight().sign().to(torch.int8)
    save_file({"layers.0.proj.weight": weight}, tmp_path / "model.safetensors")
    (row,) = verify(tmp_path, pattern="2:4", device="cuda").layers
    assert row.backends == ["cusparselt"]
    assert row.product is None


def test_no_such_device(tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match="device 'tpu': it must be 'cpu', or a CUDA device"):
        cuda_check("tpu")
    with pytest.raises(SparsifyError, match="device 'cuda:99': PyTorch finds .* name one of them"):
        cuda_check("cuda:99")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_multiplies_an_export_right(tmp_path: Path) -> None:
    module = SparseCausalLM.from_model(tiny_llama(), word_tokenizer(), Magnitude())
    module.configure_model()
    calibrate(module)
    export(module.masked, tmp_path / "out", {})
    report = verify(tmp_path / "out", device="cuda")
    assert report.ok, report.to_dict()
    assert all(row.product is not None for row in report.layers)
    assert report.device is not None
    assert len(report.device.timings) == len(TOKENS) * len({row.shape for row in report.layers})
    assert all(t.sparse_ms > 0 and t.dense_ms > 0 for t in report.device.timings)
    # The same check sees a product of other weights.
    good = cuda_check("cuda")
    backend = good._backend
    good._backend = cast(
        Any, Fake(lambda w: cast(Tensor, backend.compress(w.roll(1, 0), None).weight))
    )
    assert good.run(sparse_weight()).problem is not None
