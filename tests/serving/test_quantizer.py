"""Transformers' ``from_pretrained`` with a ``SparsifyConfig``: the exported model, and what is
refused.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2ForCausalLM,
    pipeline,
)
from transformers.quantizers.base import HfQuantizer

from sparsify import SparsifyError, serving
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST
from sparsify.models.stored_weights import INDEX, SINGLE
from sparsify.serving import SparsifyConfig
from sparsify.serving.quantizer import check_interface
from tests.conftest import word_tokenizer
from tests.export.test_folder import masked_module
from tests.serving.fake import FakeBackend, FakeClock, PackedLinear
from tests.serving.test_loading import GREEDY, TOKENS, LiveBytes
from tests.tiny_models import FAMILIES, tiny_mixtral

MODELS: dict[str, Any] = {
    **{name: FAMILIES[name] for name in ("llama", "tied llama", "qwen2", "gpt2", "gemma3")},
    "mixtral": tiny_mixtral,
}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six architectures with magnitude masks."""
    folders = {name: tmp_path_factory.mktemp("exports") / "out" for name in MODELS}
    for name, folder in folders.items():
        export(masked_module(MODELS[name](), word_tokenizer()).masked, folder, {})
    return folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen2, whose projections have biases, to be damaged."""
    export(masked_module(MODELS["qwen2"](), word_tokenizer()).masked, tmp_path / "out", {})
    return tmp_path / "out"


def load(folder: Path, *, choose: Any = "sparse", **options: Any) -> PreTrainedModel:
    config = SparsifyConfig(choose=choose, backends=[FakeBackend()])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def packed(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("choose", ["dense", "sparse"])
@pytest.mark.parametrize("family", MODELS)
def test_it_computes_what_the_dense_folder_computes(
    family: str, choose: str, exports: dict[str, Path]
) -> None:
    wanted = AutoModelForCausalLM.from_pretrained(exports[family])
    model = load(exports[family], choose=choose)
    assert type(model) is type(wanted)
    assert not model.training
    logits = model(input_ids=TOKENS).logits
    assert torch.equal(logits, wanted(input_ids=TOKENS).logits)
    assert not logits.requires_grad
    assert torch.equal(model.generate(TOKENS, **GREEDY), wanted.generate(TOKENS, **GREEDY))
    layers = json.loads((exports[family] / MANIFEST).read_text())["layers"]
    linear = {name for name in layers if family != "gpt2" and "experts." not in name}
    assert packed(model) == (linear if choose == "sparse" else set())
    assert serving.choices(model).keys() == layers.keys()
    assert "quantization_config" not in json.loads((exports[family] / "config.json").read_text())
    assert '"choose"' in repr(model.config)


def test_it_decides_as_load_does(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    clock = FakeClock(lambda tokens, rows: 0.5 if rows == 64 else 2.0)
    monkeypatch.setattr("sparsify.serving.loading.in_turns", clock)
    config = SparsifyConfig(tokens=(2, 9), backends=[FakeBackend()])
    state = torch.random.get_rng_state()
    model = AutoModelForCausalLM.from_pretrained(exports["llama"], quantization_config=config)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = serving.load(exports["llama"], tokens=(2, 9), backends=[FakeBackend()], device="cpu")
    assert str(serving.choices(model)) == str(serving.choices(other))
    assert packed(model) == packed(other)
    assert len(packed(model)) == 4


def test_other_types_and_a_pipeline(exports: dict[str, Path]) -> None:
    wanted = AutoModelForCausalLM.from_pretrained(exports["llama"], dtype=torch.bfloat16)
    model = load(exports["llama"], dtype=torch.bfloat16, device_map="cpu")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(input_ids=TOKENS).logits, wanted(input_ids=TOKENS).logits)
    tokenizer = AutoTokenizer.from_pretrained(exports["llama"])
    [answer] = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        "w1 w2 w3", max_new_tokens=5, do_sample=False
    )
    assert answer["generated_text"].count("w") == 8


def test_a_bias_that_is_read_last_is_not_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers sorts names, so that biases come first; nothing depends on it."""
    from transformers import core_model_loading

    wanted = AutoModelForCausalLM.from_pretrained(folder)(input_ids=TOKENS).logits
    key = core_model_loading.dot_natural_key
    monkeypatch.setattr(
        core_model_loading, "dot_natural_key", lambda name: (name.endswith("bias"), key(name))
    )
    model = load(folder)
    assert torch.equal(model(input_ids=TOKENS).logits, wanted)
    assert len(packed(model)) == 14


