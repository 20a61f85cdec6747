"""Plans, held to what real modules hold."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from sparsify.calibration import Calibration
from sparsify.common.errors import SparsifyError
from sparsify.export.mask_file.file import read_masks, write_masks
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.masking.distillation import Distillation
from sparsify.masking.layer import base_parameters, masked_layers
from sparsify.masking.linear import _is_linear
from sparsify.masking.masker import Draw
from sparsify.masking.pattern import NMPattern
from sparsify.masking.registry import make_strategy
from sparsify.training.module import SparseCausalLM
from sparsify.training.parallel import Sharded
from sparsify.training.parallel.ddp import DDP
from sparsify.training.plan import (
    DryRun,
    Estimate,
    Plan,
    PlanSettings,
    dry_run,
    estimate,
    make_plan,
    of_trainer,
)
from sparsify.training.plan.estimate import BASE, BUCKETS, CPU_BASE
from sparsify.training.plan.ledger import Ledger, Peak
from sparsify.training.plan.report import GIB, verdict
from sparsify.training.plan.search import as_words
from sparsify.training.step import BatchRun
from tests.conftest import SIZES, masked_model, tiny_llama
from tests.tiny_models import tiny_falcon

PATTERN = NMPattern(2, 4)
B, T = 4, 16


def settings(
    folder: Path, name: str = "maskllm", run: dict[str, Any] | None = None, **model: Any
) -> PlanSettings:
    """Of a module with the settings of `model`, in which ``prior`` is the strategy's."""
    own = {"prior": model.pop("prior")} if "prior" in model else {}
    model = {"calibration": Calibration(samples=4)} | model
    module = SparseCausalLM(make_strategy(name, **own), str(folder), **model)
    return PlanSettings(module, B, T, **run or {})


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Saved:
    """Bytes that autograd keeps for backward, each storage once."""

    def __init__(self, known: list[Tensor]) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.found: dict[int, int] = {}
        self.keep: list[Tensor] = []  # so that no address is used twice

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.keep.append(tensor.detach())
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor


def one_real_step(name: str) -> tuple[dict[str, int], int]:
    """(bytes held after a step, bytes saved for its backward) of real tensors."""
    model, strategy = tiny_llama(), make_strategy(name, prior=None)
    masked = masked_model(model, strategy)
    masked.calibrate()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params)
    saved = Saved([*model.parameters(), *model.buffers()])
    run = BatchRun(masked, torch.zeros(B, T, dtype=torch.long), Draw(0, 0, 0))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        loss = strategy.loss(run)
    loss.backward()
    optimizer.step()
    maskers = nn.ModuleList(x.masker for x in masked_layers(model).values())
    held = {
        "weights": size(base_parameters(model).values()),
        "masker tensors": size([*maskers.parameters(), *maskers.buffers()]),
        "gradients": size(p.grad for p in params if p.grad is not None),
        "optimizer states": size(v for s in optimizer.state.values() for v in s.values()),
    }
    return held, sum(saved.found.values())


@pytest.mark.parametrize("name", ["maskllm", "sr_ste", "proxsparse"])
def test_what_is_held_is_exact_and_what_is_saved_is_near(name: str, model_folder: Path) -> None:
    seen = dry_run(settings(model_folder, name, prior=None))
    held, saved = one_real_step(name)
    parts = seen.peaks["forward"].parts
    buffers = size(tiny_llama().buffers())
    assert parts["weights"] == held["weights"] + buffers
    assert seen.weights == held["weights"]
    for part in ("gradients", "optimizer states"):
        assert parts[part] == held[part]
    assert parts.get("masker tensors", 0) == held["masker tensors"]
    # What lives after forward: what is saved, and some tensors that only other tensors hold.
    assert saved <= parts["activations"] <= 1.1 * saved


def test_checkpointing_takes_less(model_folder: Path) -> None:
    asked = settings(model_folder, prior=None)
    whole = dry_run(asked).peaks["forward"].parts["activations"]
    less = dry_run(asked.with_model(gradient_checkpointing=True)).peaks["forward"].parts
    assert less["activations"] < 0.6 * whole


