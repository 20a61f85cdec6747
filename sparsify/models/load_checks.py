"""Checks that a loaded model is the one in its files, and that it can be masked and measured."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.common.errors import SparsifyError
from sparsify.common.values import first_few
from sparsify.models.config_checks import check_causal
from sparsify.models.layer_names import family

log = logging.getLogger("sparsify")

# Tensors that older versions of Transformers saved though nothing in them is learned: the tables of
# rotary and absolute positions, the triangle of causal attention, and the value of its masked part.
_FORMER_BUFFERS = re.compile(
    r"(^|\.)((rotary_emb|rotary|attn|attention|self_attn)\.)?(inv_freq|position_ids|masked_bias)$"
    r"|\.(attn|attention|self_attn)\.(bias|causal_mask)$"
)


def check_loaded(model: PreTrainedModel, name_or_path: str, info: Mapping[str, Any]) -> None:
    """Refuse a model that is not the one in the files.

    Transformers fills a tensor with random numbers if the files lack it or hold it in another
    shape, and ignores a tensor that the class has no place for. ``info`` does not list keys that
    the class itself declares meaningless, nor tied tensors that are stored once.

    A tensor without a place is refused if the saved model must have computed with it: if it stands
    beside a module's own Parameters, or in a list of blocks. If it belongs to a whole module that
    the class lacks, such as a vision tower or a reward head, a warning names it.

    Args:
        model: the loaded model.
        name_or_path: what it was loaded from.
        info: the second result of ``from_pretrained(output_loading_info=True)``.

    Raises:
        SparsifyError: a tensor is missing, of another shape, or has no place in the model.
    """
    kind = type(model).__name__
    if missing := sorted(info["missing_keys"]):
        head = model.get_output_embeddings()
        names = {f"{n}.weight" for n, m in model.named_modules() if m is head}
        fix = (
            "save the whole causal LM, with its head; if the head is the embedding, say "
            '"tie_word_embeddings": true in config.json'
            if names & set(missing)
            else "fetch or save the model again, or correct config.json"
        )
        raise SparsifyError(
            f"{name_or_path!r} lacks {first_few(missing)}, which {kind} needs and which would be "
            f"random numbers; {fix}"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        rest = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise SparsifyError(
            f"{name_or_path!r}: {name} is {tuple(stored)} in the files, and config.json makes it "
            f"{tuple(expected)}{rest}; give the config.json that was saved with these weights"
        )
    unexpected = [
        name for name in sorted(info["unexpected_keys"]) if not _FORMER_BUFFERS.search(name)
    ]
    modules = dict(model.named_modules())
    lists = tuple(f"{n}." for n, m in modules.items() if isinstance(m, nn.ModuleList))
    refused = [n for n in unexpected if n.startswith(lists) or n.rpartition(".")[0] in modules]
    if refused:
        raise SparsifyError(
            f"{name_or_path!r} holds {first_few(refused)}, for which {kind} has no place, so that "
            "it would compute something else than the model that was saved; correct config.json, "
            "or save the model without them"
        )
    if unexpected:
        log.warning(
            "%r holds %s, which %s does not use: they are not measured, and not exported",
            name_or_path,
            first_few(unexpected),
            kind,
        )


def check_model(model: Any) -> None:
    """Refuse an object that cannot be masked as it is.

    Raises:
        SparsifyError: it is not a causal LM in memory with plain weights and without adapters.
    """
    if isinstance(model, type):
        raise SparsifyError(
            f"the model is the class {model.__name__}, and must be an object; load one with "
            f"{model.__name__}.from_pretrained(...)"
        )
    if not isinstance(model, PreTrainedModel):
        fix = "merge_and_unload() gives one" if hasattr(model, "merge_and_unload") else "load one"
        raise SparsifyError(
            f"the model is a {type(model).__name__}, and must be a causal LM of Transformers; {fix}"
        )
    check_causal(model.config, "the model", type(model).__name__)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SparsifyError(
            f"this {type(model).__name__} has PEFT adapters; merge them into its weights first"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SparsifyError(f"{name} has no values (device meta); load the model's weights")
        if not parameter.is_floating_point() and ".masker." not in name:
            raise SparsifyError(
                f"{name} is {_dtype(parameter.dtype)}: it is quantised, and masks need plain "
                "weights; load the model unquantised"
            )


def check_finite(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are not finite, which make every result meaningless.

    Raises:
        SparsifyError: some are not; the first such tensor is named.
    """
    for name, values in parameters:
        if bool(torch.isfinite(values).all()):
            continue
        kinds = [
            kind
            for kind, odd in (("nan", values.isnan()), ("inf", values.isinf()))
            if bool(odd.any())
        ]
        count = int((~torch.isfinite(values)).sum())
        verb = "is" if count == 1 else "are"
        raise SparsifyError(
            f"{name}: {count} of {values.numel()} values {verb} not finite ({', '.join(kinds)}); "
            "give a model with finite weights; if they overflowed in float16, save it in bfloat16 "
            "or float32 and use that type as --model.dtype"
        )


