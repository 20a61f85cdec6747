"""The verifier: sound exports are ok, and each single damage is reported where it is."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparsify import NMPattern, SparseCausalLM, SparsifyError
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST
from sparsify.export.mask_file.file import write_masks
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.masking.effect import Effect
from sparsify.masking.layer import masked_layers
from sparsify.masking.strategy import Block, LayerResult
from sparsify.models.hashes import hash_tensor
from sparsify.serving.verify import verify
from sparsify.serving.verify.report import Report
from sparsify.strategies.dense import Dense
from sparsify.strategies.fixed_mask import FixedMask
from sparsify.strategies.magnitude import Magnitude
from sparsify.training.build import calibrate
from tests.conftest import SIZES, tiny_llama
from tests.serving.verify.conftest import write
from tests.tiny_models import FAMILIES

UP = "model.layers.1.mlp.up_proj"
EMBED = "model.embed_tokens.weight"
SHARD_BYTES = 20_000


def tiny_mixtral() -> MixtralForCausalLM:
    """Experts that Transformers stores under other names, one by one."""
    sizes = SIZES | {"num_local_experts": 2, "pad_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


@pytest.fixture
def shards(out: Path) -> Path:
    """The same in several files with an index."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    (out / "model.safetensors").unlink()
    model.save_pretrained(out, max_shard_size=SHARD_BYTES)
    assert len(list(out.glob("model-*.safetensors"))) > 5
    return out


def problems(report: Report) -> list[str]:
    """All of them, each with its layer's name."""
    return report.problems + [f"{row.name}: {p}" for row in report.layers for p in row.problems]


