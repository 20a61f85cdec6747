"""The exported folder: loads anywhere, exact, whole or not at all."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparsify import NMPattern, SparseCausalLM, SparsifyError
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST, read_manifest
from sparsify.export.mask_file.file import read_masks
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.export.target import check_target
from sparsify.masking.inject import hard_masks
from sparsify.masking.layer import masked_layers
from sparsify.models.hashes import hash_parameters
from sparsify.serving.verify import verify
from sparsify.strategies.dense import Dense
from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.maskllm import MaskLLM
from sparsify.training.build import calibrate
from tests.architectures import tiny
from tests.conftest import tiny_llama
from tests.tiny_models import FAMILIES, tiny_mamba

TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def masked_module(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> SparseCausalLM:
    """A module with magnitude masks, without a Trainer."""
    module = SparseCausalLM.from_model(model, tokenizer, Magnitude(), **options)
    module.configure_model()
    calibrate(module)
    return module


def files(folder: Path) -> dict[str, bytes]:
    """All that lies in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_loads_as_the_masked_model(
    family: str, pattern: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = FAMILIES[family]()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    dense = model(input_ids=TOKENS).logits
    module = masked_module(model, tokenizer, pattern=pattern)
    export(module.masked, tmp_path / "out", {})
    masks = {name: mask.clone() for name, mask in hard_masks(model)}
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(loaded) is type(model)
    logits = loaded(input_ids=TOKENS).logits
    expected = model(input_ids=TOKENS).logits
    assert torch.equal(logits, expected)
    assert float((logits - dense).detach().abs().max()) > 0.05

    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["layers"].keys() == masks.keys()
    nm = NMPattern.parse(pattern)
    found = dict(loaded.named_parameters())
    assert found.keys() == base.keys()
    for name, parameter in found.items():
        layer = name.removesuffix(".weight")
        if layer not in masks:
            assert torch.equal(parameter, base[name]), name
            continue
        transposed = family == "gpt2"  # all its masked layers are Conv1D
        weight, old = (v.detach().T if transposed else v.detach() for v in (parameter, base[name]))
        assert manifest["layers"][layer] == {
            "shape": list(weight.shape),
            "layout": "in_out" if transposed else "out_in",
            "pattern": pattern,
        }
        assert torch.equal(weight[masks[layer]], old[masks[layer]]), name
        assert nm.holds(weight), name
        # Largest magnitudes of each group along the inputs, found without the pattern's code.
        groups = old.abs().unflatten(1, (-1, nm.m))
        smallest = groups.sort(-1, descending=True).values[..., nm.n - 1 : nm.n]
        assert torch.equal((weight != 0), (groups >= smallest).flatten(1)), name
        assert not bool(weight[~masks[layer]].signbit().any()), name


MIXED = {"*.self_attn.*": "1:4", "*.down_proj": "4:8", "*.1.mlp.*": "dense", "*.1.mlp.up*": "2:4"}


def test_mixed_patterns(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_llama()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    module = masked_module(model, tokenizer, overrides=MIXED)
    export(module.masked, tmp_path / "out", {})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {
        f"model.layers.{i}.self_attn.{kind}_proj": NMPattern(1, 4)
        for i in (0, 1)
        for kind in "qkvo"
    }
    wanted |= {f"model.layers.0.mlp.{kind}_proj": NMPattern(2, 4) for kind in ("gate", "up")}
    wanted["model.layers.0.mlp.down_proj"] = NMPattern(4, 8)
    wanted["model.layers.1.mlp.up_proj"] = NMPattern(2, 4)
    zeros = 0
    for name, weight in stored.items():
        pattern = wanted.get(name.removesuffix(".weight"))
        if pattern is None:
            assert torch.equal(weight, base[name]), name
            continue
        groups = base[name].abs().unflatten(1, (-1, pattern.m))
        smallest = groups.sort(-1, descending=True).values[..., pattern.n - 1 : pattern.n]
        kept = (groups >= smallest).flatten(1)
        assert torch.equal(weight, torch.where(kept, base[name], 0)), name
        assert (weight.unflatten(1, (-1, pattern.m)) != 0).sum(-1).eq(pattern.n).all(), name
        zeros += int((weight == 0).sum())
    manifest = read_manifest(tmp_path / "out")
    assert manifest["pattern"] == "2:4"
    found = {name: layer["pattern"] for name, layer in manifest["layers"].items()}
    assert found == {name: str(pattern) for name, pattern in wanted.items()}
    assert manifest["dense"]["model.layers.1.mlp.down_proj"] == "dense by override '*.1.mlp.*'"
    masks = read_masks(tmp_path / "out")
    assert masks.keys() == wanted.keys()
    assert all(torch.equal(masks[name], mask) for name, mask in hard_masks(module.lm))
    total = sum(p.numel() for name, p in base.items() if "proj" in name)
    assert module.masked.sparsity() == pytest.approx(zeros / total, abs=1e-9)

    again = SparseCausalLM.from_model(
        tiny_llama(), tokenizer, MaskLLM(str(tmp_path / "out"), alpha=1e3), overrides=MIXED
    )
    again.configure_model()
    calibrate(again)
    assert all(torch.equal(masks[name], mask) for name, mask in hard_masks(again.lm))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (MIXED | {"*.down_proj": "2:8"}, "down_proj: the prior does not keep 2 weights of every 8"),
        ({**MIXED, "*.1.mlp.up*": "1:4"}, "the prior does not keep 1 weights of every 4"),
        ({**MIXED, "*.1.mlp.gate*": "2:4"}, "1.mlp.gate_proj: the prior SavedMasks holds no mask"),
    ],
)
def test_a_prior_of_other_patterns_is_refused(
    overrides: dict[str, str],
    message: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    export(masked_module(tiny_llama(), tokenizer, overrides=MIXED).masked, tmp_path / "out", {})
    module = SparseCausalLM.from_model(
        tiny_llama(), tokenizer, MaskLLM(prior=str(tmp_path / "out")), overrides=overrides
    )
    module.configure_model()
    with pytest.raises(SparsifyError, match=message):
        calibrate(module)


def test_the_square_conv1d_is_masked_along_its_inputs(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = FAMILIES["gpt2"]()
    export(masked_module(model, tokenizer).masked, tmp_path / "out", {})
    stored = load_file(tmp_path / "out" / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    assert stored.shape == (
        32,
        32,
    )  # [in, out]: neither its shape nor a load would show a wrong transposition
    assert NMPattern(2, 4).holds(stored.T)
    assert not NMPattern(2, 4).holds(stored)


def test_the_manifest_says_what_it_is(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_llama()
    base_hash = hash_parameters({name: p.clone() for name, p in model.named_parameters()})
    module = masked_module(model, tokenizer, exclude=["*down_proj"])
    export(module.masked, tmp_path / "a" / "b", {"scores": {"x": 1}})
    manifest = read_manifest(tmp_path / "a" / "b")
    assert manifest["schema"] == "sparsify.manifest/1"
    assert manifest["pattern"] == "2:4"
    assert manifest["base"]["hash"] == base_hash
    assert manifest["strategy"]["class"] == "sparsify.strategies.magnitude.Magnitude"
    assert manifest["strategy"]["weights"] == "frozen"
    assert manifest["dtype"] == "float32"
    assert manifest["base"]["dtype"] == "float32"
    assert manifest["scores"] == {"x": 1}
    assert len(manifest["layers"]) == 12
    assert manifest["dense"]["model.layers.0.mlp.down_proj"] == "excluded by '*down_proj'"
    assert manifest["dense"]["lm_head"] == "output head"
    assert str(tmp_path) not in json.dumps(manifest)
    with pytest.raises(SparsifyError, match="holds no sparsity_manifest.json"):
        read_manifest(tmp_path / "a")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_manifest_hashes_what_is_stored(
    family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = FAMILIES[family]()
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    export(masked_module(model, tokenizer).masked, tmp_path / "out", {})
    manifest = read_manifest(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert manifest["tensors"].keys() == stored.keys()
    for name, tensor in stored.items():
        head = f"torch.float32{tuple(tensor.shape)}".encode()
        expected = hashlib.sha256(head + tensor.numpy().tobytes()).hexdigest()
        assert manifest["tensors"][name] == expected, name
    tied = {"tied llama": "model.embed_tokens", "gpt2": "transformer.wte"}
    tied["opt"] = "model.decoder.embed_tokens"
    expected = {"lm_head.weight": f"{tied[family]}.weight"} if family in tied else {}
    assert manifest["stored_as"] == expected
    assert names == stored.keys() | manifest["stored_as"].keys()


SAVE = PreTrainedModel.save_pretrained


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _config(**settings: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return spoil


def _lose_head(folder: Path) -> None:
    _tensors(lambda stored: stored.pop("lm_head.weight"))(folder)
    _config(tie_word_embeddings=True)(folder)


def _next_float(stored: dict[str, Tensor]) -> None:
    weight = stored["model.layers.1.mlp.up_proj.weight"]
    weight[3] = torch.nextafter(weight[3], torch.full_like(weight[3], 9.0))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_tensors(_next_float), "it reads other values for model.layers.1.mlp.up_proj.weight;"),
        (_lose_head, "it reads other values for lm_head.weight;"),
        (_config(rms_norm_eps=1e-3), "in its config, rms_norm_eps differ"),
        (_tensors(lambda s: s.pop("model.norm.weight")), "has missing keys: model.norm.weight"),
        (_tensors(lambda s: s.update(odd=torch.ones(2))), "has unexpected keys: odd"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be read back"),
    ],
)
def test_a_folder_that_computes_something_else_is_refused(
    spoil: Callable[[Path], None],
    says: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def save_badly(self: PreTrainedModel, folder: Path) -> None:
        SAVE(self, folder)
        spoil(folder)

    module = masked_module(tiny_llama(), tokenizer)
    export(module.masked, tmp_path / "former", {})
    former = files(tmp_path / "former")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_badly)
    for place in ("new", "former"):
        with pytest.raises(SparsifyError, match="nothing was exported") as error:
            export(module.masked, tmp_path / place, {}, overwrite=True)
        assert says in str(error.value)
    assert files(tmp_path / "former") == former
    assert [path.name for path in tmp_path.iterdir()] == ["former"]


def test_a_setting_that_the_model_object_alone_has_is_found(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_llama()
    module = masked_module(model, tokenizer)
    model.model.norm.variance_epsilon = 0.1
    with pytest.raises(SparsifyError, match="so the model object computes otherwise"):
        export(module.masked, tmp_path / "out", {})


def test_buffers_that_a_conversion_has_rounded_are_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    module = masked_module(tiny_llama().bfloat16(), tokenizer)
    with pytest.raises(SparsifyError, match=r"other values in model.rotary_emb.inv_freq"):
        export(module.masked, tmp_path / "out", {})


def test_the_folder_holds_its_masks_and_its_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    module = masked_module(tiny_llama(), tokenizer, pattern="2:8")
    export(module.masked, tmp_path / "out", {})
    found = read_masks(tmp_path / "out")
    assert found.base_hash == module.masked.base.hash
    assert found.index.lineage == {
        "base": module.masked.base.name,
        "strategy": Magnitude().describe(),
    }
    masks = dict(hard_masks(module.lm))
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")["input_ids"] == [3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not [key for key in load_file(tmp_path / "out" / "model.safetensors") if "masker" in key]


def test_a_kept_weight_that_is_zero_is_still_in_the_mask(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, :4] = 0
    export(masked_module(model, tokenizer).masked, tmp_path / "out", {})
    mask = read_masks(tmp_path / "out" / FILE_NAME)["model.layers.0.mlp.up_proj"]
    assert mask[0, :4].tolist() == [True, True, False, False]


def test_the_dense_reference_exports_the_base(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_llama()
    expected = model(input_ids=TOKENS).logits
    module = SparseCausalLM.from_model(model, tokenizer, Dense())
    module.configure_model()
    export(module.masked, tmp_path / "out", {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded(input_ids=TOKENS).logits, expected)
    assert read_manifest(tmp_path / "out")["layers"] == {}
    assert not (tmp_path / "out" / FILE_NAME).exists()


@pytest.mark.parametrize("used", ["float32", "float16", "auto"])
def test_a_base_stored_in_fp16_is_exported_in_fp16(
    used: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_llama().half().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    module = SparseCausalLM(Magnitude(), name_or_path=str(tmp_path / "base"), dtype=used)  # type: ignore[arg-type]
    module.configure_model()
    calibrate(module)
    export(module.masked, tmp_path / "out", {})
    manifest = read_manifest(tmp_path / "out")
    assert manifest["dtype"] == "float16"
    assert manifest["base"]["dtype"] == ("float16" if used == "auto" else used)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == base.keys()
    masks = dict(hard_masks(module.lm))
    for name, weight in stored.items():
        assert weight.dtype == torch.float16
        mask = masks.get(name.removesuffix(".weight"), torch.ones_like(weight, dtype=torch.bool))
        assert torch.equal(weight, torch.where(mask, base[name], 0)), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.float16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    if used == "float32":
        assert torch.equal(loaded(input_ids=TOKENS).logits, module.lm(input_ids=TOKENS).logits)


@pytest.mark.parametrize(
    ("kind", "dtype", "kept"),
    [
        ("ernie4_5_moe", torch.bfloat16, "model.layers.1.mlp.gate.weight"),
        ("gpt_oss", torch.float16, "model.norm.weight"),
    ],
)
def test_weights_that_transformers_keeps_in_float32_are_stored_in_it(
    kind: str, dtype: torch.dtype, kept: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny(kind)
    model.get_parameter(kept).data += 1e-4  # which the smaller type rounds away
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.dtype = dtype  # of the files, by their configuration
    config.save_pretrained(tmp_path / "base")
    before = base.get_parameter(kept).detach().clone()
    assert not torch.equal(before.to(dtype).float(), before)
    out = tmp_path / "out"
    export(masked_module(base, tokenizer).masked, out, {})
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["dtype"] == str(dtype).removeprefix("torch.")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {
        dtype,
        torch.float32,
    }
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert torch.equal(loaded.get_parameter(kept), before)
    assert verify(out, str(tmp_path / "base")).ok


def test_weights_of_another_type_that_transformers_does_not_keep_are_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, name = tiny_mamba().bfloat16(), "backbone.layers.1.mixer.A_log"
    weight = model.get_parameter(name)
    weight.data = weight.data.float()
    export(masked_module(model, tokenizer).masked, tmp_path / "out", {})  # nothing was rounded

    model = tiny_mamba().bfloat16()
    weight = model.get_parameter(name)
    weight.data = weight.data.float() + 1e-4
    with pytest.raises(SparsifyError, match=rf"it reads other values for {name};"):
        export(masked_module(model, tokenizer).masked, tmp_path / "new", {})


def test_changed_frozen_weights_are_detected(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    module = masked_module(tiny_llama(), tokenizer)
    layer = next(iter(masked_layers(module.lm).values()))
    before = layer.weight.data[3, 5].item()
    layer.weight.data[3, 5] = before * (1 + 2**-22)  # the last bits of one weight
    with pytest.raises(SparsifyError, match="base weights changed"):
        export(module.masked, tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []
    layer.weight.data[3, 5] = before
    export(module.masked, tmp_path / "out", {})


def test_a_foreign_folder_stays(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    module = masked_module(tiny_llama(), tokenizer)
    for overwrite in (False, True):
        with pytest.raises(SparsifyError, match="not an export and is not replaced; name another"):
            check_target(tmp_path / "out", overwrite)
        with pytest.raises(SparsifyError, match="not an export"):
            export(module.masked, tmp_path / "out", {}, overwrite)
    assert files(tmp_path) == {"out/thesis.txt": b"precious"}
    check_target(tmp_path / "free", False)


def test_an_earlier_export_is_replaced_only_if_asked(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    module = masked_module(tiny_llama(), tokenizer)
    export(module.masked, tmp_path / "out", {"run": 1})
    (tmp_path / "out" / "note.txt").write_text("the user's own")
    before = files(tmp_path)
    with pytest.raises(SparsifyError, match="holds an earlier export; replace it with overwrite"):
        export(module.masked, tmp_path / "out", {"run": 2})
    assert files(tmp_path) == before
    export(module.masked, tmp_path / "out", {"run": 2}, overwrite=True)
    assert read_manifest(tmp_path / "out")["run"] == 2
    assert set(before) == set(files(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o644}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("where", ["weights", "manifest"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_the_former_export(
    where: str,
    number: int,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = masked_module(tiny_llama(), tokenizer)
    export(module.masked, tmp_path / "out", {"run": 1})
    before = files(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(PreTrainedModel, "save_pretrained", fail)
        else:
            patch.setattr("sparsify.export.folder.write_json", fail)
        full = number == errno.ENOSPC
        with pytest.raises(
            SparsifyError if full else OSError,
            match="disk is full.*sparsify export" if full else "put/output",
        ):
            export(module.masked, tmp_path / "out", {"run": 2}, overwrite=True)
        with pytest.raises((SparsifyError, OSError)):
            export(module.masked, tmp_path / "new", {})
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_masks_do_not_change_the_module(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    module = masked_module(tiny_llama(), tokenizer)
    state: dict[str, Tensor] = {key: value.clone() for key, value in module.state_dict().items()}
    export(module.masked, tmp_path / "out", {})
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert len(masked_layers(module.lm)) == 14


def test_a_full_disk_that_safetensors_tells_of_is_a_message(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")  # no OSError

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(SparsifyError, match="disk is full.*nothing else was lost"):
        export(masked_module(tiny_llama(), tokenizer).masked, tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []
