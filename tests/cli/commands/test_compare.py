"""``sparsify compare``, as a user runs it."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from sparsify.cli.commands.compare import join_runs
from sparsify.cli.main import main
from tests.conftest import Cli
from tests.results.compare.made import MAGNITUDE, MASKLLM, PROTOCOL, result, write

Tool = Callable[..., tuple[int, str]]


@pytest.fixture
def tool(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Tool:
    """Runs the command in a folder of runs: its exit status and all that it printed."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.argv", ["sparsify"])
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        write(tmp_path / f"a/version_{seed}", result(MASKLLM, 3 + seed / 100, seed))
    write(tmp_path / "b c,d", result(MAGNITUDE, 4.0))

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["compare", *words])
        return int(exit_.value.code or 0), "".join(capsys.readouterr())

    return run


def test_the_table_and_what_can_be_said(tool: Tool) -> None:
    status, text = tool("a", "b c,d")
    assert status == 0
    assert "20.29 ± 0.20" in text
    assert "Whatever it costs: maskllm (20.29 ± 0.20, 3 seeds) is ahead of magnitude" in text
    assert "Test perplexity of embedded (hash c3f59e483b27, float32)" in text
    table = text[: text.index("Base weights kept")]
    assert max(map(len, table.splitlines())) <= 100
    lines = [line.split() for line in table.splitlines()]
    assert [
        "maskllm",
        "masks",
        "22.42",
        "18.36",
        "20.29",
        "±",
        "0.20",
        "1,000",
        "60",
        "1.00",
        "3",
    ] in lines
    assert ["magnitude", "masks", "60.34", "49.40", "54.60", "0", "0", "1.00", "exact"] in lines


def test_a_narrow_terminal_shows_whole_numbers(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = tool("a", "b c,d")[1]
    assert ["maskllm", "masks", "20.29", "±", "0.20", "1,000", "60", "1.00", "3"] in [
        line.split() for line in text.splitlines()
    ]
    assert "…" not in text
    assert "by text in --format json" in text


def test_all_of_it_as_json(tool: Tool) -> None:
    status, text = tool("a", "--format", "json", "b c,d", "--html=r.html")
    assert status == 0
    found = json.loads(text)
    assert found["schema"] == "sparsify.compare/1"
    assert found["protocol"] == PROTOCOL
    first, second = found["rows"]
    assert (first["label"], first["losses"]) == ("maskllm", [3.0, 3.01, 3.02])
    assert first["tokens"] == [1000, 1000, 1000]
    assert second["spread"] == "exact"
    (verdict,) = found["verdicts"]
    assert [one["cost"] for one in verdict["findings"]] == [
        "any", "tokens", "tokens", "seconds", "seconds", "memory"
    ]  # fmt: skip
    assert verdict["findings"][0]["winner"] == "maskllm"
    assert verdict["findings"][1]["winner"] is None
    assert "once in 10" in found["rule"]
    assert Path("r.html").is_file()


def test_brackets_are_no_markup(tool: Tool) -> None:
    name = "org/model[/b]"
    bracketed = PROTOCOL | {"base": PROTOCOL["base"] | {"name": name}}  # type: ignore[operator]
    for seed in range(2):
        settings = {"[i]note[/i]": f"[bold]{seed}[/]"}
        content = result(MASKLLM, 3 + seed, settings=settings, protocol=bracketed)
        content["scores"]["[u]"] = content["scores"]["b"]
        write(Path(f"brackets/{seed}"), content)
    status, text = tool("brackets")
    assert status == 0
    assert f"perplexity of {name} (hash" in " ".join(text.split())
    assert "[bold]0[/]" in text
    assert "[u]" in text


def test_patterns_are_a_column_where_they_differ(tool: Tool) -> None:
    write(Path("b c,d"), result(MAGNITUDE, 4.0, pattern="4:8"))
    text = tool("a", "b c,d")[1]
    assert "pattern" in text
    assert text.count("is the only one.") >= 2


def test_a_report_is_written_and_replaced(tool: Tool) -> None:
    for title in ("First", "Second"):
        status, text = tool("a", "--html", "r.html", "--title", title)
        assert status == 0
        assert text.splitlines()[-1].startswith("wrote r.html (")
        assert f"<h1>{title}</h1>" in Path("r.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a", "--html", "a/version_0/result.json"), "name one that ends .html"),
        (("a", "--html", "no/r.html"), "no/r.html: No such file or directory"),
        (("a", "--plan", "x"), "give --html FILE too"),
        (("a", "--plan", "no/model", "--html", "r.html"), "no/model"),
        (("gone",), "gone does not exist"),
        ((), "arguments are required: runs"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], message: str, tool: Tool) -> None:
    status, text = tool(*words)
    assert status == 2
    assert message in text
    assert "Traceback" not in text


