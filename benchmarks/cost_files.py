"""Size of mask files, and time to write and read them, beside ``np.packbits`` with zlib.

The masks are random, which no code can make smaller than their entropy: one block with the shapes
of LLaMA-2-7B's. Other blocks of a model take the same again.
"""

import math
import statistics
import zlib
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from measuring import in_turns
from torch import Tensor

from sparsify import NMPattern
from sparsify.export.mask_file.file import MaskWriter, read_masks

PATTERNS = (NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8))
LLAMA_2_7B, TINY = (4096, 11008), (64, 128)


def random_masks(pattern: NMPattern, hidden: int, inner: int) -> dict[str, Tensor]:
    """Masks of a block's layers, every candidate of a group equally likely."""
    torch.manual_seed(0)
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    shapes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    shapes |= {"down_proj": (hidden, inner)}
    ranks = {
        n: torch.randint(pattern.candidates, (o, i // pattern.m)) for n, (o, i) in shapes.items()
    }
    return {name: pattern.unrank(rank) for name, rank in ranks.items()}


def write(file: Path, masks: dict[str, Tensor], pattern: NMPattern) -> None:
    with MaskWriter(file, "0" * 64) as writer:
        for name, mask in masks.items():
            writer.add(name, mask, pattern)


def zipped(masks: dict[str, Tensor]) -> list[bytes]:
    return [zlib.compress(np.packbits(mask.numpy())) for mask in masks.values()]


def unzipped(parts: list[bytes]) -> list[Any]:
    return [np.unpackbits(np.frombuffer(zlib.decompress(part), np.uint8)) for part in parts]


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """Of each pattern the bits a weight, and CPU seconds for all layers."""
    rows: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "masks.nmask"
        for pattern in PATTERNS:
            masks = random_masks(pattern, *(TINY if quick else LLAMA_2_7B))
            weights = sum(mask.numel() for mask in masks.values())
            write(file, masks, pattern)
            parts = zipped(masks)
            assert all(torch.equal(mask, masks[name]) for name, mask in read_masks(file).items())
            turns = {
                "write": partial(write, file, masks, pattern),
                "read": lambda: dict(read_masks(file)),
                "packbits_zlib": partial(zipped, masks),
                "unzip_unpackbits": partial(unzipped, parts),
            }
            times = in_turns({name: lambda _, run=run: run for name, run in turns.items()}, rounds)
            rows[str(pattern)] = {
                "bits": 8 * file.stat().st_size / weights,
                "packbits_zlib_bits": 8 * sum(map(len, parts)) / weights,
                "entropy_bits": math.log2(pattern.candidates) / pattern.m,
                **{f"{name}_seconds": statistics.median(t) for name, t in times.items()},
                "times": times,
            }
    return {"weights": weights, "rows": rows}
