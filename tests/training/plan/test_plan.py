"""Plans, held to what real modules hold, and the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from sparsify.calibration import Calibration
from sparsify.cli.main import main
from sparsify.common.errors import SparsifyError
from sparsify.masking.layer import base_parameters, masked_layers
from sparsify.masking.masker import Draw
from sparsify.masking.pattern import NMPattern
from sparsify.masking.registry import make_strategy
from sparsify.training.distillation import Distillation
from sparsify.training.plan import (
    DryRun,
    Estimate,
    Plan,
    PlanSettings,
    dry_run,
    estimate,
    make_plan,
)
from sparsify.training.plan.estimate import BASE, BUCKETS, CPU_BASE
from sparsify.training.plan.ledger import Ledger, Peak
from sparsify.training.step import BatchRun
from tests.conftest import SIZES, masked_model, tiny_llama

PATTERN = NMPattern(2, 4)
B, T = 4, 16


def settings(folder: Path, strategy: str = "maskllm", **more: Any) -> PlanSettings:
    return PlanSettings(
        strategy,
        str(folder),
        batch_size=B,
        block_size=T,
        calibration=Calibration(samples=4),
        **more,
    )


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
    seen = dry_run(settings(model_folder, name, strategy_args={"prior": None}))
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
    asked = settings(model_folder, strategy_args={"prior": None})
    whole = dry_run(asked).peaks["forward"].parts["activations"]
    less = dry_run(replace(asked, gradient_checkpointing=True)).peaks["forward"].parts
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
    many = replace(few, calibration=Calibration(samples=10_004))
    seen = dry_run(few)
    more = estimate(many, seen).total - estimate(few, seen).total
    window = T * 32 * 4  # tokens, hidden size, fp32
    assert 10_000 * window <= more <= 2 * 10_004 * window
    assert estimate(few, seen).phase == "calibration"


def test_the_larger_hessian_is_seen(model_folder: Path) -> None:
    seen = dry_run(settings(model_folder, "sparsegpt"))
    down = 64 * 64 * 4  # inputs of down_proj, squared
    assert seen.peaks["calibration"].parts["temporary"] >= 3 * down  # it, its factor, a copy


@pytest.mark.parametrize("name", ["wanda", "ria", "gblm", "pruner_zero", "dsnot", "admm", "dense"])
def test_every_one_shot_strategy_can_be_planned(name: str, model_folder: Path) -> None:
    peaks = dry_run(settings(model_folder, name)).peaks
    assert "forward" not in peaks
    assert peaks["calibration"].total >= peaks["start"].total > 0


def test_sharding_divides_what_is_held(model_folder: Path) -> None:
    seen = dry_run(settings(model_folder, strategy_args={"prior": None}))
    one = estimate(settings(model_folder), seen).phases["forward"]
    many = estimate(settings(model_folder, devices=8, shard=True), seen).phases["forward"]
    assert many["optimizer states"] == one["optimizer states"] // 8
    assert many["masker tensors"] == -(-one["masker tensors"] // 8) + seen.block_maskers
    assert many["activations"] == one["activations"]
    ddp = estimate(settings(model_folder, devices=2), seen).phases["forward"]
    assert ddp[BUCKETS] == ddp["gradients"] == one["gradients"]
    assert one[BASE] == CPU_BASE


def test_a_sharded_optimizer_works_on_its_own_rows(model_folder: Path) -> None:
    asked = settings(model_folder, device="cuda", strategy_args={"prior": None})
    seen = dry_run(asked)
    one = estimate(asked, seen).phases["optimizer step"]
    many = estimate(replace(asked, devices=8, shard=True), seen).phases["optimizer step"]
    assert many["temporary"] == -(-one["temporary"] // 8)


def test_what_is_kept_in_caches_is_real_afterwards(model_folder: Path) -> None:
    dry_run(settings(model_folder, "magnitude", pattern="1:4"))
    assert NMPattern(1, 4).table().int().sum().item() == 4


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[PlanSettings]:
    """Dry runs made up: activations are of the batch, and a quarter under checkpointing. Gives what
    was run.
    """
    ran: list[PlanSettings] = []

    def run(asked: PlanSettings) -> DryRun:
        ran.append(asked)
        weights = 400 if asked.dtype == "float32" else 200
        activations = asked.batch_size * (100 if asked.gradient_checkpointing else 400)
        parts = {"weights": weights, "activations": activations}
        return DryRun({"forward": Peak(parts)}, weights, 20, 10, 0, 0, 0, 0)

    monkeypatch.setattr("sparsify.training.plan.search.dry_run", run)
    return ran


def test_remedies_come_in_order_until_one_fits(quick: list[PlanSettings]) -> None:
    asked = PlanSettings("maskllm", batch_size=4)
    smallest = make_plan(asked, memory=1)
    assert [(change, found.total - CPU_BASE) for change, found in smallest.tries] == [
        ("as asked", 2000),
        ("gradient checkpointing", 800),
        ("batch of 2", 600),
        ("batch of 1", 500),
        ("bfloat16 weights", 300),
        *((f"sharded over {n}", 130 - (-200 // n)) for n in (2, 4, 8, 16, 32, 64)),
    ]
    assert not smallest.fits
    assert len(quick) == 5  # sharding needs no run
    plan = make_plan(asked, memory=CPU_BASE + 600)
    assert [change for change, _ in plan.tries][-1] == "batch of 2"
    assert plan.fits
    assert plan.best.settings.batch_size == 2
    assert len(make_plan(asked).tries) == 1


def test_what_a_strategy_cannot_do_is_not_tried(quick: list[PlanSettings]) -> None:
    changes = {
        name: [change for change, _ in make_plan(PlanSettings(name), memory=1).tries]
        for name in ("maskllm", "sr_ste")
    }
    assert "bfloat16 weights" in changes["maskllm"]
    assert "bfloat16 weights" not in changes["sr_ste"]
    assert "sharded over 2" in changes["sr_ste"]


def test_the_best_is_the_first_that_fits_or_the_smallest() -> None:
    asked = PlanSettings("dense")
    tries = [(str(n), Estimate(asked, {"start": {"weights": n}})) for n in (9, 5, 3)]
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


def test_settings_out_of_range() -> None:
    with pytest.raises(SparsifyError, match="batch_size=0; it must be at least 1"):
        PlanSettings("dense", batch_size=0)
    with pytest.raises(SparsifyError, match="nobody to share with; give --devices 2"):
        PlanSettings("dense", shard=True)


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


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *words])
    return int(exit_.value.code or 0), "".join(capsys.readouterr())


def test_the_command(capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    words = ["--strategy=magnitude", f"--model={model_folder}", "--block_size=16"]
    status, text = run(capsys, *words, "--memory=1")
    assert status == 0
    assert "fits 1 GiB" in text
    status, text = run(capsys, *words, "--memory=0.1")
    assert status == 1
    assert "nothing fits 0.1 GiB: the best of these needs 0.34 GiB more" in text
    status, text = run(capsys, *words, "--format=json", "--calibration.samples=2")
    found = json.loads(text)
    assert (status, found["fits"], found["short_by"]) == (0, True, 0)
    assert sum(found["tries"][0]["parts"].values()) == found["tries"][0]["peak"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --strategy NAME"),
        (["--strategy=mask_llm"], "there is no strategy 'mask_llm'; did you mean 'maskllm'?"),
        (["--strategy=dense", "--model=/nowhere"], "no model could be loaded from '/nowhere'"),
        (["--strategy=maskllm", "--pattern=8:16"], "12,870 candidates"),
    ],
)
def test_input_that_a_user_can_mend(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = run(capsys, *words)
    assert status == 2
    assert message in text
