"""Size, time and memory of the mask file on a random 2:4 mask with the shapes of LLaMA-2-7B.

The mask is made, written, read and compared layer by layer; what ``np.packbits`` and zlib make of
the same layers is measured in the same run, in turns.

    python benchmarks/mask_file_size.py --save benchmarks/results
"""

import argparse
import json
import platform
import resource
import tempfile
import time
import zlib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsify import NMPattern
from sparsify.export.mask_file.file import MaskWriter, read_masks

PATTERN = NMPattern(2, 4)
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ENTROPY = 0.25 * float(np.log2(PATTERN.candidates))


def layers(blocks: int, hidden: int, inner: int) -> Iterator[tuple[str, int, int]]:
    """Name, O and I of every masked layer."""
    for i in range(blocks):
        block = f"model.layers.{i}"
        yield from ((f"{block}.{name}", hidden, hidden) for name in ATTENTION)
        yield from ((f"{block}.mlp.{name}", inner, hidden) for name in ("gate_proj", "up_proj"))
        yield f"{block}.mlp.down_proj", hidden, inner


def random_mask(number: int, rows: int, columns: int) -> Tensor:
    """A mask with every candidate equally likely; its number makes it again."""
    generator = torch.Generator().manual_seed(number)
    shape = (rows, columns // PATTERN.m)
    ranks = torch.randint(PATTERN.candidates, shape, generator=generator, dtype=torch.uint8)
    return PATTERN.unrank(ranks)


def measure(shapes: list[tuple[str, int, int]], file: Path) -> dict[str, Any]:
    """Write and read all layers both ways."""
    seconds = dict.fromkeys(("encode", "decode", "packbits_zlib", "unzip_unpackbits"), 0.0)
    zipped_bytes = 0
    with MaskWriter(file, "0" * 64) as writer:
        for number, (name, rows, columns) in enumerate(shapes):
            mask = random_mask(number, rows, columns)
            start = time.perf_counter()
            writer.add(name, mask, PATTERN)
            written = time.perf_counter()
            zipped = zlib.compress(np.packbits(mask.numpy().reshape(-1)))
            seconds["packbits_zlib"] += time.perf_counter() - written
            seconds["encode"] += written - start
            zipped_bytes += len(zipped)
            start = time.perf_counter()
            bits = np.unpackbits(np.frombuffer(zlib.decompress(zipped), np.uint8))
            bits = bits[: rows * columns].astype(bool).reshape(rows, columns)
            seconds["unzip_unpackbits"] += time.perf_counter() - start
            del mask, zipped, bits
    masks = read_masks(file)
    for number, (name, rows, columns) in enumerate(shapes):
        start = time.perf_counter()
        found = masks[name]
        seconds["decode"] += time.perf_counter() - start
        assert torch.equal(found, random_mask(number, rows, columns)), name
    return {"bytes": file.stat().st_size, "packbits_zlib_bytes": zipped_bytes, "seconds": seconds}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--save", type=Path, help="folder for the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = list(layers(args.blocks, args.hidden, args.inner))
    weights = sum(rows * columns for _, rows, columns in shapes)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(shapes, Path(folder) / "masks.nmask")
    bound = 1.01 * ENTROPY * weights / 8 + 256 * len(shapes)
    result = {
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": 1,
        "layers": len(shapes),
        "groups": weights // PATTERN.m,
        "bits_a_weight": 8 * found["bytes"] / weights,
        "packbits_zlib_bits_a_weight": 8 * found["packbits_zlib_bytes"] / weights,
        "entropy_bits_a_weight": ENTROPY,
        "within_bound": found["bytes"] <= bound,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        **found,
    }
    print(json.dumps(result, indent=2))
    if args.save:
        path = args.save / f"mask_file_size-{result['date']}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
