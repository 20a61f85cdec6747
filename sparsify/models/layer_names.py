"""Qualified names of layers, shortened for people."""

import re

OTHER = "other"


def family(name: str) -> str:
    """The name with its numbers replaced by ``*``: what a layer is called in every block."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def block_and_kind(name: str) -> tuple[str, str]:
    """The block and the kind of a layer: ``model.layers.0`` and ``self_attn.q_proj``; numbers
    within a kind, as those of experts, become ``*``, and a layer in no block is in ``other``.
    """
    match = re.fullmatch(r"(.*?\.\d+)\.(.+)", name)
    return (match[1], family(match[2])) if match else (OTHER, family(name))


def block_number(name: str) -> int | None:
    """The number of a layer's block; None of a layer in no block."""
    block, _ = block_and_kind(name)
    return None if block == OTHER else int(block.rpartition(".")[2])
