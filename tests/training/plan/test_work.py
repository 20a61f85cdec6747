"""The work of a dry run, held to products that are counted by hand."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.calibration import Calibration
from sparsify.masking import noise
from sparsify.masking.distillation import Distillation
from sparsify.masking.pattern import NMPattern
from sparsify.masking.plackett_luce import score
from sparsify.masking.registry import make_strategy
from sparsify.training.module import SparseCausalLM
from sparsify.training.plan import PlanSettings, dry_run, estimate
from sparsify.training.plan.ledger import Ledger
from sparsify.training.plan.replay import replayed
from sparsify.training.plan.work import Work, WorkCounter

B, T = 4, 16
H, KV, F, V, LAYERS = 32, 16, 64, 64, 2  # tiny_llama's hidden, of keys, inner, vocabulary
TOKENS = B * T
QKV = H * H + 2 * KV * H
WEIGHTS = LAYERS * (QKV + H * H + 3 * H * F)
# Products of all tokens with all weights of the blocks, of the first block's first three layers
# and of the head; the two of attention.
BLOCKS, FIRST, HEAD = 2 * TOKENS * WEIGHTS, 2 * TOKENS * QKV, 2 * TOKENS * H * V
ATTENTION = LAYERS * B * 2 * 2 * T * T * H
FORWARD = BLOCKS + ATTENTION + HEAD


def settings(folder: Path, name: str, run: dict[str, Any] | None = None, **model: Any) -> Any:
    own = {"prior": model.pop("prior")} if "prior" in model else {}
    module = SparseCausalLM(make_strategy(name, **own), str(folder), **model)
    return PlanSettings(module, B, T, **run or {})


def flops(folder: Path, name: str, **model: Any) -> tuple[int, int]:
    """Of forward and of backward."""
    work = dry_run(settings(folder, name, prior=None, **model)).work
    return work["forward"].flops["float32"], work["backward"].flops["float32"]


def test_trained_weights_have_three_products_each(model_folder: Path) -> None:
    """Attention makes its scores again: five products in backward for its two."""
    backward = 2 * (BLOCKS + HEAD) + ATTENTION * 5 // 2
    assert flops(model_folder, "sr_ste") == (FORWARD, backward)


def test_a_frozen_base_needs_less(model_folder: Path) -> None:
    """A head that is frozen has no gradient of its weight, what enters the first block none."""
    # A weight's mask is a sum over 6 candidates: 2 x 4 x 6 operations for a group of four.
    mask = 12 * WEIGHTS
    forward, backward = flops(model_folder, "maskllm")
    assert forward == FORWARD + mask
    assert backward == 2 * BLOCKS - FIRST + HEAD + ATTENTION * 5 // 2 + 2 * mask


def test_checkpointing_runs_the_blocks_once_more(model_folder: Path) -> None:
    for name, mask in (("sr_ste", 0), ("maskllm", 12 * WEIGHTS)):
        plain = flops(model_folder, name)
        again = flops(model_folder, name, gradient_checkpointing=True)
        assert again[0] == plain[0]
        # Transformers may ask for the gradient of what enters the first block, so as to checkpoint.
        assert again[1] - plain[1] - (BLOCKS + ATTENTION + mask) in (0, FIRST)


@pytest.mark.parametrize("name", ["sr_ste", "proxsparse"])  # with a teacher, and without one
def test_distillation_is_one_forward_more(name: str, model_folder: Path) -> None:
    plain = flops(model_folder, name)
    distilled = flops(model_folder, name, distillation=Distillation(weight=0.5))
    assert distilled == (plain[0] + FORWARD, plain[1])


def test_a_strategy_without_gradients_runs_forward_alone(model_folder: Path) -> None:
    forward, backward = flops(model_folder, "maskpro")
    assert (forward % FORWARD, backward) == (0, 0)
    assert forward >= FORWARD


def test_mixed_precision_multiplies_in_bfloat16(model_folder: Path) -> None:
    mixed = settings(model_folder, "sr_ste", {"precision": "bf16-mixed"}, prior=None)
    assert dry_run(mixed).work["forward"].flops == {"bfloat16": FORWARD}


def test_calibration_runs_every_block_twice_a_window(model_folder: Path) -> None:
    def once_and_a_window(name: str) -> tuple[int, int]:
        work = dry_run(settings(model_folder, name)).work
        return work["calibration"].flops["float32"], work["a window of calibration"].flops[
            "float32"
        ]

    blocks = (BLOCKS + ATTENTION) // B
    # To see what blocks return, and that one window gives the same block by block, run twice.
    assert once_and_a_window("wanda") == (4 * blocks, 2 * blocks)
    # Hessians of what enters q, k and v; o; gate and up; down.
    hessians = LAYERS * 2 * T * (3 * H * H + F * F)
    assert once_and_a_window("sparsegpt")[1] == 2 * blocks + hessians
    # A backward pass of the whole model for each window, in which only masked weights learn.
    gradients = (FORWARD + 2 * BLOCKS - FIRST + HEAD + ATTENTION * 5 // 2) // B
    assert once_and_a_window("gblm")[1] == 2 * blocks + gradients


def test_a_run_has_all_its_windows_and_micro_batches(model_folder: Path) -> None:
    asked = settings(
        model_folder,
        "sr_ste",
        {"accumulate": 8, "devices": 2, "shard": True},
        prior="wanda",
        calibration=Calibration(samples=10),
    )
    seen = dry_run(asked).work
    found = estimate(asked, dry_run(asked)).work
    assert found["forward"].flops["float32"] == 8 * FORWARD
    assert found["backward"].moved == 8 * seen["backward"].moved
    assert found["optimizer step"].moved == seen["optimizer step"].moved // 2
    assert found["calibration"].flops["float32"] == (BLOCKS + ATTENTION) // B * 24


@pytest.mark.parametrize("name", ["maskllm", "maskpro"])
def test_noise_is_work_even_where_its_memory_is_left_out(name: str, model_folder: Path) -> None:
    cpu, cuda = (
        dry_run(settings(model_folder, name, {"device": device}, prior=None)).work
        for device in ("cpu", "cuda")
    )
    for phase in ("forward", "backward", "optimizer step"):
        assert cpu[phase].flops == cuda[phase].flops
        assert cpu[phase].moved == pytest.approx(cuda[phase].moved, rel=0.01)


def work_of(run: Any) -> Work:
    with Ledger(), WorkCounter(lambda: "now") as counter:
        run()
    return counter.found["now"]


def test_bytes_are_those_of_inputs_and_outputs() -> None:
    x, out, wide = torch.zeros(10), torch.zeros(10), torch.zeros(10, dtype=torch.int64)
    for run, expected in (
        (lambda: torch.zeros(10), 40),
        (lambda: torch.empty(10).view(2, 5).t().detach(), 0),
        (lambda: x + x, 120),
        (lambda: x + 1, 80),
        (lambda: x + wide, 160),
        (lambda: x.add_(x), 120),
        (lambda: x.neg_(), 80),
        (lambda: x.copy_(wide), 120),
        (lambda: x.zero_(), 40),
        (lambda: torch.neg(x, out=out), 80),
        (lambda: torch._foreach_add_([x, out], 1), 160),
        (lambda: x.max(0), 40 + 4 + 8),
        (lambda: x[:1].expand(100).neg(), 40 + 400),  # it is read from a storage of 40 bytes
        (lambda: x.view(5, 2) @ x.view(2, 5), 40 + 40 + 100),
    ):
        assert work_of(run).moved == expected


def test_products_in_place_and_of_experts_are_counted() -> None:
    one = 2 * 8 * 16 * 32
    a, b = torch.empty(3, 8, 16), torch.empty(3, 16, 32)
    for run, expected in (
        (lambda: torch.empty(8, 32).addmm_(a[0], b[0]), one),
        (lambda: torch.empty(3, 8, 32).baddbmm_(a, b), 3 * one),
    ):
        assert work_of(run).flops == {"float32": expected}
    offsets = torch.tensor([2, 5, 8], dtype=torch.int32)
    # Experts share 8 rows, 16 that are summed over, nothing, or 32 columns.
    for run, expected in (
        (lambda: torch._grouped_mm(a[0], b, offs=offsets), one),
        (lambda: torch._grouped_mm(a[0], b[0], offs=offsets), one),
        (lambda: torch._grouped_mm(a, b), 3 * one),
        (lambda: torch._grouped_mm(a, b[0], offs=offsets), one),
    ):
        assert work_of(run).flops == {"float32": expected}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_replay_takes_what_the_function_took(device: str) -> None:
    """Three calls with one shape and one with another, each under a phase of its own."""

    def run(replays: bool) -> tuple[Any, dict[str, Work]]:
        with Ledger() as ledger, WorkCounter(lambda: ledger.phase) as work, ExitStack() as stack:
            if replays:
                stack.enter_context(replayed(ledger, work, device))
            kept = []
            for phase, rows in (("a", 8), ("b", 8), ("c", 4), ("d", 8)):
                ledger.phase = phase
                x = noise.gumbel(torch.tensor(1), rows, 16)
                kept.append(score(x, x, NMPattern(2, 4)))
                assert (kept[-1].shape, kept[-1].dtype) == ((rows, 16), torch.float32)
            peaks = {name: peak.total for name, peak in ledger.peaks().items()}
        return peaks, work.found

    real, replay = run(False), run(True)
    assert replay[1] == real[1]
    if device == "cuda":
        assert replay[0] == real[0]
    else:  # whose temporary tensors are left out
        assert all(replay[0][phase] < real[0][phase] for phase in "abcd")
