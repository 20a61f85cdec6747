"""What a benchmark takes from another file of the folder is there."""

import ast
from pathlib import Path

import pytest

FILES = {path.stem: path for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py")}


def defined(file: Path) -> set[str]:
    """The names that a file defines or imports at its top."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_what_it_takes_from_others_is_there(name: str) -> None:
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            taken = {alias.name for alias in node.names}
            assert taken <= defined(FILES[node.module]), node.module
