"""Files that somebody made up: refused, or read as what they say; never a crash.

``benchmarks/fuzz_mask_file.py`` runs the same check for longer, guided by coverage.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import NMPattern, SparsifyError
from sparsify.export.mask_file.file import MaskFile, read_masks, write_masks
from tests.export.mask_file.damage import reindexed, signed, split

TWO_FOUR = NMPattern(2, 4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 70) | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
KEYS = st.sampled_from(
    ["base", "lineage", "prior", "layers", "x", "shape", "pattern", "sha256", "changed"]
)
VALUES = JSON | st.sampled_from(["2:4", "1:2", "8:16", [4, 8], [4, 16], {}, "0" * 64])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file, and a delta file against it."""
    folder = tmp_path_factory.mktemp("fuzz")
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(6, (4, 4), generator=generator)
    write_masks(folder / "a.nmask", {"x": TWO_FOUR.unrank(ranks)}, TWO_FOUR, "h")
    prior = read_masks(folder / "a.nmask")
    ranks[0, 0] = (ranks[0, 0] + 1) % 6
    write_masks(folder / "b.nmask", {"x": TWO_FOUR.unrank(ranks)}, TWO_FOUR, "h", prior=prior)
    return folder


def check(path: Path, prior: MaskFile | None = None) -> None:
    """The reader refuses the file, or what it gives is what its index states."""
    try:
        found = read_masks(path, prior)
        masks = {name: found[name] for name in found}
    except SparsifyError:
        return
    size = path.stat().st_size + (0 if prior is None else prior.path.stat().st_size)
    for name, mask in masks.items():
        entry = found.index.layers[name]
        assert tuple(mask.shape) == entry.shape
        assert mask.numel() <= 32 * size
        assert (entry.pattern.groups(mask).sum(-1) == entry.pattern.n).all()
    again = path.with_suffix(".again")
    write_masks(again, masks, found.patterns, "")
    assert read_masks(again).digest == found.digest


@settings(deadline=None, max_examples=150)
@given(content=st.binary(max_size=300))
def test_any_bytes(content: bytes, folder: Path) -> None:
    path = folder / "any.nmask"
    path.write_bytes(content)
    check(path)
    codes, _ = split((folder / "a.nmask").read_bytes())
    path.write_bytes(signed(codes, content))
    check(path)


@settings(deadline=None, max_examples=150)
@given(JSON)
def test_any_json_as_index(folder: Path, index: Any) -> None:
    codes, _ = split((folder / "a.nmask").read_bytes())
    path = folder / "json.nmask"
    path.write_bytes(signed(codes, json.dumps(index).encode()))
    check(path)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), name=st.sampled_from(["a", "b"]))
def test_any_change_of_an_index(data: st.DataObject, name: str, folder: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        for where in (index["layers"]["x"], index["layers"], index):
            if data.draw(st.booleans()):
                where[data.draw(KEYS)] = data.draw(VALUES)

    path = folder / "changed.nmask"
    path.write_bytes(reindexed((folder / f"{name}.nmask").read_bytes(), change))
    check(path, read_masks(folder / "a.nmask"))


@settings(deadline=None, max_examples=200)
@given(data=st.data(), name=st.sampled_from(["a", "b"]))
def test_any_codes_under_their_own_checksum(data: st.DataObject, name: str, folder: Path) -> None:
    codes, index = split((folder / f"{name}.nmask").read_bytes())
    start = data.draw(st.integers(8, len(codes)))
    codes = codes[:start] + data.draw(st.binary(max_size=8)) + codes[start + 4 :]
    fields = json.loads(index)
    fields["layers"]["x"]["sha256"] = hashlib.sha256(codes[8:]).hexdigest()
    path = folder / "codes.nmask"
    path.write_bytes(signed(codes, json.dumps(fields).encode()))
    check(path, read_masks(folder / "a.nmask"))
