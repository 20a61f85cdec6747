import json
from pathlib import Path
from typing import Any

import pytest

from sparsify import SparsifyError
from sparsify.results.compare import compare
from sparsify.results.compare.loading import load_runs
from sparsify.results.result import check
from tests.results.compare.made import result, write


def test_files_folders_and_folders_of_folders_are_found_once(tmp_path: Path) -> None:
    first = write(tmp_path / "runs/maskllm/version_0", result(seed=0))
    second = write(tmp_path / "runs/maskllm/version_1", result(seed=1))
    (first.parent / "config.yaml").write_text("data: {seed: 7}")
    found, remarks = load_runs([tmp_path, first, first.parent, tmp_path / "runs" / ".." / "runs"])
    assert [run.path for run in found] == [first, second]
    assert [run.record["seed"] for run in found] == [0, 1]
    assert [run.config for run in found] == [{"data": {"seed": 7}}, None]
    assert remarks == []


def test_text_of_any_script_is_read(tmp_path: Path) -> None:
    name = "\u30c6\u3000\u30b9\u00a0\u200d\n\t"
    content: Any = result()
    content["protocol"]["data"] = {name: name}
    file = write(tmp_path, content)
    (file.parent / "config.yaml").write_text(json.dumps({"data": {"test": name}}))
    assert load_runs([tmp_path])[0][0].config == {"data": {"test": name}}


def test_exports_are_not_searched(tmp_path: Path) -> None:
    own = write(tmp_path / "run", result())
    write(tmp_path / "run/export/inner", result(seed=5))
    (tmp_path / "run/export/sparsity_manifest.json").write_text("{}")
    assert [run.path for run in load_runs([tmp_path])[0]] == [own]


def test_the_validation_result_is_taken_where_it_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, result())
    other = file.rename(tmp_path / "result-validation.json")
    assert load_runs([other])[0][0].path == other
    with pytest.raises(SparsifyError, match="holds no result.json; name the folder of a run"):
        load_runs([tmp_path])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "result.json cannot be read"),
        ("[" * 100_000, "result.json cannot be read"),
        ("[]", "is no result: its schema is None instead of 'sparsify.result/2'"),
        ('{"schema": "sparsify.sensitivity/1"}', "its schema is 'sparsify.sensitivity/1'"),
        ('{"schema": "sparsify.result/1"}', "lacks what a result holds .KeyError: 'run'"),
        ('{"schema": "sparsify.result/1", "run": 3}', "lacks what a result holds"),
    ],
)
def test_what_is_no_result_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(SparsifyError, match=message):
        load_runs([tmp_path])


@pytest.mark.parametrize("missing", ["pattern", "tokens", "strategy"])
def test_a_result_without_a_part_is_refused(missing: str, tmp_path: Path) -> None:
    content = result()
    del content["run"][missing]
    with pytest.raises(SparsifyError, match=f"KeyError: 'run.{missing}'"):
        load_runs([write(tmp_path, content)])


def test_a_loss_that_is_no_number_is_refused(tmp_path: Path) -> None:
    content: Any = result()
    content["scores"]["a"]["loss"] = float("nan")
    file = tmp_path / "result.json"
    file.write_text(json.dumps(content))
    with pytest.raises(SparsifyError, match="the loss of a is nan"):
        load_runs([file])


def test_a_path_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match="gone does not exist"):
        load_runs([tmp_path / "gone"])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("run.tokens", "abc", "run.tokens is 'abc' instead of a number"),
        ("run.tokens", float("nan"), "run.tokens is nan instead of a number"),
        ("run.sparsity", None, "run.sparsity is None instead of a number"),
        ("run.strategy", "x", "run.strategy is 'x' instead of a table"),
        ("run.pattern", 3, "run.pattern is 3 instead of text"),
        ("run.calibration", [1], "run.calibration is .1. instead of a table"),
        ("run.calibration", {"tokens": "x"}, "run.calibration.tokens is 'x' instead of a number"),
        ("run.calibration", {"sources": {"a": 1}}, "calibration.sources.a is 1 instead of a"),
        ("run.processes", "two", "run.processes is 'two' instead of a number"),
        ("run.device", {}, "run.device is {} instead of text"),
        ("versions", None, "versions is None instead of a table"),
        ("protocol.data", "x", "protocol.data is 'x' instead of a table"),
        ("protocol.windows", 3, "protocol.windows is 3 instead of a table"),
        ("scores.a", None, "scores.a is None instead of a table"),
        ("scores.a.loss", "x", "scores.a.loss is 'x' instead of a number"),
        ("history", [], "history is .. instead of a table"),
        ("history", {"masks": [3]}, "history.masks.0. is 3 instead of a table"),
        ("history", {"masks": [{"flips": 1}]}, "KeyError: 'step'"),
        ("history", {"masks": [{"step": 1, "flips": "x"}]}, "masks.0..flips is 'x' instead of a"),
        ("masks", {"layers": {"a.1.b": 1}}, "masks.layers.a.1.b is 1 instead of a table"),
        ("masks", {"retained_norm": "x"}, "masks.retained_norm is 'x' instead of a number"),
    ],
)
def test_what_is_of_another_type_is_refused(
    path: str, value: Any, message: str, tmp_path: Path
) -> None:
    content: Any = result()
    *above, key = path.split(".")
    part = content
    for name in above:
        part = part[name]
    part[key] = value
    with pytest.raises(SparsifyError, match=message) as caught:
        load_runs([write(tmp_path, content)])
    assert "lacks what a result holds" in str(caught.value)