def test_a_strategy_without_gradients_saves_nothing(model_folder: Path) -> None:
    parts = dry_run(settings(model_folder, "maskpro")).peaks["forward"].parts
    assert parts.get("gradients", 0) == parts.get("optimizer states", 0) == 0
    assert parts["activations"] <= 8 * B * T + 8  # the token ids, the loss


def test_a_teacher_is_a_copy_of_trained_weights_only(model_folder: Path) -> None:
    distil = Distillation(weight=0.5)
    trained = dry_run(settings(model_folder, "sr_ste", distillation=distil))
    frozen = dry_run(settings(model_folder, "proxsparse", distillation=distil))
    assert trained.peaks["forward"].parts["teacher"] == trained.weights
    assert "teacher" not in frozen.peaks["forward"].parts


def test_calibration_holds_the_inputs_of_all_windows(model_folder: Path) -> None:
    few = settings(model_folder, "sparsegpt")
    many = few.with_model(calibration=Calibration(samples=10_004))
    seen = dry_run(few)
    more = estimate(many, seen).total - estimate(few, seen).total
    window = T * 32 * 4  # tokens, hidden size, fp32
    assert 10_000 * window <= more <= 2 * 10_004 * window
    assert estimate(few, seen).phase == "calibration"


def test_the_larger_hessian_is_seen(model_folder: Path) -> None:
    seen = dry_run(settings(model_folder, "sparsegpt"))
    down = 64 * 64 * 4  # inputs of down_proj, squared
    assert seen.peaks["calibration"].parts["temporary"] >= 3 * down  # it, its factor, a copy


@pytest.mark.parametrize(
    "name", ["wanda", "ria", "gblm", "pruner_zero", "dsnot", "swaps", "admm", "dense"]
)
def test_every_one_shot_strategy_can_be_planned(name: str, model_folder: Path) -> None:
    peaks = dry_run(settings(model_folder, name)).peaks
    assert "forward" not in peaks
    assert peaks["calibration"].total >= peaks["start"].total > 0


