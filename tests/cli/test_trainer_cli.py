"""The command line, as a user types it, on the tiny model."""

import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsify.cli import short_forms
from sparsify.cli.main import main
from sparsify.cli.short_forms import expand
from sparsify.cli.table import TRAINER_COMMANDS
from sparsify.cli.trainer_cli import SparsifyCLI
from sparsify.common.errors import SparsifyError
from sparsify.export.mask_file.file import read_masks
from sparsify.masking.pattern import NMPattern
from tests.conftest import Cli

CONFIGS = sorted(
    path.name for path in files("sparsify.configs").iterdir() if path.name.endswith(".yaml")
)


def result(run: Path, name: str = "result.json") -> dict:
    return json.loads((run / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["dense", "Magnitude", "MaskLLM"])
def test_fit_ends_with_a_result_an_export_and_a_checkpoint(cli: Cli, name: str) -> None:
    cli("fit", "--strategy", name)
    [run] = cli.runs()
    found = result(run)
    assert (
        found["run"]["strategy"]["class"]
        == f"sparsify.strategies.{name.lower()}.{'Dense' if name == 'dense' else name}"
    )
    assert found["run"]["steps"] == (2 if name == "MaskLLM" else 0)
    assert (run / "checkpoints" / "last.ckpt").is_file()
    AutoModelForCausalLM.from_pretrained(run / "export")
    zeros = (
        load_file(run / "export" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        .eq(0)
        .float()
        .mean()
    )
    assert zeros == (0 if name == "dense" else 0.5)


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "4:8"])
def test_patterns(cli: Cli, pattern: str) -> None:
    cli(
        "fit",
        "--strategy",
        "maskllm",
        "--model.pattern",
        pattern,
        "--output.folder",
        "out",
        steps=1,
    )
    n, m = map(int, pattern.split(":"))
    weights = load_file("out/model.safetensors")
    for name in read_masks(Path("out")):
        assert (weights[f"{name}.weight"].unflatten(1, (-1, m)) != 0).sum(-1).eq(n).all(), name


OVERRIDES = {"*.down_proj": "4:8", "*.0.mlp.*": "1:4", "*.0.mlp.up*": "dense"}


@pytest.mark.parametrize("where", ["command line", "file"])
def test_overrides_of_single_layers(cli: Cli, where: str) -> None:
    if where == "file":
        Path("mixed.yaml").write_text(
            "model:\n  overrides:\n"
            + "".join(f'    "{glob}": "{text}"\n' for glob, text in OVERRIDES.items())
        )
    words = {"file": "--config=mixed.yaml", "command line": json.dumps(OVERRIDES)}[where]
    words = words if where == "file" else f"--model.overrides={words}"
    cli("fit", "--strategy=maskllm", words, steps=2)
    [run] = cli.runs()
    assert result(run)["run"]["pattern"] == "2:4"
    assert list(result(run)["run"]["overrides"].items()) == list(OVERRIDES.items())
    # 7 layers a block; of the first, gate and down (2048 weights each) are 1:4 and up is dense.
    a_block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    zeros = 0.5 * 2 * a_block + 2048 * (0.25 + 0.25 - 0.5)
    assert result(run)["run"]["sparsity"] == pytest.approx(zeros / (2 * a_block))
    manifest = json.loads((run / "export" / "sparsity_manifest.json").read_text())
    patterns = {name: layer["pattern"] for name, layer in manifest["layers"].items()}
    assert patterns["model.layers.0.mlp.down_proj"] == "1:4"
    assert patterns["model.layers.1.mlp.down_proj"] == "4:8"
    assert "model.layers.0.mlp.up_proj" not in patterns

    checkpoint = f"--ckpt_path={run}/checkpoints/last.ckpt"
    saved = torch.load(checkpoint.partition("=")[2], weights_only=True)["hyper_parameters"]
    assert list(saved["overrides"].items()) == list(OVERRIDES.items())
    main(["export", checkpoint, *cli.trainer, "--output.folder=again"])
    before, after = (load_file(f / "model.safetensors") for f in (run / "export", Path("again")))
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    main(["fit", checkpoint, *cli.trainer, "--trainer.max_steps=3"])
    assert result(cli.runs()[-1])["run"]["overrides"] == OVERRIDES


