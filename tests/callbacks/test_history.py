"""The course of a run, in its result file and in its log."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli

EVERY_TWO = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
TOKENS = 4 * 16  # of a step


def validations(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "result.json").read_text())["history"][
        "validation"
    ]
    return found


def test_every_validation_is_kept_with_what_it_had_cost(cli: Cli) -> None:
    cli("fit", "--strategy=maskllm", "--history.at_start=true", *EVERY_TWO, steps=5)
    [run] = cli.runs()
    found = validations(run)
    assert [(row["step"], row["tokens"]) for row in found] == [
        (step, step * TOKENS) for step in (0, 2, 4, 5)
    ]
    seconds = [row["seconds"] for row in found]
    assert seconds[0] == 0
    assert sorted(seconds) == seconds
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/perplexity"]]
    for row, logged in zip(found, rows, strict=True):
        for name, metric in (("loss", "val/loss"), ("perplexity", "val/perplexity")):
            assert float(logged[metric]) == pytest.approx(row[name], rel=1e-6)
        assert float(logged["run/tokens"]) == row["tokens"]
        assert float(logged["run/seconds"]) == pytest.approx(row["seconds"], abs=0.02)


@pytest.mark.parametrize(("strategy", "last"), [("magnitude", 0), ("maskllm", 2)])
def test_a_sanity_check_is_no_validation(strategy: str, last: int, cli: Cli) -> None:
    cli("fit", f"--strategy={strategy}")
    cli("fit", f"--strategy={strategy}", "--trainer.num_sanity_val_steps=1")
    plain, checked = (validations(run) for run in cli.runs())
    assert [row["step"] for row in checked] == [last]
    assert checked[0]["loss"] == plain[0]["loss"]


def test_the_first_point_is_the_priors(cli: Cli) -> None:
    cli("fit", "--strategy=magnitude")
    certain = ["--model.strategy.prior=magnitude", "--model.strategy.alpha=1000"]
    cli("fit", "--strategy=maskllm", *certain, "--history.at_start=true")
    prior, learned = (validations(run) for run in cli.runs())
    assert [row["step"] for row in prior] == [0]
    assert prior[0]["tokens"] == 0
    assert learned[0]["loss"] == pytest.approx(prior[0]["loss"], rel=1e-6)
    assert learned[-1]["step"] == 2


def test_a_resumed_run_has_the_whole_course(cli: Cli) -> None:
    cli("fit", "--strategy=maskllm", *EVERY_TWO, "--checkpoint.every_n_steps=3", steps=4)
    [run] = cli.runs()
    cli("fit", f"--ckpt_path={run}/checkpoints/step-00000003.ckpt", data=False, steps=6)
    again = validations(cli.runs()[-1])
    assert [row["step"] for row in again] == [2, 4, 6]
    assert [row["tokens"] for row in again] == [step * TOKENS for step in (2, 4, 6)]
    assert again[0] == validations(run)[0]


def test_without_validation_text_the_course_is_empty(cli: Cli) -> None:
    cli("fit", "--strategy=maskllm", "--history.at_start=true", "--trainer.limit_val_batches=0")
    assert validations(cli.runs()[0]) == []


def test_the_end_of_a_run_is_logged_under_the_same_names_for_every_strategy(cli: Cli) -> None:
    same = {"test/perplexity", "test/loss", "val/perplexity", "val/loss"}
    same |= {"run/tokens", "run/seconds", "run/peak_memory_gib"}
    for strategy in ("dense", "magnitude", "maskllm"):
        cli("fit", f"--strategy={strategy}")
        run = cli.runs()[-1]
        with (run / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        last = {name for name, value in rows[-1].items() if value}
        logged = {name for row in rows for name, value in row.items() if value}
        masks = {"masks/retained_norm", "masks/distance"} if strategy != "dense" else set()
        assert same | masks <= logged, strategy
        assert {"test/perplexity", "run/tokens", "run/peak_memory_gib"} | masks <= last
        result = json.loads((run / "result.json").read_text())
        assert (result["masks"] is None) == (strategy == "dense")


def test_an_export_of_the_checkpoint_tells_the_same_of_masks_and_costs(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([3, 3, 1])  # GiB: of the run when it saves, at its end, and of the later process
    monkeypatch.setattr(
        "sparsify.callbacks.throughput.peak_memory", lambda device: next(peaks, 1) * 2**30
    )
    cli("fit", "--strategy=maskllm", "--trainer.log_every_n_steps=100", steps=4)
    [run] = cli.runs()
    cli("export", f"--ckpt_path={run}", "--output.folder=out", data=False)
    first, again = (json.loads((folder / "result.json").read_text()) for folder in cli.runs())
    assert [first["run"].pop("command"), again["run"].pop("command")] == ["fit", "export"]
    assert first["run"]["peak_memory_gib"] == 3
    seconds = [content["run"].pop("seconds") for content in (first, again)]
    assert seconds[1] == pytest.approx(seconds[0], abs=0.2)
    assert again["run"] == first["run"]
    assert first["masks"]["max_probability"] > 0.9, "kappa is that of the end"
    assert again["masks"] == first["masks"]
    assert again["scores"] == first["scores"]