def test_sharding_divides_what_is_held(model_folder: Path) -> None:
    seen = dry_run(settings(model_folder, prior=None))
    one = estimate(settings(model_folder), seen).phases["forward"]
    many = estimate(settings(model_folder, run={"devices": 8, "shard": True}), seen).phases[
        "forward"
    ]
    assert many["optimizer states"] == one["optimizer states"] // 8
    assert many["masker tensors"] == -(-one["masker tensors"] // 8) + seen.block_maskers
    assert many["activations"] == one["activations"]
    ddp = estimate(settings(model_folder, run={"devices": 2}), seen).phases["forward"]
    assert ddp[BUCKETS] == ddp["gradients"] == one["gradients"]
    assert one[BASE] == CPU_BASE


def test_a_sharded_optimizer_works_on_its_own_rows(model_folder: Path) -> None:
    asked = settings(model_folder, run={"device": "cuda"}, prior=None)
    seen = dry_run(asked)
    one = estimate(asked, seen).phases["optimizer step"]
    many = estimate(replace(asked, devices=8, shard=True), seen).phases["optimizer step"]
    assert many["temporary"] == -(-one["temporary"] // 8)


def test_what_is_kept_in_caches_is_real_afterwards(model_folder: Path) -> None:
    overrides = {"*.up_proj": "3:4"}
    dry_run(settings(model_folder, "magnitude", pattern="1:4", overrides=overrides))
    assert NMPattern(1, 4).table().int().sum().item() == 4
    assert NMPattern(3, 4).table().int().sum().item() == 12


def test_classes_of_layers_are_tried_with_real_values(tmp_path: Path) -> None:
    _is_linear.cache_clear()
    tiny_falcon().save_pretrained(tmp_path)
    assert len(dry_run(settings(tmp_path, "magnitude")).masked.layers) == 8


@pytest.mark.parametrize("name", ["fixed_mask", "maskllm", "selfmask"])
def test_a_saved_prior_is_planned_by_its_shapes(
    name: str, model_folder: Path, tmp_path: Path
) -> None:
    masks = {
        layer: PATTERN.top(module.weight.abs())
        for layer, module in tiny_llama().named_modules()
        if isinstance(module, nn.Linear) and layer != "lm_head"
    }
    write_masks(tmp_path / FILE_NAME, masks, PATTERN, "")
    seen = dry_run(settings(model_folder, name, prior=str(tmp_path)))
    assert seen.maskers == dry_run(settings(model_folder, name, prior="magnitude")).maskers
    saved = read_masks(tmp_path)
    assert all(torch.equal(saved[layer], mask) for layer, mask in masks.items())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[PlanSettings]:
    """Dry runs made up: activations are of the batch, and a quarter under checkpointing. Gives what
    was run.
    """
    ran: list[PlanSettings] = []

    def run(asked: PlanSettings) -> DryRun:
        ran.append(asked)
        weights = 400 if asked.module.dtype_name == "float32" else 200
        activations = asked.batch_size * (100 if asked.module.gradient_checkpointing else 400)
        parts = {"weights": weights, "activations": activations}
        masked = masked_model(tiny_llama(), asked.module.strategy)
        return DryRun({"forward": Peak(parts)}, weights, 20, 10, 0, 0, 0, 0, masked, {})

    monkeypatch.setattr("sparsify.training.plan.search.dry_run", run)
    return ran


def test_remedies_come_in_order_until_one_fits(quick: list[PlanSettings]) -> None:
    asked = settings(Path())
    smallest = make_plan(asked, memory=1)
    assert [(as_words(change), found.total - CPU_BASE) for change, found in smallest.tries] == [
        ("", 2000),
        ("--model.gradient_checkpointing true", 800),
        ("--data.batch_size 2", 600),
        ("--data.batch_size 1", 500),
        ("--model.dtype bfloat16", 300),
        *((f"--devices {n} --shard", 130 - (-200 // n)) for n in (2, 4, 8, 16, 32, 64)),
    ]
    assert as_words(smallest.changes) == (
        "--model.gradient_checkpointing true --data.batch_size 1 --model.dtype bfloat16 "
        "--devices 64 --shard"
    )
    assert not asked.module.gradient_checkpointing
    assert asked.module.dtype_name == "float32"
    assert not smallest.fits
    assert len(quick) == 5  # sharding needs no run
    plan = make_plan(asked, memory=CPU_BASE + 600)
    assert plan.tries[-1][0] == {"--data.batch_size": "2"}
    assert plan.fits
    assert plan.best.settings.batch_size == 2
    assert verdict(plan) == (
        f"fits {(CPU_BASE + 600) / GIB:g} GiB with --model.gradient_checkpointing true "
        "--data.batch_size 2: 0.44 GiB"
    )
    assert len(make_plan(asked).tries) == 1


def test_what_a_strategy_cannot_do_is_not_tried(quick: list[PlanSettings]) -> None:
    def changes(name: str, gather: str = "plain") -> list[str]:
        tries = make_plan(settings(Path(), name, gather=gather), memory=1).tries
        return [as_words(change) for change, _ in tries]

    assert "--model.dtype bfloat16" in changes("maskllm")
    assert "--model.dtype bfloat16" not in changes("sr_ste")
    assert "--devices 2 --shard" in changes("sr_ste")
    assert "--devices 2 --shard" not in changes("sr_ste", "masked")
    # The smallest layer has 16 rows, and of 32 ranks half would hold none.
    assert changes("maskllm", "masked")[-1] == "--devices 16 --shard"


def test_the_best_is_the_first_that_fits_or_the_smallest() -> None:
    asked = settings(Path(), "dense")
    tries = [({str(n): ""}, Estimate(asked, {"start": {"weights": n}})) for n in (9, 5, 3)]
    assert Plan(tries, 6).best.total == 5
    assert Plan(tries, 2).best.total == 3
    assert Plan(tries, 2).short(tries[2][1]) == 1


def test_checks_pass_and_code_that_needs_values_is_refused() -> None:
    with Ledger():
        x = torch.zeros(3)
        assert x.isfinite().all()
        assert torch.equal(x, x + 1)
        assert not (x < 0).any()
        assert x.is_set_to(x)
        assert not x.is_set_to(x + 0)
        assert len(x.nonzero()) == len(x[x > 0]) == 0
    with pytest.raises(SparsifyError, match="start cannot be planned: aten._unique2"), Ledger():
        torch.unique(torch.zeros(3))


def test_the_ledger_sees_what_lives() -> None:
    with Ledger() as ledger:
        ledger.phase = "a"
        x = torch.zeros(10)
        y = x + x
        del y
        z = x.view(2, 5)  # no bytes of its own
        ledger.label("kept", [z])
        ledger.phase = "b"
        w = torch.zeros(1)
        peaks = ledger.peaks()
    assert peaks["a"].parts == {"kept": 40, "temporary": 40}
    assert peaks["b"].parts == {"kept": 40, "temporary": 4}
    del w


def test_a_layer_is_masked_by_its_own_pattern_or_left_dense(model_folder: Path) -> None:
    """A layer has a logit for each candidate and group of four, and a table of the candidates."""

    def of(weights: int, candidates: int, layers: int) -> int:
        return 4 * (weights // 4 * candidates + layers * candidates * 4)  # fp32

    everything = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    assert dry_run(settings(model_folder, prior=None)).maskers == of(everything, 6, 14)
    exclude, overrides = ["*.q_proj", "*.1.mlp.*"], {"*.up_proj": "1:4", "*.k_proj": "dense"}
    found = dry_run(settings(model_folder, prior=None, exclude=exclude, overrides=overrides))
    # Of both blocks v (16 rows) and o (32) of 32 columns; of the first block gate, down and up.
    two_of_four = 2 * (16 + 32) * 32 + 2 * 32 * 64
    assert found.maskers == of(two_of_four, 6, 6) + of(32 * 64, 4, 1)
    only = dry_run(settings(model_folder, prior=None, include="*.down_proj"))
    assert only.maskers == of(2 * 32 * 64, 6, 2)


def test_the_users_own_optimizer_is_run(model_folder: Path) -> None:
    def states(optimizer: Any) -> tuple[int, int]:
        found = dry_run(settings(model_folder, prior=None, optimizer=optimizer))
        parts = found.peaks["forward"].parts
        return parts["optimizer states"], parts["gradients"]

    assert states(lambda params: torch.optim.SGD(params, lr=1.0))[0] == 0
    kept, learned = states(lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9))
    assert kept == learned > 0
    layers = 14  # AdamW counts the steps of each tensor in another one
    kept, learned = states(lambda params: torch.optim.AdamW(params, lr=1.0))
    assert kept == 2 * learned + 4 * layers
    with pytest.raises(SparsifyError, match="refuses its settings: Invalid learning rate: -1.0"):
        states(lambda params: torch.optim.SGD(params, lr=-1.0))


def test_masked_weights_are_gathered_in_place_of_maskers(model_folder: Path) -> None:
    shards = {"devices": 8, "shard": True}
    asked = settings(model_folder, run=shards, prior=None, gather="masked")
    seen = dry_run(asked)
    one = estimate(settings(model_folder), seen).phases["optimizer step"]
    many = estimate(asked, seen).phases["optimizer step"]
    assert many["masker tensors"] == -(-one["masker tensors"] // 8)
    block = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32)  # its norms too
    assert many["gradients"] == one["gradients"] // 8 + block
    alone = settings(model_folder, prior=None, gather="masked")  # where nothing is gathered
    plain = settings(model_folder, prior=None)
    assert estimate(alone, seen).phases == estimate(plain, seen).phases


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sr_ste", "SRSTE changes weights"),
        ("maskpro", "MaskPro needs other draws on each rank"),
        ("maskllm", "some of 32 ranks would hold none of its 16 rows"),
    ],
)
def test_what_cannot_be_gathered_is_refused(name: str, message: str, model_folder: Path) -> None:
    shards = {"devices": 32, "shard": True}
    with pytest.raises(SparsifyError, match=f"{message}.*give --model.gather plain"):
        dry_run(settings(model_folder, name, shards, gather="masked"))


def test_settings_out_of_range(model_folder: Path) -> None:
    with pytest.raises(SparsifyError, match="devices=0; it must be at least 1"):
        settings(model_folder, run={"devices": 0})
    with pytest.raises(SparsifyError, match="accumulate_grad_batches=0; it must be at least 1"):
        settings(model_folder, run={"accumulate": 0})
    for share in (0, -0.1, 1.01, math.nan, math.inf):
        with pytest.raises(SparsifyError, match=f"utilisation={share}; .*give --utilisation 0.4"):
            settings(model_folder, run={"utilisation": share})
    with pytest.raises(SparsifyError, match="nobody to share with; give --devices 2"):
        settings(model_folder, run={"shard": True})
    with pytest.raises(SparsifyError, match="trains weights and needs them in float32"):
        dry_run(settings(model_folder, "sr_ste", dtype="bfloat16"))


TRAINER: dict[str, Any] = {
    "accelerator": "cuda",
    "devices": "auto",
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    "accumulate_grad_batches": 1,
    "max_steps": 2000,
}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, {"device": "cuda", "precision": "32-true", "shard": False}),
        ({"accelerator": "gpu"}, {"device": "cuda"}),
        ({"accelerator": "cpu"}, {"device": "cpu", "devices": 1}),
        ({"devices": 8, "num_nodes": 2}, {"devices": 8, "nodes": 2}),
        ({"devices": [0, 3]}, {"devices": 2}),
        ({"devices": "3"}, {"devices": 3}),
        ({"devices": "1,3,"}, {"devices": 2}),
        ({"strategy": "fsdp"}, {"shard": True}),
        ({"strategy": Sharded()}, {"shard": True}),
        ({"strategy": DDP()}, {"shard": False}),
        ({"precision": "bf16-mixed"}, {"precision": "bf16-mixed"}),
        ({"precision": 32}, {"precision": "32-true"}),
        ({"accumulate_grad_batches": 4}, {"accumulate": 4, "steps": 2000}),
        ({"max_steps": -1}, {"accumulate": 1, "steps": None}),
    ],
)
def test_what_the_trainers_options_mean(options: Any, found: dict[str, Any]) -> None:
    assert found.items() <= of_trainer(TRAINER | options).items()


