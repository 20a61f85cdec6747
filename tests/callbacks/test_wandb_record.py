"""Offline runs of Weights & Biases, read back from their files."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsify.callbacks import wandb_record
from sparsify.callbacks.wandb_record import describe_lineage, keys_of_result, layer_table
from sparsify.common.files import read_json
from sparsify.export.manifest import MANIFEST
from sparsify.export.mask_file import read_masks
from sparsify.masking.registry import make_strategy
from tests.callbacks.wandb_files import OfflineRun, read_run
from tests.conftest import Cli

EVERY_RUN = {
    "trainer/global_step",
    *(f"{split}/{name}" for split in ("val", "test") for name in ("loss", "perplexity")),
    *(f"run/{name}" for name in ("tokens", "seconds", "peak_memory_gib")),
    "masks/distance",
    "masks/retained_norm",
    "layers",
}
LEARNING_RUN = EVERY_RUN | {
    "train/loss",
    "train/task_loss",
    "train/kappa",
    "train/tau",
    "masks/flips",
    "masks/entropy",
    "masks/max_probability",
    "masks/sample_change",
    "masks/soft_hard_gap",
    "layers/model.layers.0.mlp.up_proj/flips",
    "speed/tokens_per_second",
    "speed/peak_memory_gib",
}
WORDS = ("--logger=wandb", "--trainer.log_every_n_steps=1", "--masks.every_n_steps=1")
LAYER = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights & Biases offline, with all of its folders in this test's."""
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb_home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def fit(cli: Cli, *words: str) -> tuple[OfflineRun, Path]:
    """A run, and the folder that it wrote."""
    import wandb

    wandb.teardown()  # it reads the environment once
    cli("fit", *WORDS, *words)
    wandb.finish()
    wandb.teardown()  # waits until all is written
    [result] = Path("runs").rglob("result.json")
    return read_run(Path("runs")), result.parent


class Config(dict[str, Any]):
    """As that of a run."""

    def update(self, content: dict[str, Any], allow_val_change: bool) -> None:  # type: ignore[override]
        assert allow_val_change
        super().update(content)


class FakeRun:
    """Takes what a run is given."""

    id = "abc"
    tags = None

    def __init__(self) -> None:
        self.config = Config()
        self.artifacts: list[Any] = []

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.artifacts.append(artifact)


def staged(artifact: Any) -> dict[str, Path]:
    """The files that a later upload of an artifact would take."""
    return {part.path: Path(part.local_path) for part in artifact.manifest.contents}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_learning_run_has_its_metrics_keys_layers_and_masks(cli: Cli, home: None) -> None:
    run, folder = fit(
        cli, "--strategy=maskllm", "--model.strategy.prior=magnitude", "--model.seed=3"
    )
    result = read_json(folder / "result.json")

    assert run.keys() >= LEARNING_RUN
    for split in ("val", "test"):  # one can be drawn over the other
        rows = [row for row in run.history if f"{split}/perplexity" in row]
        assert rows
        assert all({"run/tokens", "run/seconds"} <= row.keys() for row in rows)
    scores = [row["test/perplexity"] for row in run.history if "test/perplexity" in row]
    assert scores == [pytest.approx(result["scores"]["overall"]["perplexity"])]
    assert run.metrics["*"].step_metric == "trainer/global_step"
    assert set(run.summary["val/perplexity"]) == {"min", "last"}

    config, base = run.config, result["protocol"]["base"]
    assert config["base"] == base["name"]
    assert config["base_hash"] == base["hash"][:12]
    keys = [config[key] for key in ("strategy", "pattern", "weights", "seed", "lineage")]
    assert keys == ["maskllm", "2:4", "frozen", 3, {}]
    assert config["protocol_detail"]["data"] == result["protocol"]["data"]
    assert len(config["protocol"]) == 12
    assert keys_of_result(result).items() <= config.items(), "it can be logged later too"
    assert {"maskllm", "2:4"} <= set(run.tags)

    [table] = Path("runs").rglob("*.table.json")
    layers = json.loads(table.read_text())
    metrics = ["distance", "retained_norm", "entropy", "max_probability", "sample_change"]
    assert layers["columns"] == ["block", "kind", "layer", *metrics]
    assert len(layers["data"]) == len(result["masks"]["layers"]) == 14
    values = [result["masks"]["layers"][LAYER][metric] for metric in metrics]
    assert [1, "self_attn.q_proj", LAYER, *values] in layers["data"]

    artifact = run.artifacts["model"]
    files, export = staged(artifact), folder / "export"
    assert {name: digest(file) for name, file in files.items()} == {
        "result.json": digest(folder / "result.json"),
        MANIFEST: digest(export / MANIFEST),
        "masks.nmask": digest(export / "masks.nmask"),
    }
    metadata, masks = json.loads(artifact.metadata), read_masks(export)
    assert metadata["digest"] == masks.digest
    assert metadata["base_hash"] == base["hash"]
    assert metadata["lineage"]["class"].endswith(".MaskLLM")
    assert metadata["scores"] == result["scores"]
    assert artifact.name == f"{base['name']}-maskllm-2-4"
    assert set(artifact.aliases) == {"latest", folder.name, masks.digest[:12]}


