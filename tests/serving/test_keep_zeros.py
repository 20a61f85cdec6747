"""``KeepZeros`` under Transformers' Trainer: zeros stay, all else learns as by a plain loop."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sparsify import KeepZeros, SparsifyError
from sparsify.export.folder import export
from sparsify.export.manifest import read_manifest
from sparsify.masking.linear import maskable
from tests.conftest import tiny_llama, word_tokenizer
from tests.export.test_folder import masked_module
from tests.tiny_models import tiny_gpt2, tiny_gpt_oss, tiny_mixtral
from tests.training.test_two_ranks import ROOT, TORCHRUN, launch

MODELS: dict[str, Any] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mixtral": tiny_mixtral,
    "gpt_oss": tiny_gpt_oss,
}
ROWS = torch.randint(2, 64, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
DATA = [{"input_ids": row, "labels": row} for row in ROWS]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("exports") / "out" for name in MODELS}
    for name, folder in folders.items():
        export(masked_module(MODELS[name](), word_tokenizer()).masked, folder, {})
    return folders


def trainer(
    model: PreTrainedModel, out: Path, *callbacks: TrainerCallback, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(
        str(out),
        **{
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 0.02,
            "weight_decay": 0.1,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "logging_strategy": "no",
            **settings,
        },
    )
    return Trainer(model, arguments, train_dataset=DATA, callbacks=[*callbacks])


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of all layers that can be masked."""
    return {name: layer.weight.detach().clone() for name, layer in maskable(model).items()}


def listed(folder: Path) -> set[str]:
    return set(read_manifest(folder)["layers"])


def assert_zeros(before: dict[str, Tensor], after: dict[str, Tensor], names: set[str]) -> None:
    """The same weights are zero, and most others have changed."""
    for name in names:
        assert torch.equal(before[name] == 0, after[name] == 0), name
        assert float((before[name] != after[name]).float().mean()) > 0.3, name


@pytest.mark.parametrize(
    ("family", "given"), [("llama", True), ("gpt2", True), ("mixtral", False), ("gpt_oss", True)]
)
def test_zeros_stay_in_the_model_in_checkpoints_and_in_what_is_saved(
    family: str, given: bool, exports: dict[str, Path], tmp_path: Path
) -> None:
    folder = exports[family]
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = weights(model)
    run = trainer(
        model,
        tmp_path,
        KeepZeros(folder if given else None),
        gradient_accumulation_steps=2,
        bf16=True,
        save_strategy="steps",
        save_steps=2,
    )
    run.train()
    run.save_model(str(tmp_path / "last"))
    assert_zeros(before, weights(model), listed(folder))
    for saved in (tmp_path / "checkpoint-2", tmp_path / "last"):
        loaded = weights(AutoModelForCausalLM.from_pretrained(saved))
        assert_zeros(before, loaded, listed(folder))


def test_without_it_training_fills_zeros(exports: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exports["llama"])
    trainer(model, tmp_path).train()
    after = weights(model)
    assert all(float((after[name] == 0).float().mean()) < 0.05 for name in listed(exports["llama"]))


def test_it_trains_as_a_plain_loop_does(exports: dict[str, Path], tmp_path: Path) -> None:
    """Gradients are masked before they are clipped, and weights after each step."""
    model = AutoModelForCausalLM.from_pretrained(exports["llama"])
    plain = copy.deepcopy(model)

    def optimizer(of: PreTrainedModel) -> torch.optim.Optimizer:
        return torch.optim.AdamW(of.parameters(), lr=0.01, weight_decay=0.1)

    own = optimizer(model)
    constant = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 1.0)
    run = trainer(model, tmp_path, KeepZeros(exports["llama"]), max_grad_norm=0.1)
    run.optimizer, run.lr_scheduler = own, constant
    run.train_dataset = DATA[:1] * 8  # of any order
    run.train()
    masks = {name: layer.weight != 0 for name, layer in maskable(plain).items()}
    masks = {name: masks[name] for name in listed(exports["llama"])}
    other, layers = optimizer(plain), maskable(plain)
    batch = torch.tensor(ROWS[:1] * 2)
    plain.train()
    for _ in range(4):
        other.zero_grad()
        plain(input_ids=batch, labels=batch).loss.backward()
        for name, mask in masks.items():
            layers[name].weight.grad *= mask
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        other.step()
        for name, mask in masks.items():
            layers[name].weight.data *= mask
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_a_momentum_of_zeros_fills_nothing(exports: dict[str, Path], tmp_path: Path) -> None:
    """As of an optimizer that went on from a run without masks, or moves all weights together."""
    model = AutoModelForCausalLM.from_pretrained(exports["llama"])
    before = weights(model)
    own = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for parameter in model.parameters():
        own.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    run = trainer(model, tmp_path, KeepZeros(exports["llama"]))
    run.optimizer = own
    run.train()
    assert_zeros(before, weights(model), listed(exports["llama"]))


