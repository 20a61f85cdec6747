"""``sparsify budget`` from end to end, against plain models with weights set to zero by hand."""

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify.cli.main import main
from sparsify.cli.short_forms import expand
from sparsify.export.mask_file.file import read_masks
from sparsify.export.mask_file.index import find_file
from sparsify.results.budget.measure import Scores, spread
from sparsify.results.budget.report import fit_words
from tests.conftest import Cli, tiny_llama

BLOCK = 16
COMMAND = ["--strategy=magnitude", "--windows=6", "--rounds=1", "--unit=module"]


def windows(text: Path, split: str, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The windows of a text, int64 ``[W, T]``."""
    ids = tokenizer((text / f"{split}.txt").read_text())["input_ids"]
    return torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, text: Path, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The tiny model, a little trained, so that masks make it worse."""
    model, tokens = tiny_llama(), windows(text, "train", tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(60):
            batch = tokens[torch.randint(len(tokens), (16,))]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def budget(cli: Cli, trained: Path) -> Cli:
    """The command line on the trained model."""
    cli.model = [f"--model.name_or_path={trained}"]
    return cli


def newest(cli: Cli) -> Path:
    """The folder of the newest budget."""
    records = cli.folder.rglob("budget.json")
    return max(records, key=lambda file: file.stat().st_mtime_ns).parent


def record(cli: Cli) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((newest(cli) / "budget.json").read_text())
    return found


def pruned_by_hand(folder: Path, patterns: Mapping[str, str]) -> LlamaForCausalLM:
    """The plain model with the smallest weights of some layers set to zero."""
    model = LlamaForCausalLM.from_pretrained(folder)
    for name, pattern in patterns.items():
        if pattern != "dense":
            kept, of = map(int, pattern.split(":"))
            groups = model.get_submodule(name).weight.data.view(-1, of)
            groups.scatter_(1, groups.abs().argsort(1)[:, : of - kept], 0.0)
    return model


def middles(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Evenly spaced windows."""
    count = min(count, len(tokens))
    return tokens[[int((i + 0.5) * len(tokens) / count) for i in range(count)]]


def test_losses_are_those_of_plain_models(
    budget: Cli, trained: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pytest.importorskip("matplotlib")
    patterns = ["dense", "2:4", "1:4"]
    budget("budget", *COMMAND, "--kept=0.5", "--unit=layer", "--patterns", *patterns)
    found = record(budget)
    tokens = windows(text, "validation", tokenizer)
    few, many = middles(tokens, 6), middles(tokens, 24)
    assert found["windows"] == {"changes": len(few), "choices": len(many)}
    dense = loss_of(pruned_by_hand(trained, {}), few)
    assert len(found["units"]) == 14
    for unit in found["units"]:
        assert list(unit["alone"]) == list(unit["bytes"]) == patterns
        [name] = unit["layers"]
        for pattern, increase in unit["alone"].items():
            loss = loss_of(pruned_by_hand(trained, {name: pattern}), few)
            assert increase == pytest.approx(loss - dense, abs=2e-6)

    names = [unit["name"] for unit in found["units"]]
    dense = loss_of(pruned_by_hand(trained, {}), many)
    assert {p["kind"] for p in found["frontier"]} == {"uniform", "search", "frontier"}
    for point in [found["chosen"], found["final"], *found["frontier"]]:
        own = dict(zip(names, point["patterns"], strict=True))
        loss = loss_of(pruned_by_hand(trained, own), many)
        assert point["loss_increase"] == pytest.approx(loss - dense, abs=2e-6)
        assert point["perplexity_ratio"] == pytest.approx(math.exp(loss - dense), rel=1e-5)
        alone = [unit["alone"][own[unit["name"]]] for unit in found["units"]]
        assert point["predicted_increase"] == pytest.approx(sum(alone))
    costs = [point["cost"] for point in found["frontier"]]
    assert costs == sorted(costs)

    assert found["schema"] == "sparsify.budget/1"
    assert found["protocol"]["split"] == "validation"
    chosen = found["chosen"]
    assert chosen["kept"] <= 0.5
    even = next(p for p in found["frontier"] if set(p["patterns"]) == {"2:4"})
    assert chosen["loss_increase"] < even["loss_increase"]
    assert newest(budget) == budget.folder / "runs/magnitude/budget/version_0"
    assert not list(budget.folder.rglob("config.yaml"))
    picture = (newest(budget) / "frontier.svg").read_text()
    assert "<svg" in picture


def test_a_second_start_measures_nothing_twice(
    budget: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["budget", *COMMAND, "--kept=0.6", "--unit=block", "--rounds=0"]
    stops_after = 5
    measure = Scores.__call__

    def stop(scores: Scores, *given: Any) -> torch.Tensor:
        if scores.measured == stops_after:
            raise KeyboardInterrupt
        return measure(scores, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Scores, "__call__", stop)
        with pytest.raises(SystemExit):
            budget(*command)
    scores = budget.folder / "runs/magnitude/budget/scores.json"
    assert len(json.loads(scores.read_text())) == stops_after
    budget(*command)
    first, known = record(budget), json.loads(scores.read_text())
    assert first["measured"] == len(known) - stops_after
    budget(*command)
    assert record(budget)["measured"] == 0
    assert record(budget) == first | {"measured": 0}
    # Other windows are other measurements; so are other masks.
    budget(*command, "--windows=5")
    assert record(budget)["measured"] > 6
    budget(*command, "--strategy=wanda", "--output.folder=runs/magnitude/budget")
    assert record(budget)["measured"] > 6
    scores.write_text("{")
    budget(*command)
    assert record(budget)["measured"] == len(json.loads(scores.read_text()))


def test_fit_takes_the_overrides_and_makes_what_was_measured(
    budget: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--strategy=wanda", "--model.calibration.samples=8"]
    own = ["--windows=7", "--rounds=1", "--unit=module", "--bytes=30KiB", "--output.folder=there"]
    own += ["--patterns", "dense", "2:4", "1:4", "--trainer.enable_progress_bar=true"]
    budget("budget", *words, *own)
    page = re.sub(r"\s+", " ", capsys.readouterr().out)
    file = budget.folder / "there" / "overrides.yaml"
    assert "--config there/overrides.yaml" in page
    assert "--bytes" not in page.partition("next: ")[2]
    found = json.loads((budget.folder / "there" / "budget.json").read_text())
    layers = {name: p for unit, p in zip(found["units"], found["final"]["patterns"], strict=True)
              for name in unit["layers"]}  # fmt: skip
    assert yaml.safe_load(file.read_text()) == {"model": {"overrides": layers}}
    assert found["final"]["bytes"] <= 30 * 2**10
    assert len(set(layers.values())) > 1

    budget("fit", *words, f"--config={file}")
    run = max((budget.folder / "runs/wanda").glob("version_*"))
    made = {name: str(p) for name, p in read_masks(find_file(run / "export")).patterns.items()}
    assert made == {name: pattern for name, pattern in layers.items() if pattern != "dense"}
    # All windows of the text are those of the choice, so the scores are of the same masks.
    result = json.loads((run / "result.json").read_text())
    history = result["history"]["validation"][-1]
    dense_loss = dense(budget)
    increase = found["final"]["loss_increase"]
    assert math.log(history["perplexity"]) - dense_loss == pytest.approx(increase, abs=1e-6)


def dense(cli: Cli) -> float:
    """The dense model's validation loss."""
    cli("validate", "--strategy=dense")
    [file] = cli.folder.glob("runs/dense/*/result-validation.json")
    loss: float = json.loads(file.read_text())["scores"]["overall"]["loss"]
    return loss


def test_a_ratio_is_kept_on_text_that_was_not_seen(
    budget: Cli, trained: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    budget("budget", *COMMAND, "--max_perplexity_ratio=1.15")
    found = record(budget)
    final = found["final"]
    own = {
        name: p
        for unit, p in zip(found["units"], final["patterns"], strict=True)
        for name in unit["layers"]
    }
    assert set(own.values()) > {"dense"}
    tokens = windows(text, "test", tokenizer)
    ratio = math.exp(
        loss_of(pruned_by_hand(trained, own), tokens) - loss_of(pruned_by_hand(trained, {}), tokens)
    )
    assert 1.0 < ratio <= 1.15
    assert final["loss_increase"] + 2 * final["standard_error"] <= math.log(1.15)
    # Cheaper choices that were run do not surely keep it.
    for point in found["frontier"]:
        if point["bytes"] < final["bytes"]:
            assert point["loss_increase"] + 2 * point["standard_error"] > math.log(1.15)


def test_windows_are_evenly_spaced_and_have_targets() -> None:
    tokens = torch.arange(40).view(10, 4)
    [one, two] = spread(iter(tokens.split(3)), 5, 4)
    assert torch.cat([one, two])[:, 0].tolist() == [4, 12, 20, 28, 36]
    [every] = spread([tokens], 99, 99)
    assert torch.equal(every, tokens)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no budget given; give exactly one of --max_perplexity_ratio, --kept, --bytes, --mil"),
        (["--kept=0.5", "--bytes=1kB"], "--kept and --bytes given; give exactly one of"),
        (["--kept=0.2"], r"kept=0.2: the patterns allow from 0.25 to 1; give a number from"),
        (["--kept=1"], "kept=1: the patterns allow from 0.25 to 1"),
        (["--kept=1.5"], "kept=1.5; it must be above 0 and at most 1, a share"),
        (["--bytes=1MiB"], r"bytes=1.04858e\+06: the patterns allow from \d+ to \d+"),
        (["--bytes=12MB/s"], "bytes=12MB/s: expected a number and a unit of B, kB, MB"),
        (["--max_perplexity_ratio=0.9"], "max_perplexity_ratio=0.9; it must be above 1: give for"),
        (["--milliseconds=1"], "milliseconds: no times of a layer 32 x 32 float32.*kept for cpu"),
        (["--kept=0.5", "--patterns", "dense", "2:5:1"], "patterns: pattern '2:5:1'.*or 'dense'"),
        (["--kept=0.5", "--patterns", "2:4"], "patterns 2:4: there is nothing to choose between"),
        (["--kept=0.5", "--windows=1"], "windows=1; give --windows 2 or more"),
        (["--kept=0.5", "--strategy=dense"], "Dense masks nothing"),
        (["--kept=0.5", "--data.validation=null"], "no validation text"),
        (["--kept=0.5", "--strategy=sr_ste"], "base weights of SRSTE are trained"),
        (
            ["--max_perplexity_ratio=1.0001", "--patterns", "2:4", "1:4"],
            "max_perplexity_ratio=1.0001: none of the choices that were run keeps it",
        ),
        (
            ["--kept=0.5", "--data.block_size=256"],
            r"text has 1 window\(s\), and a budget compares",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    budget: Cli, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        budget("budget", "--strategy=magnitude", "--windows=2", "--rounds=0", *words)
    assert re.search(message, capsys.readouterr().err)
    assert not list(budget.folder.rglob("overrides.yaml"))


def test_no_file_of_the_users_or_of_another_budget_is_replaced(
    budget: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["budget", *COMMAND, "--unit=block", "--rounds=0"]
    budget(*command, "--kept=0.5")
    first = newest(budget) / "overrides.yaml"
    first.write_text("mine")
    budget(*command, "--kept=0.6")
    assert newest(budget).name == "version_1"
    assert first.read_text() == "mine"

    there = budget.folder / "there"
    there.mkdir()
    (there / "scores.json").write_text('{"mine": "all of it"}')
    for name, message in (
        ("scores.json", "scores.json holds no measurements of sparsify budget, and stays"),
        ("overrides.yaml", "overrides.yaml exists, and stays; give another --output.folder"),
        ("sparsity_permutation.json", "sparsity_permutation.json exists, and stays; give"),
    ):
        if name != "scores.json":
            next(there.iterdir()).unlink()
            (there / name).write_text("mine")
        with pytest.raises(SystemExit, match="^2$"):
            budget(*command, "--kept=0.5", "--output.folder=there")
        assert message in capsys.readouterr().err
        assert "mine" in (there / name).read_text()
    budget(*command, "--kept=0.5", "--output.folder=there", "--output.overwrite=true")
    assert "overrides:" in (there / "overrides.yaml").read_text()


@pytest.mark.parametrize("strategy", ["gblm", "pruner_zero"])
def test_strategies_that_calibrate_by_gradients_have_budgets(budget: Cli, strategy: str) -> None:
    words = [f"--strategy={strategy}", "--model.calibration.samples=4", "--windows=2"]
    budget("budget", *words, "--kept=0.6", "--unit=block", "--rounds=0")
    assert record(budget)["final"]["kept"] <= 0.6


def test_the_next_command_has_the_orders_under_which_was_measured(
    budget: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--strategy=wanda", "--model.calibration.samples=8", "--model.permute", "[mlp]"]
    words.append("--trainer.enable_progress_bar=true")
    budget("budget", *words, "--kept=0.5", "--windows=99", "--rounds=0", "--unit=block")
    folder = newest(budget)
    line = re.sub(r"\s+", " ", capsys.readouterr().out).partition("next: sparsify ")[2]
    assert f"--model.permute={folder.relative_to(budget.folder)}" in line
    assert "[mlp]" not in line
    final = record(budget)["final"]
    budget(*shlex.split(line))
    run = max((budget.folder / "runs/wanda").glob("version_*"))
    result = json.loads((run / "result.json").read_text())
    history = result["history"]["validation"][-1]
    increase = math.log(history["perplexity"]) - dense(budget)
    assert increase == pytest.approx(final["loss_increase"], abs=1e-6)


def test_the_next_command_takes_a_config_that_held_the_budget(
    budget: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = budget.folder / "mine.yaml"
    text = (
        "# of both commands\nmodel:\n  strategy: {class_path: Magnitude}\n  pattern: 2:4\n"
        "kept: 0.5\nwindows: 3\nrounds: 0\nunit: block\noutput: {overwrite: true}\n"
    )
    mine.write_text(text)
    for word in (["--config", "mine.yaml"], ["--config=mine.yaml"], ["-c", "mine.yaml"]):
        budget("budget", *word, "--trainer.enable_progress_bar=true")
        line = re.sub(r"\s+", " ", capsys.readouterr().out).partition("next: sparsify ")[2]
        assert "mine.yaml" in line
        budget(*shlex.split(line))
    assert mine.read_text() == text
    copy = yaml.safe_load((newest(budget) / "fit_mine.yaml").read_text())
    assert copy.keys() == {"model"}
    assert copy["model"]["pattern"] == "2:4"
    run = max((budget.folder / "runs/magnitude").glob("version_*"))
    assert read_masks(find_file(run / "export")).patterns


def test_a_strategy_keeps_its_packaged_config_beside_overrides(tmp_path: Path) -> None:
    file = tmp_path / "overrides.yaml"
    file.write_text("# a comment\nmodel:\n  overrides:\n    '*.q_proj': 2:4\n")
    words = ["fit", "--strategy", "maskllm", "--config", str(file)]
    configs = [word for word in expand(words) if word.startswith("--config=")]
    assert [config.rpartition("/")[2] for config in configs] == ["maskllm.yaml", "overrides.yaml"]
    file.write_text("model:\n  overrides: {}\n  seed: 1\n")
    assert [word for word in expand(words) if word.startswith("--config=")] == configs[1:]


def test_the_words_that_fit_takes_too(tmp_path: Path) -> None:
    given = "--strategy wanda --patterns dense 2:4 --kept 0.5 -c file --unit=block --data.seed 1"
    taken = fit_words(given.split(), tmp_path)
    assert taken == ["--strategy", "wanda", "-c", "file", "--data.seed", "1"]
    own = ["--output.folder", "x", "--rounds", "0", "--model.seed=2"]
    assert fit_words(own, tmp_path) == ["--model.seed=2"]
    assert fit_words(['--config={"model": {}}'], tmp_path) == ['--config={"model": {}}']
    assert not list(tmp_path.iterdir())
    (mine := tmp_path / "kept=0.5.yaml").write_text("kept: 0.5\nmodel: {}\n")
    copy = str(tmp_path / "fit_kept=0.5.yaml")
    assert fit_words(["--config", str(mine)], tmp_path) == ["--config", copy]
    assert fit_words([f"--config={mine}"], tmp_path) == [f"--config={copy}"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main(["budget", "--help"])
    page = capsys.readouterr().out
    for option in ("patterns", "max_perplexity_ratio", "kept", "bytes", "milliseconds", "unit"):
        assert f"--{option}" in page