def test_different_protocols_are_refused_by_their_field(tool: Tool) -> None:
    other = PROTOCOL | {"data": {"block_size": 512}}
    write(Path("z"), result(MAGNITUDE, 4.0, protocol=other))
    status, text = tool("a", "z", "--html=r.html")
    assert status == 2
    assert "protocol.data.block_size: 256 in a/version_0 and 2 more, 512 in z" in text
    assert not Path("r.html").exists()


def test_without_matplotlib_the_extra_is_named(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sparsify.results.compare.report", "sparsify.results.compare.drawing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, text = tool("a", "--html=r.html")
    assert status == 2
    assert "pip install 'sparsify-llm[plot]'" in text
    assert tool("a")[0] == 0


def test_runs_are_gathered_around_options() -> None:
    assert join_runs(["a", "--html", "r", "b", "--format=json"]) == [
        '["a", "b"]', "--html", "r", "--format=json"
    ]  # fmt: skip
    assert join_runs(["--help"]) == ["--help"]
    assert join_runs(["--html"]) == ["--html"]


def test_a_report_is_not_written_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", result())
    (tmp_path / "kept").write_text("mine")
    (tmp_path / "a.html").symlink_to("kept")
    with pytest.raises(SystemExit, match="^2$"):
        main(["compare", str(tmp_path / "run"), "--html", str(tmp_path / "a.html")])
    assert "it is a link" in capsys.readouterr().err
    assert (tmp_path / "kept").read_text() == "mine"


def test_rows_that_learn_are_planned_on_another_model(cli: Cli) -> None:
    """From their checkpoints; where there is none, or no plan, the reason is said."""
    pytest.importorskip("matplotlib")
    masks = ("fit", "--strategy=maskllm", "--model.strategy.prior=null")
    cli(*masks)
    cli(*masks, "--model.overrides={model.layers.0.mlp.up_proj: '4:8'}")
    cli("fit", "--strategy=sr_ste")
    cli("fit", "--strategy=fixed_mask")
    cli("fit", "--strategy=magnitude")
    gone = next(run for run in cli.runs() if "sr_ste" in str(run) or "srste" in str(run))
    shutil.rmtree(gone / "checkpoints")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaConfig(**sizes, **heads, max_position_embeddings=4096).save_pretrained("other/shape")
    with pytest.raises(SystemExit, match="^0$"):
        main(["compare", "runs", "--html", "r.html", "--plan", "other/shape"])
    text = " ".join(re.sub(r"<[^>]+>", " ", Path("r.html").read_text()).split())
    table = text[text.index("hours of H100") :]
    for label in ("maskllm", "fixed_mask"):
        assert re.search(rf" {label} [\d.]+ [\d,]+ [\d,]+ ", table), label
    assert "On shape (0.0 billion parameters)" in text
    assert "2,000 steps of 256 windows of 4,096 tokens in bfloat16" in text
    assert "No plan of sr_ste: " in text
    assert "No plan of fixed_mask" not in text
    assert "No plan of maskllm, overrides: its patterns by layer" in text
    assert "magnitude would" not in text
    assert "No plan of magnitude" not in text
