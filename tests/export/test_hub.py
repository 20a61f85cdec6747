"""What is sent to the Hub: with its client replaced, as there is no network."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import PreTrainedTokenizerFast

from sparsify import SparsifyError
from sparsify.cli.main import main
from sparsify.export import push_to_hub
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST
from tests.conftest import tiny_llama
from tests.export.test_folder import masked_module


class Api:
    """Records what it is asked for."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create", {"repo_id": repo_id} | options))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload", options))
        return SimpleNamespace(pr_url=None, commit_url="https://hub/commit/1")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    Api.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api.calls


@pytest.fixture(scope="module")
def exported(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(masked_module(tiny_llama(), tokenizer).masked, folder, {})
    return folder


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "out")


def sent(folder: Path, options: dict[str, Any]) -> set[str]:
    """The files that the Hub's own client would take."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return set(filter_repo_objects(names, allow_patterns=options["allow_patterns"]))


def test_the_exports_own_files_are_sent_and_no_others(
    out: Path, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    own = {path.name for path in out.iterdir()}
    (out / "secret.env").write_text("key")
    (out / "sub").mkdir()
    (out / "sub" / "config.json").write_text("{}")
    assert push_to_hub(out, "me/model", private=True) == "https://hub/commit/1"
    (first, created), (second, uploaded) = calls
    assert (first, second) == ("create", "upload")
    assert (created["repo_id"], created["private"], created["exist_ok"]) == ("me/model", True, True)
    assert sent(out, uploaded) == own
    assert {"model.safetensors", MANIFEST, "README.md", "masks.nmask"} <= own


@pytest.mark.parametrize("harm", ["missing", "changed", "manifest", "old"])
def test_what_is_not_whole_is_not_sent(
    harm: str, out: Path, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    if harm == "missing":
        (out / "tokenizer.json").unlink()
    elif harm == "changed":
        file = out / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    elif harm == "manifest":
        (out / MANIFEST).write_text("{}")
    else:
        text = (out / MANIFEST).read_text().replace('"files"', '"no_files"')
        (out / MANIFEST).write_text(text)
    with pytest.raises(SparsifyError, match="export the model again"):
        push_to_hub(out, "me/model")
    with pytest.raises(SystemExit, match="^2$"):
        main(["push", str(out), "me/model"])
    assert calls == []


def test_the_command_verifies_and_sends(
    out: Path, calls: list[tuple[str, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "evil.py").write_text("print()")  # which no push would send, but verify refuses
    with pytest.raises(SystemExit, match="^2$"):
        main(["push", str(out), "me/model", "--private"])
    assert calls == []
    (out / "evil.py").unlink()
    with pytest.raises(SystemExit, match="^0$"):
        main(["push", str(out), "me/model", "--private"])
    assert "published as https://hub/commit/1" in capsys.readouterr().out
    assert calls[0][1]["private"] is True


def test_a_refusal_of_the_hub_is_a_message(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparsifyError, match=r"bad name!: nothing was published.*hf auth login"):
        push_to_hub(out, "bad name!")  # the client checks names before it asks the Hub
    with pytest.raises(SparsifyError, match="nothing was published"):
        push_to_hub(out, "me/model", token="x")  # noqa: S106  # offline, as in all tests
