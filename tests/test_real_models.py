"""The benchmark on real models: what it keeps, its tables, its questions, and its options."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from sparsify.cli.main import main
from sparsify.data import Source
from tests.conftest import Scripts

Row = dict[str, Any]


@pytest.fixture
def real(scripts: Scripts) -> ModuleType:
    return scripts("real_models")


def made_up(loss: float, steps: int = 0, seed: int = 0, **protocol: Any) -> Row:
    score = {"loss": loss, "perplexity": 10 * loss, "windows": 2}
    run = {"seed": seed, "steps": steps, "tokens": 10 * steps, "seconds": 60.0 * steps}
    run |= {"calibration": None, "peak_memory_gib": 1.5, "strategy": {"weights": "frozen"}}
    return {
        "run": run,
        "protocol": {"base": {"hash": "a", "dtype": "float32"}, "windows": {"c4": 2}} | protocol,
        "scores": {"wikitext": score, "c4": score, "overall": score},
        "masks": {"layers": {"q": {}}, "distance": 0.1},
        "history": {"validation": []},
    }


def arguments(real: ModuleType, folder: Path, *words: str) -> argparse.Namespace:
    found: argparse.Namespace = real.arguments(["--model=smollm2", f"--folder={folder}", *words])
    return found


# -- what is kept ----------------------------------------------------------------------------------


@pytest.fixture
def run(
    real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Runs the benchmark with results made up; gives the names of the runs that it made."""

    def start(*words: str, **protocol: Any) -> list[str]:
        made: list[str] = []

        def fit(name: str, options: list[str], folder: Path, aloud: bool) -> Row:
            made.append(name)
            return made_up(2.0 + len(made), 240 if "240 steps" in name else 0, **protocol)

        monkeypatch.setattr(real, "fit", fit)
        monkeypatch.setattr(real, "fetch_model", lambda _: tmp_path / "model.gguf")
        monkeypatch.setattr(
            "sys.argv", ["", "--model=smollm2", f"--folder={tmp_path / 'work'}", *words]
        )
        real.main()
        return made

    return start


def results(folder: Path) -> dict[str, list[Row]]:
    (file,) = folder.glob("real_models_smollm2-*.json")
    found: dict[str, list[Row]] = json.loads(file.read_text())
    return found


