"""The folders import each other in one direction, as docs/architecture.md says."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.masking.registry import STRATEGIES, find_strategy, plugins
from sparsify.strategies.dense import Dense
from sparsify.strategies.magnitude import Magnitude

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
from draw_architecture import (  # noqa: E402
    MAY_IMPORT,
    PICTURE,
    PLACES,
    direct,
    draw,
    edges,
    sources,
    violations,
)

LONGEST = 300
WITHOUT_LIGHTNING = (
    "sparsify.masking.masked_model",
    "sparsify.export.folder",
    "sparsify.export.exchange.apply",
    "sparsify.results.result",
    "sparsify.results.mask_diff",
    "sparsify.serving",
    "sparsify.serving.adapters",
    "sparsify.serving.verify",
)


def test_twelve_names() -> None:
    names = {path.name for path in (ROOT / "sparsify").iterdir() if path.name != "__pycache__"}
    assert names == {
        *MAY_IMPORT.keys() - {"strategies", "callbacks", "api"},
        *("__init__.py", "__main__.py", "api.py", "py.typed"),
    }


def test_imports_run_one_way() -> None:
    assert violations() == []
    found = set(edges())
    assert len(found) > 30
    assert all((target, source) not in found for source, target in found)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("sparsify/masking/pattern.py", "from sparsify.training.module import SparseCausalLM"),
        ("sparsify/common/bits.py", "def f():\n    from sparsify.models import base"),
        ("sparsify/export/folder.py", "import sparsify.serving.loading"),
        ("strategies/wanda.py", "from sparsify.training.step import BatchRun"),
        ("callbacks/history.py", "from sparsify.cli import main"),
        ("sparsify/results/result.py", "from sparsify import api"),
    ],
)
def test_an_import_that_is_turned_round_is_found(file: str, line: str, tmp_path: Path) -> None:
    for folder in ("sparsify", "strategies", "callbacks"):
        ignored = shutil.ignore_patterns("embedded", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    assert violations(tmp_path) == []
    with (tmp_path / file).open("a", encoding="utf-8") as text:
        text.write(f"\n{line}\n")
    [found] = violations(tmp_path)
    assert found.startswith(f"{file} imports sparsify.")


def test_files_are_short() -> None:
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for files in sources(ROOT).values()
        for file in files
    }
    assert len(lengths) > 150
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


def test_no_method_has_its_name_in_the_core() -> None:
    classes = {find_strategy(name) for name in plugins(STRATEGIES)} - {Dense, Magnitude}
    words = {kind.__name__ for kind in classes} | {
        kind.__module__.split(".")[-1] for kind in classes
    }
    assert {"MaskLLM", "sparsegpt"} <= words
    pattern = re.compile(rf"\b({'|'.join(sorted(words))})\b", re.IGNORECASE)
    named = [
        (file.name, found[0])
        for folder, files in sources(ROOT).items()
        if folder != "strategies"
        for file in files
        if (found := pattern.search(file.read_text(encoding="utf-8")))
    ]
    assert named == []


def test_what_needs_no_lightning_does_not_import_it() -> None:
    code = f"import sys, {', '.join(WITHOUT_LIGHTNING)}; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_picture_is_of_these_imports(tmp_path: Path) -> None:
    assert PLACES.keys() == MAY_IMPORT.keys()
    draw(tmp_path / "now.svg")
    assert (tmp_path / "now.svg").read_text() == PICTURE.read_text(), (
        "run docs/draw_architecture.py"
    )


def test_only_what_no_other_way_stands_for_is_drawn() -> None:
    assert direct({("a", "b"), ("b", "c"), ("a", "c")}) == {("a", "b"), ("b", "c")}


def defined(file: Path) -> set[str]:
    """The functions, classes and methods of a file, the latter as ``Class.method``."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            parts = (n for n in node.body if isinstance(n, ast.FunctionDef))
            found |= {f"{node.name}.{part.name}" for part in parts}
    return found


def test_every_file_and_function_of_the_page_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `([\w/]+\.py)` \| `([\w.]+)` \|$", text, re.MULTILINE)
    assert len(rows) > 25
    assert [row for row in rows if row[1] not in defined(ROOT / row[0])] == []
    folders = set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE))
    assert folders == MAY_IMPORT.keys() - {"api"}
