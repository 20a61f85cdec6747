"""The mask file: packed candidate ranks in a safetensors file.

Version 1. One uint8 tensor a layer, under the layer's qualified name. Groups are numbered row by
row. With K candidates a group, as many ranks as fit share a byte (three for 2:4: 0.667 bits a
weight), the first in the lowest digit of base K; where K exceeds 256 a rank takes two bytes,
little-endian. The last byte is padded with rank 0. The header's metadata holds the format's name,
the base model's hash, and for every layer its shape and pattern.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.pattern import NMPattern

FORMAT = "sparsify.masks/1"
FILE_NAME = "masks.safetensors"


@dataclass(frozen=True)
class MaskFile:
    """What a mask file holds.

    Attributes:
        masks: bool ``[O, I]`` by layer name, True = kept.
        base_hash: the hash of the model that they were made for.
    """

    masks: dict[str, Tensor]
    base_hash: str


def _ranks_a_byte(pattern: NMPattern) -> int:
    return int(math.log(256.5, pattern.candidates))


def pack_ranks(rank: Tensor, pattern: NMPattern) -> Tensor:
    """Pack integer ranks of any shape into a flat uint8 tensor."""
    flat = rank.flatten().int().cpu()
    digits = _ranks_a_byte(pattern)
    if digits == 0:
        return torch.stack([flat & 0xFF, flat >> 8], dim=-1).flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % digits)).view(-1, digits)
    return (padded * pattern.candidates ** torch.arange(digits)).sum(-1).to(torch.uint8)


def unpack_ranks(packed: Tensor, groups: int, pattern: NMPattern) -> Tensor:
    """The first ``groups`` ranks of a packed tensor: int32 ``[groups]``."""
    digits = _ranks_a_byte(pattern)
    if digits == 0:
        low, high = packed.int().view(-1, 2).unbind(-1)
        return low + (high << 8)
    ranks = packed.int()[:, None] // pattern.candidates ** torch.arange(digits) % pattern.candidates
    return ranks.flatten()[:groups].int()


def packed_bytes(groups: int, pattern: NMPattern) -> int:
    """How many bytes :func:`pack_ranks` makes of so many groups."""
    digits = _ranks_a_byte(pattern)
    return 2 * groups if digits == 0 else -(-groups // digits)


def write_masks(
    path: Path,
    masks: Mapping[str, Tensor],
    patterns: NMPattern | Mapping[str, NMPattern],
    base_hash: str,
) -> None:
    """Write masks.

    Args:
        path: the file.
        masks: bool ``[O, I]`` by layer name.
        patterns: theirs, or the one that all have.
        base_hash: the hash of the model that they were made for.

    Raises:
        SparsifyError: a mask is not one of its pattern.
    """
    if isinstance(patterns, NMPattern):
        patterns = dict.fromkeys(masks, patterns)
    tensors = {
        name: pack_ranks(patterns[name].rank(mask), patterns[name]) for name, mask in masks.items()
    }
    layers = {
        name: {"shape": list(mask.shape), "pattern": str(patterns[name])}
        for name, mask in masks.items()
    }
    save_file(
        tensors, path, {"format": FORMAT, "base_hash": base_hash, "layers": json.dumps(layers)}
    )


def find_file(path: Path) -> Path:
    """The mask file itself, where an exported folder is named."""
    return path / FILE_NAME if path.is_dir() else path


def read_masks(path: Path) -> MaskFile:
    """Read a mask file, or the one in an exported folder.

    Raises:
        SparsifyError: it is missing, no mask file, of another version, or its contents do not add
            up.
    """
    path = find_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise SparsifyError(
                    f"{path}: its format is {header.get('format')!r}, "
                    f"and this version reads {FORMAT!r}"
                )
            layers = json.loads(header["layers"])
            if set(layers) != set(file.keys()):
                raise SparsifyError(
                    f"{path}: its header lists other layers than it holds; the file is damaged"
                )
            masks = {
                name: _mask(path, name, file.get_tensor(name), **layer)
                for name, layer in layers.items()
            }
            return MaskFile(masks, header["base_hash"])
    except SparsifyError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SparsifyError(
            f"{path}: not a readable mask file ({error}); `sparsify export` writes {FILE_NAME}"
        ) from error


def _mask(path: Path, name: str, packed: Tensor, shape: list[int], pattern: str) -> Tensor:
    nm = NMPattern.parse(pattern)
    rows, columns = shape
    groups = rows * columns // nm.m
    if columns % nm.m or packed.dtype != torch.uint8 or packed.numel() != packed_bytes(groups, nm):
        raise SparsifyError(
            f"{path}: {name} holds {packed.numel()} bytes, "
            f"which is not a {nm} mask of {rows} x {columns}"
        )
    ranks = unpack_ranks(packed, groups, nm)
    if (ranks >= nm.candidates).any() or not torch.equal(pack_ranks(ranks, nm), packed):
        raise SparsifyError(
            f"{path}: {name} holds a rank beyond the {nm.candidates} candidates of {nm}; "
            "the file is damaged"
        )
    return nm.unrank(ranks.view(rows, -1))
