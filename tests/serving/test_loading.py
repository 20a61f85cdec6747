"""A loaded model is the exported one, whatever its layers run on."""

import gc
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)
from transformers import pipeline as make_pipeline

from sparsify import NMPattern, SparsifyError, serving
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST
from sparsify.models.stored_weights import INDEX, SINGLE, StoredWeights
from sparsify.serving.loading import _sparse_layers
from sparsify.serving.quantizer import SparsifyConfig
from tests.architectures import tiny
from tests.conftest import SIZES, tiny_llama, word_tokenizer
from tests.export.test_folder import masked_module
from tests.serving.fake import FakeBackend, FakeClock, PackedLinear
from tests.tiny_models import FAMILIES

TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
GREEDY: dict[str, Any] = {
    "max_new_tokens": 8,
    "do_sample": False,
    "attention_mask": torch.ones_like(TOKENS),
    "pad_token_id": 0,
}
SPARSE: dict[str, Any] = {"choose": "sparse", "device": "cpu"}


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family with magnitude masks."""
    folders = {name: tmp_path_factory.mktemp("exports") / "out" for name in FAMILIES}
    for name, folder in folders.items():
        export(masked_module(FAMILIES[name](), word_tokenizer()).masked, folder, {})
    return folders


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny Llama with magnitude masks, to be damaged."""
    export(masked_module(tiny_llama(), tokenizer).masked, tmp_path / "out", {})
    return tmp_path / "out"


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_transformers_computes(
    family: str, dtype: torch.dtype | None, sparse: bool, exports: dict[str, Path]
) -> None:
    wanted = AutoModelForCausalLM.from_pretrained(exports[family], dtype=dtype or "auto")
    options = SPARSE | {"backends": [FakeBackend()]} if sparse else {"device": "cpu"}
    model = serving.load(exports[family], dtype=dtype, **options)
    assert type(model) is type(wanted)
    assert (model.dtype, model.training) == (dtype or torch.float32, False)
    logits = model(input_ids=TOKENS).logits
    assert torch.equal(logits, wanted(input_ids=TOKENS).logits)
    assert not logits.requires_grad
    assert torch.equal(model.generate(TOKENS, **GREEDY), wanted.generate(TOKENS, **GREEDY))
    assert model.generation_config.to_dict() == wanted.generation_config.to_dict()
    packed = {name for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    listed = set(json.loads((exports[family] / MANIFEST).read_text())["layers"])
    assert packed == (listed if sparse and family != "gpt2" else set())
    ties = [
        {(a, b) for a, x in m.named_parameters(remove_duplicate=False)
         for b, y in m.named_parameters(remove_duplicate=False) if x is y and a != b}
        for m in (model, wanted)
    ]  # fmt: skip
    assert ties[0] == ties[1]


@pytest.mark.parametrize(
    ("kind", "dtype", "kept"),
    [
        ("deepseek_v3", torch.bfloat16, "e_score_correction_bias"),
        ("ernie4_5_moe", torch.bfloat16, "gate.weight"),
        ("gpt_oss", torch.float16, "norm.weight"),
    ],
)
def test_what_transformers_keeps_in_float32_is_kept(
    kind: str, dtype: torch.dtype, kept: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Such biases decide between experts: rounded, they send tokens to others."""
    model = tiny(kind)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # Close to each other and large, so that the smaller type makes them equal.
            buffer.copy_(30 + 0.01 * torch.arange(buffer.numel()).reshape(buffer.shape))
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    out = tmp_path / "out"
    export(masked_module(base, tokenizer).masked, out, {})
    wanted = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    state = wanted.state_dict()
    assert {value.dtype for name, value in state.items() if name.endswith(kept)} == {torch.float32}
    quantized = SparsifyConfig(choose="dense")
    for found in (
        serving.load(out, device="cpu", dtype=dtype),
        AutoModelForCausalLM.from_pretrained(out, dtype=dtype, quantization_config=quantized),
    ):
        own = found.state_dict()
        assert {n: v.dtype for n, v in own.items()} == {n: v.dtype for n, v in state.items()}
        assert all(torch.equal(own[name], value) for name, value in state.items())
        assert torch.equal(
            found(input_ids=TOKENS, use_cache=False).logits,
            wanted(input_ids=TOKENS, use_cache=False).logits,
        )


def test_a_backend_is_chosen_for_the_type_that_a_layer_is_kept_in(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["up_proj"])
    asked = []

    class Asked(FakeBackend):
        def takes(self, shape: Any, dtype: torch.dtype, *others: Any) -> bool:
            asked.append((shape, dtype))
            return super().takes(shape, dtype, *others)

    options: dict[str, Any] = {"choose": "sparse", "backends": [Asked()]}
    serving.load(exports["llama"], dtype=torch.bfloat16, device="cpu", **options)
    by_load = asked.copy()
    asked.clear()
    AutoModelForCausalLM.from_pretrained(
        exports["llama"], dtype=torch.bfloat16, quantization_config=SparsifyConfig(**options)
    )
    assert {dtype for _, dtype in by_load} == {torch.float32, torch.bfloat16}
    assert by_load == asked


def test_layers_run_as_they_were_measured(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    clock = FakeClock(lambda tokens, rows: 0.5 if rows == 64 else 2.0 - tokens / 8)
    monkeypatch.setattr("sparsify.serving.loading.in_turns", clock)
    options: dict[str, Any] = {"device": "cpu", "backends": [FakeBackend()]}
    state = torch.random.get_rng_state()
    model = serving.load(exports["llama"], tokens=(2, 9), **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    found = serving.choices(model)
    wide = {name for name, choice in found.items() if choice.backend == "fake"}
    assert wide == {f"model.layers.{i}.mlp.{kind}_proj" for i in (0, 1) for kind in ("up", "gate")}
    assert {n for n, m in model.named_modules() if isinstance(m, PackedLinear)} == wide
    assert {tokens for tokens, _ in clock.asked} == {2, 4, 8, 9}
    assert found["model.layers.0.mlp.down_proj"].reason == "no faster: fake at 2, 4, 8 tokens"
    many = serving.load(exports["llama"], tokens=16, **options)
    assert {choice.backend for choice in serving.choices(many).values()} == {"fake"}


def test_conv1d_stays_dense_and_says_so(exports: dict[str, Path]) -> None:
    model = serving.load(exports["gpt2"], **SPARSE, backends=[FakeBackend()])
    reasons = {choice.reason for choice in serving.choices(model).values()}
    assert reasons == {"Conv1D stores its weight transposed"}


def test_the_cpu_is_dense_by_default(exports: dict[str, Path]) -> None:
    model = serving.load(exports["llama"], device="cpu")
    assert {c.reason for c in serving.choices(model).values()} == {"no backend runs on cpu"}
    with pytest.raises(SparsifyError, match="none of cusparselt, cutlass, decode runs on cpu"):
        serving.load(exports["llama"], **SPARSE)


def test_a_pipeline_runs_it(exports: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    texts = []
    for model in (
        serving.load(exports["llama"], **SPARSE, backends=[FakeBackend()]),
        AutoModelForCausalLM.from_pretrained(exports["llama"]),
    ):
        pipeline = make_pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        [answer] = pipeline("w1 w2 w3", max_new_tokens=5, do_sample=False)
        texts.append(answer["generated_text"])
    assert texts[0] == texts[1]
    assert texts[0].count("w") == 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_it_compiles(exports: dict[str, Path]) -> None:
    model = serving.load(exports["llama"], **SPARSE, backends=[FakeBackend()])
    wanted = model(input_ids=TOKENS).logits
    compiled: Any = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids=TOKENS).logits, wanted)
    assert serving.choices(compiled) is serving.choices(model)


def test_shards_load_as_one_file(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    wanted = serving.load(folder, device="cpu")(input_ids=TOKENS).logits
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    sharded = serving.load(folder, **SPARSE, backends=[FakeBackend()])
    assert torch.equal(sharded(input_ids=TOKENS).logits, wanted)
    shard = min(folder.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(SparsifyError, match=f"{shard.name} is missing, though .*export"):
        serving.load(folder, device="cpu")
    (folder / INDEX).write_text("{")
    with pytest.raises(SparsifyError, match="index.json has no readable weight_map"):
        serving.load(folder, device="cpu")


def test_a_bias_in_a_later_shard_is_not_lost(tmp_path: Path) -> None:
    """Weight and bias may come in any order."""
    export(masked_module(FAMILIES["qwen2"](), word_tokenizer()).masked, tmp_path / "out", {})
    out = tmp_path / "out"
    wanted = serving.load(out, device="cpu")(input_ids=TOKENS).logits
    tensors = load_file(out / SINGLE)
    (out / SINGLE).unlink()
    parts = [
        {n: t for n, t in tensors.items() if n.endswith("bias") == last} for last in (False, True)
    ]
    for i, part in enumerate(parts):
        save_file(part, out / f"{i}.safetensors")
    index = {n: f"{i}.safetensors" for i, part in enumerate(parts) for n in part}
    (out / INDEX).write_text(json.dumps({"weight_map": index}))
    model = serving.load(out, **SPARSE, backends=[FakeBackend()])
    assert torch.equal(model(input_ids=TOKENS).logits, wanted)


UP = "model.layers.1.mlp.up_proj"


def _fill_group(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight"][3, 4:8] = 1.0


def _rename(tensors: dict[str, Tensor]) -> None:
    tensors["model.other.weight"] = tensors.pop(f"{UP}.weight")


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["model.other.weight"] = torch.ones(2)


def _cut(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"][:8].clone()


def test_experts_that_are_stored_one_by_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = Qwen3MoeConfig(
        **SIZES, head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    )
    out = tmp_path / "out"
    export(
        masked_module(AutoModelForCausalLM.from_config(config).eval(), tokenizer).masked, out, {}
    )
    assert any("experts.3.up_proj" in name for name in StoredWeights(out))
    wanted = AutoModelForCausalLM.from_pretrained(out)(input_ids=TOKENS).logits
    model = serving.load(out, **SPARSE, backends=[FakeBackend()])
    assert torch.equal(model(input_ids=TOKENS).logits, wanted)
    tensors = load_file(out / SINGLE)
    for name in [name for name in tensors if ".0.mlp.experts." in name and "up_proj" in name]:
        del tensors[name]
    save_file(tensors, out / SINGLE, {"format": "pt"})
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(content | {"transformers_version": "5.0.0"}))
    with pytest.raises(SparsifyError, match=r"experts.*5\.0\.0 wrote .* install transformers==5"):
        serving.load(out, device="cpu")


@pytest.mark.parametrize("choose", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _fill_group,
            f"{UP}: sparsity_manifest.json says 2:4, but its weight has groups with more",
        ),
        (_rename, f"hold no tensor of the name {UP}.weight; .*export the model again"),
        (_add, "the model lacks, model.other.weight; .*export the model again"),
        (_cut, rf"{UP}.weight is stored as \(8, 32\), but the configuration says \(64, 32\)"),
    ],
)
def test_a_changed_file_is_refused(damage: Any, message: str, choose: Any, folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    damage(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(SparsifyError, match=message):
        serving.load(folder, device="cpu", choose=choose, backends=[FakeBackend()])


def test_a_damaged_file_is_refused(folder: Path) -> None:
    (folder / SINGLE).write_bytes(b"not safetensors")
    with pytest.raises(SparsifyError, match="model.safetensors: not a readable safetensors file"):
        serving.load(folder, device="cpu")


def test_a_manifest_of_another_model_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["layers"]["model.norm"] = manifest["layers"].pop(UP)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        SparsifyError, match="lists model.norm, which is no linear layer of this Ll"
    ):
        serving.load(folder, device="cpu")


def test_a_plain_folder_is_refused(model_folder: Path) -> None:
    with pytest.raises(SparsifyError, match="holds no sparsity_manifest.json.*sparsify export"):
        serving.load(model_folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_damaged_configuration_is_refused(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(SparsifyError, match="no configuration that Transformers can read"):
        serving.load(folder, device="cpu")


def test_a_folder_without_a_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(SparsifyError, match="no configuration that Transformers can read"):
        serving.load(folder)


@pytest.mark.parametrize("tokens", [0, (4, 2), (0, 8), (1, 2, 3), 1.5, "5"])
def test_token_ranges_are_checked(tokens: Any, folder: Path) -> None:
    with pytest.raises(SparsifyError, match="give a number of at least 1"):
        serving.load(folder, tokens=tokens)


def test_other_arguments_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparsifyError, match="choose='fast': write 'measured', 'sparse' or 'dense'"):
        serving.load(folder, choose="fast")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SparsifyError, match="device='cuda:0': PyTorch finds no CUDA device"):
        serving.load(folder, device="cuda:0")


def test_a_backend_that_multiplies_wrongly_is_found(exports: dict[str, Path]) -> None:
    for scale in (1.05, torch.nan):
        with pytest.raises(
            SparsifyError, match=r"layers.0.\w+.\w+: fake gives a product that is off by"
        ):
            serving.load(exports["llama"], **SPARSE, backends=[FakeBackend(scale=scale)])


def test_choices_of_another_model() -> None:
    with pytest.raises(SparsifyError, match="this LlamaForCausalLM was not loaded by sparsify"):
        serving.choices(tiny_llama())


class LiveBytes:
    """The bytes of all storages that were added and still live, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._change(storage.nbytes())
        weakref.finalize(storage, self._change, -storage.nbytes())

    def _change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def test_memory_stays_near_that_of_the_sparse_model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 MB dense: what is read lives until it is compressed, one layer at a time."""
    config = LlamaConfig(
        **SIZES | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 10}
    )
    export(masked_module(LlamaForCausalLM(config), tokenizer).masked, tmp_path / "out", {})
    dense = (tmp_path / "out" / SINGLE).stat().st_size
    live = LiveBytes()

    get = StoredWeights.get

    def read(weights: StoredWeights, name: str) -> Tensor:
        own = get(weights, name).clone()  # not mapped from the file: it lives as long as it is used
        live.add(own)
        return own

    monkeypatch.setattr(StoredWeights, "get", read)
    gc.collect()
    model = serving.load(tmp_path / "out", **SPARSE, backends=[FakeBackend()])
    largest = 256 * 512 * 4
    left = sum(p.numel() * 4 for p in model.parameters())
    assert dense > 20e6
    assert live.now == left < 1e6  # norms, embedding and head
    assert left < live.peak <= left + largest


def test_layers_that_share_a_weight_stay_dense() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    found = _sparse_layers(model, {UP: NMPattern(2, 4), UP.replace("up", "gate"): NMPattern(2, 4)})
    assert [layer.obstacle for layer in found.values()] == [
        "shares its weight with another layer",
        None,
    ]


def test_devices_and_types_are_checked(folder: Path) -> None:
    with pytest.raises(SparsifyError, match="device='foo': write 'cuda'"):
        serving.load(folder, device="foo")
    for device in ("meta", torch.device("meta"), 1.5):
        with pytest.raises(SparsifyError, match=f"device={re.escape(repr(device))}: write 'cuda'"):
            serving.load(folder, device=device)  # type: ignore[arg-type]
    for dtype in (torch.int8, "bfloat16"):
        with pytest.raises(SparsifyError, match=f"dtype={dtype!r}: a model's weights are floats"):
            serving.load(folder, dtype=dtype)  # type: ignore[arg-type]