def test_parts_that_are_null_or_absent_are_none() -> None:
    content: Any = result()
    content["run"] |= {"overrides": None, "peak_memory_gib": None, "device": None, "command": None}
    content |= {"history": None, "masks": None}
    check(content)
    del content["versions"]
    check(content)


@pytest.mark.parametrize("text", ["a: [", "", "- a"])
def test_a_damaged_configuration_is_said_and_counts_as_none(text: str, tmp_path: Path) -> None:
    write(tmp_path, result())
    (tmp_path / "config.yaml").write_text(text)
    (run,), remarks = load_runs([tmp_path])
    assert run.config is None
    assert remarks == [f"{tmp_path}/config.yaml cannot be read as settings, and counts as missing."]


@pytest.mark.parametrize("config", ["data: [1]", "data: {seed: 1}\nmodel: 3", "trainer: x"])
def test_configurations_of_other_shapes_are_compared(config: str, tmp_path: Path) -> None:
    write(tmp_path, result())
    (tmp_path / "config.yaml").write_text(config)
    assert len(compare([tmp_path]).rows) == 1


def test_runs_that_did_not_end_are_said(tmp_path: Path) -> None:
    write(tmp_path / "ended", result())
    for name in ("ended", "half", "empty"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    for name in ("ended", "half"):
        (tmp_path / name / "checkpoints/last.ckpt").touch()
    (tmp_path / "checkpoints.txt").touch()
    remark = (
        f"{tmp_path}/half has checkpoints but no result.json: it did not end, or wrote none; go on "
        f"with `sparsify fit --ckpt_path {tmp_path}/half`."
    )
    for paths in ([tmp_path], [tmp_path, tmp_path / "half" / ".."]):
        assert load_runs(paths)[1] == [remark]
    assert remark in compare([tmp_path]).remarks


@pytest.mark.parametrize(("command", "goes_on"), [("fit", True), (None, True), ("test", False)])
def test_a_run_that_another_went_on_from_is_no_loss(
    command: str | None, goes_on: bool, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "half/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    write(tmp_path / "rest", result(command=command))
    (tmp_path / "rest/config.yaml").write_text(f"ckpt_path: {checkpoint}")
    assert bool(load_runs([tmp_path])[1]) is not goes_on


def test_a_damaged_sensitivity_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, result())
    for content in ("{", "[]", '{"schema": "sparsify.sensitivity/1"}'):
        (tmp_path / "sensitivity.json").write_text(content)
        assert load_runs([tmp_path])[0][0].sensitivity is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("run.seconds", 1e308, "run.seconds is 1e.308 instead of a number, not negative"),
        ("run.seconds", -1.0, "run.seconds is -1.0 instead of a number, not negative"),
        ("run.tokens", 10**400, "tokens is an integer of 1329 bits instead of"),
        ("run.tokens", -5, "run.tokens is -5 instead of a number, whole"),
        ("run.tokens", True, "run.tokens is True instead of a number, whole"),
        ("run.tokens", 1.5, "run.tokens is 1.5 instead of a number, whole"),
        ("run.steps", float("inf"), "run.steps is inf instead of a number, whole"),
        ("run.sparsity", 1.5, "run.sparsity is 1.5 instead of a number from 0 to 1"),
        ("run.strategy.class", "a\x1b[2Jb", "run.strategy.class is .* without control characters"),
        ("run.strategy.settings", {"big": 10**400}, "settings.big is an integer of 1329 bits"),
        ("scores.a.loss", -1.0, "the loss of a is -1.0"),
        ("scores.a.loss", 1e308, "the loss of a is 1e.308, which no model has"),
        ("scores.a.perplexity", 1e308, "its perplexity 1e.308"),
    ],
)
def test_numbers_that_no_run_has_are_refused(
    path: str, value: Any, message: str, tmp_path: Path
) -> None:
    content: Any = result()
    *above, key = path.split(".")
    part = content
    for name in above:
        part = part[name]
    part[key] = value
    with pytest.raises(SparsifyError, match=message):
        load_runs([write(tmp_path, content)])


def test_what_is_nested_deeper_than_can_be_followed_is_refused(tmp_path: Path) -> None:
    text = json.dumps(result()).replace('"settings": {', '"settings": {"a": ' + "[" * 800 + "1")
    text = text.replace("[1", "[1" + "]" * 800 + ", ", 1)
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(SparsifyError, match="result.json"):
        load_runs([tmp_path])
