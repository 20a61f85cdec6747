"""Models that see images beside text: which class loads all of them, where their text decoder is,
and the files that prepare what they see.
"""

import logging
from contextlib import suppress
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils.hub import cached_file

log = logging.getLogger("sparsify")

TEMPLATES = ("chat_template.jinja", "chat_template.json")
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_VALUES = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def auto_class(config: Any) -> Any:
    """The class of Transformers that loads all of a model: ``AutoModelForImageTextToText`` where
    that of causal LMs refuses the configuration, or would load the text decoder alone though more
    is stored.
    """
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    stored = getattr(config, "architectures", None) or ()
    if whole is None or causal is whole or getattr(causal, "__name__", None) in stored:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def loader_of(kind: type[PreTrainedModel], config: Any) -> Any:
    """The auto class that makes a model of this class from its configuration; without one, the
    class itself.
    """
    tables: Any = (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    )
    for auto, known in tables:
        if known.get(type(config), None) is kind:
            return auto
    return kind


def needed_beside_text(config: Any) -> list[str]:
    """The arguments without which a model does not run on token ids."""
    kind = auto_class(config)._model_mapping.get(type(config), None)
    if kind is None:
        return []
    arguments = signature(kind.forward).parameters.values()
    return [
        argument.name
        for argument in arguments
        if argument.kind in _VALUES
        and argument.default is Parameter.empty
        and argument.name not in ("self", "input_ids")
    ]


def text_decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of a model that predicts text, by the model's own accessor, and its qualified name:
    the innermost one that holds a ``ModuleList``. The model itself, and no name, if it has none.
    """
    name = ""
    while True:
        find = getattr(model, "get_decoder", None)
        inner = model if find is None else find()
        below = next((n for n, m in model.named_modules() if m is inner and n), None)
        if below is None or not any(isinstance(m, nn.ModuleList) for m in inner.modules()):
            return name, model
        name, model = f"{name}.{below}" if name else below, cast(nn.Module, inner)


def towers(model: PreTrainedModel) -> dict[str, str]:
    """The modules beside the text decoder by qualified name, but for the output head, and what they
    are: vision towers, projectors.
    """
    name, _ = text_decoder(model)
    head = model.get_output_embeddings()
    found: dict[str, str] = {}
    above: nn.Module = model
    path = ""
    for part in filter(None, name.split(".")):
        for own, module in above.named_children():
            if own != part and module is not head:
                found[f"{path}{own}"] = f"{type(module).__name__}, outside the text decoder"
        above, path = above.get_submodule(part), f"{path}{part}."
    return found


def tokenizer_of(given: Any) -> Any:
    """A processor's tokenizer; of anything else the thing itself."""
    return getattr(given, "tokenizer", None) if isinstance(given, ProcessorMixin) else given


def processor_files(config: Any, source: str) -> dict[str, bytes]:
    """The files of a model's processor by name; none if it takes text alone.

    Args:
        config: the model's configuration.
        source: the folder or Hugging Face id that may hold them, empty if there is none; a file
            that cannot be fetched is left out.
    """
    if config.get_text_config() is config:
        return {}
    files: dict[str, bytes] = {}
    for name in (*PROCESSOR_FILES, *TEMPLATES) if source else ():
        with suppress(OSError):
            found = cached_file(source, name, revision=getattr(config, "_commit_hash", None))
            files[name] = Path(str(found)).read_bytes()
    if not files.keys() & set(PROCESSOR_FILES):
        log.warning(
            "%r holds no processor (%s), so that the export will hold none; in Python, give the "
            "processor in place of the tokenizer",
            source or type(config).__name__,
            ", ".join(PROCESSOR_FILES),
        )
    return files
