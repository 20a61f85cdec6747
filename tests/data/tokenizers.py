"""Tiny tokenizers whose normalizers and post-processors are those of well-known models."""

from collections.abc import Callable

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = " ".join(f"the {i % 7}th cat, which sat on mat {i}, saw {i * i} rats." for i in range(40))
# The special tokens before and after a text, and those that the tokenizer names.
FORMS: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "llama2": (["<s>"], [], {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "mistral": (["<s>"], [], {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "gemma": (["<bos>"], [], {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "llama3": (
        ["<|begin_of_text|>"],
        [],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "glm": (["[gMASK]", "<sop>"], [], {"eos_token": "<|endoftext|>"}),
    "qwen": ([], [], {"eos_token": "<|endoftext|>"}),
    "gpt2": ([], [], {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "opt": (["</s>"], [], {"bos_token": "</s>", "eos_token": "</s>"}),
    "eos only": ([], ["</s>"], {"eos_token": "</s>"}),
    "both": (["<s>"], ["</s>"], {"bos_token": "<s>", "eos_token": "</s>"}),
}


def spaces_as_marks(tokenizer: Tokenizer, prepend: bool) -> None:
    """As sentencepiece's: a space becomes part of the word after it."""
    replace = normalizers.Replace(" ", "▁")
    steps = [normalizers.Prepend("▁"), replace] if prepend else [replace]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # words, to train
    tokenizer.decoder = decoders.Replace("▁", " ")


def metaspace(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")


def bytes_(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()


SHAPES: dict[str, Callable[[Tokenizer], None]] = {
    "llama2": lambda tokenizer: spaces_as_marks(tokenizer, prepend=True),
    "mistral": metaspace,
    "gemma": lambda tokenizer: spaces_as_marks(tokenizer, prepend=False),
}


def like(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of at most 120 entries, trained on `TEXT`."""
    before, after, named = FORMS[name]
    tokenizer = Tokenizer(models.BPE(unk_token=named.get("unk_token")))
    SHAPES.get(name, bytes_)(tokenizer)
    special = list(dict.fromkeys([*named.values(), *before, *after]))
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    if before or after:
        template = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in special],
        )
        # Llama 3 keeps the step that GPT-2's post-processor has.
        steps = [processors.ByteLevel(trim_offsets=True), template]
        tokenizer.post_processor = processors.Sequence(steps) if name == "llama3" else template
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
