"""The benchmark that damages files, in short: none of what it reads changes a result or breaks."""

import sys
from pathlib import Path

import pytest


def test_damaged_files_are_refused_or_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["sparsify"])
    from damage import CHANGED, TRACEBACK, damage

    found = damage(tmp_path, count=8, seed=1, kinds=["checkpoints", "masks"])
    assert all(sum(counts.values()) == 8 for counts in found.values())
    assert all(counts["refused"] >= 4 for counts in found.values())
    assert all(counts[CHANGED] == counts[TRACEBACK] == 0 for counts in found.values())
    again = damage(tmp_path, count=8, seed=1, kinds=["checkpoints", "masks"])
    assert again == found