def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    folder, saving = exports["llama"], {"save_strategy": "steps", "save_steps": 2}
    whole = AutoModelForCausalLM.from_pretrained(folder)
    trainer(whole, tmp_path / "a", KeepZeros(folder), **saving).train()
    model = AutoModelForCausalLM.from_pretrained(folder)
    run = trainer(model, tmp_path / "b", KeepZeros(folder))
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert run.state.global_step == 4
    for name, weight in weights(model).items():
        assert torch.equal(weight, weights(whole)[name]), name


def test_the_model_is_free_again_after_training(exports: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exports["llama"])
    trainer(model, tmp_path, KeepZeros(exports["llama"])).train()
    model(input_ids=torch.tensor(ROWS), labels=torch.tensor(ROWS)).loss.backward()
    weight = model.get_parameter(f"{UP}.weight")
    assert int((weight.grad[weight == 0] != 0).sum()) > 500


# -- what is refused -------------------------------------------------------------------------------


def begin(model: Any, folder: Path | None) -> None:
    KeepZeros(folder).on_train_begin(None, None, None, model=model)


def test_a_model_that_is_not_the_export_is_refused(exports: dict[str, Path]) -> None:
    folder = exports["llama"]
    with pytest.raises(SparsifyError, match=r"says 2:4, and its weight has groups .* without Keep"):
        begin(tiny_llama(), folder)
    with pytest.raises(SparsifyError, match="and the model that is trained has no such linear"):
        begin(tiny_gpt2(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    up = model.get_submodule(UP)
    up.weight = torch.nn.Parameter(up.weight.detach().flatten())
    with pytest.raises(SparsifyError, match=r"up_proj: its weight is \(2048,\), .* take FSDP 2"):
        begin(model, folder)


def test_a_model_without_zeros_is_refused(exports: dict[str, Path]) -> None:
    with pytest.raises(SparsifyError, match="no layer of this LlamaForCausalLM is N:M sparse"):
        begin(tiny_llama(), None)
    model = AutoModelForCausalLM.from_pretrained(exports["llama"])
    model.get_parameter(f"{UP}.weight").data[:32] = 1.0
    with pytest.raises(SparsifyError, match="up_proj: 25% of its weights are zero, but it is N:M"):
        begin(model, None)


def test_folders_and_adapters_are_checked(exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match="holds no sparsity_manifest.json"):
        KeepZeros(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(exports["llama"])
    model.peft_config = {}
    with pytest.raises(SparsifyError, match="trains adapters, .* sparsify merge"):
        begin(model, exports["llama"])


# -- sharded ---------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_sharded_by_fsdp2(family: str, exports: dict[str, Path]) -> None:
    """In the order of the Trainer's events."""
    model = AutoModelForCausalLM.from_pretrained(exports[family])
    before = weights(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    weight = next(iter(maskable(model).values())).weight
    assert isinstance(weight, DTensor)
    keep, optimizer = KeepZeros(exports[family]), torch.optim.AdamW(model.parameters(), lr=0.02)
    keep.on_train_begin(None, None, None, model=model)
    for _ in range(2):
        model(input_ids=torch.tensor(ROWS), labels=torch.tensor(ROWS)).loss.backward()
        optimizer.step()
        keep.on_optimizer_step(None, None, None)
        optimizer.zero_grad()
    after = {name: value.full_tensor() for name, value in weights(model).items()}
    assert_zeros(before, after, listed(exports[family]))


@pytest.mark.slow
def test_two_ranks_end_with_the_weights_of_one(exports: dict[str, Path]) -> None:
    folders = [exports[family] for family in ("llama", "gpt2", "mixtral")]
    done = launch(*TORCHRUN, ROOT / "tests" / "assets" / "keep_zeros_run.py", *folders)
    assert done.returncode == 0, done.stderr[-6000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert list(results) == [str(folder) for folder in folders]
    for folder, found in results.items():
        layers = len(listed(Path(folder)))
        assert (found["filled"], found["rows"]) == (0, layers / 2)
        assert found["moved"] > 0.4 * layers
        assert found["apart"] < 1e-5
