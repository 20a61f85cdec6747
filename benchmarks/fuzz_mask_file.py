"""Fuzz the reader of mask files, guided by coverage (needs ``pip install atheris``; Linux).

Inputs are whole files, or an index and codes that are given their right checksums, so that the
fuzzer gets past them. The check is that of ``tests/export/mask_file/test_fuzz.py``: refused with a
message, or read as what the index states. Memory is bounded, so that an allocation without end is
a crash.

    python benchmarks/fuzz_mask_file.py CORPUS -max_total_time=1800 -max_len=1024
"""

import hashlib
import resource
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sparsify.export.mask_file", "sparsify.masking.pattern"]):
    from sparsify.export.mask_file import codes, delta, file, index  # noqa: F401

import torch

from sparsify import NMPattern
from sparsify.export.mask_file.file import read_masks, write_masks
from tests.export.mask_file.damage import signed, split
from tests.export.mask_file.test_fuzz import check

TWO_FOUR = NMPattern(2, 4)
FOLDER = Path(tempfile.mkdtemp())
PRIOR = FOLDER / "prior.nmask"


def test_one(data: bytes) -> None:
    """One input: a first byte that says what it is, and the rest."""
    kind, rest = data[:1], data[1:]
    path = FOLDER / "input.nmask"
    if kind < b"\x40":
        path.write_bytes(rest)
    else:
        codes_of, _, index_of = rest.partition(b"\n")
        index_of = index_of.replace(b"$", hashlib.sha256(codes_of).hexdigest().encode())
        path.write_bytes(signed(index.MAGIC + codes_of, index_of))
    check(path, read_masks(PRIOR) if kind >= b"\x80" else None)


def seed(corpus: Path) -> None:
    """A whole file, and one and a delta as index and codes."""
    corpus.mkdir(parents=True, exist_ok=True)
    ranks = torch.arange(16).view(4, 4) % 6
    write_masks(PRIOR, {"x": TWO_FOUR.unrank(ranks)}, TWO_FOUR, "h")
    moved = TWO_FOUR.unrank((ranks + (ranks == 3)) % 6)
    write_masks(FOLDER / "delta.nmask", {"x": moved}, TWO_FOUR, "h", prior=read_masks(PRIOR))
    (corpus / "whole").write_bytes(b"\0" + PRIOR.read_bytes())
    for kind, path in ((b"\x40", PRIOR), (b"\x80", FOLDER / "delta.nmask")):
        codes_of, index_of = split(path.read_bytes())
        codes_of = codes_of[len(index.MAGIC) :]
        # So that changed codes still have the hash that the index states.
        index_of = index_of.replace(hashlib.sha256(codes_of).hexdigest().encode(), b"$")
        content = kind + codes_of + b"\n" + index_of
        (corpus / path.stem).write_bytes(content)


if __name__ == "__main__":
    torch.set_num_threads(1)
    seed(Path(sys.argv[1]))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + 2**29
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    atheris.Setup(sys.argv, test_one)
    atheris.Fuzz()
