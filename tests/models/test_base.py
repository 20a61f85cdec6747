"""Where the base model comes from: folders, shards, types, and GGUF files."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify import SparseCausalLM, SparsifyError
from sparsify.calibration import Calibration
from sparsify.export.folder import export
from sparsify.export.manifest import read_manifest
from sparsify.masking.inject import hard_masks
from sparsify.models.base import EMBEDDED, load_model, load_tokenizer, stored_dtype
from sparsify.models.hashes import hash_parameters
from sparsify.models.stored_weights import StoredWeights
from sparsify.strategies.wanda import Wanda
from sparsify.training.build import calibrate
from tests.conftest import EOS, SIZES, Cli, tiny_llama

gguf = pytest.importorskip("gguf")

TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
LETTERS = "abcdefghij"
PAIRS = [f"w{a}" for a in LETTERS] + [f"w{a}{b}" for a in "abc" for b in LETTERS]
TOKENS_OF_FILE = [EOS, "<unk>", "Ġ", "w", *"0123456789", *LETTERS, *PAIRS]
MERGES = [f"{pair[:-1]} {pair[-1]}" for pair in PAIRS]
HEADS = {"attn_q": SIZES["num_attention_heads"], "attn_k": SIZES["num_key_value_heads"]}


def gguf_name(name: str) -> str:
    """The name of a Llama's Parameter in a GGUF file."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(
    path: Path, model: LlamaForCausalLM, quantised: bool, architecture: str = "llama"
) -> dict[str, torch.Tensor]:
    """Write the tiny Llama and a tokenizer of single words; gives the values that the file holds.

    Args:
        path: the file.
        model: with the sizes of ``conftest``.
        quantised: store the layers of the blocks as Q8_0, not as F32.
        architecture: its name in the file.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS_OF_FILE)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 62)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(1)
    held = {}
    for name, parameter in model.named_parameters():
        values, kind = parameter.detach().numpy(), gguf_name(name).split(".")[-2]
        heads = HEADS.get(kind)
        if heads:  # the two halves of each head's rotation are interleaved
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2)
            values = values.reshape(parameter.shape)
        if quantised and name.endswith("_proj.weight"):
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
        if heads:
            values = values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2)
            values = values.reshape(parameter.shape)
        held[name] = torch.from_numpy(np.array(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("quantised", [False, True], ids=["F32", "Q8_0"])
@pytest.mark.parametrize("file", ["tiny.gguf", "TINY.GGUF"])
def test_a_gguf_file_gives_the_weights_that_it_holds(
    quantised: bool, file: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    held = write_gguf(tmp_path / file, model, quantised)
    found = load_model(str(tmp_path / file))
    assert found.dtype == torch.float32
    assert stored_dtype(str(tmp_path / file)) == torch.float32
    assert not found.training
    parameters = dict(found.named_parameters())
    assert parameters.keys() == held.keys()
    for name, values in held.items():
        assert torch.equal(parameters[name], values), name
        changed = not torch.equal(values, model.get_parameter(name))
        assert changed == (quantised and name.endswith("_proj.weight")), name
    with torch.no_grad():
        logits = found(input_ids=TOKENS).logits
        torch.testing.assert_close(
            logits, model(input_ids=TOKENS).logits, rtol=0, atol=0.3 if quantised else 1e-5
        )


def test_a_model_from_a_gguf_file_can_be_saved(tmp_path: Path) -> None:
    held = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), True)
    load_model(str(tmp_path / "tiny.gguf")).save_pretrained(tmp_path / "out")
    again = load_model(str(tmp_path / "out"))
    assert all(torch.equal(again.get_parameter(name), values) for name, values in held.items())


@pytest.mark.parametrize("error", [KeyError(99), NotImplementedError("type IQ9_Z")])
def test_a_type_of_weights_that_is_not_known_is_an_error(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unknown)
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(SparsifyError, match="no model could be loaded from .*(99|IQ9_Z)"):
        load_model(str(tmp_path / "tiny.gguf"))


def test_a_gguf_file_is_named_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), False)
    monkeypatch.chdir(tmp_path)
    found = load_model("tiny.gguf", "bfloat16")
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("quantised", [False, True], ids=["F32", "Q8_0"])
def test_a_model_from_a_gguf_file_is_exported_as_a_plain_folder(
    quantised: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "tiny.gguf"
    held = write_gguf(path, tiny_llama(), quantised)
    settings = Calibration(cache=False)
    module = SparseCausalLM(Wanda(), name_or_path=str(path), calibration=settings)
    module.origin._tokenizer = tokenizer
    module.configure_model()
    calibrate(module, windows=lambda: TOKENS)
    masks = dict(hard_masks(module.lm))
    assert len(masks) == 14
    export(module.masked, tmp_path / "out", {})
    assert read_manifest(tmp_path / "out")["dtype"] == "float32"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert plain.dtype == torch.float32
    assert not hasattr(plain.config, "quantization_config")
    for name, values in held.items():
        mask = masks.get(name.removesuffix(".weight"))
        expected = values if mask is None else values * mask
        assert torch.equal(plain.get_parameter(name), expected), name
    with torch.no_grad():
        losses = module.window_losses(TOKENS)
        logits = plain(input_ids=TOKENS).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
    )
    assert torch.equal(losses.flatten(), expected)


def test_the_command_line_takes_a_gguf_file(cli: Cli) -> None:
    write_gguf(Path("tiny.gguf"), tiny_llama(), True)
    cli("fit", "--strategy=wanda", "--model.name_or_path=./tiny.gguf", "--data.block_size=8")
    out = cli.runs()[0] / "export"
    assert load_model(str(out)).dtype == torch.float32
    for name in ("./tiny.gguf", str(out)):
        found = load_tokenizer(name)
        assert found.eos_token == EOS
        assert found.tokenize("wd wab4") == ["wd", "Ġ", "wab", "4"]
        assert found("wd")["input_ids"] == [TOKENS_OF_FILE.index("wd")]


def test_a_gguf_file_of_an_unknown_architecture_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama(), False, architecture="nonsense")
    check_error(str(path), "nonsense")


def test_a_gguf_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    check_error(str(tmp_path / "nowhere.gguf"), "there is no such path")
    (tmp_path / "folder").mkdir()
    check_error(str(tmp_path / "folder" / "nowhere.gguf"), "there is no such path")


@pytest.mark.parametrize("content", [b"", b"this is no GGUF file, whatever its name says"])
def test_a_file_that_is_no_gguf_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_bytes(content)
    check_error(str(tmp_path / "text.gguf"), "")


def test_a_gguf_file_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    write_gguf(path, tiny_llama(), False)
    path.write_bytes(path.read_bytes()[:-20_000])
    check_error(str(path), "")


def check_error(name: str, reason: str) -> None:
    """Its message has the value, the reason and what to give instead; so for the tokenizer."""
    for what, load in (("model", load_model), ("tokenizer", load_tokenizer)):
        with pytest.raises(SparsifyError) as raised:
            load(name)  # type: ignore[operator]
        message = str(raised.value)
        assert f"no {what} could be loaded from {name!r}" in message
        assert reason in message
        assert "--model.name_or_path takes 'embedded', a folder" in message
        assert "or a GGUF file" in message


def test_without_the_package_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama(), False)

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Please install gguf>=0.10 to load a GGUF checkpoint")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(SparsifyError, match=r"tiny.gguf' needs .*gguf>=0.10.*sparsify-llm\[gguf\]"):
        load_model(str(path))


# -- folders ---------------------------------------------------------------------------------------


def test_shards_are_the_model_of_one_file(tmp_path: Path, model_folder: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    whole, sharded = (load_model(str(folder)) for folder in (model_folder, tmp_path / "shards"))
    assert hash_parameters(dict(sharded.named_parameters())) == hash_parameters(
        dict(whole.named_parameters())
    )
    files[0].unlink()
    with pytest.raises(SparsifyError, match="no model could be loaded"):
        load_model(str(tmp_path / "shards"))


def test_the_weights_types(tmp_path: Path) -> None:
    model = tiny_llama()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    folder = str(tmp_path / "bfloat16")
    assert stored_dtype(folder) == torch.bfloat16
    hashes = {}
    for dtype, expected in (
        ("auto", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float32", torch.float32),
    ):
        found = load_model(folder, dtype)  # type: ignore[arg-type]
        assert {p.dtype for p in found.parameters()} == {expected}
        hashes[dtype] = hash_parameters(dict(found.named_parameters()))
        weight = found.lm_head.weight.float()
        assert torch.equal(weight, model.lm_head.weight.to(expected).float())
    assert hashes["auto"] == hashes["bfloat16"]
    assert len(set(hashes.values())) == 3
    assert load_model(folder).dtype == torch.float32
    assert load_model(EMBEDDED, "auto").dtype == stored_dtype(EMBEDDED) == torch.float16


@pytest.mark.parametrize("stated", [None, "float32", "float16"])
@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["one file", "shards"])
def test_the_stored_type_is_that_of_the_tensors(
    stated: str | None, size: str, cli: Cli, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.model.norm.float()  # some models keep a few tensors in another type
    model.save_pretrained("half", max_shard_size=size)
    assert Path("half/model.safetensors.index.json").exists() == (size == "20KB")
    tokenizer.save_pretrained("half")
    config = json.loads(Path("half/config.json").read_text())
    Path("half/config.json").write_text(json.dumps(config | {"dtype": stated}))
    assert stored_dtype("half") == load_model("half", "auto").dtype == torch.bfloat16
    cli("fit", "--strategy=magnitude", "--model.name_or_path=./half")
    export = cli.runs()[0] / "export"
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
    assert StoredWeights(export).get("lm_head.weight").dtype == torch.bfloat16


def test_the_stored_type_of_a_model_by_name_is_that_of_its_files_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--owner--name"
    snapshot = cached / "snapshots" / ("0" * 40)
    tiny_llama().to(torch.bfloat16).save_pretrained(snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"dtype": None}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert stored_dtype("owner/name") == torch.bfloat16
    (snapshot / "model.safetensors").unlink()
    assert stored_dtype("owner/name") == torch.float32


def test_the_type_of_quantised_weights_and_of_pickles_is_what_the_configuration_states(
    tmp_path: Path,
) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "float16"}
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for stated, expected in (({}, torch.bfloat16), (quantised, torch.float16)):
        content = config | ({"quantization_config": stated} if stated else {})
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert stored_dtype(str(tmp_path)) == expected
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert stored_dtype(str(tmp_path)) == torch.float16


@pytest.mark.parametrize("strategy", ["wanda", "sparsegpt", "gblm", "admm", "maskllm"])
def test_a_model_in_bfloat16_is_calibrated_and_exported(
    strategy: str, cli: Cli, tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained("half")
    tokenizer.save_pretrained("half")
    words = [f"--strategy={strategy}", "--model.name_or_path=./half", "--model.dtype=auto"]
    cli("fit", *words)
    plain = load_model(str(cli.runs()[0] / "export"), "auto")
    assert plain.dtype == torch.bfloat16
    kept = plain.model.layers[1].mlp.up_proj.weight != 0
    assert bool((kept.unflatten(1, (-1, 4)).sum(-1) <= 2).all())
    assert float(kept.float().mean()) > 0.49


def test_new_weights_keep_the_precision_in_which_they_were_computed(
    cli: Cli, tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained("half")
    tokenizer.save_pretrained("half")
    for strategy, expected in (("wanda", torch.bfloat16), ("admm", torch.float32)):
        cli("fit", f"--strategy={strategy}", "--model.name_or_path=./half")
        assert load_model(str(cli.runs()[-1] / "export"), "auto").dtype == expected
