"""GPU-hours, held to their arithmetic."""

from collections import Counter
from typing import Any

import pytest

from sparsify.calibration import Calibration
from sparsify.masking.registry import make_strategy
from sparsify.training.module import SparseCausalLM
from sparsify.training.plan import PlanSettings
from sparsify.training.plan.hours import GPU, GPUS, device_work, hours, total_flops
from sparsify.training.plan.work import Work

E12 = 10**12
ROUND = GPU(half=100, single=10, memory=2)  # TFLOP/s, TFLOP/s, TB/s
SEEN = {
    "start": Work(Counter(float32=E12), E12),
    "calibration": Work(Counter(float32=3 * E12), 0),
    "a window of calibration": Work(Counter(bfloat16=5 * E12), E12),
    "forward": Work(Counter(bfloat16=100 * E12), 2 * E12),
    "backward": Work(Counter(bfloat16=180 * E12, float32=10 * E12), 4 * E12),
    "optimizer step": Work(Counter(), 8 * E12),
}


def settings(**run: Any) -> PlanSettings:
    module = SparseCausalLM(make_strategy("maskllm"), calibration=Calibration(samples=10))
    return PlanSettings(module, 2, 16, **run)


def test_a_step_and_a_run() -> None:
    asked = settings(accumulate=3, devices=2, nodes=2, steps=900, utilisation=0.5)
    assert asked.tokens == 2 * 16 * 3 * 4
    work = device_work(asked, SEEN)
    found = hours(asked, work, ROUND)
    # Three micro-batches: products at half of both peaks, and bytes; then the optimizer's bytes.
    step = 3 * (280 / 50 + 10 / 5 + 6 / 2) + 8 / 2
    assert found.step == pytest.approx(step)
    assert found.learning == pytest.approx(step * 900 * 4 / 3600)
    assert found.calibration == pytest.approx((3 / 5 + 10 * (5 / 50 + 1 / 2)) * 4 / 3600)
    assert found.total == pytest.approx(found.learning + found.calibration)
    assert found.moving == pytest.approx(((3 * 3 + 4) * 900 + 10 / 2) * 4 / 3600)
    # One device calibrates for all four.
    assert total_flops(asked, work) == (3 + 50 + 3 * 290 * 900 * 4) * E12


def test_shards_share_the_optimizers_work() -> None:
    copies, shards = (
        device_work(settings(devices=4, shard=shard), SEEN) for shard in (False, True)
    )
    assert shards["optimizer step"].moved == 2 * E12
    assert copies["optimizer step"].moved == 8 * E12
    assert shards["forward"] == copies["forward"] == SEEN["forward"]


def test_a_run_without_a_number_of_steps_has_those_of_a_step() -> None:
    asked = settings(steps=None)
    work = device_work(asked, SEEN)
    found = hours(asked, work, ROUND)
    assert found.step > 0
    assert found.calibration > 0
    assert (found.learning, found.moving, found.total) == (None, None, None)
    assert total_flops(asked, work) is None


def test_what_learns_nothing_takes_its_calibration() -> None:
    asked = settings(steps=None)
    seen = {name: SEEN[name] for name in ("calibration", "a window of calibration")}
    work = device_work(asked, seen)
    found = hours(asked, work, ROUND)
    assert (found.step, found.learning) == (0, 0)
    assert found.total == found.calibration > 0
    assert total_flops(asked, work) == 53 * E12


def test_the_peak_is_that_of_the_type() -> None:
    peaks = [ROUND.peak(name) for name in ("bfloat16", "float16", "float8_e4m3fn", "float32")]
    assert peaks == [100, 100, 100, 10]
    for gpu in GPUS.values():
        assert gpu.half > gpu.single > 10 > gpu.memory
