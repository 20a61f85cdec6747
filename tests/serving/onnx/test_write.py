"""The ONNX graph: computes what the model does, holds its zeros where TensorRT looks, or is not
written.
"""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor
from torch.onnx.errors import OnnxExporterError
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparsify import SparsifyError
from sparsify.common.replace import put_new
from sparsify.export.folder import export
from sparsify.export.manifest import read_manifest
from sparsify.serving.onnx.write import OnnxReport, export_onnx
from tests.conftest import SIZES, tiny_llama
from tests.export.test_folder import masked_module
from tests.tiny_models import FAMILIES, tied_llama

SHAPES = [(2, 8), (1, 1), (3, 21)]  # as traced, the smallest, and another


def sparse_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any
) -> Path:
    export(masked_module(model, tokenizer, **options).masked, folder, {})
    return folder


def logits_of_graph(file: Path, ids: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {"input_ids": ids.numpy()})
    return torch.from_numpy(logits).float()


def check_export(folder: Path, file: Path, report: OnnxReport) -> None:
    """Hold a file against its folder without the code that checked it at first."""
    assert sorted(p.name for p in file.parent.iterdir() if p != folder) == [
        file.name,
        f"{file.name}.data",
    ]
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(str(file))
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    stored = load_file(folder / "model.safetensors")
    assert [layer.name for layer in report.layers] == list(read_manifest(folder)["layers"])
    for layer in report.layers:
        n, m = map(int, layer.pattern.split(":"))
        value = constants[layer.weight]
        assert value.dtype.name == report.dtype
        assert value.shape == layer.shape
        groups = np.moveaxis(value, layer.axis, -1).reshape(-1, m)
        assert (np.count_nonzero(groups, axis=1) <= n).all(), layer
        assert layer.nonzero == pytest.approx(n / m)
        expected = stored[f"{layer.name}.weight"].to(getattr(torch, report.dtype)).float()
        inputs_first = "transformer.h." in layer.name  # as GPT-2 stores its weights
        expected = expected if inputs_first == (layer.axis == 0) else expected.T
        assert np.array_equal(value.astype("float32"), expected.numpy()), layer
        [users] = [node for node in model.graph.node if layer.weight in node.input]
        assert (users.name, users.op_type) == (layer.node, layer.op)


def check_logits(folder: Path, file: Path, dtype: torch.dtype, tolerance: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for shape in SHAPES:
        ids = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))
        expected = model(input_ids=ids).logits.detach().float()
        assert float((logits_of_graph(file, ids) - expected).abs().max()) < tolerance, shape


