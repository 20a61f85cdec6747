"""What a model's configuration tells before its weights are loaded: whether it is causal, and how
weights that are stored quantised become plain.
"""

from collections.abc import Mapping
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.quantizers.auto import AutoQuantizationConfig

from sparsify.common.errors import SparsifyError
from sparsify.models.multimodal import needed_beside_text

# What Transformers expands while it loads, with no package that the model's files name.
DEQUANTISED = ("mxfp4", "fp8")


def check_causal(config: Any, name: str, kind: str | None = None) -> None:
    """Refuse an encoder, whose tokens see those after them, an encoder-decoder, and a model that
    does not run on text alone.

    Args:
        config: the model's configuration.
        name: the model's name, for the message.
        kind: its class; None takes what the configuration says.

    Raises:
        SparsifyError: it is one of them.
    """
    kind = kind or (getattr(config, "architectures", None) or [type(config).__name__])[0]
    fix = "give a decoder-only model"
    if getattr(config, "is_encoder_decoder", False):
        found = "an encoder-decoder (is_encoder_decoder)"
    # A configuration with these two options is that of an encoder which may become a decoder.
    elif getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention"):
        found = "an encoder (is_decoder is false)"
        fix += ', or set "is_decoder": true in config.json if it was trained as a decoder'
    elif (
        type(config) in MODEL_FOR_MASKED_LM_MAPPING
        and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        found = "an encoder, which fills in masked tokens"
    elif needed := needed_beside_text(config):
        found = f"a model that needs {', '.join(needed)} beside text"
    else:
        return
    raise SparsifyError(
        f"{name} is {kind}, {found}; masks are learned and measured on causal language models, "
        f"which predict each token from those before it: {fix}"
    )


def dequantising(config: Any) -> dict[str, Any]:
    """The arguments with which ``from_pretrained`` expands quantised weights; none if the
    configuration says that they are plain.
    """
    stated = _stated(config)
    if stated is None:
        return {}
    plain = dict(stated, dequantize=True)
    return {"quantization_config": AutoQuantizationConfig.from_dict(plain)}


def forget_quantisation(config: Any) -> None:
    """Have a configuration say that weights are plain, so that an export is loaded as such."""
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def why_quantised(stated: Any) -> str | None:
    """What is wrong with a ``quantization_config``, and the fix; None if it can be expanded.

    Args:
        stated: its value in a ``config.json``.
    """
    method = stated.get("quant_method") if isinstance(stated, Mapping) else None
    if method in DEQUANTISED:
        return None
    return (
        "sparsify masks plain weights, and imports no package that a model's files name; it "
        f"expands {' and '.join(DEQUANTISED)} alone: take the model as it was before it was "
        "quantised, or a GGUF file"
    )


def _stated(config: Any) -> Mapping[str, Any] | None:
    for part in (config, config.get_text_config(decoder=True)):
        if (stated := getattr(part, "quantization_config", None)) is not None:
            return stated if isinstance(stated, Mapping) else stated.to_dict()
    return None
