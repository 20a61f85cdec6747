"""The workspace as it would be sent, and why it could not be."""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from sparsify.cli.main import main

# wandb-workspaces 0.4 on Pydantic 2.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")

SECTIONS = ["Which to ship", "Perplexity over cost", "Masks move", "Layers", "Speed"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, output and errors of the command."""
    with pytest.raises(SystemExit) as exit_:
        main(["dashboard", *words])
    return int(exit_.value.code or 0), *capsys.readouterr()


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    """What a dry run prints."""
    status, out, _ = run(capsys, "--dry_run", "--project=p", "--entity=e", "--name=n")
    assert status == 0
    return json.loads(out)


def test_runs_of_two_bases_or_protocols_are_never_in_one_group(printed: Any) -> None:
    assert [printed[key] for key in ("project", "entity", "displayName")] == ["p", "e", "n"]
    [runs] = printed["spec"]["section"]["runSets"]
    assert [group["name"] for group in runs["grouping"]] == [
        "base_hash.value",
        "protocol.value",
        "strategy.value",
    ]
    assert {group["section"] for group in runs["grouping"]} == {"config"}
    [key] = runs["sort"]["keys"]
    assert (key["key"]["name"], key["ascending"]) == ("test/perplexity", True)


def test_panels_show_what_runs_log(printed: Any) -> None:
    sections = printed["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == SECTIONS
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    lines = {(p.get("xAxis"), *p["metrics"]) for p in panels if "metrics" in p}
    assert lines >= {
        ("run/tokens", "val/perplexity"),
        ("run/seconds", "val/perplexity"),
        ("trainer/global_step", "masks/flips"),
        ("trainer/global_step", "masks/sample_change"),
        ("trainer/global_step", "speed/tokens_per_second"),
    }
    scatters = {(p["xAxis"], p["yAxis"]) for p in panels if "yAxis" in p}
    assert scatters == {
        (f"summary:{cost}", "summary:test/perplexity")
        for cost in ("run/seconds", "run/peak_memory_gib")
    }
    [bars] = [p for p in panels if "vertical" in p]
    assert bars["metrics"] == ["test/perplexity"]
    assert "groupBy" not in bars, "that of the runs keeps protocols apart"
    regexes = [p["metricRegex"] for p in panels if "metricRegex" in p]
    logged = ("train/tau", "layers/model.layers.0.mlp.up_proj/distance", "layers/a.b/flips")
    assert [[bool(re.search(r, name)) for r in regexes] for name in logged] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    assert '"val": "layers"' in json.dumps(sections)  # the table of layers


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in, and nothing is written outside of this folder."""
    for name in ("API_KEY", "IDENTITY_TOKEN_FILE", "MODE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_without_an_account_the_message_says_how_to_log_in(
    capsys: pytest.CaptureFixture[str], home: None
) -> None:
    status, out, err = run(capsys)
    assert (status, out) == (2, "")
    message = err.splitlines()[-1]
    assert message.startswith("error: the workspace was not created: No API key configured")
    assert "run `wandb login` or set WANDB_API_KEY" in message


class Server(BaseHTTPRequestHandler):
    """Answers as the server of an account named ``me``, and keeps what it was asked to store."""

    stored: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        data: dict[str, Any] = {"viewer": {"id": "1", "entity": "me", "username": "me"}}
        if b"upsertView" in body:
            self.stored.append(json.loads(body)["variables"])
            data = {"upsertView": {"view": {"id": "1", "name": "nw-abc-v"}, "inserted": True}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


def test_the_workspace_is_sent_to_the_account(
    capsys: pytest.CaptureFixture[str], home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        wandb.teardown()  # it reads the environment once
        status, out, _ = run(capsys, "--project=p")
        wandb.teardown()
        server.shutdown()
    assert (status, out) == (0, f"created {address}/me/p?nw=abc\n")
    [view] = Server.stored
    assert [view[key] for key in ("entityName", "projectName")] == ["me", "p"]
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == SECTIONS


def test_without_the_package_the_message_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.workspaces", raising=False)
    status, _, err = run(capsys, "--dry_run")
    assert status == 2
    assert err.endswith("which is not installed; pip install 'sparsify-llm[wandb]'\n")
