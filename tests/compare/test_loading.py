import json
from pathlib import Path
from typing import Any

import pytest

from sparsify import SparsifyError
from sparsify.compare.loading import load_runs
from tests.compare.made import result, write


def test_files_folders_and_folders_of_folders_are_found_once(tmp_path: Path) -> None:
    first = write(tmp_path / "runs/maskllm/version_0", result(seed=0))
    second = write(tmp_path / "runs/maskllm/version_1", result(seed=1))
    (first.parent / "config.yaml").write_text("data: {seed: 7}")
    found = load_runs([tmp_path, first, first.parent, tmp_path / "runs" / ".." / "runs"])
    assert [run.path for run in found] == [first, second]
    assert [run.record["seed"] for run in found] == [0, 1]
    assert [run.config for run in found] == [{"data": {"seed": 7}}, None]


def test_exports_are_not_searched(tmp_path: Path) -> None:
    own = write(tmp_path / "run", result())
    write(tmp_path / "run/export/inner", result(seed=5))
    (tmp_path / "run/export/sparsity_manifest.json").write_text("{}")
    assert [run.path for run in load_runs([tmp_path])] == [own]


def test_the_validation_result_is_taken_where_it_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, result())
    other = file.rename(tmp_path / "result-validation.json")
    assert load_runs([other])[0].path == other
    with pytest.raises(SparsifyError, match="holds no result.json; name the folder of a run"):
        load_runs([tmp_path])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "result.json cannot be read"),
        ("[" * 100_000, "result.json cannot be read"),
        ("[]", "is no result: its schema is None instead of 'sparsify.result/1'"),
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
    with pytest.raises(SparsifyError, match=f"KeyError: '{missing}'"):
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


def test_a_damaged_configuration_counts_as_none(tmp_path: Path) -> None:
    write(tmp_path, result())
    (tmp_path / "config.yaml").write_text("a: [")
    assert load_runs([tmp_path])[0].config is None
