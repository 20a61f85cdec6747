"""Shortens the qualified names of layers for people."""

import re

OTHER = "other"


def family(name: str) -> str:
    """The name with its numbers replaced by ``*``, so that it is the same in every block."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def block_and_kind(name: str) -> tuple[str, str]:
    """Split a layer's name into block and kind, such as ``model.layers.0`` and
    ``self_attn.q_proj``. Numbers within a kind, such as those of experts, become ``*``; a layer
    outside all blocks has the block ``other``.
    """
    match = re.fullmatch(r"(.*?\.\d+)\.(.+)", name)
    return (match[1], family(match[2])) if match else (OTHER, family(name))


def block_number(name: str) -> int | None:
    """The number of a layer's block, or None for a layer outside all blocks."""
    block, _ = block_and_kind(name)
    return None if block == OTHER else int(block.rpartition(".")[2])
