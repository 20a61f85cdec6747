"""Files that tell whether they are as they were written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.common.errors import SparsifyError
from sparsify.common.seal import is_altered, sealed
from sparsify.results.compare.loading import load_runs
from sparsify.results.result import UNSEALED_SCHEMA
from tests.conftest import Cli


@pytest.mark.parametrize(
    "change", [{"a": 2}, {"b": [1, 2.5]}, {"b": [1, 2.5, "y"]}, {"new": None}, {"sha256": 3}]
)
def test_a_change_is_noticed(change: dict[str, Any]) -> None:
    content = sealed({"a": 1, "b": (1, 2.5, "x"), "c": {1: "key"}})
    read = json.loads(json.dumps(content))
    assert not is_altered(read)
    assert not is_altered(dict(reversed(read.items())))
    assert is_altered(read | change)


def test_what_has_no_hash_cannot_be_told() -> None:
    assert not is_altered({"a": 1})


def test_a_result_with_another_number_is_refused(cli: Cli) -> None:
    cli("fit", "--strategy=magnitude", "--output.enabled=true")
    [path] = Path().glob("runs/*/*/result.json")
    assert len(load_runs([path])[0]) == 1
    content = json.loads(path.read_text())
    content["scores"]["overall"]["loss"] -= 0.125
    path.write_text(json.dumps(content))
    with pytest.raises(SparsifyError, match="is not as it was written"):
        load_runs([path])
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(SparsifyError, match="is not as it was written"):
        load_runs([path])
    content["schema"] = UNSEALED_SCHEMA  # as of results from before there was one
    path.write_text(json.dumps(content))
    assert len(load_runs([path])[0]) == 1


def test_a_checkpoint_with_other_settings_is_refused(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("fit", "--strategy=maskllm")
    [path] = Path().glob("runs/*/*/checkpoints/step-*.ckpt")
    content = torch.load(path, weights_only=True)
    del content["hyper_parameters"]["config"]["model"]["strategy"]["init_args"]["tau"]["shape"]
    torch.save(content, path)
    with pytest.raises(SystemExit) as stop:
        cli("test", f"--ckpt_path={path}")
    assert stop.value.code == 2
    assert "the settings in it are not those that were written" in capsys.readouterr().err
    del content["settings_sha256"]  # as of version 0.1.0
    torch.save(content, path)
    cli("test", f"--ckpt_path={path}")


def test_settings_that_an_optimizer_refuses(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli("fit", "--strategy=maskllm", "--model.optimizer.init_args.betas=[0.9,2.0]")
    assert stop.value.code == 2
    assert "the optimizer refuses its settings: Invalid beta" in capsys.readouterr().err