def printed(report: Report) -> str:
    console = Console(width=160)
    with console.capture() as shown:
        console.print(report.table(), soft_wrap=True)
    return shown.get()


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object], rehash: bool = False) -> None:
    """Rewrite the weights; with ``rehash`` the manifest's hashes too, as a forger would."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if rehash:
        hashes = {name: hash_tensor(tensor) for name, tensor in tensors.items()}
        edit_manifest(folder, lambda m: m.update(tensors=hashes))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def dropped(weight_OI: Tensor) -> tuple[int, int]:
    """The first zero of row 3."""
    return 3, int((weight_OI[3] == 0).nonzero()[0])


# -- sound folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_an_export_is_ok(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = (FAMILIES | {"mixtral": tiny_mixtral})[family]()
    module = write(model, tokenizer, tmp_path)
    for base in (None, str(tmp_path / "base")):
        report = verify(tmp_path / "out", base)
        assert problems(report) == []
        assert report.ok
        plain, _, against = report.summary().partition("; ")
        assert plain == f"ok: {tmp_path / 'out'}, {len(report.layers)} sparse layers of 2:4"
        assert bool(against) == (base is not None)
        assert [row.name for row in report.layers] == list(masked_layers(module.lm))
        assert all(row.nonzero == 0.5 and row.pattern == "2:4" for row in report.layers)
    assert "NOT compared" not in against
    assert report.notes == []
    experts = {row.name: row for row in report.layers if "experts" in row.name}
    assert len(experts) == (4 if family == "mixtral" else 0)
    dense = ["experts run dense: no backend here multiplies a stack of sparse matrices"]
    assert all(row.notes == dense and row.backends == [] for row in experts.values())
    compared = report.to_dict()["base"]
    assert compared["base"] == base
    assert sorted(compared["kept"]) == sorted(row.name for row in report.layers)
    assert compared["left"] == {}
    # The files hold w1, w2 and w3 of each of two experts in each of two blocks by themselves.
    stored = {n for n in load_file(tmp_path / "out/model.safetensors") if ".experts." not in n}
    linear = {f"{row.name}.weight" for row in report.layers if row.name not in experts}
    assert set(compared["whole"]) == stored - linear
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_the_backends_are_those_of_the_shape_in_the_type_that_packs(exported: Path) -> None:
    report = verify(exported / "out")
    rows = {row.name: row for row in report.layers}
    assert rows["model.layers.0.self_attn.q_proj"].backend_text == "cusparselt, decode"
    assert rows["model.layers.0.mlp.down_proj"].backend_text == "cusparselt, cutlass, decode"
    assert "backends as bfloat16" in printed(report)


def test_mixed_patterns(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    overrides = {"*.self_attn.*": "1:4", "*.down_proj": "4:8", "*.1.mlp.up*": "dense"}
    write(tiny_llama(), tokenizer, tmp_path, overrides=overrides)
    report = verify(tmp_path / "out", str(tmp_path / "base"))
    assert problems(report) == []
    rows = {row.name: row for row in report.layers}
    assert rows["model.layers.0.self_attn.q_proj"].nonzero == 0.25
    assert rows["model.layers.0.self_attn.q_proj"].backends == ["cusparselt", "decode"]
    down = rows["model.layers.0.mlp.down_proj"]
    assert down.backends == []
    assert down.notes == ["no backend runs 4:8 at 32 x 64 in bfloat16: it runs dense"]
    assert "model.layers.*.mlp.down_proj (2): no backend runs 4:8" in printed(report)
    assert UP not in rows

    # A pattern that was asked for besides: 1:4 is 2:4 too, 4:8 need not be.
    wrong = [row.name for row in verify(tmp_path / "out", pattern="2:4").layers if row.problems]
    assert wrong == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert any(
        "in_features=32 is not a multiple of m=5 of 2:5" in problem
        for problem in problems(verify(tmp_path / "out", pattern="2:5"))
    )


def test_a_base_stored_in_bf16_and_used_in_fp32(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    module = SparseCausalLM(Magnitude(), name_or_path=str(tmp_path / "base"), dtype="float32")
    module.configure_model()
    calibrate(module)
    export(module.masked, tmp_path / "out", {})
    report = verify(tmp_path / "out", str(tmp_path / "base"))
    assert problems(report) == []
    assert {row.cast for row in report.layers} == {None}
    edit_manifest(tmp_path / "out", lambda m: m["base"].update(dtype="bfloat16"))
    (problem,) = problems(verify(tmp_path / "out", str(tmp_path / "base")))
    assert "is not the base: its hash in bfloat16 is" in problem


class Doubled(Magnitude):
    """Updates what it keeps."""

    effect = Effect(weights="updated")

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        blocks = list(blocks)
        layers = {name: layer for block in blocks for name, layer in block.layers.items()}
        for name, result in super().calibrate(blocks):
            yield name, LayerResult(result.mask, 2 * layers[name].weight_OI.detach())


@pytest.mark.parametrize("weights", ["updated", "adapted", "trained"])
def test_changed_weights_are_said_to_be_so(
    weights: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    strategy = {
        "updated": Doubled,
        "adapted": lambda: FixedMask("magnitude", lora_rank=2),
        "trained": lambda: FixedMask("magnitude"),
    }[weights]()
    module = write(tiny_llama(), tokenizer, tmp_path, strategy)
    with torch.no_grad():
        for name, parameter in module.lm.named_parameters():
            if weights == "trained" or "lora_B" in name:
                parameter.add_(0.25 if parameter.is_floating_point() else 0)
    shutil.rmtree(tmp_path / "out")
    export(module.masked, tmp_path / "out", {})
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    kept = after[f"{UP}.weight"] != 0
    assert (before[f"{UP}.weight"] != after[f"{UP}.weight"])[kept].any()

    report = verify(tmp_path / "out", str(tmp_path / "base"))
    assert problems(report) == []
    what = "all weights" if weights == "trained" else "masked layers"
    assert f"changed by the strategy ({weights}): {what}" in report.notes[0]
    tensors = 21 if weights == "trained" else 14
    why = f"{MANIFEST} says that the strategy changed them: {weights}"
    done = "nothing" if weights == "trained" else "all values of 7 other tensors"
    assert report.summary().endswith(
        f"; compared with {tmp_path / 'base'}: {done}; NOT compared: {tensors} tensors ({why})"
    )
    edit(tmp_path / "out", lambda t: t[EMBED][0].add_(1), rehash=True)
    found = problems(verify(tmp_path / "out", str(tmp_path / "base")))
    assert bool(found) == (weights != "trained")


def test_the_dense_reference_is_ok(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write(tiny_llama(), tokenizer, tmp_path, Dense())
    report = verify(tmp_path / "out", str(tmp_path / "base"))
    assert problems(report) == []
    assert report.layers == []


def test_several_files(shards: Path, exported: Path) -> None:
    assert problems(verify(shards, str(exported / "base"))) == []


# -- one damage each -------------------------------------------------------------------------------


def set_value(value: float, kept: bool = False) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        weight = tensors[f"{UP}.weight"]
        at = (3, int((weight[3] != 0).nonzero()[0])) if kept else dropped(weight)
        weight[at] = value

    return change


def one_ulp(tensors: dict[str, Tensor]) -> None:
    weight = tensors[f"{UP}.weight"]
    at = 3, int((weight[3] != 0).nonzero()[0])
    weight[at] = torch.nextafter(weight[at], torch.tensor(torch.inf))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_value(1.0),
            r"1 of 512 groups hold more than 2 nonzeros of 4; the first is row 3, inputs 0 to 3",
        ),
        (set_value(1.0), "1 nonzeros are where its stored mask drops"),
        (set_value(-0.0), r"1 dropped weights are -0\.0, which compressors count as nonzero"),
        (set_value(torch.nan, kept=True), "1 values are not finite"),
        (set_value(torch.inf, kept=True), "1 values are not finite"),
        (set_value(0.5, kept=True), None),
        (set_value(0.0, kept=True), None),
        (one_ulp, None),
    ],
)
@pytest.mark.parametrize("rehash", [False, True])
def test_damage_in_a_layer(
    change: Callable[[dict[str, Tensor]], None],
    message: str | None,
    rehash: bool,
    out: Path,
    exported: Path,
) -> None:
    edit(out, change, rehash)
    found = problems(verify(out))
    assert all(problem.startswith(f"{UP}: ") for problem in found)
    assert (message is None) or any(re.search(message, problem) for problem in found)
    assert any("SHA-256 differs" in problem for problem in found) == (not rehash)
    assert bool(found) == (message is not None or not rehash)
    dropped_place = message is not None and "finite" not in message
    found = problems(verify(out, str(exported / "base")))
    differs = f"{UP}: 1 of 1024 kept weights differ from the base's"
    assert (differs in found) == (not dropped_place)
    assert all(problem.startswith(f"{UP}: ") for problem in found)


def test_a_kept_negative_zero_is_the_bases_own(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, :8] = -0.0
    write(model, tokenizer, tmp_path)
    report = verify(tmp_path / "out", str(tmp_path / "base"))
    assert problems(report) == []
    row = next(row for row in report.layers if row.name == UP)
    assert row.notes == ["4 kept weights are -0.0, the base's own value"]
    edit(tmp_path / "out", lambda t: t[f"{UP}.weight"].add_(0.0), rehash=True)
    (found,) = problems(verify(tmp_path / "out", str(tmp_path / "base")))
    assert found == f"{UP}: 4 of 1024 kept weights differ from the base's"


def test_a_layer_that_is_stored_under_another_name(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreTrainedModel.save_pretrained

    def rename(self: PreTrainedModel, folder: Path) -> None:
        save(self, folder)
        if folder.name != "base":
            tensors = load_file(folder / "model.safetensors")
            tensors["up"] = tensors.pop(f"{UP}.weight")
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", rename)
    monkeypatch.setattr(
        "sparsify.export.folder.check_read_back", lambda *_: None
    )  # it cannot be loaded
    write(tiny_llama(), tokenizer, tmp_path)
    report = verify(tmp_path / "out", str(tmp_path / "base"))
    assert problems(report) == report.notes == []
    assert len(report.layers) == 14
    edit(tmp_path / "out", lambda t: t["up"].add_(t["up"]), rehash=True)
    (found,) = problems(verify(tmp_path / "out", str(tmp_path / "base")))
    assert found == f"{UP}: 1024 of 1024 kept weights differ from the base's"


def test_damage_in_a_dense_tensor(out: Path, exported: Path) -> None:
    edit(out, lambda t: t[EMBED].view(torch.int32)[0, 0].add_(1))
    base = str(exported / "base")
    assert len(problems(verify(out))) == 1
    message = "its values are not those that the export wrote"
    assert problems(verify(out))[0].startswith(f"{EMBED}: {message}")
    edit(out, lambda t: t, rehash=True)
    assert problems(verify(out)) == []
    assert problems(verify(out, base)) == [f"{EMBED}: 1 of 2048 values differ from the base's"]
    edit(out, lambda t: t[EMBED][0].fill_(torch.nan), rehash=True)
    assert f"{EMBED}: 32 values are not finite (NaN or infinite)" in problems(verify(out))


def test_tensors_that_are_missing_or_too_many(out: Path, exported: Path) -> None:
    edit(out, lambda t: (t.pop(EMBED), t.pop(f"{UP}.weight"), t.update(more=torch.ones(2))))
    found = problems(verify(out))
    assert f"{EMBED} is in no readable file, and {MANIFEST} lists it" in found
    assert f"{UP}: its weight, {UP}.weight, is in no readable file" in found
    assert f"more: {MANIFEST} does not list it" in found
    assert len(found) == 3
    # Even if the manifest forgets it too, its list of dense layers does not, nor does the base.
    edit_manifest(out, lambda m: m["tensors"].pop(EMBED))
    found = problems(verify(out, str(exported / "base")))
    assert any("model.embed_tokens: " in problem and "as dense" in problem for problem in found)
    assert f"{EMBED} is a Parameter of {exported / 'base'}, and is not stored" in found


def test_a_weight_of_another_type_or_shape(out: Path) -> None:
    name = f"{UP}.weight"
    edit(out, lambda t: t.update({name: t[name].bfloat16()}), rehash=True)
    (found,) = problems(verify(out))
    assert found == f"{UP}: it is stored in bfloat16, and {MANIFEST} says float32"
    edit(out, lambda t: t.update({name: t[name].T.contiguous()}), rehash=True)
    (found,) = problems(verify(out))
    assert found == f"{UP}: its weight is (32, 64) as (out, in), and {MANIFEST} says (64, 32)"


def test_a_square_weight_in_the_wrong_layout(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write(FAMILIES["gpt2"](), tokenizer, tmp_path)
    name = "transformer.h.0.attn.c_proj"
    edit_manifest(tmp_path / "out", lambda m: m["layers"][name].update(layout="out_in"))
    found = problems(verify(tmp_path / "out"))
    assert any("groups hold more than 2 nonzeros" in problem for problem in found)
    assert all(problem.startswith(f"{name}: ") for problem in found)


def test_masks_of_another_run(out: Path) -> None:
    layers = json.loads((out / MANIFEST).read_text())["layers"]
    base_hash = json.loads((out / MANIFEST).read_text())["base"]["hash"]
    kept = torch.tensor([True, True, False, False])
    masks = {name: kept.repeat(e["shape"][0], e["shape"][1] // 4) for name, e in layers.items()}
    write_masks(out / FILE_NAME, masks, NMPattern(2, 4), base_hash)
    report = verify(out)
    assert all("where its stored mask drops" in row.problems[0] for row in report.layers)
    assert report.problems == [f"{FILE_NAME} is not as it was exported (SHA-256 differs)"]
    assert report.count - 1 == len(report.layers) == 14

    masks[UP] = masks[UP][:, :16]
    masks["other"] = masks.pop("model.layers.0.mlp.up_proj")
    write_masks(out / FILE_NAME, masks, NMPattern(2, 4), "0" * 64)
    found = problems(verify(out))
    assert f"other: {FILE_NAME} masks it, and {MANIFEST} does not" in found
    assert f"{UP}: its stored mask is (64, 16), and its weight (64, 32)" in found
    assert f"model.layers.0.mlp.up_proj: {FILE_NAME} holds no mask of it" in found
    assert any(f"{FILE_NAME} is for base 000000000000" in problem for problem in found)
    (out / FILE_NAME).write_bytes(b"rubbish")
    assert any("not a readable mask file" in problem for problem in problems(verify(out)))


def test_a_mask_that_keeps_another_number(out: Path) -> None:
    edit_manifest(out, lambda m: m["layers"][UP].update(pattern="3:4"))
    stated, kept = problems(verify(out))
    assert stated == f"{UP}: masks.nmask holds 2:4, and sparsity_manifest.json 3:4"
    assert kept == f"{UP}: 512 groups of its stored mask do not keep 3:4"
    edit_manifest(out, lambda m: m["layers"][UP].update(pattern="4:8"))  # which 2:4 is too
    assert problems(verify(out)) == [stated.replace("3:4", "4:8")]


def test_another_base(out: Path, tmp_path: Path, exported: Path) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    report = verify(out, str(tmp_path / "other"))
    assert "is not the base: its hash in float32 is" in report.problems[0]
    assert all("kept weights differ" in row.problems[0] for row in report.layers)
    edit_manifest(out, lambda m: m["base"].update(hash="0" * 64))
    found = problems(verify(out, str(exported / "base")))
    assert len(found) == 2  # against the base, and against the mask file
    assert all("000000000000" in problem for problem in found)


def pop(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest.pop(path[-1])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema="sparsify.manifest/9"), "its schema is 'sparsify.manifest/9'"),
        (pop("schema"), "its schema is None"),
        (pop("layers"), "layers is missing; it must be a JSON object"),
        (lambda m: m.update(layers=[]), r"layers is \[\]; it must be a JSON object"),
        (pop("layers", UP), f"{UP}: masks.nmask masks it, and"),
        (pop("layers", UP, "layout"), f"the entry of {UP} is damaged .no 'layout'"),
        (lambda m: m["layers"].update({UP: 3}), f"the entry of {UP} is damaged"),
        (lambda m: m["layers"][UP].update(shape=[64]), f"the entry of {UP} is damaged"),
        (lambda m: m["layers"][UP].update(shape=["a", 4]), "is not .out_features, in_features"),
        (lambda m: m["layers"][UP].update(layout="x"), "layout 'x' is neither 'out_in' nor"),
        (lambda m: m["layers"][UP].update(pattern="4:2"), f"{UP} is damaged .pattern '4:2'"),
        (
            lambda m: m["layers"][UP].update(pattern="2:5"),
            "in_features=32 is not a multiple of m=5",
        ),
        (lambda m: m["layers"][UP].update(pattern="1:4"), f"{UP}: 512 of 512 groups hold more"),
        (lambda m: m["layers"][UP].update(shape=[32, 64]), r"is \(64, 32\) as \(out, in\)"),
        (pop("tensors"), "tensors is missing; it must be a JSON object"),
        (lambda m: m["tensors"].update({EMBED: 1}), "tensors of model.embed_tokens.weight is 1"),
        (pop("stored_as"), "stored_as is missing"),
        (pop("dtype"), "dtype is missing; it must be a string"),
        (lambda m: m.update(dtype="float16"), "it is stored in float32, and .* says float16"),
        (lambda m: m.update(dtype="decimal"), "dtype 'decimal' is not a type of PyTorch"),
        (pop("base"), "base.hash is missing"),
        (lambda m: m.update(base="llama"), "base.dtype is missing"),
        (pop("strategy", "weights"), "strategy.weights is missing"),
        (lambda m: m["strategy"].update(weights="melted"), "strategy.weights is 'melted'; it must"),
        (pop("dense"), "dense is missing"),
        (lambda m: m["dense"].update(x="?"), "x: .* lists it as dense, but none of its tensors"),
        (lambda m: m["dense"].update({UP: "?"}), f"{UP}: .* lists it as masked and as dense"),
        (lambda m: m.update(run={"sparsity": 0.6}), "run.sparsity is 0.6; .* exceed 0.5000"),
        (lambda m: m.update(run={"sparsity": "half"}), "run.sparsity is 'half'"),
    ],
)
def test_an_edited_manifest(
    change: Callable[[dict[str, Any]], object], message: str, out: Path
) -> None:
    edit_manifest(out, change)
    report = verify(out)
    assert not report.ok
    assert any(re.search(message, problem) for problem in problems(report)), problems(report)
    json.dumps(report.to_dict())
    printed(report)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not readable as JSON"), ("[]", "it is a list, not an object"), ("", "not readable")],
)
def test_a_manifest_that_is_none(text: str, message: str, out: Path) -> None:
    (out / MANIFEST).write_text(text)
    (found,) = problems(verify(out))
    assert found.startswith(f"{MANIFEST}: {message}")
    report = verify(out, pattern="2:4")  # the pattern can be checked still
    assert problems(report) == [found]
    assert len(report.layers) == 14


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", "{", "config.json: not readable as JSON"),
        ("config.json", "{}", "config.json: it names no model_type"),
        ("tokenizer.json", None, "the tokenizer's vocabulary is missing"),
        ("tokenizer.json", "]", "tokenizer.json: not readable as JSON"),
        ("tokenizer_config.json", None, "tokenizer_config.json is missing"),
    ],
)
def test_text_files(file: str, text: str | None, message: str, out: Path) -> None:
    edit_manifest(out, lambda m: m.pop("files"))
    if text is None:
        (out / file).unlink()
    else:
        (out / file).write_text(text)
    (found,) = problems(verify(out))
    assert found.startswith(message)


def test_a_truncated_file_and_the_others(shards: Path) -> None:
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    file = shards / index[f"{UP}.weight"]
    lost = {name for name, other in index.items() if other == file.name}
    other = next(n for n in index if n.endswith("proj.weight") and n not in lost)
    tensors = load_file(shards / index[other])
    tensors[other][0, :4] = 1
    save_file(tensors, shards / index[other])
    file.write_bytes(file.read_bytes()[:-10])
    report = verify(shards)
    assert report.problems[0].startswith(f"{file.name}: not a readable safetensors file")
    text = "\n".join(problems(report))
    for name in lost:
        assert f"{name} is in no readable file" in text or f"{name}, is in no readable file" in text
    assert f"{other.removesuffix('.weight')}: 1 of " in text
    assert report.count == 1 + len(lost) + 3


def test_an_index_that_lies(shards: Path) -> None:
    path = shards / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    first, second = sorted({*content["weight_map"].values()})[:2]
    name = next(n for n, file in content["weight_map"].items() if file == first)
    content["weight_map"] |= {name: second, "ghost": "model-9.safetensors"}
    path.write_text(json.dumps(content))
    assert problems(verify(shards)) == [
        f"model-9.safetensors is missing, though {path.name} lists it",
        f"{name} is in {first}, but {path.name} does not say so",
    ]
    content["weight_map"] |= {name: first, "ghost": first}
    path.write_text(json.dumps(content))
    (found,) = problems(verify(shards))
    assert found == (f"ghost is not in {first}, though {path.name} lists it there")
    path.write_text("{}")
    (found,) = problems(verify(shards))
    assert found.startswith(f"{path.name} has no readable weight_map")
    path.unlink()
    (found,) = problems(verify(shards))
    assert found.startswith(f"without {path.name} a loader reads only model.safetensors")


# -- folders of others -----------------------------------------------------------------------------


@pytest.fixture
def foreign(out: Path) -> Path:
    for name in (MANIFEST, FILE_NAME, "tokenizer.json", "tokenizer_config.json"):
        (out / name).unlink()
    return out


def test_without_a_manifest_the_pattern_must_be_given(foreign: Path, exported: Path) -> None:
    with pytest.raises(SparsifyError, match="nothing says what it should hold; give a pattern"):
        verify(foreign)
    report = verify(foreign, pattern="2:4")
    assert problems(report) == []
    assert len(report.layers) == 14
    assert "there is no" in report.notes[0]
    assert any("tokenizer" in note for note in report.notes)
    assert problems(verify(foreign, str(exported / "base"), "2:4")) == []


def test_a_damaged_layer_of_others_is_not_taken_for_dense(foreign: Path, exported: Path) -> None:
    gate = "model.layers.0.mlp.gate_proj"
    base = load_file(exported / "base" / "model.safetensors")
    edit(foreign, lambda t: t.update({f"{gate}.weight": base[f"{gate}.weight"]}))
    report = verify(foreign, pattern="2:4")
    assert problems(report) == []
    row = next(row for row in report.layers if row.name == gate)
    assert row.pattern is None
    assert report.summary().endswith("13 sparse layers of 2:4")
    assert f"{gate.replace('0', '*')} (1): dense: most of its groups" in printed(report)
    edit(foreign, set_value(1.0))
    (found,) = problems(verify(foreign, pattern="2:4"))
    assert found.startswith(f"{UP}: 1 of 512 groups hold more than 2 nonzeros")


def test_negative_zeros_of_others(foreign: Path) -> None:
    edit(foreign, lambda t: t[f"{UP}.weight"].mul_(torch.tensor(-1.0)))
    (found,) = problems(verify(foreign, pattern="2:4"))
    assert found.startswith(f"{UP}: 1024 dropped weights are -0.0")
    edit(foreign, lambda t: t[f"{UP}.weight"].add_(0.0))
    assert problems(verify(foreign, pattern="2:4")) == []


def test_a_dense_model_does_not_pass(exported: Path) -> None:
    report = verify(exported / "base", pattern="2:4")
    assert report.problems == ["no matrix of the decoder blocks holds 2:4"]


def test_gpt2_of_others_is_read_along_its_inputs(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write(FAMILIES["gpt2"](), tokenizer, tmp_path)
    (tmp_path / "out" / MANIFEST).unlink()
    report = verify(tmp_path / "out", pattern="2:4")
    assert problems(report) == []
    rows = {row.name: row for row in report.layers}
    assert rows["transformer.h.0.attn.c_proj"].pattern == "2:4"
    assert rows["transformer.h.0.attn.c_attn"].shape == (96, 32)


# -- what cannot be verified, and the table --------------------------------------------------------


def test_unusable_input(out: Path, tmp_path: Path, exported: Path) -> None:
    with pytest.raises(SparsifyError, match="is not a folder; name one that"):
        verify(tmp_path / "nowhere")
    with pytest.raises(SparsifyError, match="no model could be loaded"):
        verify(out, base=str(tmp_path / "nowhere"))
    with pytest.raises(SparsifyError, match="pattern '2:x'"):
        verify(out, pattern="2:x")
    (out / MANIFEST).unlink()
    (out / "model.safetensors").unlink()
    with pytest.raises(SparsifyError, match="holds no safetensors files"):
        verify(out, pattern="2:4")
    (out / "pytest_model.bin").touch()
    with pytest.raises(SparsifyError, match="pickle files .*save it with save_pretrained"):
        verify(out, pattern="2:4")


def test_the_table_shows_families_and_every_failing_layer(out: Path) -> None:
    edit(out, set_value(1.0))
    edit(out, lambda t: t["model.layers.0.mlp.up_proj.weight"].mul_(2))
    report = verify(out)
    lines = printed(report).splitlines()
    assert lines[0].startswith(f"4 problems: {out}, 14 sparse layers of 2:4"[:60])
    assert sum(line.startswith(f"  {UP}: ") for line in lines) == 3
    rows = [line.split() for line in lines if line.startswith(" model.")]
    assert next(r[:7] for r in rows if r[0] == UP) == [UP, "1", "64", "x", "32", "50.0", "%"]
    assert [row[-1] for row in rows if row[0].endswith("up_proj")] == ["1", "3"]
    assert ["model.layers.*.mlp.gate_proj", "2"] in [row[:2] for row in rows]
    assert len(rows) == 8
    assert len(report.to_dict()["layers"]) == 14


def test_a_file_that_loaders_do_not_read(out: Path, foreign_copy: Path) -> None:
    save_file({"a": torch.zeros(2)}, out / "other.safetensors")
    (found,) = problems(verify(out))
    assert found.startswith("other.safetensors is none of the files that a loader reads")
    save_file({"a": torch.zeros(2)}, foreign_copy / "consolidated.safetensors")
    report = verify(foreign_copy, pattern="2:4")
    assert report.ok
    assert any(note.startswith("consolidated.safetensors is none of") for note in report.notes)


@pytest.fixture
def foreign_copy(out: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(out, tmp_path / "foreign")
    (folder / MANIFEST).unlink()
    return folder


def test_a_type_in_which_no_base_is_loaded(out: Path, exported: Path) -> None:
    edit_manifest(out, lambda m: m["base"].update(dtype="int8"))
    found = problems(verify(out, str(exported / "base")))
    assert found == [
        "sparsity_manifest.json: base.dtype is 'int8'; it must be one of float32, bfloat16, float16"
    ]
