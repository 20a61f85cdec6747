"""Models that are not causal, and weights that are stored quantised."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    GPTNeoXConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from sparsify import SparsifyError
from sparsify.models.base import load_model, load_skeleton
from sparsify.models.config_checks import check_causal, dequantising
from sparsify.models.load_checks import check_model
from tests.conftest import tiny_llama
from tests.tiny_models import FAMILIES, tiny_falcon, tiny_gpt_oss, tiny_mamba

TOKENS = torch.arange(8)[None]
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
TINY = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), r"BertConfig, an encoder \(is_decoder is false\).*set \"is_decoder\": true"),
        (RobertaConfig(), r"RobertaConfig, an encoder \(is_decoder is false\)"),
        (ModernBertConfig(), "ModernBertConfig, an encoder, which fills in masked tokens"),
        (T5Config(), r"T5Config, an encoder-decoder \(is_encoder_decoder\)"),
        (BartConfig(is_encoder_decoder=True), "BartConfig, an encoder-decoder"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_causal_is_refused_before_its_weights_are_read(
    config: PreTrainedConfig, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    for load in (load_model, load_skeleton):
        with pytest.raises(SparsifyError, match=message) as raised:
            load(str(tmp_path))
        assert "give a decoder-only model" in str(raised.value)
        assert str(raised.value).startswith(f"'{tmp_path}' is ")


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(),  # says is_decoder false, though it is causal
        BertConfig(is_decoder=True),
        BartConfig(is_decoder=True, is_encoder_decoder=False),  # as BartForCausalLM saves it
    ],
)
def test_decoders_pass(config: PreTrainedConfig) -> None:
    check_causal(config, "it")


def test_objects_are_refused_too() -> None:
    bert = BertConfig(**TINY, intermediate_size=64)
    t5 = T5Config(d_model=32, d_ff=32, num_layers=1, vocab_size=64, num_heads=2, d_kv=16)
    for model, kind in (
        (BertLMHeadModel(bert), "BertLMHeadModel, an encoder"),
        (T5ForConditionalGeneration(t5), "T5ForConditionalGeneration, an encoder-decoder"),
    ):
        with pytest.raises(SparsifyError, match=f"the model is {kind}"):
            check_model(model)
    for make in (*FAMILIES.values(), tiny_falcon, tiny_mamba):
        check_model(make())


# -- quantised checkpoints -------------------------------------------------------------------------


def requantised(
    folder: Path, model: PreTrainedModel, stored: dict[str, Tensor], stated: dict[str, Any]
) -> str:
    """Save a model with a part of its tensors stored otherwise, and the configuration of that."""
    model.save_pretrained(folder)
    quantised = {name.removesuffix("_blocks") for name in stored}
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in quantised}
    save_file(tensors | stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    return str(folder)


@torch.no_grad()
def check_expanded(folder: Path, values: dict[str, Tensor]) -> None:
    """Check the expanded weights, and that what is saved of them is plain."""
    model = load_model(str(folder / "q"))
    for name, value in values.items():
        assert torch.equal(model.get_parameter(name), value), name
        assert model.get_parameter(name).dtype == torch.float32
    assert not hasattr(load_skeleton(str(folder / "q")).config, "quantization_config")
    model.save_pretrained(folder / "plain")
    assert "quantization_config" not in json.loads((folder / "plain/config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain")
    assert torch.equal(plain(TOKENS).logits, model(TOKENS).logits)


def test_fp8_is_expanded_while_it_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, stored, values = tiny_llama(), {}, {}
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            codes = weight.detach().to(torch.float8_e4m3fn)
            rows, columns = (size // 16 for size in weight.shape)
            scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) + 0.5
            stored |= {name: codes, f"{name}_scale_inv": scale}
            spread = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
            values[name] = codes.float() * spread
    stated = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    requantised(tmp_path / "q", model, stored, stated)
    with caplog.at_level(logging.WARNING, "sparsify"):
        check_expanded(tmp_path, values)
    assert "is stored quantised: its weights were expanded" in caplog.text


def test_mxfp4_is_expanded_while_it_is_loaded(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model, stored, values = tiny_gpt_oss(), {}, {}
    for name, weight in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = weight.shape  # [E, in, out]; files hold groups of the inputs
            groups = (experts, rows, columns // 32)
            blocks = torch.randint(256, (*groups, 16), generator=generator).to(torch.uint8)
            scales = torch.randint(120, 128, groups, generator=generator).to(torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            table = torch.tensor(FP4 + [-value for value in FP4])
            pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1)
            scaled = pairs.flatten(-2) * 2.0 ** (scales.float() - 127)[..., None]
            values[name] = scaled.flatten(-2).transpose(1, 2)
    requantised(tmp_path / "q", model, stored, {"quant_method": "mxfp4"})
    check_expanded(tmp_path, values)


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_the_arguments_keep_what_the_files_say(method: str) -> None:
    stated = {"quant_method": method, "modules_to_not_convert": ["lm_head"]}
    for config in (
        PreTrainedConfig(quantization_config=stated),
        PreTrainedConfig(quantization_config=None),
    ):
        found = dequantising(config)
        if config.quantization_config is None:
            assert found == {}
            continue
        assert found["quantization_config"].dequantize is True
        assert found["quantization_config"].modules_to_not_convert == ["lm_head"]
    assert "dequantize" not in stated


def test_others_are_refused_wherever_they_are_stated(tmp_path: Path) -> None:
    stated = {"quant_method": "gptq", "bits": 4}
    name = requantised(tmp_path, tiny_llama(), {}, stated)
    with pytest.raises(SparsifyError, match="'gptq'; .*mxfp4 and fp8 alone: .*before it was"):
        load_model(name)
    config = json.loads((tmp_path / "config.json").read_text())
    nested = config | {"quantization_config": None, "text_config": {"quantization_config": stated}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    with pytest.raises(SparsifyError, match="quantization_config 'gptq'"):
        load_model(name)
