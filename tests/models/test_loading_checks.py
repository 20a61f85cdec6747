"""What is loaded is what the files say, and what is measured is what ships."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import sparsify
from sparsify import SparseCausalLM, SparsifyError
from sparsify.calibration import Calibration
from sparsify.export.folder import export
from sparsify.masking.inject import fold
from sparsify.masking.layer import masked_layers
from sparsify.masking.masker import Draw
from sparsify.masking.select import decoder_blocks
from sparsify.models.base import load_model, load_tokenizer
from sparsify.models.load_checks import check_tokenizer
from sparsify.models.positions import check_positions
from sparsify.models.stored_weights import StoredWeights
from sparsify.serving.verify.base_check import BaseCheck
from sparsify.strategies.dense import Dense
from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.wanda import Wanda
from sparsify.training.build import calibrate
from sparsify.training.step import BatchRun, checkpoint_activations
from tests.architectures import tiny
from tests.conftest import Cli, masked_model, tiny_llama, word_tokenizer
from tests.tiny_models import tiny_gpt2, tiny_mamba, tiny_mixtral, tiny_opt

TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
UP = "model.layers.1.mlp.up_proj.weight"


def saved(
    folder: Path,
    model: PreTrainedModel,
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    **config: Any,
) -> str:
    """Save a model, with other tensors and another configuration than it has."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return str(folder)


