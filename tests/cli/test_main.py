"""The first step of the command line: quick answers, and what is typed wrongly."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path

import jsonargparse
import pytest
import torch

import sparsify
from sparsify.cli.commands import plan
from sparsify.cli.dispatch import find_function
from sparsify.cli.main import main
from sparsify.cli.table import TOOLS, TRAINER_COMMANDS, Group, Tool
from sparsify.common.version import DISTRIBUTION
from sparsify.export.mask_file import write_masks
from sparsify.masking.pattern import NMPattern

Exits = Callable[..., tuple[int, str, str]]
HEAVY = ("torch", "lightning", "transformers", "numpy", "datasets", "matplotlib")
CHILD = """
import json, sys, time
try:
    {code}
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps([sorted(sys.modules), time.process_time()]))
"""


@pytest.fixture
def exits(capsys: pytest.CaptureFixture[str]) -> Exits:
    """Runs the command line: its exit status, and what it wrote to both streams."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def in_a_fresh_process(code: str) -> tuple[set[str], float]:
    """The packages that were imported by it, and the seconds of CPU that it took."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(code=code)], capture_output=True, text=True, check=True
    )
    modules, seconds = json.loads(child.stdout.splitlines()[-1])
    return {name.partition(".")[0] for name in modules}, seconds


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["mask", "--help"],
        ["verify", "--help"],
        ["compare", "--help"],
        ["eval", "--help"],
        ["onnx", "--help"],
        ["card", "--help"],
        ["push", "--help"],
        ["merge", "--help"],
        ["mask", "show", "m.nmask"],
    ],
    ids=" ".join,
)
def test_quick_answers(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pattern = NMPattern(2, 4)
    write_masks(Path("m.nmask"), {"a.0.b": pattern.top(torch.randn(4, 8))}, pattern, "")
    modules, seconds = in_a_fresh_process(f"from sparsify.cli.main import main; main({words})")
    assert modules & {*HEAVY} == set()
    assert seconds < 2


def test_the_package_is_imported_at_once_and_its_names_when_they_are_asked_for() -> None:
    code = "import sparsify; sparsify.SparsifyError; sparsify.NMPattern(2, 4); sparsify.common.lazy"
    modules, seconds = in_a_fresh_process(code)
    assert modules & {*HEAVY} == set()
    assert seconds < 0.5


def test_all_public_names_are_there() -> None:
    assert set(sparsify.__all__) <= set(dir(sparsify))
    assert callable(sparsify.sparsify)
    for name in sparsify.__all__:
        assert getattr(sparsify, name).__name__ == name
    assert sparsify.masking.pattern.NMPattern is sparsify.NMPattern
    with pytest.raises(AttributeError, match="module 'sparsify' has no attribute 'Mask'"):
        _ = sparsify.Mask  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        exec("from sparsify import Mask")  # noqa: S102


@pytest.mark.parametrize("package", ["sparsify", "sparsify.export", "sparsify.export.mask_file"])
def test_type_checkers_and_python_find_the_same_names_in_the_same_modules(package: str) -> None:
    """The lists of a lazy package agree."""
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    [branch] = [node for node in tree.body if isinstance(node, ast.If)]
    checked = {
        alias.name: statement.module
        for statement in branch.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert sorted(checked) == module.__all__
    for name, where in checked.items():
        found = getattr(importlib.import_module(str(where)), name)
        assert getattr(module, name) is found
        assert module.__getattr__(name) is found


def test_help_lists_every_command_with_its_line(
    exits: Exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    status, out, err = exits("--help")
    assert (status, err) == (0, "")
    abouts = TRAINER_COMMANDS | {name: entry.about for name, entry in TOOLS.items()}
    for name, about in abouts.items():
        assert any(line.split() == [name, *about.split()] for line in out.splitlines()), name
    status, out, err = exits("mask", "-h")
    assert (status, err) == (0, "")
    assert "usage: sparsify mask COMMAND" in out
    assert "    show    Say what a mask file holds." in out


def test_help_of_a_narrow_terminal(exits: Exits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = exits("--help")[1].splitlines()
    assert max(len(line) for line in lines if line.startswith("    ")) <= 60
    monkeypatch.setenv("COLUMNS", "1")
    assert exits("--help")[0] == 0


def _tools() -> dict[str, Tool]:
    tools: dict[str, Tool] = {}
    for name, entry in TOOLS.items():
        group = entry.tools if isinstance(entry, Group) else {"": entry}
        tools |= {f"{name} {word}".strip(): tool for word, tool in group.items()}
    return tools


@pytest.mark.parametrize("name", _tools())
def test_every_command_is_where_the_table_says(name: str) -> None:
    function = find_function(_tools()[name])
    assert function.__doc__
    assert jsonargparse.auto_parser(function, as_positional=True)


def test_the_version(exits: Exits) -> None:
    assert exits("--version") == (0, f"sparsify {version(DISTRIBUTION)}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verfy", "x"], "there is no command 'verfy'; did you mean 'verify'? There are fit, "),
        (["mask", "shw"], "there is no command 'mask shw'; did you mean 'show'? There are show, "),
        (["zzzz"], "there is no command 'zzzz'; There are fit, validate, "),
    ],
)
def test_a_mistyped_command(words: list[str], message: str, exits: Exits) -> None:
    status, out, err = exits(*words)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_no_command(exits: Exits) -> None:
    for words in ([], ["mask"]):
        status, out, err = exits(*words)
        assert (status, out) == (2, "")
        assert err.startswith(" ".join(["usage: sparsify", *words, "COMMAND"]))


def test_an_interrupted_command(exits: Exits, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsify.cli.dispatch.auto_cli", interrupted)
    assert exits("compare", "x") == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "command", ["--help", "cache show", "cache show --format=json", "mask show", "mask diff"]
)
def test_whoever_reads_may_stop(command: str, tmp_path: Path) -> None:
    words = command.split()
    if words[0] == "mask":
        masks = {f"layers.{n}": torch.tensor([[True, True, False, False]]) for n in range(2)}
        files = [tmp_path / "a.nmask", tmp_path / "b.nmask"][: 1 if words[1] == "show" else 2]
        for file in files:
            write_masks(file, masks, NMPattern(2, 4), "0" * 64)
        words += map(str, files)
    run = f"import time; time.sleep(0.3); from sparsify.cli.main import main; main({words})"
    read = subprocess.Popen(
        [sys.executable, "-c", run],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert read.stdout is not None
    read.stdout.close()
    assert read.stderr is not None
    assert read.stderr.read() == b""
    read.stderr.close()
    assert read.wait() == 0


def test_a_module_in_the_current_folder_takes_nobodys_place(
    exits: Exits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder comes last: what a command imports later is what is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    status, _, err = exits("plan", "--strategy=my.Own")
    assert (status, "'my.Own' cannot be imported" in err) == (2, True)
    assert plan.__name__ in sys.modules
    assert sys.path[-1] == str(tmp_path)
    assert str(tmp_path) not in sys.path[:-1]


def test_the_entry_point_is_this_one() -> None:
    [script] = [
        point
        for point in entry_points(group="console_scripts")
        if point.dist is not None and point.dist.name == DISTRIBUTION
    ]
    assert script.load() is main
