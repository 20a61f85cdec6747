"""The verifier on files: those that were exported, strays, and whatever is damaged."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparsify import SparsifyError
from sparsify.cli.main import main
from sparsify.common.file_hashes import parse_hashes
from sparsify.export.card import CARD
from sparsify.export.manifest import MANIFEST
from sparsify.export.mask_file import read_masks
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.serving.verify import verify
from tests.serving.verify.test_verify import UP, edit_manifest, problems

DIFFERS = "is not as it was exported (SHA-256 differs)"


def files_of(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / MANIFEST).read_text())["files"]
    return found


def test_the_manifest_lists_every_other_file(out: Path) -> None:
    there = {path.name: path for path in out.iterdir()}
    del there[MANIFEST]
    del there[CARD]  # which somebody may edit
    assert len(there) > 4
    assert files_of(out) == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()
    }


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", FILE_NAME],
)
def test_an_altered_and_a_missing_file(name: str, out: Path) -> None:
    content = (out / name).read_bytes()
    (out / name).write_bytes(content.replace(b'"', b' "', 1) if name != FILE_NAME else content[:-1])
    assert f"{name} {DIFFERS}" in problems(verify(out))
    (out / name).unlink()
    message = f"{name} is missing or no regular file, and {MANIFEST} lists it"
    assert message in problems(verify(out))


def test_an_altered_template_in_a_folder(out: Path) -> None:
    place = out / "additional_chat_templates"
    place.mkdir()
    (place / "a.jinja").write_text("{{ messages }}")
    digest = hashlib.sha256(b"{{ messages }}").hexdigest()
    edit_manifest(out, lambda m: m["files"].update({"additional_chat_templates/a.jinja": digest}))
    assert problems(verify(out)) == []
    (place / "a.jinja").write_text("{{ evil }}")
    assert problems(verify(out)) == [f"additional_chat_templates/a.jinja {DIFFERS}"]


def test_a_large_file_is_read_in_pieces(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.common.file_hashes._PIECE", 7)
    assert verify(out).ok


@pytest.mark.parametrize(
    ("name", "of_old_ones"),
    [
        ("pytorch_model.bin", True),
        ("modeling_evil.py", True),
        ("sub/Model.PY", True),
        ("adapter_config.json", True),
        ("model-Q4_K_M.gguf", True),
        ("adapter_model.safetensors", True),
        ("tokenizer.model", False),
        ("added_tokens.json", False),
        ("chat_template.jinja", False),
        ("vocab.txt", False),
        ("quantize_config.json", False),
        ("pytorch_model.bin.index.json", False),
        ("other.nmask", False),
        ("sub/model.safetensors", False),
    ],
)
def test_a_stray_that_loaders_take(name: str, of_old_ones: bool, out: Path) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({"a": torch.zeros(2)}, out / name)
    else:
        (out / name).write_text("{}")
    (found,) = problems(verify(out))
    assert found.startswith(name)
    assert found.endswith("remove it")
    edit_manifest(out, lambda m: m.pop("files"))
    report = verify(out)
    assert report.ok != of_old_ones
    assert any("lists no files, as those of older exports" in note for note in report.notes)


def test_what_people_put_beside_an_export_is_at_most_noted(out: Path) -> None:
    (out / "README.md").write_text("# Model")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    (out / "LICENSE").write_text("MIT")
    for folder in (".git", ".cache"):
        (out / folder).mkdir()
        (out / folder / "config.json").write_text("{}")
    report = verify(out)
    assert problems(report) == report.notes == []
    (out / "figures").mkdir()
    for name in ("figures/a.png", "notes.md", *(f"{i}.csv" for i in range(5))):
        (out / name).write_text("")
    report = verify(out)
    assert problems(report) == []
    assert report.notes == [
        "not of the export, and not checked: 0.csv, 1.csv, 2.csv, 3.csv, 4.csv and 2 more"
    ]


def test_links(out: Path, tmp_path: Path) -> None:
    (out / "config.json").rename(tmp_path / "config.json")
    (out / "config.json").symlink_to(tmp_path / "config.json")
    (out / "more").symlink_to(tmp_path, target_is_directory=True)
    assert problems(verify(out)) == [
        "config.json is a link out of the folder: put the file itself there",
        "more is a link to a folder, which is not looked into: remove it",
    ]


def test_a_snapshot_in_the_hugging_face_cache(out: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me--m/snapshots/abc", tmp_path / "models--me--m/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in out.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert problems(verify(snapshot)) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"files is \[\]; it must be a JSON object"),
        ("x", "files is 'x'; it must be a JSON object"),
        ({"config.json": 3}, "files of 'config.json' is 3; it must be a SHA-256 in hexadecimal"),
        ({"config.json": "A" * 64}, "it must be a SHA-256 in hexadecimal"),
        ({"config.json": ["x" * 999]}, r"is \['x{78}\.\.\.; it must be"),
        ({"../base/config.json": "0" * 64}, "'../base/config.json' is no path of a file within"),
        ({"a/../../b": "0" * 64}, "'a/../../b' is no path"),
        ({"/etc/passwd": "0" * 64}, "'/etc/passwd' is no path"),
        ({"./config.json": "0" * 64}, "'./config.json' is no path"),
        ({"": "0" * 64}, "'' is no path"),
        ({".": "0" * 64}, "'.' is no path"),
        ({"a\x1b[2Jb": "0" * 64}, r"'a\\x1b\[2Jb' is no path"),
        ({"a\x00": "0" * 64}, r"'a\\x00' is no path"),
        ({"\ud800": "0" * 64}, r"'\\ud800' is no path"),
        ({"x" * 5000: "0" * 64}, "x is not readable"),
        ({"config.json/x": "0" * 64}, "config.json/x is missing or no regular file"),
    ],
)
def test_a_list_of_files_that_cannot_be_trusted(files: Any, message: str, out: Path) -> None:
    edit_manifest(out, lambda m: m.update(files=files))
    assert any(re.search(message, problem) for problem in problems(verify(out)))


def test_paths_that_stay_in_the_folder() -> None:
    digest = "0" * 64
    names = dict.fromkeys(["a", "b/c d.json", "...", ".x", "ä.json"], digest)
    assert parse_hashes(names) == (names, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["layers"][UP].update(shape=[10**18, 32]),
        lambda m: m["layers"][UP].update(shape=[10**400, 10**400]),
        lambda m: m["layers"][UP].update(shape=[True, True]),
        lambda m: m["layers"][UP].update(shape=[1e308, 4]),
        lambda m: m["layers"][UP].update(pattern="9" * 5000 + ":4"),
        lambda m: m["layers"][UP].update(layout={}),
        lambda m: m["layers"].update({UP: [[]]}),
        lambda m: m.update(run={"sparsity": 10**400}),
        lambda m: m.update(run={"sparsity": float("nan")}),
        lambda m: m.update(run={"sparsity": float("inf")}),
        lambda m: m.update(schema={"a": "x" * 10**6}),
        lambda m: m["stored_as"].update(x={}) or m["tensors"].update(z=[]),
        lambda m: m.update(dtype="__class__"),
    ],
)
def test_absurd_values_are_problems_of_a_readable_length(
    change: Callable[[dict[str, Any]], object],
    out: Path,
) -> None:
    edit_manifest(out, change)
    report = verify(out)
    assert not report.ok
    assert all(len(problem) < 400 for problem in problems(report)), problems(report)
    assert len(report.layers) >= 13


def test_a_number_that_python_does_not_print(out: Path) -> None:
    text = (out / MANIFEST).read_text()
    (out / MANIFEST).write_text(text.replace('"schema":', f'"size": {"9" * 5000}, "schema":', 1))
    (found,) = problems(verify(out))
    assert found.startswith(f"{MANIFEST}: not readable as JSON")


def test_claims_are_said_not_to_be_checked(out: Path) -> None:
    edit_manifest(out, lambda m: m.update(scores={"overall": {"perplexity": 1.0}}, protocol={}))
    report = verify(out)
    assert report.ok
    assert report.notes == [
        f"{MANIFEST}: protocol, scores are its writer's claims, and are not checked"
    ]


def test_a_forged_trained_does_not_hide_that_nothing_was_compared(
    out: Path,
    exported: Path,
) -> None:
    edit_manifest(out, lambda m: m["strategy"].update(weights="trained"))
    report = verify(out, str(exported / "base"))
    assert report.summary() == (
        f"ok: {out}, 14 sparse layers of 2:4; compared with {exported / 'base'}: nothing; "
        f"NOT compared: 21 tensors ({MANIFEST} says that the strategy changed them: trained)"
    )
    assert sum(map(len, report.to_dict()["base"]["left"].values())) == 21


# -- every check is reported, whatever fails -------------------------------------------------------


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_damaged_mask_is_a_problem_of_its_layer(out: Path) -> None:
    masks = read_masks(out)
    names = list(masks)
    flip(out / FILE_NAME, 12)
    report = verify(out)
    assert report.problems == [f"{FILE_NAME} {DIFFERS}"]
    (row,) = [row for row in report.layers if row.problems]
    assert row.name == names[0]
    assert "the mask of" in row.problems[0]
    assert "is damaged" in row.problems[0]
    assert row.name in read_masks(out), "whether a layer is there takes no reading of its mask"


def test_exit_status_1_for_whatever_is_damaged(
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run() -> str:
        with pytest.raises(SystemExit, match="^1$"):
            main(["verify", str(out)])
        return " ".join(capsys.readouterr().out.split())  # lines are folded anywhere

    flip(out / FILE_NAME, 12)
    assert "is damaged" in run()
    (out / "config.json").unlink()
    os.mkfifo(out / "config.json")
    (out / "generation_config.json").write_text('{"eos_token_id": 7}')
    cut = (out / "model.safetensors").read_bytes()[:-9]
    (out / "model.safetensors").write_bytes(cut)
    text = run()
    assert "config.json is missing or no regular file" in text
    assert f"generation_config.json {DIFFERS}" in text
    assert "model.safetensors: not a readable safetensors file" in text
    assert text.count("is in no readable file") == 21
    (out / "model.safetensors").unlink()
    assert "holds no safetensors files, so there are no weights to read" in run()
    os.mkfifo(out / "model.safetensors")
    assert "model.safetensors: not a regular file" in run()
    (out / MANIFEST).write_text("[[")
    text = run()
    assert f"{MANIFEST}: not readable as JSON" in text
    assert "model.safetensors: not a regular file" in text


def test_one_check_that_fails_ends_no_other(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise OverflowError("too\nlarge")

    (out / "tokenizer.json").write_text("{}")
    for what in ("read_masks", "check_text_files"):
        monkeypatch.setattr(f"sparsify.serving.verify.folder.{what}", fails)
    monkeypatch.setattr("sparsify.serving.verify.tensor_check.check_pattern", fails)
    report = verify(out)
    assert {
        "configuration and tokenizer: not checked to the end (OverflowError: too)",
        f"tokenizer.json {DIFFERS}",
        f"{FILE_NAME}: not checked to the end (OverflowError: too)",
        f"{UP}.weight: not checked to the end (OverflowError: too)",
    } <= set(report.problems)
    assert len(report.problems) == 3 + 14


def test_a_type_that_pytorch_cannot_compare(out: Path, exported: Path) -> None:
    """Somebody's own dtype in the header is read or reported, never a traceback."""
    file = out / "model.safetensors"
    content = file.read_bytes()
    assert content.count(b'"F32"') > 1
    file.write_bytes(content.replace(b'"F32"', b'"I32"'))
    report = verify(out, str(exported / "base"))
    assert not report.ok
    assert all(row.problems for row in report.layers)


def test_a_base_that_cannot_be_loaded_is_the_callers(out: Path, tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match="no model could be loaded"):
        verify(out, base=str(tmp_path / "nowhere"))


def test_a_pattern_of_absurd_numbers_is_refused(out: Path) -> None:
    with pytest.raises(SparsifyError, match="expected two integers as 'N:M'"):
        verify(out, pattern="9" * 5000 + ":4")