def correct_tie(model: PreTrainedModel) -> None:
    """Set ``tie_word_embeddings`` to False where the model's weights are not tied.

    If the files hold two different tensors that the configuration calls tied, Transformers loads
    both; saving the model with that configuration would lose one of them.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            pairs = part.get_expanded_tied_weights_keys(all_submodels=False)
            apart = [
                f"{target} and {source}"
                for target, source in pairs.items()
                if part.get_parameter_or_buffer(target) is not part.get_parameter_or_buffer(source)
            ]
            if apart:
                part.config.tie_word_embeddings = False
                log.warning(
                    "%s differ, though the configuration says that they are tied: both are kept, "
                    "and the export says tie_word_embeddings: false",
                    apart[0],
                )


def check_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids for which the embedding has no row.

    Only the ordinary vocabulary and the tokens that begin or end a text count. Added tokens, for
    padding say, may lie beyond the embedding as long as no text holds them: a warning names them.

    Raises:
        SparsifyError: ids of ordinary text have no row.
    """
    rows = _rows(model)
    vocabulary = tokenizer.get_vocab()
    beyond = {token for token, number in vocabulary.items() if number >= rows}
    if not beyond:
        return
    added = set(tokenizer.get_added_vocab()) - {tokenizer.eos_token, tokenizer.bos_token}
    highest = max(vocabulary.values())
    if ordinary := sorted(beyond - added):
        raise SparsifyError(
            f"the tokenizer has ids up to {highest}, such as that of {ordinary[0]!r}, but the "
            f"model's embedding has {rows} rows; give the model its own tokenizer"
        )
    log.warning(
        "the tokenizer's added tokens %s have ids beyond the embedding's %d rows; text that holds "
        "them cannot be used",
        first_few(sorted(beyond)),
        rows,
    )


def check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    """Refuse token ids for which the embedding has no row.

    Raises:
        SparsifyError: there is such an id.
    """
    rows = _rows(model)
    if (highest := int(tokens.max())) >= rows:
        raise SparsifyError(
            f"the text holds the token id {highest}, but the model's embedding has {rows} rows; "
            "give the model its own tokenizer, or text without added tokens"
        )


def _rows(model: PreTrainedModel) -> int:
    """How many token ids the embedding has a row for."""
    return cast(Tensor, model.get_input_embeddings().weight).shape[0]


@torch.no_grad()
def not_called(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], blocks: Iterable[str]
) -> list[str]:
    """The layers that a forward pass does not call, though it may read their weights: a mask would
    change the exported model, but not the measured one.

    The model runs over a few tokens. A layer is judged only if the module that holds it was called,
    or another layer with its weight, or if its block was not (some only run if there are images):
    so experts that got no token are not.

    Args:
        model: in evaluation mode, computing with its dense weights.
        layers: linear layers, masked or not, by qualified name.
        blocks: the qualified names of the decoder blocks.

    Returns:
        Their names.
    """
    called: set[str] = set()
    holders = {name.rpartition(".")[0] for name in layers}
    with ExitStack() as stack:
        for name in {*holders, *layers, *blocks}:
            module = layers[name] if name in layers else model.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
            stack.callback(hook.remove)
        model(input_ids=torch.arange(4, device=model.device)[None], use_cache=False)
    used = {id(layer.weight) for name, layer in layers.items() if name in called}
    silent = tuple(f"{block}." for block in blocks if block not in called)

    def judged(name: str, layer: nn.Module) -> bool:
        holder = name.rpartition(".")[0]
        return holder in called or id(layer.weight) in used or name.startswith(silent)

    return [n for n, layer in layers.items() if n not in called and judged(n, layer)]


def check_called(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Refuse layers that the model does not call.

    Args:
        model: the model.
        names: what :func:`not_called` found.

    Raises:
        SparsifyError: there are such layers.
    """
    if names:
        globs = " ".join(
            f"--model.exclude '{glob}'"
            for glob in dict.fromkeys(f"*{name.rpartition('.')[2]}" for name in names)
        )
        raise SparsifyError(
            f"{', '.join(dict.fromkeys(map(family, names)))}: {type(model).__name__} reads the "
            "weight without calling the layer, so that a mask would change what is exported and "
            f"not what is measured; leave it dense with {globs}"
        )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
