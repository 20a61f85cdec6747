"""What a model's configuration tells before its weights are loaded."""

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from sparsify.common.errors import SparsifyError


def check_causal(config: Any, name: str, kind: str | None = None) -> None:
    """Refuse an encoder, whose tokens see those after them, and an encoder-decoder.

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
    else:
        return
    raise SparsifyError(
        f"{name} is {kind}, {found}; masks are learned and measured on causal language models, "
        f"which predict each token from those before it: {fix}"
    )
