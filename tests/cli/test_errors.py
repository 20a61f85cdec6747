"""Input that a user can mend: one message, exit status 2, and nothing lost."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsify.cli.main import main
from sparsify.common.files import write_json
from sparsify.masking.run import Run
from sparsify.strategies.maskllm import MaskLLM
from tests.conftest import Cli, tiny_llama

Fails = Callable[..., str]


@pytest.fixture
def fails(cli: Cli, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail, and gives the message."""

    def run(command: str, *words: str, steps: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli(command, *words, steps=steps)
        err = capsys.readouterr().err
        assert stop.value.code == 2, err
        assert "Traceback" not in err
        [message] = [line for line in err.splitlines() if line.startswith("error:")]
        assert err.endswith(f"{message}\n"), "the message is the last line"
        return message

    return run


def test_an_unknown_strategy(fails: Fails) -> None:
    message = fails("fit", "--strategy", "maskllmm")
    assert "no strategy 'maskllmm'" in message
    assert "did you mean 'maskllm'?" in message
    assert "magnitude" in message


def test_a_strategy_that_cannot_be_imported_or_is_none(fails: Fails) -> None:
    assert "'nowhere.Mine' cannot be imported" in fails("fit", "--strategy", "nowhere.Mine")
    assert "must be a subclass of sparsify.SparsityStrategy" in fails(
        "fit", "--strategy", "pathlib.Path"
    )


@pytest.mark.parametrize(
    ("words", "guess"),
    [
        (["--max_steps=3"], "did you mean --trainer.max_steps?"),
        (["--model.name_or_pth", "a"], "did you mean --model.name_or_path?"),
        (["--no_such_thing=3"], "unrecognized arguments: --no_such_thing=3"),
    ],
)
def test_an_unknown_option(fails: Fails, words: list[str], guess: str) -> None:
    assert fails("fit", "--strategy=magnitude", *words).endswith(guess)


@pytest.mark.parametrize(
    ("word", "guess"),
    [("--model=a/b", "--model.name_or_path a/b"), ("--data=a.txt", "--data.train a.txt")],
)
def test_a_group_of_options_that_is_given_a_value(
    word: str, guess: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        cli("fit", "--strategy=magnitude", word)
    assert capsys.readouterr().err.endswith(f"takes a file of settings; did you mean {guess}?\n")


def test_a_word_in_place_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    for word, flag in (("Wanda", "--strategy"), ("runs/wanda/version_0", "--ckpt_path")):
        with pytest.raises(SystemExit, match="^2$"):
            main(["export", word])
        assert capsys.readouterr().err.endswith(f"; did you mean {flag} {word}?\n")


@pytest.mark.parametrize("pattern", ["4:2", "2:4:8", "x"])
def test_a_bad_pattern(fails: Fails, pattern: str) -> None:
    assert pattern in fails("fit", "--strategy", "magnitude", "--model.pattern", pattern)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing(fails: Fails, option: str) -> None:
    message = fails("fit", "--strategy", "magnitude", f"--model.{option}=*.attention.*")
    assert "'*.attention.*' matches no linear layer" in message
    assert "model.layers.*.self_attn.q_proj" in message


def test_overrides_that_cannot_be_used(cli: Cli, fails: Fails) -> None:
    magnitude = ("fit", "--strategy=magnitude")
    message = fails(*magnitude, '--model.overrides={"*.down_proj": "8:4"}')
    assert "overrides '*.down_proj': pattern '8:4'" in message
    message = fails(*magnitude, '--model.overrides={"*.attention.*": "4:8"}')
    assert "'*.attention.*' matches no layer that would be masked" in message
    assert "model.layers.*.self_attn.q_proj" in message
    cli("fit", "--strategy=maskllm", '--model.overrides={"*.down_proj": "1:4"}')
    [checkpoint] = map(str, Path().glob("runs/maskllm/*/checkpoints/last.ckpt"))
    message = fails("test", "--ckpt_path", checkpoint, '--model.overrides={"*.up_proj": "1:4"}')
    assert "give the strategy, pattern, include, exclude and overrides of its run" in message


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_precision_that_what_is_learned_cannot_have(fails: Fails, precision: str) -> None:
    message = fails("fit", "--strategy=maskllm", f"--trainer.precision={precision}")
    assert f"precision {precision}: what is learned stays in the type of its maskers" in message
    assert "--trainer.precision bf16-mixed" in message


def test_too_little_text(fails: Fails) -> None:
    Path("short.txt").write_text("w1 w2 w3")
    message = fails("fit", "--strategy", "magnitude", "--data.train=short.txt")
    assert "3 tokens are less than one block of 16" in message
    assert "--data.block_size" in message


def test_text_that_is_missing_or_unreadable(fails: Fails) -> None:
    assert "nowhere.txt does not exist" in fails(
        "fit", "--strategy", "magnitude", "--data.train=nowhere.txt"
    )
    Path("broken.jsonl.gz").write_bytes(b"this is no gzip file")
    assert "broken.jsonl.gz cannot be read" in fails(
        "fit", "--strategy", "magnitude", "--data.train=broken.jsonl.gz"
    )


def test_a_missing_model(fails: Fails) -> None:
    message = fails("fit", "--strategy", "magnitude", "--model.name_or_path", "nowhere/model")
    assert "'nowhere/model'" in message
    assert "--model.name_or_path takes" in message


def test_a_checkpoint_of_another_base_model(
    cli: Cli, fails: Fails, tokenizer: object, tmp_path: Path
) -> None:
    cli("fit", "--strategy", "maskllm")
    checkpoint = cli.runs()[0] / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    message = fails(
        "test", "--ckpt_path", str(checkpoint), "--model.name_or_path", str(tmp_path / "other")
    )
    assert "the checkpoint belongs to base model" in message
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_of_other_masks(cli: Cli, fails: Fails) -> None:
    cli("fit", "--strategy", "maskllm")
    checkpoint = str(cli.runs()[0] / "checkpoints" / "last.ckpt")
    assert "do not fit this run" in fails(
        "test", "--ckpt_path", checkpoint, "--strategy", "magnitude"
    )


def test_a_checkpoint_that_is_garbage_or_missing(fails: Fails) -> None:
    Path("garbage.ckpt").write_bytes(b"garbage")
    for name, reason in (
        ("garbage.ckpt", "this is not a checkpoint that sparsify wrote, or it is damaged"),
        ("missing.ckpt", "there is no such file"),
    ):
        message = fails("export", "--strategy", "maskllm", "--ckpt_path", name)
        assert f"--ckpt_path {name}: {reason}" in message
    assert Path("garbage.ckpt").read_bytes() == b"garbage"


class Breaks(MaskLLM):
    """Its loss is not a number in step ``at``, counted from zero."""

    def __init__(self, at: int = 3) -> None:
        super().__init__(prior=None)
        self.at = at

    def loss(self, run: Run) -> torch.Tensor:
        loss = super().loss(run)
        if run.draw().step == self.at:
            run.task_loss = run.task_loss * float("nan")
            loss = loss * float("nan")
        return loss


@pytest.mark.parametrize("saved_every", [2, 4, 5])
@pytest.mark.parametrize("log_every", [5, 100])
def test_a_loss_that_is_not_finite(
    cli: Cli, fails: Fails, saved_every: int, log_every: int
) -> None:
    message = fails(
        "fit",
        "--strategy=tests.cli.test_errors.Breaks",
        f"--trainer.log_every_n_steps={log_every}",
        f"--checkpoint.every_n_steps={saved_every}",
        steps=6,
    )
    assert "not finite since optimizer step 3" in message
    [run] = cli.runs()
    assert not (run / "export").exists()
    checkpoints = list(run.rglob("*.ckpt"))
    assert sorted(path.name for path in checkpoints) == (
        ["last.ckpt", "step-00000002.ckpt"] if saved_every == 2 else []
    )
    if checkpoints:
        saved = torch.load(checkpoints[0], weights_only=True)
        assert saved["global_step"] == 2
        assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_a_full_disk_at_the_export(cli: Cli, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: dict) -> None:
        if path.name == "sparsity_manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, content)

    monkeypatch.setattr("sparsify.export.folder.write_json", full)
    message = fails("fit", "--strategy", "maskllm")
    [run] = cli.runs()
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert "disk is full" in message
    command = f"sparsify export --ckpt_path {checkpoint.relative_to(cli.folder)}"
    assert command in message
    assert not (run / "export").exists()
    assert not list(run.glob(".export*"))
    assert json.loads((run / "result.json").read_text())["scores"]
    monkeypatch.undo()
    monkeypatch.chdir(cli.folder)
    monkeypatch.setattr("sys.argv", ["sparsify"])
    main(
        [
            *command.split()[1:],
            "--output.folder=out",
            "--trainer.enable_progress_bar=false",
            "--trainer.accelerator=cpu",
        ]
    )
    assert Path("out/model.safetensors").is_file()


def test_a_checkpoint_with_nothing_left_to_learn(cli: Cli, fails: Fails) -> None:
    cli("fit", "--strategy=maskllm", steps=2)
    checkpoint = str(cli.runs()[0] / "checkpoints" / "last.ckpt")
    message = fails("fit", "--strategy=maskllm", "--ckpt_path", checkpoint, steps=2)
    assert "the checkpoint is at step 2 of 2" in message
    assert "--trainer.max_steps" in message


def test_a_checkpoint_that_lost_its_place_in_the_data(cli: Cli, fails: Fails) -> None:
    cli("fit", "--strategy=maskllm", steps=3)
    path = cli.runs()[0] / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["resumable"] = False
    torch.save(checkpoint, path)
    message = fails("fit", "--strategy=maskllm", "--ckpt_path", str(path), steps=5)
    assert "saved after fit had returned" in message


def test_the_embedded_text_is_not_learned_from_for_another_model(cli: Cli) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        cli("fit", "--strategy=maskllm", "--data.block_size=16", data=False)


def test_a_checkpoint_of_another_pattern(cli: Cli, fails: Fails) -> None:
    cli("fit", "--strategy=maskllm", steps=2)
    checkpoint = str(cli.runs()[0] / "checkpoints" / "last.ckpt")
    message = fails("fit", "--ckpt_path", checkpoint, "--model.pattern=1:4", steps=4)
    assert "down_proj.masker.logits_OKG is (32, 6, 16) in it and (32, 4, 16) here" in message


def test_a_run_of_no_steps(fails: Fails) -> None:
    assert "give --trainer.max_steps" in fails("fit", "--strategy=maskllm", steps=0)


@pytest.mark.parametrize("command", ["fit", "test", "export"])
def test_neither_strategy_nor_checkpoint(fails: Fails, command: str) -> None:
    message = fails(command)
    assert f"sparsify {command} needs --strategy NAME (admm, dense, " in message
    assert "magnitude, maskllm, " in message
    assert "--ckpt_path" in message


@pytest.mark.parametrize(
    "name", ["fsdp_cpu_offload", "lightning.pytorch.strategies.ModelParallelStrategy"]
)
def test_lightnings_own_sharding(fails: Fails, name: str) -> None:
    message = fails("fit", "--strategy=maskllm", "--trainer.strategy", name)
    assert f"strategy {name.rpartition('.')[2]}: " in message
    assert "give --trainer.strategy fsdp" in message


def test_a_folder_given_as_a_checkpoint(cli: Cli, fails: Fails) -> None:
    cli("fit", "--strategy=magnitude", steps=1)
    message = fails("test", "--ckpt_path", str(cli.runs()[0] / "export"))
    assert "give the checkpoints/last.ckpt of a run" in message


def test_trainer_settings_that_lightning_refuses(fails: Fails) -> None:
    magnitude = ("fit", "--strategy=magnitude")
    message = fails(*magnitude, "--trainer.limit_train_batches=7.5")
    assert "the trainer refuses its settings" in message
    assert "7.5" in message
    message = fails("fit", "--strategy=maskllm", "--trainer.val_check_interval=99999")
    assert "val_check_interval 99999 is more than the " in message
    message = fails(*magnitude, "--trainer.limit_train_batches=0")
    assert "limit_train_batches 0 leaves no batch" in message


def test_a_step_that_is_longer_than_an_epoch_is_a_warning(cli: Cli) -> None:
    with pytest.warns(UserWarning, match="accumulate_grad_batches is 999, and an epoch has 62 "):
        cli("fit", "--strategy=maskllm", "--trainer.accumulate_grad_batches=999", steps=1)


def test_results_lie_under_the_root_that_was_given(cli: Cli) -> None:
    cli("fit", "--strategy=magnitude", "--trainer.default_root_dir", "elsewhere")
    assert list(Path().glob("elsewhere/magnitude/version_0/result.json"))
    assert not Path("runs").exists()
