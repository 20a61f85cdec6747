"""A stranger's files through the commands that only read: nothing runs, nothing is obeyed.

What ``fit``, ``validate``, ``test`` and ``export`` take from a checkpoint is in test_security.py.
"""

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.cli.main import main
from sparsify.common.printable import is_printable
from sparsify.common.seal import content_hash
from sparsify.common.shown_logs import shown_logs
from sparsify.export.manifest import MANIFEST
from sparsify.export.mask_file import read_masks, write_masks
from sparsify.masking.pattern import NMPattern
from tests.conftest import Cli, start_in
from tests.hostile import CODE, ESCAPE, Pickled
from tests.results.downstream.tasks import write_tasks

LAYER = "model.layers.0.mlp.up_proj"


class Odd(str):
    """A name that the writer of mask files, which refuses control characters, lets pass."""

    def isprintable(self) -> bool:
        return True


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text: Path
) -> Iterator[Path]:
    """A folder with an honest run in ``runs``, and its ``evil`` export, masks and result."""
    folder = tmp_path_factory.mktemp("hostile")
    write_tasks(folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        start_in(folder, patch)
        cli = Cli(folder, model_folder, text)
        cli("fit", "--strategy=magnitude")
        [run] = cli.runs()
        shutil.copytree(run / "export", "good")
        _hostile_code()
        _hostile_names(run / "result.json")
        yield folder


def _hostile_code() -> None:
    """``evil``: an export with code in every place where Transformers looks for some."""
    shutil.copytree("good", "evil")
    weights = load_file("evil/model.safetensors")
    Path("evil/model.safetensors").unlink()
    torch.save(weights | {"model.norm.weight": Pickled()}, "evil/pytorch_model.bin")
    Path("evil/evil.py").write_text(CODE)
    for file, parts in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ):
        _edit(Path("evil") / file, auto_map=parts)


def _hostile_names(result: Path) -> None:
    """``named``: an export whose layers have names that a terminal would obey, and the like."""
    shutil.copytree("good", "named")
    manifest = Path("named", MANIFEST)
    manifest.write_text(manifest.read_text().replace(LAYER, json.dumps(ESCAPE)[1:-1]))
    weights = load_file("named/model.safetensors")
    weights[f"{ESCAPE}.weight"] = weights.pop(f"{LAYER}.weight")
    save_file(weights, "named/model.safetensors", metadata={"format": "pt"})
    masks = dict(read_masks(Path("good")))
    masks[Odd(ESCAPE)] = masks.pop(LAYER)
    for file in (Path("evil.nmask"), Path("named/masks.nmask")):
        file.unlink(missing_ok=True)
        write_masks(file, masks, NMPattern(2, 4), ESCAPE, {ESCAPE: ESCAPE})
    content = json.loads(result.read_text())
    content["run"]["strategy"]["class"] = ESCAPE
    content["run"]["strategy"]["settings"] = {ESCAPE: ESCAPE}
    content["protocol"]["base"]["name"] = f"<script>{ESCAPE}</script>"
    content["scores"][ESCAPE] = content["scores"]["overall"]
    content.pop("sha256")
    Path("evil.json").write_text(json.dumps(content | {"sha256": content_hash(content)}))


def _edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


COMMANDS = [
    "verify {}",
    "verify {} --base {}",
    "eval {} --base none --include_path tasks --tasks recall --limit 2",
    "eval good --base {} --include_path tasks --tasks recall --limit 2",
    "onnx {} out/graph.onnx",
    "plan --model.name_or_path {} --strategy magnitude",
    "sensitivity --strategy magnitude --model.name_or_path {} --data.train t --data.validation t",
    "mask import {} out/m.nmask",
    "mask import {} out/m.nmask --base {}",
    "mask export {} out/e --base {}",
    "mask export good out/e --base {}",
    "mask show {}",
    "mask diff {} good --plot out/heat.png",
    "mask delta {} {} out/d.nmask",
    "mask join {} {} out/d.nmask",
    "compare {} --html out/report.html",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_runs_and_nothing_is_obeyed(
    command: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for handler in logging.getLogger("transformers").handlers:  # bound before this test
        if type(handler) is logging.StreamHandler:  # and not one of pytest's
            monkeypatch.setattr(handler, "stream", sys.stderr)
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail("asked"))
    for hostile in ("evil", "named", "evil.nmask", "evil.json"):
        shutil.rmtree("out", ignore_errors=True)
        Path("out").mkdir()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(command.format(*[hostile] * command.count("{}")).split())
        said = "".join(capsys.readouterr())
        assert stop.value.code in (0, 1, 2)
        assert is_printable(said), ascii(said)
        assert "Traceback" not in said
        assert not Path("OWNED").exists()
        for page in Path("out").glob("*.html"):
            assert f"<script>{ESCAPE}" not in page.read_text(), "escaped"


def test_logs_and_warnings_are_shown(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with shown_logs():
        logging.getLogger("any").warning("the layer %s", ESCAPE)
        said = warnings.formatwarning(ESCAPE, UserWarning, "file.py", 1, "line")
    assert r"the layer \x1b]0;owned" in caplog.messages[0]
    assert is_printable(said)
    assert r"\x1b]0;owned" in said
    logging.getLogger("any").warning("%s", ESCAPE)
    assert caplog.messages[1] == ESCAPE, "as before, for the process is not ours"