CASES = [
    ("llama", "2:4", "float32"),
    ("qwen2", "1:4", "float32"),
    ("gpt2", "2:4", "float32"),
    pytest.param("opt", "2:4", "float32", marks=pytest.mark.slow),
    pytest.param("gemma3", "4:8", "float32", marks=pytest.mark.slow),
    pytest.param("llama", "2:4", "bfloat16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "pattern", "dtype"), CASES)
def test_the_graph_is_the_model_and_holds_its_zeros(
    family: str,
    pattern: str,
    dtype: Any,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = sparse_folder(FAMILIES[family](), tokenizer, tmp_path / "out", pattern=pattern)
    file = tmp_path / "graph" / "model.onnx"
    with caplog.at_level(logging.WARNING):
        report = export_onnx(folder, file, dtype)
    assert not [r for r in caplog.records if r.name.startswith("torch.onnx")]
    check_export(folder, file, report)
    assert all(layer.two_four == (pattern != "4:8") for layer in report.layers)
    assert report.max_tokens == 32
    assert json.loads(json.dumps(report.describe()))["layers"][0]["pattern"] == pattern
    if dtype == "float32":  # ONNX Runtime does not compute bfloat16 on CPU
        check_logits(folder, file, torch.float32, 1e-4)


@pytest.fixture(scope="module")
def exported(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, OnnxReport]:
    """A folder of the tied Llama, its graph in fp16, and the report."""
    place = tmp_path_factory.mktemp("exported")
    folder = sparse_folder(tied_llama(), tokenizer, place / "out")
    return folder, place / "model.onnx", export_onnx(folder, place / "model.onnx")


def test_fp16_is_what_is_written(exported: tuple[Path, Path, OnnxReport]) -> None:
    check_export(*exported)
    assert exported[2].dtype == "float16"


def test_the_two_files_can_be_moved_together(
    exported: tuple[Path, Path, OnnxReport], tmp_path: Path
) -> None:
    folder, file, _ = exported
    for path in (file, file.with_name("model.onnx.data")):
        shutil.copy(path, tmp_path)
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph
    places = {e.value for c in graph.initializer for e in c.external_data if e.key == "location"}
    assert places == {"model.onnx.data"}
    check_logits(folder, tmp_path / "model.onnx", torch.float16, 2e-2)


def test_what_stands_at_the_place_stays(
    exported: tuple[Path, Path, OnnxReport], tmp_path: Path
) -> None:
    folder, file, _ = exported
    with pytest.raises(SparsifyError, match=r"model.onnx exists and stays; remove it, or name"):
        export_onnx(folder, file)
    (tmp_path / "new.onnx.data").write_text("precious")
    with pytest.raises(SparsifyError, match=r"new.onnx.data exists and stays"):
        export_onnx(folder, tmp_path / "new.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["new.onnx.data"]


@pytest.mark.parametrize("where", ["trace", "check", "move"])
def test_a_failure_leaves_nothing_behind(
    where: str,
    exported: tuple[Path, Path, OnnxReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, file, _ = exported

    def untraceable(*args: Any, **options: Any) -> None:
        raise OnnxExporterError("an operator is unknown\nmany more lines")

    def write_former(model: Any, path: Path) -> None:
        for end in ("", ".data"):
            shutil.copy(f"{file}{end}", f"{path}{end}")

    def refuse(*args: Any) -> None:
        raise SparsifyError("layer: refused")

    def taken(path: Path, target: Path) -> None:
        if target.name == "model.onnx":  # another process writes it just now
            target.write_text("theirs")
        put_new(path, target)

    if where == "trace":
        monkeypatch.setattr(torch.onnx, "export", untraceable)
        message = (
            r"LlamaForCausalLM cannot be traced .*\(an operator is unknown\); nothing was written"
        )
    elif where == "check":
        monkeypatch.setattr("sparsify.serving.onnx.write._write", write_former)
        monkeypatch.setattr("sparsify.serving.onnx.write.check_layers", refuse)
        message = "layer: refused"
    else:
        monkeypatch.setattr("sparsify.serving.onnx.write._write", write_former)
        monkeypatch.setattr("sparsify.serving.onnx.write.put_new", taken)
        message = "model.onnx exists, and stays"
    with pytest.raises((SparsifyError, OSError), match=message):
        export_onnx(folder, tmp_path / "model.onnx")
    if where == "move":
        assert (tmp_path / "model.onnx").read_text() == "theirs"
        (tmp_path / "model.onnx").unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SparsifyError, match=rf"{package}.*: pip install 'sparsify-llm\[onnx\]'"):
        export_onnx(tmp_path, tmp_path / "model.onnx")


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match="it is not a folder that sparsify exported"):
        export_onnx(tmp_path, tmp_path / "model.onnx")


def test_a_weight_beyond_the_type_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_llama()
    model.lm_head.weight.data[0, 0] = 7e4  # above 65504
    folder = sparse_folder(model, tokenizer, tmp_path / "out")
    with pytest.raises(SparsifyError, match=r"lm_head.weight holds .*float16.*take bfloat16"):
        export_onnx(folder, tmp_path / "model.onnx", "float16")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_rotary_embeddings_that_depend_on_the_length_do_so_in_the_graph(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        **SIZES | {"num_hidden_layers": 1, "pad_token_id": 0},
        original_max_position_embeddings=16,  # traced below it, checked on both sides
        rope_scaling=rope,
    )
    folder = sparse_folder(Phi3ForCausalLM(config).eval(), tokenizer, tmp_path / "out")
    with pytest.warns(UserWarning, match="long_inv_freq was assigned during export"):
        export_onnx(folder, tmp_path / "model.onnx", "float32")
    check_logits(folder, tmp_path / "model.onnx", torch.float32, 1e-4)


@pytest.mark.slow
def test_a_model_that_branches_on_the_length_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).eval()
    folder = sparse_folder(model, tokenizer, tmp_path / "out")
    with pytest.raises(SparsifyError, match="LlamaForCausalLM cannot be traced .*data-dependent"):
        export_onnx(folder, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
