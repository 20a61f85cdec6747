"""Packs documents into blocks of token ids of one length.

Shapes: T tokens of a block.
"""

import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify.errors import SparsifyError

log = logging.getLogger("sparsify")

DOCUMENTS_A_CALL = 64  # enough to keep a fast tokenizer's threads busy, few enough for memory


@dataclass(frozen=True)
class PackedText:
    """Token blocks of one source.

    Args:
        blocks: int32 token ids [blocks, T]; int32 because token ids fit and it halves the memory.
        documents: Number of documents.
        tokens: Number of tokens of all documents and separators, before the last partial block
            was dropped.
        dropped: Number of tokens of the last partial block, which `blocks` lacks.
        sha256: Hex digest of all `tokens` ids as little-endian int32. Equal digests mean equal
            text and tokenizer, whatever the block size.
    """

    blocks: Tensor
    documents: int
    tokens: int
    dropped: int
    sha256: str


def pack(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, name: str
) -> PackedText:
    """Joins documents with the end-of-text token and cuts them into blocks.

    Args:
        documents: The texts, read once.
        tokenizer: Must have an ``eos_token``, which separates documents. It adds no other special
            token.
        block_size: Tokens a block.
        name: Name of the source, for messages.

    Returns:
        The blocks; only the last partial block is dropped.

    Raises:
        SparsifyError: The tokenizer has no end-of-text token, or the text is less than one block.
    """
    separator = tokenizer.eos_token_id
    if not isinstance(separator, int):
        raise SparsifyError(
            f"{name}: the tokenizer's eos_token is {tokenizer.eos_token!r}; documents are "
            "separated by it: use a tokenizer that has one, or set tokenizer.eos_token"
        )
    ids = array("i")
    count = 0
    for texts in _batches(documents, DOCUMENTS_A_CALL):
        # verbose=False: a document may be longer than the model's context, it is cut below
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        for document in encoded["input_ids"]:
            if count:
                ids.append(separator)
            ids.extend(document)
            count += 1
    blocks, dropped = divmod(len(ids), block_size)
    if not blocks:
        raise SparsifyError(
            f"{name}: {len(ids)} tokens are less than one block of {block_size}; add text or lower "
            "--data.block_size"
        )
    stream = np.frombuffer(ids, dtype=np.int32)  # shares the array's memory
    packed = PackedText(
        blocks=torch.from_numpy(stream[: blocks * block_size]).view(blocks, block_size),
        documents=count,
        tokens=len(ids),
        dropped=dropped,
        sha256=hashlib.sha256(stream.astype("<i4", copy=False).data).hexdigest(),
    )
    _log(name, packed)
    return packed


@rank_zero_only
def _log(name: str, packed: PackedText) -> None:
    log.info(
        "%s: %d documents, %d tokens, %d blocks, %d tokens dropped",
        name,
        packed.documents,
        packed.tokens,
        len(packed.blocks),
        packed.dropped,
    )


def _batches(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    documents = iter(documents)
    while texts := list(islice(documents, size)):
        yield texts
