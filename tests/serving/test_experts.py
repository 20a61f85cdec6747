"""An export with masked experts where it is used: loaded, swapped, and written as a graph."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsify import SparsifyError, serving
from sparsify.export.folder import export
from sparsify.serving.adapters import MaskAdapters
from sparsify.serving.onnx.write import export_onnx
from tests.architectures import tiny
from tests.conftest import word_tokenizer
from tests.export.test_folder import TOKENS, masked_module
from tests.serving.fake import FakeBackend

KINDS = ["mixtral", "gpt_oss"]
EXPERTS = {
    f"model.layers.{i}.mlp.experts.{kind}_proj" for i in (0, 1) for kind in ("gate_up", "down")
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By kind of model and pattern."""
    folder, found = tmp_path_factory.mktemp("experts"), {}
    for kind in KINDS:
        for pattern in ("2:4", "4:8"):
            found[kind, pattern] = folder / kind / pattern
            module = masked_module(tiny(kind), word_tokenizer(), pattern=pattern)
            export(module.masked, found[kind, pattern], {})
    return found


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")


@pytest.mark.parametrize("kind", KINDS)
def test_experts_load_dense_and_say_why(kind: str, exports: dict[tuple[str, str], Path]) -> None:
    options = {"device": "cpu", "choose": "sparse", "backends": [FakeBackend()]}
    model = serving.load(exports[kind, "2:4"], dtype=torch.bfloat16, **options)
    found = serving.choices(model)
    dense = {name: choice.reason for name, choice in found.items() if choice.backend == "dense"}
    assert dense == dict.fromkeys(EXPERTS, "no backend multiplies a stack of experts")
    assert len(found) == 8 + 4
    same = serving.load(exports[kind, "2:4"], device="cpu", choose="dense")
    same.set_experts_implementation("eager")
    assert torch.equal(logits(same), logits(plain(exports[kind, "2:4"])))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_experts_are_swapped(kind: str, exports: dict[tuple[str, str], Path]) -> None:
    model = tiny(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._experts_implementation
    adapters = MaskAdapters(model)
    for pattern in ("2:4", "4:8"):
        adapters.add(pattern, exports[kind, pattern])
    model.set_experts_implementation("eager")
    dense = logits(model)
    model.set_experts_implementation(implementation)
    for pattern in ("2:4", "4:8", "2:4"):
        adapters.use(pattern)
        assert torch.equal(logits(model), logits(plain(exports[kind, pattern])))
    with adapters.use("4:8"):
        assert torch.equal(logits(model), logits(plain(exports[kind, "4:8"])))
    assert torch.equal(logits(model), logits(plain(exports[kind, "2:4"])))
    adapters.use(None)
    assert model.config._experts_implementation == implementation
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), dense)
    adapters.use("2:4")
    adapters.fold("2:4")
    assert torch.equal(logits(model), logits(plain(exports[kind, "2:4"])))


def test_a_graph_of_experts_is_refused(
    exports: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    message = "model.layers.0.mlp.experts.gate_up_proj holds masked experts: .* the folder itself"
    with pytest.raises(SparsifyError, match=message):
        export_onnx(exports["mixtral", "2:4"], tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