def test_rows_of_a_kept_file_are_not_run_again_and_all_are_saved(
    run: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("--only", "selfmask", "dense", f"--save={first}") == [
        "selfmask, 240 steps, seed 0",
        "dense, seed 0",
    ]
    (kept,) = first.iterdir()
    rows = json.loads(kept.read_text())
    del rows["selfmask"][0]["run"]["peak_memory_gib"]  # as earlier versions had it
    kept.write_text(json.dumps(rows))
    made = run("--only", "dense", "selfmask", "wanda", f"--keep={kept}", f"--save={second}")
    assert made == ["dense, seed 0", "wanda, seed 0"]  # dense for its protocol
    assert list(results(second)) == ["dense", "wanda", "selfmask"]
    assert results(second)["selfmask"] == results(first)["selfmask"]
    assert "layers" not in results(second)["wanda"][0]["masks"]
    assert results(second)["wanda"][0]["masks"]["distance"] == 0.1
    capsys.readouterr()
    # Today's file is kept by itself, and shown.
    assert run("--only", "wanda", f"--save={second}") == []
    assert "selfmask" in capsys.readouterr().out


def test_rows_of_another_protocol_are_refused_with_what_differs(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    run("--only", "magnitude", f"--save={tmp_path}")
    (kept,) = tmp_path.glob("*.json")
    words = ["--only", "wanda", f"--keep={kept}"]
    other = {"base": {"hash": "b", "dtype": "float32"}}
    with pytest.raises(SystemExit, match=r"'magnitude'.*: base.hash is a there and b here\. "):
        run(*words, **other)
    with pytest.raises(SystemExit, match="windows.c4 is 2 there and 3 here"):
        run(*words, windows={"c4": 3})


def test_rows_of_another_number_of_steps_are_refused(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    run("--only", "selfmask", f"--save={tmp_path}")
    with pytest.raises(SystemExit, match="240 steps, and here it would be 2"):
        run("--only", "wanda", "--steps=2", f"--save={tmp_path}")


def test_a_seed_that_is_not_kept_is_run(run: Callable[..., list[str]], tmp_path: Path) -> None:
    run("--only", "wanda", f"--save={tmp_path}")
    kept = results(tmp_path)
    row = made_up(9.0, seed=1)
    (file,) = tmp_path.glob("*.json")
    file.write_text(json.dumps(kept | {"wanda": [*kept["wanda"], row]}))
    assert run("--only", "wanda", f"--save={tmp_path}", "--seeds", "0", "1") == []
    assert "wanda, seed 2" in run("--only", "wanda", f"--save={tmp_path}", "--seeds", "2")


def test_a_row_that_starts_from_anothers_export_makes_it_first(
    real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, list[str]] = {}

    def fit(name: str, options: list[str], folder: Path, aloud: bool) -> Row:
        made[name] = options
        (folder / "selfmask-240_steps-seed_0/runs/a/b/export").mkdir(parents=True, exist_ok=True)
        return made_up(2.0)

    monkeypatch.setattr(real, "fit", fit)
    name = "selfmask, then fixed_mask"
    args = arguments(real, tmp_path)
    args.base = tmp_path / "model.gguf"
    real.run(name, 0, args)
    assert list(made) == ["selfmask, 240 steps, seed 0", f"{name}, 240 steps, seed 0"]
    prior = f"--model.strategy.prior={tmp_path}/selfmask-240_steps-seed_0/runs/a/b/export"
    assert prior in made[f"{name}, 240 steps, seed 0"]
    made.clear()
    args = arguments(real, tmp_path, f"--selfmask={tmp_path}/given")
    args.base = tmp_path / "model.gguf"
    real.run(name, 0, args)
    assert f"--model.strategy.prior={tmp_path}/given" in made.popitem()[1]
    assert not made


def test_rows_with_a_budget_take_the_patterns_of_one_search(
    real: ModuleType, scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[list[str]] = []
    fits: list[list[str]] = []

    def sparsify(name: str, words: list[str], root: Path, aloud: bool) -> None:
        searches.append(words)
        (root / "overrides.yaml").write_text("model: {overrides: {}}")

    def fit(name: str, options: list[str], folder: Path, aloud: bool) -> Row:
        fits.append(options)
        return made_up(2.0)

    monkeypatch.setattr(scripts("kept_runs"), "_sparsify", sparsify)
    monkeypatch.setattr(real, "fit", fit)
    args = arguments(
        real, tmp_path, "--c4", str(tmp_path / "c4"), "--wikitext", str(tmp_path / "w")
    )
    for path in (args.c4, args.wikitext):
        path.write_text("")
    args.base = tmp_path / "model.gguf"
    for name in ("wanda, budget", "selfmask, budget"):
        real.run(name, 0, args)
    (search,) = searches
    assert search[:3] == ["budget", "--kept=0.5", "--strategy=wanda"]
    assert f"--model.name_or_path={args.base}" in search
    chosen = f"--config={tmp_path}/budget/overrides_0.5.yaml"
    assert all(chosen in options for options in fits)
    recipe = next(i for i, option in enumerate(fits[1]) if "smollm2_selfmask.yaml" in option)
    assert recipe < fits[1].index(chosen)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_that_was_stopped_goes_on_and_is_tested_in_float32(
    precision: str, scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_runs = scripts("kept_runs")
    commands: list[list[str]] = []

    def sparsify(name: str, words: list[str], root: Path, aloud: bool) -> None:
        commands.append(words)
        folder = root / "runs/fit/version_0"
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        config = {"trainer": {"max_steps": 4}}
        state = {"global_step": min(4, 2 * len(commands)), "hyper_parameters": {"config": config}}
        torch.save(state, folder / "checkpoints/last.ckpt")
        tests = words[0] == "export" or "--output.enabled=false" not in commands[0]
        if state["global_step"] == 4 and tests:
            (folder / "result.json").write_text('{"scores": 1}')

    monkeypatch.setattr(kept_runs, "_sparsify", sparsify)
    options = ["--strategy=selfmask", *kept_runs.learn_in(precision)]
    assert kept_runs.fit("a, b", options, tmp_path) == {"scores": 1}
    again = f"--ckpt_path={tmp_path}/a-b/runs/fit/version_0/checkpoints/last.ckpt"
    # A precision is taken from a checkpoint only by what goes on learning.
    export = [["export", again]] if precision == "bf16-mixed" else []
    assert commands == [["fit", *options], ["fit", again], *export]
    assert kept_runs.fit("a, b", options, tmp_path) == {"scores": 1}
    assert len(commands) == 2 + len(export)


# -- tables and curves -----------------------------------------------------------------------------


def cells(table: Any) -> dict[str, list[str]]:
    """A table's columns by their heads."""
    return {column.header: list(column.cells) for column in table.columns}


def test_the_table_shows_each_text_and_the_gap_where_it_is_known(real: ModuleType) -> None:
    rows = {"dense": [made_up(2.0)], "magnitude": [made_up(4.0)], "wanda": [made_up(3.0)]}
    shown = cells(real.table(rows, "title"))
    assert shown["wikitext"] == shown["c4"] == ["20.00", "40.00", "30.00"]
    assert shown["gap closed"] == ["100.0 %", "0.0 %", "50.0 %"]
    shown = cells(real.table({"wanda": rows["wanda"]}, "title"))
    assert shown["gap closed"] == [""]


def test_accuracies_have_their_errors_and_dense_is_shown_once(real: ModuleType) -> None:
    def report(value: float) -> dict[str, Any]:
        kinds = {"dense": 0.5, "sparse": value, "difference": value - 0.5}
        each = {kind: {"value": v, "stderr": 0.02} for kind, v in kinds.items()}
        return {"results": {"cloze_c4": each}, "mean": each}

    rows = {"wanda": [made_up(3.0) | {"tasks": report(0.3)}], "ria": [made_up(3.0)]}
    shown = cells(real.task_table(rows | {"admm": [made_up(3.0) | {"tasks": report(0.4)}]}))
    assert shown["strategy"] == ["dense", "wanda", "admm"]
    assert shown["cloze_c4"] == ["50.0 ± 2.0", "30.0 ± 2.0", "40.0 ± 2.0"]
    assert shown["mean less dense's"] == ["", "-20.0 ± 2.0", "-10.0 ± 2.0"]
    assert real.task_table({"ria": rows["ria"]}) is None


def test_curves_are_drawn_from_what_was_saved(scripts: Scripts, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = scripts("draw_curves")
    look = {"tokens": 1000, "seconds": 60.0, "perplexity": 90.0}
    row = made_up(2.0) | {"history": {"validation": [look | {"tokens": 0, "seconds": 0.0}, look]}}
    script.draw({"maskllm": [row], "wanda": [made_up(2.0)]}, tmp_path / "curve.svg")
    picture = (tmp_path / "curve.svg").read_text()
    assert script.COLOURS["maskllm"] in picture
    assert script.COLOURS["selfmask"] not in picture


# -- questions -------------------------------------------------------------------------------------


def test_the_answer_is_the_texts_own_end(scripts: Scripts, tmp_path: Path) -> None:
    tasks = scripts("continuation_tasks")
    documents = [" ".join(f"{name}{i} word" for i in range(100)) for name in "abc"]
    texts = {"t": Source([*documents, "too short"])}  # type: ignore[arg-type]
    assert tasks.write_tasks(tmp_path, texts, choices=2) == ["continue_t", "cloze_t"]

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    choices = read("continue_t")
    assert len(choices) == 9  # three passages of 60 of each 200 words
    assert {question["answer"] for question in choices} == {0, 1}
    for question in choices:
        whole = f"{question['context']} {question['choices'][question['answer']]}"
        assert sum(whole in document for document in documents) == 1
        assert len(whole.split()) == 60
        assert len({*question["choices"]}) == 2
    for question in read("cloze_t"):
        assert question["word"] == "word"  # a59 and the like are no words
        assert any(f"{question['context']} word" in document for document in documents)
    for name in ("continue_t", "cloze_t"):
        task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert task["task"] == name
        assert Path(task["dataset_kwargs"]["data_files"]["test"]) == tmp_path / f"{name}.jsonl"


def test_a_text_of_too_few_passages_is_refused(scripts: Scripts, tmp_path: Path) -> None:
    tasks = scripts("continuation_tasks")
    text = {"t": Source([" ".join(map(str, range(60)))])}  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="a text has 1 different passages of 60 words"):
        tasks.write_tasks(tmp_path, text, choices=2)


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["smollm2", "moe"])
def test_the_options_of_all_rows_are_those_of_fit(
    model: str,
    real: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("c4.jsonl", "wiki.txt"):
        (tmp_path / name).write_text('{"text": "a"}\n' * 24)
    files = [f"--c4={tmp_path}/c4.jsonl", f"--wikitext={tmp_path}/wiki.txt"]
    args = arguments(real, tmp_path, f"--model={model}", *files, f"--selfmask={tmp_path}/given")
    args.base = tmp_path / "model"
    found: dict[str, Any] = {}

    def fit(name: str, options: list[str], folder: Path, aloud: bool) -> Row:
        capsys.readouterr()
        with pytest.raises(SystemExit, match="^0$"):
            main(["fit", *options, "--print_config"])
        found[name.partition(", seed")[0]] = yaml.safe_load(capsys.readouterr().out)
        return made_up(2.0)

    monkeypatch.setattr(real, "fit", fit)
    # One of each kind: a parser takes a second.
    kinds = {
        "smollm2": ["sparsegpt, updated", "selfmask, then fixed_mask", "sr_ste, distilled"],
        "moe": ["sparsegpt, updated", "selfmask, no teacher"],
    }
    for name in kinds[model]:
        real.run(name, 3, args)
    updated = found["sparsegpt, updated"]
    assert updated["model"]["strategy"]["init_args"]["update_weights"] is True
    assert updated["data"]["block_size"] == {"smollm2": 512, "moe": 256}[model]
    assert updated["model"]["seed"] == updated["model"]["calibration"]["seed"] == 3
    if model == "smollm2":
        assert list(updated["data"]["test"]) == ["wikitext", "c4"]
        then = found["selfmask, then fixed_mask, 240 steps"]
        assert then["model"]["strategy"]["init_args"]["prior"] == str(tmp_path / "given")
        assert then["model"]["optimizer"]["init_args"]["lr"] == 0.0001
        assert found["sr_ste, distilled, 240 steps"]["model"]["distillation"]["weight"] == 0.5
        assert then["trainer"]["val_check_interval"] == 40
        assert then["history"]["at_start"] is True
    else:
        without = found["selfmask, no teacher, 300 steps"]["model"]["distillation"]
        assert without["weight"] == without["hidden"] == 0