def test_the_whole_dense_model_is_never_held(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import core_model_loading

    live = LiveBytes()
    read = core_model_loading._materialize_copy

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        own = read(*args, **kwargs).clone()
        live.add(own)
        return own

    monkeypatch.setattr(core_model_loading, "_materialize_copy", counted)
    model = load(exports["llama"])
    left = sum(p.numel() * 4 for p in model.parameters())
    largest = 64 * 64 * 4
    assert live.now == left
    assert left < live.peak <= left + largest


def _fill_group(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight"][3, 4:8] = 1.0


def _remove(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{UP}.weight"]


@pytest.mark.parametrize("choose", ["dense", "sparse"])
@pytest.mark.parametrize("damage", [_fill_group, _remove])
def test_weights_that_are_not_n_m_are_refused(damage: Any, choose: str, folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    damage(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(SparsifyError, match=f"{UP}: sparsity_manifest.json says 2:4, but its wei"):
        load(folder, choose=choose)


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"][:8].clone()
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(SparsifyError, match=r"is stored as \(8, 32\), but the configuration says"):
        load(folder)


def test_other_folders_are_refused(folder: Path, model_folder: Path) -> None:
    with pytest.raises(SparsifyError, match="holds no sparsity_manifest.json: it is not a folder"):
        load(model_folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"schema": "sparsify.manifest/9"}))
    with pytest.raises(SparsifyError, match="its schema is 'sparsify.manifest/9', and this vers"):
        load(folder)


def test_a_backend_that_multiplies_wrongly_is_found(folder: Path) -> None:
    config = SparsifyConfig(choose="sparse", backends=[FakeBackend(scale=1.05)])
    with pytest.raises(SparsifyError, match="fake gives a product that is off by"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_shards_load_as_one_file(folder: Path) -> None:
    wanted = load(folder)(input_ids=TOKENS).logits
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).is_file()
    assert torch.equal(load(folder)(input_ids=TOKENS).logits, wanted)


def test_the_manifest_of_a_model_on_the_hub_is_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers fetches weights and configuration, and no file that it does not know."""
    cached = tmp_path / "hub" / "models--me--sparse"
    snapshot = cached / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    (snapshot / MANIFEST).unlink()
    asked: list[Any] = []

    def fetch(name: str, file: str, revision: str, **options: Any) -> str:
        asked.append((name, file, revision))
        return str(folder / file)

    monkeypatch.setattr("sparsify.serving.quantizer.cached_file", fetch)
    model = load(Path("me/sparse"), cache_dir=tmp_path / "hub")
    assert asked == [("me/sparse", MANIFEST, "0" * 40)]
    assert len(packed(model)) == 14


def test_it_is_neither_saved_nor_trained(exports: dict[str, Path], tmp_path: Path) -> None:
    for choose in ("dense", "sparse"):
        model = load(exports["llama"], choose=choose)
        with pytest.raises(SparsifyError, match="it is not saved: copy the exported folder"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        assert not model.hf_quantizer.is_trainable


def test_arguments_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparsifyError, match="give a number of at least 1"):
        SparsifyConfig(tokens=0)
    with pytest.raises(SparsifyError, match="choose='fast': write 'measured'"):
        SparsifyConfig(choose="fast")  # type: ignore[arg-type]
    with pytest.raises(SparsifyError, match="layers are timed and run on one device"):
        load(folder, device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(SparsifyError, match="give from_pretrained that folder and no state_dict"):
        Qwen2ForCausalLM.from_pretrained(
            None,
            config=AutoConfig.from_pretrained(folder),
            state_dict=load_file(folder / SINGLE),
            quantization_config=SparsifyConfig(),
        )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "sparsify"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparsifyError, match="quantization_config of sparsify, which no export has"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_other_interfaces_are_refused() -> None:
    check_interface("5.99.0", HfQuantizer)
    with pytest.raises(SparsifyError, match=r"Transformers 6\.1: it is not version 5; use"):
        check_interface("6.1", HfQuantizer)

    class Renamed:
        __abstractmethods__ = frozenset({"is_serializable", "plan"})

    with pytest.raises(SparsifyError, match="lacks _process_model.*; its .* asks for plan"):
        check_interface("5.50.0", Renamed)
