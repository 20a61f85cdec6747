"""Every packaged config runs, on a tiny model and text in place of its own."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsify.cli.main import main
from sparsify.data import Source, TextDataModule
from sparsify.masking.registry import STRATEGIES, plugins
from tests.conftest import Cli

BASES = ("llama", "qwen")
CONFIGS = Path(str(files("sparsify.configs")))
# Those of papers run on models of their own families: test_paper_recipes.py.
PAPERS = sorted(file for file in CONFIGS.glob("recipes/*.yaml") if file.stem.startswith(BASES))
RUNNABLE = sorted({*CONFIGS.glob("*.yaml"), *CONFIGS.glob("recipes/*.yaml")} - {*PAPERS})


def test_every_strategy_has_a_config() -> None:
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(plugins(STRATEGIES))


@pytest.mark.parametrize("file", RUNNABLE, ids=lambda file: file.stem)
def test_a_config_runs(file: Path, cli: Cli) -> None:
    smaller = [
        "--trainer.max_steps=2",
        "--trainer.accumulate_grad_batches=1",
        "--trainer.val_check_interval=1",
        "--model.calibration.samples=8",
    ]
    main(["fit", f"--config={file}", *cli.model, *cli.data, *cli.trainer, *smaller])
    result = json.loads(next(cli.folder.glob("runs/*/*/result.json")).read_text())
    assert result["scores"]["overall"]["windows"] > 0
    expected = 0.0 if file.stem == "dense" else 0.5
    assert result["run"]["sparsity"] == expected


def test_the_domain_recipe_takes_the_users_files_in_its_own_blend(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data.train.domain.path=my_text", "--data.test.domain.path=my_test.jsonl"]
    with pytest.raises(SystemExit, match="^0$"):
        main(["fit", f"--config={CONFIGS}/recipes/domain.yaml", *words, "--print_config"])
    printed: Any = yaml.safe_load(capsys.readouterr().out)["data"]
    assert printed["train"]["domain"]["path"] == "my_text"
    assert printed["test"]["domain"]["path"] == "my_test.jsonl"
    shares = {name: source["weight"] for name, source in printed["train"].items()}
    assert shares == {"domain": 0.7, "fineweb": 0.3}


def test_the_embedded_recipe_reads_the_packages_own_texts() -> None:
    names = ["embedded:python", "embedded:bible"]
    blend = {"code": Source("embedded:python", weight=3), "rest": Source("embedded:bible", 1)}
    data = TextDataModule(train=blend, test=names)
    own = TextDataModule().sources
    assert data.sources["train"]["code"] == Source(own["train"]["python"].path, weight=3)
    assert data.sources["test"] == {n: own["test"][n] for n in ("python", "bible")}