def test_auto_is_what_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, device in ((0, "cpu"), (4, "cuda")):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        found = of_trainer(TRAINER | {"accelerator": "auto"})
        assert (found["device"], found["devices"]) == (device, max(1, gpus))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "tpu"}, "tpu: .* give --trainer.accelerator cuda or cpu"),
        ({"devices": "some"}, "devices=some: it is no number; give --devices 1"),
        ({"strategy": "deepspeed"}, "strategy deepspeed: .* give --trainer.strategy ddp or fsdp"),
        ({"strategy": "fsdp_cpu_offload"}, "give --trainer.strategy fsdp"),
        ({"precision": "16-mixed"}, "precision 16-mixed: .* give --trainer.precision bf16-mixed"),
    ],
)
def test_trainers_of_which_no_rules_are_known(options: Any, message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        of_trainer(TRAINER | options)


@pytest.mark.parametrize("strategy", ["wanda", "maskllm", "sr_ste"])
def test_a_mixture_of_experts_in_float32(strategy: str, tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    seen = dry_run(settings(tmp_path, strategy))
    model = MixtralForCausalLM(config)
    assert seen.weights == size(model.parameters())
    found = make_plan(settings(tmp_path, strategy))
    assert found.fits


def test_grouped_products_have_the_shapes_of_real_ones() -> None:
    offsets = torch.tensor([2, 5, 8], dtype=torch.int32)
    for a, b, offs in (
        ((8, 16), (3, 16, 32), offsets),
        ((8, 16), (16, 32), offsets),
        ((3, 8, 16), (3, 16, 32), None),
        ((3, 8, 16), (16, 32), offsets),
    ):
        real = torch._grouped_mm(torch.zeros(a), torch.zeros(b), offs=offs)
        with Ledger():
            fake = torch._grouped_mm(torch.empty(a), torch.empty(b), offs=offs)
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_a_search_of_orders_holds_every_block_s_inputs(model_folder: Path) -> None:
    def peak(permute: str) -> int:
        seen = dry_run(settings(model_folder, "wanda", permute=permute))
        return sum(seen.peaks["calibration"].parts.values())

    gram = 4 * 32 * 32
    assert peak("residual") >= peak("none") + 3 * gram  # of two blocks' attention and MLP
    assert peak("none") < peak("heads") < peak("residual")
