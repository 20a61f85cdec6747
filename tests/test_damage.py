"""The benchmark that damages files, in short: none of what it reads changes a result or breaks."""

import sys
from pathlib import Path

import pytest

from tests.conftest import Scripts


def test_damaged_files_are_refused_or_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripts: Scripts
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsify"])
    script = scripts("damage")
    found = script.damage(tmp_path, count=8, seed=1, kinds=["checkpoints", "masks"])
    assert all(sum(counts.values()) == 8 for counts in found.values())
    assert all(counts["refused"] >= 4 for counts in found.values())
    assert all(counts[script.CHANGED] == counts[script.TRACEBACK] == 0 for counts in found.values())
    again = script.damage(tmp_path, count=8, seed=1, kinds=["checkpoints", "masks"])
    assert again == found
