"""Models that are not causal."""

from pathlib import Path

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    GPTNeoXConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from sparsify import SparsifyError
from sparsify.models.base import load_model, load_skeleton
from sparsify.models.config_checks import check_causal
from sparsify.models.load_checks import check_model
from tests.tiny_models import FAMILIES, tiny_falcon, tiny_mamba

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