def test_a_one_shot_run_has_its_scores_and_its_whole_model(cli: Cli, home: None) -> None:
    options = ("--wandb.artifact=full", "--model.calibration.samples=4", "--output.folder=out")
    run, _ = fit(cli, "--strategy=wanda", *options)
    assert run.keys() >= EVERY_RUN
    assert [run.config[key] for key in ("strategy", "pattern")] == ["wanda", "2:4"]
    files = staged(run.artifacts["model"])
    exported = {path.name: path for path in Path("out").iterdir()}
    assert set(files) == {"result.json", *exported}
    assert "model.safetensors" in files
    for name, path in exported.items():  # no second copy of the weights
        assert files[name].samefile(path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, home: None) -> Callable[[], FakeRun]:
    """Puts a new run in the place of any other."""

    def make() -> FakeRun:
        run = FakeRun()
        monkeypatch.setattr(wandb_record, "wandb_run", lambda trainer: run)
        return run

    return make


def test_masks_that_a_run_starts_from_are_in_its_lineage(cli: Cli) -> None:
    cli("export", "--strategy=magnitude", "--output.folder=first")
    trainer = SimpleNamespace(ckpt_path=None)
    assert describe_lineage(trainer, make_strategy("maskllm", prior="first")) == {
        "masks": "first",
        "masks_digest": read_masks(Path("first")).digest,
    }
    assert describe_lineage(trainer, make_strategy("maskllm", prior="magnitude")) == {}


def test_the_protocol_tells_splits_and_parts_of_them_apart(
    cli: Cli, fake: Callable[[], FakeRun]
) -> None:
    def protocol(command: str, *words: str) -> str:
        run = fake()
        cli(command, *words)
        assert not run.artifacts
        return str(run.config["protocol"])

    dense, sparse = protocol("test", "--strategy=dense"), protocol("test", "--strategy=magnitude")
    assert dense == sparse
    assert protocol("validate", "--strategy=dense") != dense
    assert protocol("test", "--strategy=dense", "--trainer.limit_test_batches=1") != dense


def test_a_dense_run_and_the_export_of_its_checkpoint_have_no_masks(
    cli: Cli, fake: Callable[[], FakeRun]
) -> None:
    first = fake()
    cli("fit", "--strategy=dense")
    [checkpoint] = Path("runs").rglob("last.ckpt")
    second = fake()
    cli("export", f"--ckpt_path={checkpoint}", data=False)
    for run in (first, second):
        assert [run.config[key] for key in ("strategy", "pattern")] == ["dense", "dense"]
        [artifact] = run.artifacts
        assert set(artifact.manifest.entries) == {"result.json", MANIFEST}
    origin = "dense/version_0/checkpoints/step-00000001.ckpt"
    assert (first.config["lineage"], second.config["lineage"]) == ({}, {"checkpoint": origin})


def test_no_artifact_where_none_is_asked_for(cli: Cli, fake: Callable[[], FakeRun]) -> None:
    run = fake()
    cli("fit", "--strategy=dense", "--wandb.artifact=none")
    assert not run.artifacts


def test_other_loggers_do_not_need_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    cli("fit", "--strategy=magnitude")
    assert list(Path("runs").rglob("masks.nmask"))


def test_layers_of_the_table_keep_their_order_and_experts_are_one_kind() -> None:
    layers = {"h.10.mlp.experts.3.up": {"a": 1.0}, "h.2.c_attn": {"b": 2.0}}
    assert layer_table(layers) == (
        ["block", "kind", "layer", "a", "b"],
        [
            [10, "mlp.experts.*.up", "h.10.mlp.experts.3.up", 1.0, None],
            [2, "c_attn", "h.2.c_attn", None, 2.0],
        ],
    )
