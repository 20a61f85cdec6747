"""What version 0.1.0 wrote is read: a checkpoint, a config, an export and a result."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from sparsify.cli.main import main
from sparsify.export.mask_file import read_masks
from tests.conftest import start_in

ASSETS = Path(__file__).parent / "assets" / "version_0_1_0"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its run's folder; model and text, which are relative paths, lie in the current folder."""
    start_in(tmp_path, monkeypatch)
    shutil.copytree(ASSETS, ".", dirs_exist_ok=True)
    return Path("run")


@pytest.mark.parametrize(
    "words",
    [
        ["--ckpt_path=run/checkpoints/step-00000002.ckpt"],
        ["--config=run/config.yaml", "--trainer.enable_progress_bar=false"],
    ],
)
def test_a_checkpoint_and_a_config_give_the_same_masks(run: Path, words: list[str]) -> None:
    main(["fit", *words])
    masks, then = (read_masks(folder) for folder in (Path(_new_run() / "export"), run / "export"))
    assert dict(masks).keys() == dict(then).keys()
    assert all(torch.equal(masks[name], then[name]) for name in masks)


def _new_run() -> Path:
    [folder] = Path("runs/maskllm").iterdir()
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["verify", "run/export", "--base=model"],
        ["mask", "show", "run/export"],
        ["compare", "run"],
    ],
)
def test_an_export_and_a_result_are_read(run: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main(words)


def test_the_import_path_that_its_sharded_runs_hold(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["strategy"] = {"class_path": "sparsify.distributed.Sharded"}
    Path("sharded.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="^0$"):
        main(["fit", "--config=sharded.yaml", "--print_config"])
