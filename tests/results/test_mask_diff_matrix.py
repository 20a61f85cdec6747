"""Pairwise differences, against the difference of each two."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from sparsify import NMPattern, SparsifyError
from sparsify.results.mask_diff import diff, diff_matrix
from tests.export.mask_file.cases import random_mask
from tests.results.test_mask_diff import text_of

SETS = {
    name: {layer: random_mask(4, 8 * i, "2:4", seed + i) for i, layer in enumerate("qkv", 1)}
    for seed, name in enumerate(["code", "law", "german"])
}
SETS["law"]["extra"] = random_mask(4, 8)


def test_every_two_are_compared(tmp_path: Path) -> None:
    found = diff_matrix(SETS)
    assert found.layers == ["q", "k", "v"]
    patterns = dict.fromkeys([*"qkv", "extra"], NMPattern(2, 4))
    for a in SETS:
        for b in SETS:
            wanted = diff(SETS[a], SETS[b], patterns).overall.shares()["weights"]
            assert found.shares[a][b] == wanted
            assert (wanted == 0) == (a == b)
    assert found.to_dict() == {"shares": found.shares, "layers": found.layers}
    table = text_of(found.table())
    assert all(f"{share:.2%}" in table for row in found.shares.values() for share in row.values())
    found.plot(tmp_path / "m.png")
    assert imread(tmp_path / "m.png").shape[0] > 200


def test_what_cannot_be_compared_is_an_error() -> None:
    with pytest.raises(SparsifyError, match="no layer is in all of code, law, german, x; compare"):
        diff_matrix(SETS | {"x": {"o": random_mask(4, 8)}})
    with pytest.raises(SparsifyError, match=r"q: the masks are \(4, 8\) and \(4, 16\)"):
        diff_matrix(SETS | {"x": SETS["law"] | {"q": random_mask(4, 16)}})
