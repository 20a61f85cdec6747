"""The recipes of papers: what they ask for, and two steps of each on a tiny model of its family."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from sparsify.cli.main import main
from tests.conftest import EOS, SIZES, Cli
from tests.test_recipes import PAPERS

RECIPES = Path(str(files("sparsify.configs"))) / "recipes"
C4 = {"path": "hf://allenai/c4", "config": "en", "streaming": True}
FINEWEB = {"path": "hf://HuggingFaceFW/fineweb", "config": "sample-10BT", "streaming": True}
HELD_OUT = C4 | {"split": "validation", "documents": 1000}
WIKITEXT2 = {
    "path": "hf://Salesforce/wikitext",
    "config": "wikitext-2-raw-v1",
    "split": "test",
    "joined": True,
}
SOURCES: dict[str, dict[str, Any]] = {
    "c4": {"c4": C4},
    "c4, 2048 documents": {"c4": C4 | {"documents": 2048}},
    "fineweb": {"fineweb": FINEWEB},
}


class Recipe(NamedTuple):
    """What the papers, or the authors' scripts, say; written down apart from the recipes."""

    model: str
    family: str
    strategy: str
    steps: int
    windows: int  # of a step, on all devices together
    block: int
    text: str
    options: dict[str, Any]  # by dotted name in the settings


MASKLLM = {
    "model.strategy.init_args.prior": "sparsegpt",
    "model.strategy.init_args.alpha": 3,
    "model.strategy.init_args.init_std": 0.01,
    "model.strategy.init_args.kappa": {"start": 100, "end": 500, "shape": "linear"},
    "model.strategy.init_args.tau": {"start": 4, "end": 0.05, "shape": "linear"},
    "model.strategy.init_args.penalty_weight": {"start": 1e-5, "end": 0, "shape": "linear"},
    "model.strategy.init_args.hard": False,
    "model.optimizer.class_path": "torch.optim.AdamW",
    "model.optimizer.init_args.lr": 5e-4,
    "model.optimizer.init_args.weight_decay": 0.1,
    "model.optimizer.init_args.betas": [0.9, 0.95],
    "model.optimizer.init_args.eps": 1e-8,
    "model.lr_final": 0.1,
    "model.warmup_steps": 0,
    "model.calibration.samples": 128,
    "model.calibration.activations": "dense",
    "model.dtype": "bfloat16",
    "trainer.gradient_clip_val": 1.0,
}
LLAMA2_SCRIPT = MASKLLM | {"model.optimizer.init_args.eps": 1e-5}
PATCH = MASKLLM | {"model.optimizer.init_args.lr": 1e-3, "model.warmup_steps": 5}
MASKPRO = {
    "model.strategy.init_args.prior.class_path": "sparsify.strategies.sparsegpt.SparseGPT",
    "model.strategy.init_args.prior.init_args.update_weights": True,
    "model.strategy.init_args.strength": 10,
    "model.strategy.init_args.grading": 0,
    "model.strategy.init_args.lr": 50,
    "model.strategy.init_args.estimator": "residual",
    "model.strategy.init_args.memory": 0.99,
    "model.calibration.samples": 2048,
    "model.lr_final": 1.0,
    "model.warmup_steps": 0,
}
ONE_SHOT = {
    "model.dtype": "float16",
    "model.calibration.samples": 128,
    "model.calibration.activations": "pruned",
}
PROXSPARSE = {
    "model.strategy.init_args.strength": 0.25,
    "model.strategy.init_args.coupled": False,
    "model.strategy.init_args.anchor": 0,
    "model.optimizer.class_path": "torch.optim.AdamW",
    "model.optimizer.init_args.lr": 1e-4,
    "model.optimizer.init_args.weight_decay": 0,
    "model.optimizer.init_args.betas": [0.9, 0.999],
    "model.lr_final": 0,
    "model.warmup_steps": 40,
    "model.dtype": "float32",
    "trainer.precision": "bf16-mixed",
    "trainer.gradient_clip_val": 1.0,
}
L7, L13, L3 = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf", "meta-llama/Meta-Llama-3-8B"
MOST = "c4, 2048 documents"
EXPECTED = {
    "llama2_7b_maskllm": Recipe(L7, "llama2", "MaskLLM", 2000, 256, 4096, "c4", LLAMA2_SCRIPT),
    "llama2_13b_maskllm": Recipe(L13, "llama2", "MaskLLM", 2000, 256, 4096, "c4", LLAMA2_SCRIPT),
    "llama3_8b_maskllm": Recipe(L3, "llama3", "MaskLLM", 2000, 256, 4096, "c4", MASKLLM),
    "llama32_1b_maskllm": Recipe(
        "meta-llama/Llama-3.2-1B", "llama3.2", "MaskLLM", 2000, 256, 4096, "fineweb", PATCH
    ),
    "qwen25_05b_maskllm": Recipe(
        "Qwen/Qwen2.5-0.5B", "qwen2.5", "MaskLLM", 2000, 256, 4096, "fineweb", PATCH
    ),
    "llama2_7b_maskpro": Recipe(L7, "llama2", "MaskPro", 10000, 32, 128, MOST, MASKPRO),
    "llama3_8b_maskpro": Recipe(L3, "llama3", "MaskPro", 10000, 32, 128, MOST, MASKPRO),
    "llama2_7b_sparsegpt": Recipe(
        L7,
        "llama2",
        "SparseGPT",
        1,
        1,
        2048,
        "c4",
        ONE_SHOT
        | {
            "model.strategy.init_args.update_weights": True,
            "model.strategy.init_args.damping": 0.01,
        },
    ),
    "llama2_7b_wanda": Recipe(L7, "llama2", "Wanda", 1, 1, 2048, "c4", ONE_SHOT),
    "llama2_7b_proxsparse": Recipe(L7, "llama2", "ProxSparse", 400, 4, 4096, "c4", PROXSPARSE),
}


