"""``sparsify plan``: the options of ``sparsify fit``, and nothing loaded or written."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from sparsify.cli.commands.plan import FORMER
from sparsify.cli.main import main
from sparsify.data import windows
from tests.conftest import Cli

RECIPES = Path(str(files("sparsify.configs"))) / "recipes"

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(cli: Cli, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Runs the command in an empty folder: its exit status, and what it wrote to both streams."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["plan", *words])
        assert list(cli.folder.iterdir()) == []
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


@pytest.fixture
def small(cli: Cli) -> list[str]:
    """The tiny model on a CPU."""
    return [*cli.model, "--trainer.accelerator=cpu", "--data.block_size=16"]


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model, its tokenizer or text was read")

    monkeypatch.setattr("sparsify.models.base.load_model", refuse)
    monkeypatch.setattr("sparsify.models.origin.load_base", refuse)
    monkeypatch.setattr("sparsify.models.origin.load_tokenizer", refuse)
    monkeypatch.setattr("sparsify.data.TextDataModule._pack", refuse)


def found(plan: Plan, *words: str) -> dict[str, Any]:
    status, out, err = plan(*words, "--format=json")
    assert status == 0, err
    content: dict[str, Any] = json.loads(out)
    return content


def test_the_command(
    plan: Plan, small: list[str], nothing_is_loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--strategy=magnitude", *small]
    status, text, err = plan(*words, "--memory=1")
    assert (status, err) == (0, "")
    assert "magnitude on cpu: GiB a device" in text
    assert "fits 1 GiB as asked: 0.44 GiB" in text
    assert "validation and test, not counted: 16 windows a batch" in text
    status, text, _ = plan(*words, "--memory=0.1")
    assert status == 1
    assert "nothing fits 0.1 GiB: the best of these needs 0.34 GiB more" in text
    plain = found(plan, *words, "--model.calibration.samples=2")
    assert (plain["fits"], plain["short_by"], plain["changes"]) == (True, 0, "")
    assert sum(plain["tries"][0]["parts"].values()) == plain["tries"][0]["peak"]
    assert plain["tries"][0]["evaluation"] == {"logits": 16 * 16 * 64 * 4}
    monkeypatch.setattr(windows, "EVAL_LOGITS", 3 * 16 * 64 * 4)
    assert found(plan, *words)["tries"][0]["settings"]["data.eval_batch_size"] == 3
    asked = found(plan, *words, "--data.eval_batch_size=5")["tries"][0]
    assert asked["settings"]["data.eval_batch_size"] == 5


def test_what_is_printed_can_be_typed(plan: Plan, small: list[str]) -> None:
    words = ["--strategy=sr_ste", *small, "--data.batch_size=16", "--data.block_size=32"]
    words += ["--model.calibration.samples=1", "--trainer.accelerator=cuda"]
    memory = f"--memory={1e6 / 2**30}"  # a third of what it takes
    content = found(plan, *words, memory)
    assert content["changes"] == "--model.gradient_checkpointing true --data.batch_size 4"
    assert [one["change"] for one in content["tries"][2:]] == [
        "--data.batch_size 8",
        "--data.batch_size 4",
    ]
    best = content["tries"][content["best"]]
    again = found(plan, *words, *content["changes"].split(), memory)
    assert again["tries"] == [best | {"change": ""}]


def test_options_of_every_group_are_those_of_fit(plan: Plan, small: list[str]) -> None:
    words = ["--strategy=sr_ste", *small, "--model.exclude=*.q_proj"]
    words += ['--model.overrides={"*.up_proj": "1:4"}', "--model.optimizer=torch.optim.SGD"]
    words += ["--model.optimizer.lr=0.1", "--model.distillation.weight=0.5"]
    words += ["--model.strategy.decay=2", "--trainer.precision=bf16-mixed", "--devices=2"]
    words += ["--trainer.num_nodes=2", "--shard", "--data.batch_size=3"]
    words += ["--trainer.accumulate_grad_batches=4", "--trainer.max_steps=50"]
    [one] = found(plan, *words)["tries"]
    assert one["settings"] | {"model.name_or_path": ""} == {
        "model.strategy": "sr_ste",
        "model.name_or_path": "",
        "model.pattern": "2:4",
        "model.include": None,
        "model.exclude": ["*.q_proj"],
        "model.overrides": {"*.up_proj": "1:4"},
        "model.dtype": "float32",
        "model.gradient_checkpointing": False,
        "model.gather": "plain",
        "data.batch_size": 3,
        "data.block_size": 16,
        "data.eval_batch_size": 16,
        "trainer.precision": "bf16-mixed",
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.num_nodes": 2,
        "trainer.accumulate_grad_batches": 4,
        "trainer.max_steps": 50,
        "shard": True,
    }
    parts = one["phases"]["forward"]
    assert parts["teacher"] > 0
    assert "optimizer states" not in parts
    assert one["time"]["tokens_a_step"] == 3 * 16 * 4 * 4


def test_the_time_of_a_run(plan: Plan, small: list[str]) -> None:
    words = ["--strategy=maskllm", *small, "--model.strategy.prior=magnitude"]
    [one] = found(plan, *words, "--trainer.max_steps=3600", "--utilisation=0.5")["tries"]
    time, gpu = one["time"], one["time"]["gpus"]["RTX A6000"]
    assert (time["utilisation"], time["tokens_a_step"]) == (0.5, 8 * 16)
    work = [time["work"][phase] for phase in ("forward", "backward", "optimizer step")]
    flops = sum(done["flops"].get("float32", 0) for done in work)
    assert gpu["peaks"] == {"half": 155, "single": 38.7, "memory": 0.768}
    seconds = flops / (0.5 * 38.7e12) + sum(done["moved"] for done in work) / 0.768e12
    assert gpu["step"] == pytest.approx(seconds)
    assert gpu["hours"] == pytest.approx(seconds + gpu["calibration"])  # an hour has 3600 of them
    status, text, _ = plan(*words)
    assert status == 0
    assert "work of a device, one step" in text
    assert "GPU-hours: 2,000 steps of 128 tokens, " in text
    assert "FLOP, products at 40% of peak" in text
    status, text, _ = plan(*words, "--trainer.max_steps=-1", "--trainer.max_epochs=1")
    assert "GPU-hours: each step of 128 tokens, products at 40% of peak" in text
    status, text, _ = plan("--strategy=wanda", *small)
    assert "work of a device  " in text
    assert "GPU-hours: 128 windows of 16 tokens, " in text


def test_a_recipe_is_planned_as_it_is(plan: Plan, cli: Cli, nothing_is_loaded: None) -> None:
    small = [*cli.model, "--data.block_size=16", "--trainer.accelerator=cuda"]
    [one] = found(plan, f"--config={RECIPES}/llama2_7b_maskllm.yaml", *small)["tries"]
    names = ("model.dtype", "model.gradient_checkpointing", "trainer.devices", "shard")
    assert [one["settings"][name] for name in names] == ["bfloat16", True, 8, True]
    assert one["settings"]["data.batch_size"] == 1


def test_the_settings_of_a_run_are_planned(
    cli: Cli, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cli("fit", "--strategy=maskllm", "--model.pattern=1:4", "--model.optimizer=torch.optim.SGD")
    [run] = cli.runs()
    before = sorted(tmp_path.rglob("*"))
    plans = []
    for words in (f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt"):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="^0$"):
            main(["plan", words, "--format=json"])
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1]
    assert plans[0]["tries"][0]["settings"]["model.pattern"] == "1:4"
    assert "optimizer states" not in plans[0]["tries"][0]["parts"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_began_from_an_export_is_planned(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("fit", "--strategy=magnitude", "--output.folder=prior")
    cli("fit", "--strategy=fixed_mask", "--model.strategy.prior=prior")
    checkpoint = f"--ckpt_path={cli.runs()[-1]}/checkpoints/last.ckpt"
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^0$"):
        main(["plan", checkpoint, "--format=json"])
    [planned] = json.loads(capsys.readouterr().out)["tries"]
    assert planned["settings"]["model.strategy"] == "fixed_mask"


def test_the_help_and_the_settings_are_shown(plan: Plan) -> None:
    status, out, _ = plan("--help")
    assert status == 0
    for name in (
        "--memory",
        "--utilisation",
        "--format",
        "--model.exclude",
        "--data.block_size",
        "--output.folder",
    ):
        assert f"{name} " in out
    assert "usage: sparsify plan --strategy NAME [--memory GIB]" in out
    status, out, _ = plan("--strategy=wanda", "--memory=3", "--print_config")
    assert (status, "memory: 3.0" in out) == (0, True)


@pytest.mark.parametrize("old", FORMER)
def test_each_former_option_is_answered_by_its_new_one(old: str, plan: Plan) -> None:
    status, _, err = plan("--strategy=wanda", old, "4")
    assert status == 2
    assert err == (
        "error: sparsify plan takes the options of sparsify fit: give "
        f"{FORMER[old]} in place of {old}\n"
    )


def test_former_options_are_answered_together(plan: Plan) -> None:
    words = ("--strategy=wanda", "--model=m", "--batch_size=4", "--calibration.samples", "2")
    assert plan(*words)[2].endswith(
        "give --model.name_or_path in place of --model, --data.batch_size in place of "
        "--batch_size, --model.calibration.samples in place of --calibration.samples\n"
    )


def test_a_file_of_the_models_settings(plan: Plan, small: list[str], tmp_path_factory: Any) -> None:
    file = tmp_path_factory.mktemp("settings") / "model.yaml"
    file.write_text("{pattern: 1:4}\n")
    [one] = found(plan, "--strategy=magnitude", f"--model={file}", *small)["tries"]
    assert one["settings"]["model.pattern"] == "1:4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --strategy NAME"),
        (["--strategy=mask_llm"], "there is no strategy 'mask_llm'; did you mean 'maskllm'?"),
        (["--strategy=dense", "--model.name_or_path=/no"], "no model could be loaded from '/no'"),
        (["--strategy=maskllm", "--model.pattern=8:16"], "12,870 candidates"),
        (["--strategy=wanda", "--model.exclude=*x"], "'*x' matches no linear layer"),
        (["--strategy=wanda", "--data.batch_size=0"], "batch_size is 0; it must be at least 1"),
        (["--strategy=wanda", "--memory=lots"], 'Parser key "memory"'),
        (["--strategy=wanda", "--utilisation=40"], "at most 1, a share of a GPU's peak: give "),
        (["--strategy=wanda", "--model.nome=x"], "model.nome"),
        (["--config=gone.yaml"], "File does not exist: '"),
        (
            ["--strategy=maskpro", "--devices=2", "--shard", "--model.gather=masked"],
            "give --model.gather plain",
        ),
    ],
)
def test_input_that_a_user_can_mend(words: list[str], message: str, plan: Plan) -> None:
    status, out, err = plan(*words)
    assert (status, out) == (2, "")
    assert message in err
