"""The commands on exports and mask files, as a user runs them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify import SparsifyError, serving
from sparsify.cli.main import main
from sparsify.export.mask_file import read_masks, write_masks
from tests.conftest import Cli

Tool = Callable[..., tuple[int, str]]
LAYERS = 14


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Runs a command: its exit status and what it printed, errors included."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(list(words))
        return int(exit_.value.code or 0), "".join(capsys.readouterr())

    return run


@pytest.fixture
def out(cli: Cli) -> Path:
    """The export of a magnitude mask, in the command line's folder."""
    cli("export", "--strategy=magnitude", "--output.folder=out")
    return Path("out")


@pytest.fixture
def base(cli: Cli) -> str:
    """The option that names the base model."""
    return "--base=" + cli.model[0].partition("=")[2]


def test_a_sound_export_is_ok(out: Path, base: str, tool: Tool) -> None:
    status, text = tool("verify", "out", base)
    assert status == 0
    assert text.startswith(f"ok: out, {LAYERS} sparse layers of 2:4")
    assert "model.layers.*.mlp.up_proj" in text
    status, text = tool("verify", "out", "--format=json")
    report = json.loads(text)
    assert report["ok"] is True
    assert len(report["layers"]) == LAYERS


def test_a_damaged_export_has_exit_status_1(out: Path, tool: Tool) -> None:
    file = out / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3] = 1
    save_file(weights, file, {"format": "pt"})
    status, text = tool("verify", "out")
    assert status == 1
    assert "model.layers.1.mlp.up_proj: 8 of 512 groups hold more than 2 nonzeros of 4" in text


def test_what_cannot_be_verified_has_exit_status_2(tmp_path: Path, tool: Tool) -> None:
    status, text = tool("verify", str(tmp_path / "none"))
    assert (status, text.count("\n")) == (2, 1)
    assert "none is not a folder; name one that `sparsify export` wrote" in text


def test_masks_go_through_npz_and_zeros_and_come_back(out: Path, base: str, tool: Tool) -> None:
    digest = read_masks(out).digest
    assert tool("mask", "export", "out", "m.npz", base)[0] == 0
    assert tool("mask", "import", "m.npz", "npz.nmask", base)[0] == 0
    assert tool("mask", "import", "out", "zeros.nmask")[0] == 0
    assert read_masks(Path("npz.nmask")).digest == digest
    assert read_masks(Path("zeros.nmask")).digest == digest
    assert tool("mask", "export", "npz.nmask", "again", base)[0] == 0
    assert tool("verify", "again", base)[0] == 0
    first, second = (load_file(Path(f) / "model.safetensors") for f in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), Path.mkdir], ids=["file", "dir"])
def test_only_an_archive_gives_way_to_masks(
    make: Callable[[Path], object], out: Path, base: str, tool: Tool
) -> None:
    words = "mask", "export", "out", "m.NPZ", base
    make(Path("m.NPZ"))
    status, text = tool(*words, "--overwrite")
    assert (status, text) == (2, "error: m.NPZ exists, and stays; name another file\n")
    Path("m.NPZ").rename("former")
    assert tool(*words)[0] == 0
    assert tool(*words, "--overwrite")[0] == 0
    assert is_zipfile("m.NPZ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "out", "m.npz"), "give the dense model .* with --base MODEL"),
        (("import", "a.pt", "m.nmask"), "files of this kind hold no shapes; give the model"),
        (
            ("import", "a.pt", "m.nmask", "--pattern=2:4"),
            "patterns of their own; leave it out",
        ),
        (("import", "gone.npz", "m.nmask"), "gone.npz: there is no such file or folder"),
        (("export", "out", "m.pt", "--base=embedded"), "exported to a .npz file or a folder"),
        (("export", "out", "m.npz", "--base=embedded"), "base model's weight .* give the model"),
        (("export", "out", "new", "--base=embedded"), "base model's weight .* give the model"),
        (("diff", "out", "out", "--plot=d.xyz"), "--plot d.xyz: Format 'xyz' is not supported"),
        (("diff", "out", "out", "--plot=no/d.png"), "no/d.png: No such file or directory"),
        (("import", "out", "out"), "out exists, and stays; name another file"),
        (("import", "out", "m.nmask", "--pattern=1:4"), "more than the 1 of 1:4"),
        (("show", "gone.nmask"), "not a readable mask file"),
        (("diff", "out", "gone.nmask"), "not a readable mask file"),
        (("delta", "out", "out", "out"), "out exists, and stays"),
    ],
)
def test_what_masks_commands_refuse(
    words: tuple[str, ...], message: str, out: Path, tool: Tool
) -> None:
    Path("a.pt").write_bytes(b"")
    status, text = tool("mask", *words)
    assert status == 2
    assert "error: " in text
    assert "Traceback" not in text
    Path("a.pt").unlink()
    assert re.search(message, text), text
    assert sorted(path.name for path in Path().iterdir()) == ["out", "runs"]


