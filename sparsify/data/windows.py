"""What every window begins with, and how many windows one evaluation batch holds.

Shapes: W windows, T tokens of a window, P special tokens in front of the text.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify.common.errors import SparsifyError

EVAL_LOGITS = 2**30  # bytes; the loss makes two copies of them for a moment
EVAL_WINDOWS = 16  # more are no faster


def window_start(
    tokenizer: PreTrainedTokenizerBase, bos: bool | None = None, block_size: int | None = None
) -> list[int]:
    """The ids of the special tokens in front of every window's text.

    Args:
        tokenizer: Turns text into token ids.
        bos: None takes the tokens that the tokenizer itself puts before a text; True takes its
            ``bos_token`` where these are none; False takes none.
        block_size: Tokens per window, which must hold two more than these; None if not known.

    Raises:
        SparsifyError: `bos` is True and there is no token to take, the tokenizer changes a text's
            own tokens when it adds special ones, or the window is too short.
    """
    start = [] if bos is False else _prefix(tokenizer)
    if bos and not start:
        if not isinstance(tokenizer.bos_token_id, int):
            raise SparsifyError(
                f"bos is true, and the tokenizer's bos_token is {tokenizer.bos_token!r}; a window "
                "can only begin with a token that exists: set tokenizer.bos_token, or leave "
                "--data.bos out"
            )
        start = [tokenizer.bos_token_id]
    if start and block_size is not None and block_size < len(start) + 2:
        tokens = " ".join(tokenizer.convert_ids_to_tokens(start))
        raise SparsifyError(
            f"block_size is {block_size}, and every window begins with {tokens}; it must be at "
            f"least {len(start) + 2}, for a token of text and the next one: raise it, or give "
            "--data.bos false"
        )
    return start


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that stand before a text's own only where special tokens are added."""
    special, whole = set(tokenizer.all_special_ids), list[int]()
    for text in _texts(tokenizer):
        plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not plain or special.intersection(plain):
            continue  # an unknown word might be taken for a token in front of it
        whole = tokenizer(text, add_special_tokens=True)["input_ids"]
        for at in range(len(whole) - len(plain) + 1):
            if whole[at : at + len(plain)] == plain:
                return whole[:at]
        break
    raise SparsifyError(
        f"the tokenizer's ids of {text!r} are {plain}, and with special tokens {whole}; the first "
        "must stand within the second to tell what comes before a text: give --data.bos false"
    )


def _texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield "a"
    yield from tokenizer.get_vocab()


def with_start(start: Sequence[int], text: Tensor) -> Tensor:
    """Puts the special tokens, which are context only, in front of each window.

    Args:
        start: Ids, P of them.
        text: int32 ids [W, T - P] or [T - P], complements where a token is context only.

    Returns:
        int32 ids [W, T] or [T]; without special tokens `text` itself.
    """
    if not start:
        return text
    front = ~torch.tensor(start, dtype=text.dtype)
    return torch.cat([front.expand(*text.shape[:-1], -1), text], -1)


def vocabulary_of(model: PreTrainedModel) -> int:
    """The number of logits that a model makes for each token."""
    words: int = model.config.get_text_config().vocab_size
    return words


def fitting_windows(block_size: int, vocabulary: int) -> int:
    """How many windows an evaluation batch has, so that its logits in fp32 take at most
    `EVAL_LOGITS` bytes; one window if that alone takes more, and never above `EVAL_WINDOWS`.

    Args:
        block_size: Tokens per window, T.
        vocabulary: Entries of the model's vocabulary.
    """
    return max(1, min(EVAL_WINDOWS, EVAL_LOGITS // logit_bytes(1, block_size, vocabulary)))


def logit_bytes(windows: int, block_size: int, vocabulary: int) -> int:
    """Bytes of the logits of a batch in fp32."""
    return 4 * windows * block_size * vocabulary