def tiny(family: str) -> PreTrainedModel:
    """A random model with what is special of the family."""
    attention = {"num_key_value_heads": 4 if family == "llama2" else 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if family == "llama3.2":
        rope |= {
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    tied = {"tie_word_embeddings": family in ("llama3.2", "qwen2.5")}
    sizes: dict[str, Any] = SIZES | attention | tied | {"rope_parameters": rope}
    torch.manual_seed(0)
    if family != "qwen2.5":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def letters() -> Qwen2Tokenizer:
    """Of the class that Transformers takes for a Qwen2 model, whatever was saved beside it."""
    vocab = {token: i for i, token in enumerate([EOS, *"w0123456789Ġ"])}
    return Qwen2Tokenizer(vocab=vocab, merges=[], eos_token=EOS, pad_token=EOS, unk_token=EOS)


@pytest.fixture(scope="module")
def families(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Path]:
    """Folders that ``--model.name_or_path`` takes."""
    folders = {}
    for family in sorted({recipe.family for recipe in EXPECTED.values()}):
        folders[family] = tmp_path_factory.mktemp("models") / family
        tiny(family).save_pretrained(folders[family])
        own = letters() if family == "qwen2.5" else tokenizer
        own.save_pretrained(folders[family])
    return folders


def printed(name: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """All settings, as the command line reads them from the recipe."""
    with pytest.raises(SystemExit, match="^0$"):
        main(["fit", f"--config={RECIPES / name}.yaml", *more, "--print_config"])
    settings: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return settings


def value(settings: dict[str, Any], name: str) -> Any:
    for key in name.split("."):
        settings = settings[key]
    return settings


def given(source: dict[str, Any]) -> dict[str, Any]:
    """Of a source what is not the default."""
    default = {"split": "train", "text_key": "text", "shuffle_buffer": 1000}
    return {
        key: value
        for key, value in source.items()
        if value not in (None, False) and value != default.get(key)
    }


def test_every_recipe_of_a_paper_has_its_settings_written_down() -> None:
    assert {file.stem for file in PAPERS} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_settings_are_the_papers(name: str, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    expected, settings = EXPECTED[name], printed(name, capsys)
    model, data, trainer = (settings[part] for part in ("model", "data", "trainer"))
    assert model["name_or_path"] == expected.model
    assert model["pattern"] == "2:4"
    assert model["strategy"]["class_path"].rpartition(".")[2] == expected.strategy
    assert {key: value(settings, key) for key in expected.options} == expected.options
    assert trainer["max_steps"] == expected.steps
    accumulated = trainer["accumulate_grad_batches"]
    assert trainer["devices"] * data["batch_size"] * accumulated == expected.windows
    # A model that does not fit one device is divided, and its checkpoints are not gathered.
    if trainer["devices"] > 1:
        assert trainer["strategy"] == {
            "class_path": "sparsify.training.parallel.Sharded",
            "init_args": trainer["strategy"]["init_args"] | {"save_distributed_checkpoint": True},
        }
    assert data["block_size"] == expected.block
    found = {
        split: {source: given(settings) for source, settings in data[split].items()}
        for split in ("train", "validation", "test")
    }
    assert found == {
        "train": SOURCES[expected.text],
        "validation": {"c4": HELD_OUT},
        "test": {"wikitext2": WIKITEXT2},
    }


def words(name: str, families: dict[str, Path], cli: Cli) -> list[str]:
    """A recipe's command, with a tiny model and text in place of its own, on one CPU."""
    return [
        "fit",
        f"--config={RECIPES / name}.yaml",
        f"--model.name_or_path={families[EXPECTED[name].family]}",
        "--model.dtype=float32",
        "--model.calibration.samples=8",
        *cli.data,
        *cli.trainer,
        "--trainer.max_steps=2",
        "--trainer.accumulate_grad_batches=1",
        "--trainer.val_check_interval=1",
        "--trainer.devices=1",
        "--trainer.strategy=auto",
    ]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_makes_steps(name: str, families: dict[str, Path], cli: Cli) -> None:
    main(words(name, families, cli))
    (run,) = cli.runs()
    result = json.loads((run / "result.json").read_text())
    assert result["run"]["sparsity"] == 0.5
    assert result["run"]["steps"] == (0 if EXPECTED[name].steps == 1 else 2)
    folder = families[EXPECTED[name].family]
    base = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    sparse = AutoModelForCausalLM.from_pretrained(run / "export").state_dict()
    assert sparse.keys() == base.keys()
    updates = name == "llama2_7b_sparsegpt"
    for key, weight in sparse.items():
        if "_proj.weight" in key:
            assert (weight.unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()
            assert updates or torch.equal(weight, base[key] * (weight != 0))
        else:  # biases too
            assert torch.equal(weight, base[key])


def test_another_recipes_mask_is_a_prior_and_the_test_windows_may_be_longer(
    families: dict[str, Path], cli: Cli
) -> None:
    main(words("llama2_7b_sparsegpt", families, cli))
    prior = cli.runs()[-1] / "export"
    main([*words("llama2_7b_maskpro", families, cli), f"--model.strategy.prior={prior}"])
    run = cli.runs()[-1]
    longer = ["--data.block_size=32", "--data.eval_batch_size=1"]
    main(["test", f"--ckpt_path={run}", *longer, *cli.trainer])
    found = [json.loads((folder / "result.json").read_text()) for folder in (run, cli.runs()[-1])]
    assert [result["protocol"]["data"]["block_size"] for result in found] == [16, 32]


def test_the_dense_model_under_a_recipes_protocol_and_another_text(
    families: dict[str, Path], cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    other = f"--data={RECIPES}/data/fineweb_4096.yaml"
    settings = printed("llama2_7b_maskllm", capsys, other)
    assert given(settings["data"]["train"].pop("fineweb")) == FINEWEB
    assert not settings["data"]["train"]
    main([*words("llama2_7b_maskllm", families, cli), "--strategy=dense"])
    result = json.loads((cli.runs()[-1] / "result.json").read_text())
    assert result["run"]["pattern"] == "dense"