def test_paths_of_any_characters_are_resumed_and_compared(
    cli: Cli, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = "text \U0001f600\u3000"
    shutil.copytree(text, folder)
    data = [f"--data.{split}={folder}/{split}.txt" for split in ("train", "validation", "test")]
    cli("fit", "--strategy=maskllm", *data)
    [run] = cli.runs()
    main(["fit", f"--ckpt_path={run}", *cli.trainer, "--trainer.max_steps=3"])
    shutil.copytree(cli.runs()[-1], "run \U0001f600")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^0$"):
        main(["compare", "run \U0001f600"])
    assert "cannot be read" not in capsys.readouterr().out


def test_overrides_on_the_command_line_replace_those_of_a_file(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mixed.yaml").write_text('model: {overrides: {"*q_proj": "1:4"}}\n')
    words = ["--config=mixed.yaml", '--model.overrides={"*k_proj": "dense"}', "--print_config"]
    with pytest.raises(SystemExit, match="^0$"):
        cli("fit", "--strategy=magnitude", *words)
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["model"]["overrides"] == {"*k_proj": "dense"}


def test_maskllm_refuses_a_pattern_with_too_many_candidates(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        cli("fit", "--strategy", "maskllm", "--model.pattern", "8:16")
    assert "12,870" in capsys.readouterr().err


def test_validate_and_test_without_a_checkpoint_measure_the_starting_masks(cli: Cli) -> None:
    cli("validate", "--strategy", "magnitude")
    cli("test", "--strategy", "magnitude")
    cli("test", "--strategy", "dense")
    validated, tested, dense = cli.runs()
    found = result(validated, "result-validation.json")
    assert found["protocol"]["split"] == "validation"
    assert found["scores"]["overall"]["windows"] == 400 // 16
    assert result(tested)["scores"]["overall"]["loss"] != result(dense)["scores"]["overall"]["loss"]


def test_a_checkpoint_brings_its_settings_and_the_command_line_wins(cli: Cli) -> None:
    cli(
        "fit",
        "--strategy",
        "maskllm",
        "--model.pattern",
        "1:4",
        "--model.optimizer.init_args.lr=0.1",
        steps=3,
    )
    checkpoint = str(cli.runs()[0] / "checkpoints" / "last.ckpt")
    bare = [
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        "--ckpt_path",
        checkpoint,
    ]
    main(["test", *bare, "--data.eval_batch_size", "4"])
    main(["validate", *bare])
    main(["export", *bare, "--output.folder", "again"])
    fitted, tested, validated, _ = cli.runs()
    for name, score in result(fitted)["scores"].items():
        assert result(tested)["scores"][name] == pytest.approx(score, rel=1e-5)
    assert result(tested)["run"]["pattern"] == "1:4"
    assert result(tested)["run"]["steps"] == 3
    assert result(validated, "result-validation.json")["run"]["pattern"] == "1:4"
    settings = yaml.safe_load((tested / "config.yaml").read_text())
    assert settings["data"]["eval_batch_size"] == 4
    assert settings["data"]["block_size"] == 16
    before, after = (load_file(f / "model.safetensors") for f in (fitted / "export", Path("again")))
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_an_existing_export_is_only_replaced_on_request(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("export", "--strategy", "magnitude", "--output.folder", "out")
    before = Path("out/model.safetensors").read_bytes()
    for command in ("fit", "export"):
        with pytest.raises(SystemExit, match="^2$"):
            cli(command, "--strategy", "magnitude", "--model.pattern=1:4", "--output.folder", "out")
        assert "earlier export" in capsys.readouterr().err
    assert not list(Path().glob("runs/*/*/checkpoints")), "fit trained before it refused"
    assert Path("out/model.safetensors").read_bytes() == before
    cli(
        "export",
        "--strategy",
        "magnitude",
        "--model.pattern=1:4",
        "--output.folder=out",
        "--output.overwrite=true",
    )
    assert Path("out/model.safetensors").read_bytes() != before


def test_one_batch_is_not_all_of_them(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever modules were imported first."""
    names = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches")
    names = (*names, "limit_predict_batches", "val_check_interval")
    for text, value in (("1", 1), ("1.0", 1.0), ("0.5", 0.5)):
        words = [f"--trainer.{name}={text}" for name in names]
        with pytest.raises(SystemExit, match="^0$"):
            cli("fit", "--strategy=dense", *words, "--print_config")
        found = yaml.safe_load(capsys.readouterr().out)["trainer"]
        assert [(found[name], type(found[name])) for name in names] == [(value, type(value))] * 6


def test_a_run_tests_as_many_batches_as_it_is_told(cli: Cli) -> None:
    words = ("--strategy=magnitude", "--data.eval_batch_size=2", "--trainer.limit_test_batches=1")
    for command in ("fit", "test"):
        cli(command, *words)
    fit, test = (json.loads((run / "result.json").read_text()) for run in cli.runs())
    assert fit["scores"] == test["scores"]
    assert fit["scores"]["overall"]["windows"] == 2


def test_print_config_gives_a_config_that_runs_the_same(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "--strategy",
        "maskllm",
        "--model.strategy.alpha=5",
        "--model.optimizer.init_args.lr=0.05",
    ]
    with pytest.raises(SystemExit, match="^0$"):
        cli("fit", *given, "--print_config")
    Path("saved.yaml").write_text(capsys.readouterr().out)
    cli("fit", *given)
    main(["fit", "--config", "saved.yaml"])
    first, second = map(result, cli.runs())
    assert first["scores"] == second["scores"]
    assert first["run"]["strategy"] == second["run"]["strategy"]
    assert first["run"]["strategy"]["settings"]["alpha"] == 5


@pytest.mark.parametrize(
    ("name", "trace"),
    [("CSV", "metrics.csv"), ("tensorboard", "events.out.*"), ("wandb", "*.wandb")],
)
def test_loggers(cli: Cli, name: str, trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cli("fit", "--strategy", "maskllm", "--logger", name, "--trainer.log_every_n_steps=1")
    assert list(Path("runs").rglob(trace))
    assert len(list(Path("runs").rglob("result.json"))) == 1
    if name == "wandb":
        import wandb

        wandb.finish()


def test_an_unknown_logger_is_refused(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        cli("fit", "--strategy", "dense", "--logger", "cvs")
    assert (
        capsys.readouterr().err
        == "error: there is no logger 'cvs'; there are csv, tensorboard, wandb, "
        "or --trainer.logger CLASS\n"
    )


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_logger_whose_package_is_missing(
    name: str, cli: Cli, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_forms, "find_spec", lambda package: None)
    with pytest.raises(SystemExit, match="^2$"):
        cli("fit", "--strategy", "dense", "--logger", name)
    assert capsys.readouterr().err == (
        f"error: --logger {name} needs the package {name}, which is not installed: "
        f"pip install 'sparsify-llm[{name}]'\n"
    )


def test_help(capsys: pytest.CaptureFixture[str], cli: Cli) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "sparsify", "--help"], capture_output=True, text=True, check=True
    )
    assert out.stderr == ""
    assert "N:M sparse masks" in out.stdout
    for command in ("fit", "validate", "test", "export", "sensitivity", "budget"):
        assert f"    {command} " in out.stdout
    with pytest.raises(SystemExit, match="^0$"):
        main(["fit", "--help"])
    page = capsys.readouterr().out
    for option in (
        "--strategy NAME",
        "--logger NAME",
        "--model.pattern",
        "--data.train",
        "--output.folder",
        "--ckpt_path",
    ):
        assert option in page


@pytest.mark.parametrize("config", CONFIGS)
def test_packaged_configs_run(cli: Cli, config: str) -> None:
    cli(
        "fit",
        "--config",
        str(files("sparsify.configs") / config),
        *cli.model,
        *cli.data,
        "--trainer.max_steps=2",
    )
    assert result(cli.runs()[0])["scores"]


MY_STRATEGY = Path(__file__).parents[1] / "assets" / "my_package.py"


def test_a_strategy_of_a_file_in_the_current_folder(cli: Cli) -> None:
    Path("my_package.py").write_text(MY_STRATEGY.read_text())
    try:
        cli("fit", "--strategy", "my_package.MyStrategy", "--output.folder", "out")
        checkpoint = str(cli.runs()[0] / "checkpoints" / "last.ckpt")
        cli("test", "--strategy", "my_package.MyStrategy", "--ckpt_path", checkpoint)
    finally:
        sys.modules.pop("my_package", None)
    first, second = map(result, cli.runs())
    assert first["scores"] == second["scores"]
    weight = load_file(cli.model[0].partition("=")[2] + "/model.safetensors")[
        "model.layers.1.mlp.down_proj.weight"
    ]
    kept = read_masks(Path("out"))["model.layers.1.mlp.down_proj"]
    score = weight.abs() / weight.abs().sum(0) + weight.abs() / weight.abs().sum(1, keepdim=True)
    assert torch.equal(kept, NMPattern(2, 4).top(score))


@pytest.mark.parametrize("exclude", ["*q_proj", '["*q_proj"]', '["*q_proj", "model.layers.0.*"]'])
def test_exclude_takes_a_glob_or_a_list(cli: Cli, exclude: str) -> None:
    cli("export", "--strategy", "magnitude", "--model.exclude", exclude, "--output.folder", "out")
    masks = read_masks(Path("out"))
    assert len(masks) == (6 if "layers.0" in exclude else 12)
    assert not any(name.endswith("q_proj") for name in masks)


@pytest.mark.parametrize("prior", ["out", "out/masks.nmask"])
def test_a_prior_from_a_file_starts_where_the_strategy_of_that_name_would(
    cli: Cli, prior: str
) -> None:
    cli("export", "--strategy=magnitude", "--output.folder=out")
    cli("fit", "--strategy=maskllm", "--model.strategy.prior=magnitude")
    cli("fit", "--strategy=maskllm", f"--model.strategy.prior={prior}")
    _, by_name, by_file = map(result, cli.runs())
    assert by_file["scores"] == by_name["scores"]


def test_a_checkpoint_needs_its_prior_no_more(cli: Cli) -> None:
    cli("export", "--strategy=magnitude", "--output.folder=some/out")
    cli("fit", "--strategy=maskllm", "--model.strategy.prior=some/out")
    shutil.rmtree("some")
    [checkpoint] = map(str, Path().glob("runs/maskllm/*/checkpoints/last.ckpt"))
    cli("export", "--ckpt_path", checkpoint, "--output.folder=again")
    assert Path("again").is_dir()


def test_checkpoints_can_be_turned_off(cli: Cli) -> None:
    cli("fit", "--strategy=maskllm", "--trainer.enable_checkpointing=false")
    assert not list(Path().rglob("*.ckpt"))
    assert (cli.runs()[0] / "export").is_dir()


def test_a_command_makes_only_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["sparsify", "export", "--ckpt_path", "fit"])
    assert set(SparsifyCLI.subcommands()) == {"export"}
    monkeypatch.setattr("sys.argv", ["sparsify"])
    assert set(SparsifyCLI.subcommands()) == set(TRAINER_COMMANDS)


def test_the_documentation_shows_this_strategy_and_it_is_short() -> None:
    code = MY_STRATEGY.read_text()
    assert len(code.splitlines()) <= 20
    page = MY_STRATEGY.parents[2] / "docs" / "write_your_own.md"
    assert code in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("flags", [["--shard"], ["--trainer.strategy", "fsdp"]])
def test_short_forms_of_several_processes(
    cli: Cli, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main(["fit", "--strategy=maskllm", "--devices", "8", *flags, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert int(config["devices"]) == 8
    assert config["strategy"]["class_path"] == "sparsify.training.parallel.Sharded"
    assert config["strategy"]["init_args"]["save_distributed_checkpoint"] is False


def test_a_strategy_s_import_path_is_as_its_short_name() -> None:
    short = expand(["fit", "--strategy=maskllm"])
    assert any(word.endswith("maskllm.yaml") for word in short)
    assert expand(["fit", "--strategy", "sparsify.strategies.maskllm.MaskLLM"]) == short


def test_results_go_where_a_config_says(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"trainer:\n  default_root_dir: {tmp_path}/mine\n")
    words = expand(["fit", "--strategy=dense", "--config", str(config)])
    assert f"--trainer.logger.save_dir={tmp_path}/mine" in words
    given = f"--trainer.default_root_dir={tmp_path}/other"
    words = expand(["fit", given, "--strategy=dense", f"--config={config}"])
    assert f"--trainer.logger.save_dir={tmp_path}/other" in words
    with pytest.raises(SparsifyError, match="run.yaml is no folder that can be written to; give"):
        expand(["fit", "--strategy=dense", f"--trainer.default_root_dir={config}/below"])


@pytest.mark.parametrize(
    "strategy",
    [
        "class_path: sparsify.strategies.wanda.Wanda",
        "sparsify.strategies.wanda.Wanda",
        "Wanda",
    ],
)
def test_a_run_has_the_name_of_the_strategy_in_its_config(strategy: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    inner = f"\n    {strategy}" if ":" in strategy else f" {strategy}"
    config.write_text(f"model:\n  strategy:{inner}\n")
    assert "--trainer.logger.name=wanda" in expand(["fit", f"--config={config}"])
    named = expand(["fit", "--strategy=magnitude", f"--config={config}"])
    assert "--trainer.logger.name=magnitude" in named
    assert "--trainer.logger.name=test" in expand(["test", f"--config={config}"])
    config.write_text("model:\n  pattern: '2:4'\n")
    assert "--trainer.logger.name=fit" in expand(["fit", f"--config={config}"])


@pytest.mark.parametrize(
    "words",
    [
        ["--strategy", "wanda", "--model.strategy.help"],
        ["--model.strategy.help", "Wanda"],
        ["--model.strategy.help=sparsify.strategies.wanda.Wanda"],
        ["--strategy=magnitude", "--model.strategy.help", "wanda"],
    ],
)
def test_the_settings_of_a_strategy_are_asked_for_by_its_name(words: list[str]) -> None:
    assert "--model.strategy.help=sparsify.strategies.wanda.Wanda" in expand(["fit", *words])


def test_help_of_an_unknown_strategy_is_an_error_and_without_a_name_it_is_left() -> None:
    with pytest.raises(SparsifyError, match="did you mean 'wanda'"):
        expand(["fit", "--model.strategy.help", "wandb"])
    assert "--model.strategy.help" in expand(["fit", "--model.strategy.help"])
    assert "--model.strategy.help" in expand(["fit", "--model.strategy.help", "--devices=1"])
