"""The notebook runs, and what it shows was measured."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "first_masks.ipynb"
CELLS: list[dict[str, Any]] = [
    cell
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]
INSTALL, *CODE = ["".join(cell["source"]) for cell in CELLS]
STEPS = "STEPS = 40 "


def printed() -> str:
    """All text that the stored outputs hold."""
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    return "".join(line for output in outputs for line in output.get("text", ()))


def test_ten_cells_of_public_names() -> None:
    assert len(CELLS) == 10
    assert CELLS[0]["metadata"]["tags"] == ["install"]
    assert INSTALL.startswith("%pip install ")
    code = "\n".join(CODE)
    compile(code, str(NOTEBOOK), "exec")
    assert code.count(STEPS) == 1
    assert re.findall(r"\._\w+", code) == []
    assert set(re.findall(r"^(?:from|import) (\w+\.?\w*)", code, re.MULTILINE)) == {
        *("logging", "matplotlib.pyplot", "torch", "transformers", "transformers.utils"),
        "sparsify",
    }


def test_its_outputs_are_of_a_whole_run() -> None:
    assert [cell["execution_count"] for cell in CELLS[1:]] == list(range(1, 10))
    scores = {name: float(value) for name, value in re.findall(r"(\w+): (\d+\.\d\d)\n", printed())}
    assert list(scores) == ["dense", "wanda", "selfmask"]
    assert scores["dense"] < scores["selfmask"] < scores["wanda"]
    assert "at most 2 weights in each, 50.0% zeros" in printed()
    assert [key for cell in CELLS for o in cell["outputs"] for key in o.get("data", ())].count(
        "image/png"
    ) == 1
    assert re.findall(r"(?<![\w.])/(?:home|root|tmp|usr|work)\b", NOTEBOOK.read_text()) == []


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells but the first, with one step of learning."""
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    figures: list[list[int]] = []
    show = lambda: figures.append([len(axes.patches) for axes in plt.gcf().axes])  # noqa: E731
    monkeypatch.setattr(plt, "show", show)
    names: dict[str, Any] = {}
    for code in CODE:
        exec(code.replace(STEPS, "STEPS = 1 "), names)  # noqa: S102
    plt.close("all")
    assert figures == [[0, 8]]  # two bars for each of four ranks
    scores = names["perplexity"]
    assert 20 < scores["dense"] < min(scores["wanda"], scores["selfmask"])
    assert max(scores.values()) < 100
    assert (names["most"], len(names["groups"])) == (2, 608256)
    assert names["zeros"] == pytest.approx(0.5, abs=1e-3)
    for name, mask in names["selfmask"].masks().items():
        assert torch.equal(names["plain"].get_submodule(name).weight != 0, mask)