def test_masks_are_shown(out: Path, tool: Tool) -> None:
    status, text = tool("mask", "show", "out")
    assert status == 0
    assert f"masks.nmask: {LAYERS} layers" in text
    assert read_masks(out).digest in text
    assert "sparsify.strategies.magnitude.Magnitude" in text
    assert ["model.layers.*.mlp.up_proj", "2", "64", "x", "32", "2:4"] in map(
        str.split, text.splitlines()
    )


def test_changes_are_a_file_and_join_with_what_they_changed(
    cli: Cli, out: Path, tool: Tool
) -> None:
    masks = dict(read_masks(out))
    name = "model.layers.1.mlp.up_proj"
    masks[name] = masks[name].roll(4, 1)
    write_masks(Path("b.nmask"), masks, read_masks(out).patterns, "h")
    assert tool("mask", "delta", "out", "b.nmask", "d.nmask")[0] == 0
    status, text = tool("mask", "show", "d.nmask")
    assert status == 0
    assert text.count(" 0.00% to 0.00%") == 6  # families
    assert f"changes  {read_masks(out).digest}" in text
    assert tool("mask", "join", "out", "d.nmask", "joined.nmask")[0] == 0
    assert Path("joined.nmask").read_bytes() == Path("b.nmask").read_bytes()


def test_differences_are_a_table_numbers_and_a_figure(out: Path, tool: Tool) -> None:
    masks = dict(read_masks(out))
    masks["model.layers.1.mlp.up_proj"] = ~masks["model.layers.1.mlp.up_proj"]
    write_masks(Path("b.nmask"), masks, read_masks(out).patterns, "")
    status, text = tool("mask", "diff", "out", "b.nmask", "--plot=d.png")
    assert status == 0
    assert "100.00%" in text
    assert Path("d.png").read_bytes().startswith(b"\x89PNG")
    found: Any = json.loads(tool("mask", "diff", "out", "b.nmask", "--format=json")[1])
    assert found["layers"]["model.layers.1.mlp.up_proj"]["shares"]["weights"] == 1
    del masks["model.layers.0.mlp.up_proj"]
    write_masks(Path("c.nmask"), masks, read_masks(out).patterns, "")
    assert "1 layers are in one of the two alone" in tool("mask", "diff", "out", "c.nmask")[1]
    assert "over 13 layers" in tool("mask", "diff", "out", "b.nmask", "--more=[c.nmask]")[1]
    status, text = tool("mask", "diff", "out", "b.nmask", "--more=[out/masks.nmask]")
    assert status == 0
    assert "masks.nmask" in text


def test_a_graph_is_written(out: Path, tool: Tool) -> None:
    status, text = tool("onnx", "out", "m.onnx")
    assert status == 0, text
    assert f"{LAYERS} products by masked weights" in text
    assert f"{LAYERS} are 2:4" in text
    assert Path("m.onnx").is_file()
    assert Path("m.onnx.data").is_file()
    assert tool("onnx", "out", "m.onnx")[0] == 2


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", '"x"', '{"layers": {"x": {}}}'])
def test_a_damaged_manifest_is_a_message_everywhere(content: str, out: Path, tool: Tool) -> None:
    (out / "sparsity_manifest.json").write_text(content)
    assert tool("verify", "out")[0] == 1
    status, text = tool("onnx", "out", "m.onnx")
    assert (status, "sparsity_manifest.json" in text) == (2, True)
    with pytest.raises(SparsifyError, match="sparsity_manifest.json"):
        serving.load(out)


def test_code_that_comes_with_a_model_is_not_run_nor_asked_for(out: Path, tool: Tool) -> None:
    config = json.loads((out / "config.json").read_text())
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
    config |= {"model_type": "evil", "auto_map": auto_map}
    (out / "config.json").write_text(json.dumps(config))
    (out / "evil.py").write_text("open('ran', 'w')")
    with pytest.raises(SparsifyError, match="holds no configuration that Transformers can read"):
        serving.load(out)
    for words in (("mask", "import", "out", "m.nmask"), ("onnx", "out", "m.onnx")):
        status, text = tool(*words)
        assert status == 2, text
        assert "no model could be loaded from" in text
    assert not Path("ran").exists()
