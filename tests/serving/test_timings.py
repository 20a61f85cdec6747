"""The file of measured times: kept, shared, never trusted when it is damaged or foreign."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.serving import timings
from sparsify.serving.measure import LayerKind
from sparsify.serving.timings import Timings

CPU = torch.device("cpu")
KIND = LayerKind((16, 8), torch.bfloat16, False)
BIASED = LayerKind((16, 8), torch.bfloat16, True)


def test_times_are_found_again(tmp_path: Path) -> None:
    Timings(CPU, tmp_path).add(KIND, "a", {1: (1.0, 0.5), 8: (2.0, 3.0)})
    Timings(CPU, tmp_path).add(KIND, "b", {1: (1.0, 0.25)})
    again = Timings(CPU, tmp_path)
    assert again.get(KIND, "a", [1, 4, 8]) == {1: (1.0, 0.5), 8: (2.0, 3.0)}
    assert again.get(KIND, "b", [1]) == {1: (1.0, 0.25)}
    assert again.get(BIASED, "a", [1]) == {}
    assert [path.name for path in tmp_path.iterdir()] == [again.path.name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "{",
        lambda content: "[]",
        lambda content: "7",
        lambda content: json.dumps({**content, "machine": {"device": "another"}}),
        lambda content: json.dumps({**content, "seconds": [1, 2]}),
        lambda content: json.dumps({"machine": content["machine"]}),
        lambda content: json.dumps(
            {**content, "seconds": {key: [1.0, -1.0] for key in content["seconds"]}}
        ),
        lambda content: json.dumps(
            {**content, "seconds": {key: ["1", 2.0] for key in content["seconds"]}}
        ),
        lambda content: json.dumps({**content, "seconds": dict.fromkeys(content["seconds"], 1.0)}),
    ],
)
def test_a_damaged_file_is_ignored_and_rewritten(damage: Any, tmp_path: Path) -> None:
    kept = Timings(CPU, tmp_path)
    kept.add(KIND, "a", {1: (1.0, 0.5)})
    kept.path.write_text(damage(json.loads(kept.path.read_text())))
    assert kept.get(KIND, "a", [1]) == {}
    kept.add(KIND, "a", {2: (1.0, 0.25)})
    assert Timings(CPU, tmp_path).get(KIND, "a", [1, 2]) == {2: (1.0, 0.25)}


def test_other_libraries_have_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Timings(CPU, tmp_path).add(KIND, "a", {1: (1.0, 0.5)})
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert Timings(CPU, tmp_path).get(KIND, "a", [1]) == {}
    monkeypatch.undo()
    monkeypatch.setattr(timings, "SCHEMA", "other")
    assert Timings(CPU, tmp_path).get(KIND, "a", [1]) == {}


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "sparsify"):
        Timings(CPU, tmp_path / "file").add(KIND, "a", {1: (1.0, 0.5)})
    assert "are not kept" in caplog.text


def test_the_users_cache_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "own"))
    assert Timings(CPU).path.parent == tmp_path / "own"