def add(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.ones(*shape)

    return change


# -- the files and the model hold the same tensors -------------------------------------------------


def test_a_missing_weight_is_named_not_filled(tmp_path: Path) -> None:
    name = saved(tmp_path, tiny_llama(), lambda tensors: tensors.pop(UP))
    with pytest.raises(SparsifyError, match=f"lacks {UP}, which LlamaForCausalLM needs.*random"):
        load_model(name)


def test_many_missing_weights_are_counted(tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".0.mlp." in key or ".1.mlp." in key]:
            del tensors[key]

    with pytest.raises(SparsifyError, match=r"down_proj.weight, .* and 3 more, which"):
        load_model(saved(tmp_path, tiny_llama(), drop))


def test_a_model_saved_without_its_head_is_told_so(tmp_path: Path) -> None:
    name = saved(tmp_path, tiny_llama(), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(SparsifyError, match=r"lacks lm_head.weight.*with its head.*\"tie_word"):
        load_model(name)
    tiny_llama().model.save_pretrained(tmp_path / "base")
    with pytest.raises(SparsifyError, match="lacks lm_head.weight"):
        load_model(str(tmp_path / "base"))


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    name = saved(tmp_path, tiny_llama(), intermediate_size=48)
    with pytest.raises(
        SparsifyError, match=r"0\.mlp\.down_proj\.weight is \(32, 64\) .* \(32, 48\) \(and 5 more"
    ):
        load_model(name)


@pytest.mark.parametrize(
    "extra", [UP.replace("weight", "bias"), UP + "_scale", "model.layers.2.mlp.up_proj.weight"]
)
def test_weights_without_a_place_are_refused(extra: str, tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match=f"holds {extra}, for which LlamaForCausalLM has no"):
        load_model(saved(tmp_path, tiny_llama(), add(extra, 64)))


def test_a_whole_module_that_the_class_does_not_have_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = saved(tmp_path, tiny_llama(), add("model.visual.patch.weight", 3))
    with caplog.at_level(logging.WARNING, "sparsify"):
        load_model(name)
    assert "holds model.visual.patch.weight, which LlamaForCausalLM does not use" in caplog.text


@pytest.mark.parametrize(
    ("make", "buffer"),
    [
        (tiny_gpt2, "transformer.h.0.attn.bias"),
        (tiny_gpt2, "transformer.h.0.attn.masked_bias"),
        (tiny_llama, "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_buffers_that_older_versions_saved_are_passed_over(
    make: Callable[[], PreTrainedModel], buffer: str, tmp_path: Path
) -> None:
    model = make()
    loaded = load_model(saved(tmp_path, model, add(buffer, 4)))
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


# -- tied weights ----------------------------------------------------------------------------------


def exported(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> SparseCausalLM:
    module = SparseCausalLM(Magnitude(), name_or_path=name)
    module.origin._tokenizer = tokenizer
    module.configure_model()
    calibrate(module, windows=lambda: TOKENS)
    export(module.masked, folder, {})
    return module


@torch.no_grad()
def test_a_head_that_is_called_tied_and_differs_is_kept(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    name = saved(tmp_path / "base", tiny_llama(), tie_word_embeddings=True)
    module = exported(name, tmp_path / "out", tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.tie_word_embeddings is False
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight
    assert torch.equal(plain(TOKENS).logits, module.lm(TOKENS).logits)
    check = BaseCheck(name, None, StoredWeights(tmp_path / "out"))
    assert check.problems == []


@torch.no_grad()
def test_a_model_object_whose_head_was_untied_is_exported_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    module = SparseCausalLM.from_model(model, tokenizer, Magnitude())
    module.configure_model()
    calibrate(module, windows=lambda: TOKENS)
    export(module.masked, tmp_path / "out", {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(plain(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
@pytest.mark.parametrize("gone", ["lm_head.weight", "model.embed_tokens.weight", None])
def test_a_tied_head_stays_tied(
    gone: str | None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors.pop(gone or "", None)

    name = saved(tmp_path / "base", tiny_llama(), change, tie_word_embeddings=True)
    module = exported(name, tmp_path / "out", tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.tie_word_embeddings is True
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(plain(TOKENS).logits, module.lm(TOKENS).logits)


# -- evaluation mode -------------------------------------------------------------------------------


def with_dropout(kind: str) -> PreTrainedModel:
    model = {"gpt2": tiny_gpt2, "opt": tiny_opt}[kind]()
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"):
        setattr(model.config, name, 0.1)
    torch.manual_seed(3)
    again: PreTrainedModel = type(model)(model.config)
    again.load_state_dict(model.state_dict())
    return again.eval()


def sparsified(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    folder: Path,
    strategy: str = "wanda",
    **options: Any,
) -> sparsify.Sparsified:
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16)
    quiet = {"enable_progress_bar": False, "default_root_dir": folder}
    settings = Calibration(samples=8, cache=False)
    return sparsify.sparsify(
        model, strategy, data, tokenizer, steps=2, trainer=quiet, calibration=settings, **options
    )


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
@pytest.mark.parametrize("strategy", ["wanda", "maskllm"])
def test_masks_do_not_depend_on_the_models_mode(
    kind: str, strategy: str, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    found = []
    for training in (False, True):
        model = with_dropout(kind).train(training)
        decoder_blocks(model)[next(iter(decoder_blocks(model)))].train(not training)
        before = {name: module.training for name, module in model.named_modules()}
        options = {"gradient_checkpointing": training and strategy == "maskllm"}
        run = sparsified(model, tokenizer, text, tmp_path, strategy, **options)
        after = dict(model.named_modules())
        assert {name: after[name].training for name in before} == before
        layers = masked_layers(model)
        found.append(
            [layer.masker.logits_OKG for layer in layers.values()]
            if strategy == "maskllm"
            else list(run.masks().values())
        )
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_mode_is_restored_when_a_run_fails(
    tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    model = with_dropout("gpt2").train()
    with pytest.raises(SparsifyError, match="matches no linear layer"):
        sparsified(model, tokenizer, text, tmp_path, exclude="*nothing")
    assert all(module.training for module in model.modules())


def test_a_recomputed_block_drops_nothing() -> None:
    model = with_dropout("opt")
    masked = masked_model(model, Dense())
    expected = model(TOKENS).logits
    checkpoint_activations(model, masked.scope)
    assert decoder_blocks(model)["model.decoder.layers.0"].training
    model.requires_grad_(True)
    run = BatchRun(masked, TOKENS, Draw(0, 0, 0))("dense")
    assert torch.equal(run.logits, expected)
    run.loss.backward()
    assert decoder_blocks(model)["model.decoder.layers.0"].training


# -- values that are not finite --------------------------------------------------------------------


def spoil(model: PreTrainedModel) -> PreTrainedModel:
    values = model.get_parameter(UP).data
    values[0, :2], values[3, 4] = float("nan"), float("inf")
    return model


def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = r"1\.mlp\.up_proj\.weight: 3 of 2048 values are not finite \(nan, inf\); give"
    module = SparseCausalLM(Magnitude(), name_or_path=saved(tmp_path, spoil(tiny_llama())))
    with pytest.raises(SparsifyError, match=expected):
        module.configure_model()
    module = SparseCausalLM.from_model(spoil(tiny_llama()), tokenizer, Dense())
    with pytest.raises(SparsifyError, match=expected):
        module.configure_model()


@pytest.mark.parametrize("block", [0, 1])
def test_activations_that_overflow_are_named_with_the_fix(
    block: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama().half()
    model.model.layers[block].mlp.up_proj.weight.data.mul_(6e4)
    model.model.layers[block].mlp.down_proj.weight.data.mul_(6e4)
    module = SparseCausalLM.from_model(
        model, tokenizer, Wanda(), calibration=Calibration(cache=False)
    )
    module.configure_model()
    with pytest.raises(
        SparsifyError,
        match=rf"output of model.layers.{block} is not finite in float16 .*--model.dtype bfloat16",
    ):
        calibrate(module, windows=lambda: TOKENS)


# -- layers that are not called --------------------------------------------------------------------


def test_a_layer_that_the_model_does_not_call_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    module = SparseCausalLM.from_model(tiny_mamba(), tokenizer, Magnitude(), include="*_proj")
    with pytest.raises(
        SparsifyError,
        match=r"backbone.layers.\*.mixer.dt_proj: .*without calling.*--model.exclude '\*dt_proj'",
    ):
        module.configure_model()


@torch.no_grad()
def test_by_default_it_is_dense_and_the_export_is_the_measured_model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    module = SparseCausalLM.from_model(tiny_mamba(), tokenizer, Magnitude())
    module.configure_model()
    calibrate(module, windows=lambda: TOKENS)
    export(module.masked, tmp_path / "out", {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(plain(TOKENS).logits, module.lm(TOKENS).logits, rtol=0, atol=1e-6)


def test_a_model_that_changes_its_own_weights_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny("rwkv")
    model.config.rescale_every = 1
    module = SparseCausalLM.from_model(model, tokenizer, Magnitude())
    with pytest.raises(SparsifyError, match=r'RwkvForCausalLM changes its own.*"rescale_every": 0'):
        module.configure_model()


# -- tokens and positions --------------------------------------------------------------------------


def test_a_tokenizer_with_more_ids_than_rows_is_refused(
    tmp_path: Path, cli: Cli, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tiny_llama()
    small.resize_token_embeddings(48)
    small.save_pretrained(tmp_path / "small")
    for file in model_folder.glob("token*"):
        shutil.copy(file, tmp_path / "small")
    with pytest.raises(SystemExit) as raised:
        cli("fit", "--strategy=magnitude", f"--model.name_or_path={tmp_path / 'small'}")
    assert raised.value.code == 2
    assert "has ids up to 63, such as that of 'w" in capsys.readouterr().err


def test_added_tokens_beyond_the_rows_are_a_warning(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:

    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    check_tokenizer(model, tokenizer)
    assert "added tokens <pad> have ids beyond the embedding's 64 rows" in caplog.text


@pytest.mark.parametrize(
    ("make", "table"),
    [(tiny_gpt2, "transformer.wpe"), (tiny_opt, "model.decoder.embed_positions")],
)
def test_windows_longer_than_learned_positions_are_refused(
    make: Callable[[], PreTrainedModel], table: str
) -> None:
    check_positions(make(), 32)
    with pytest.raises(SparsifyError, match=rf"block_size=33: {table} has learned 32 positions"):
        check_positions(make(), 33)


def test_windows_longer_than_rotary_positions_are_a_warning(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    check_positions(model, 32)
    assert not caplog.text
    check_positions(model, 33)
    assert "block_size=33 is longer than the 32 positions" in caplog.text


# -- what cannot be loaded -------------------------------------------------------------------------


def test_files_that_are_cut_off_are_one_sentence(tmp_path: Path) -> None:
    name = saved(tmp_path, tiny_llama())
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (len(whole) // 2, 0):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(SparsifyError, match="safetensors file is damaged or cut off"):
            load_model(name)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_a_quantised_checkpoint_is_named(method: str, tmp_path: Path) -> None:
    quantised = {"quant_method": method, "bits": 4}
    name = saved(tmp_path, tiny_llama(), quantization_config=quantised)
    with pytest.raises(
        SparsifyError, match=rf"quantization_config '{method}'; .*before it was quantised"
    ):
        load_model(name)


def test_folders_without_a_model_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "empty").mkdir()
    tiny_llama().save_pretrained(tmp_path / "bare")
    sizes = {"num_heads": 2, "d_kv": 16}
    t5 = T5Config(d_model=32, d_ff=32, num_layers=1, vocab_size=64, **sizes)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for name, load, message in (
        ("adapter", load_model, "adapter is not a model; merge it|it is an adapter"),
        ("adapter", load_tokenizer, "it is an adapter"),
        ("empty", load_model, "the folder is empty"),
        ("bare", load_tokenizer, "holds no tokenizer: none of tokenizer.json"),
        ("t5", load_model, "T5ForConditionalGeneration, an encoder-decoder"),
    ):
        with pytest.raises(SparsifyError, match=message) as raised:
            load(str(tmp_path / name))  # type: ignore[operator]
        assert "\n" not in str(raised.value)


def test_a_misspelt_id_without_network_is_one_sentence() -> None:
    with pytest.raises(SparsifyError, match=r"not a local folder .*not in the cache.*spelling"):
        load_model("nobody/no-such-model")


def test_objects_that_are_no_model_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny_llama().config)
    for model, message in (
        (LlamaForCausalLM, "the model is the class LlamaForCausalLM, and must be an object"),
        (nn.Linear(4, 4), "the model is a Linear, and must be a causal LM of Transformers"),
        (empty, "model.embed_tokens.weight has no values"),
    ):
        with pytest.raises(SparsifyError, match=message):
            SparseCausalLM.from_model(model, tokenizer, Magnitude())  # type: ignore[arg-type]


# -- the share of zeros ----------------------------------------------------------------------------


def test_experts_in_stacks_count_in_the_share_of_zeros(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_mixtral()
    module = SparseCausalLM.from_model(model, tokenizer, Magnitude())
    module.configure_model()
    calibrate(module, windows=lambda: TOKENS)
    share = module.masked.sparsity()
    fold(model)
    weights = [
        p for b in decoder_blocks(model).values() for p in b.parameters() if p.ndim in (2, 3)
    ]
    zeros = sum(int((p == 0).sum()) for p in weights)
    assert share == zeros / sum(p.numel() for p in weights)
    assert 0.45 < share < 0.5
