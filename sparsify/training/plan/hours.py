"""The time of a run on named GPUs, from the work that a dry run showed.

A GPU multiplies at a stated share of its peak, and moves bytes at the full rate of its memory, one
after the other, as the kernels of eager torch do. Messages between devices, validation, the test,
export and reading text are left out.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from sparsify.training.plan.calibration import WINDOWS
from sparsify.training.plan.dry_run import BACKWARD, CALIBRATION, FORWARD, STEP, WINDOW
from sparsify.training.plan.settings import PlanSettings
from sparsify.training.plan.work import Work

LEARNING = (FORWARD, BACKWARD, STEP)  # the phases of an optimizer step


class GPU(NamedTuple):
    """Peaks, of dense products, as NVIDIA's data sheets and whitepapers state them.

    Attributes:
        half: TFLOP/s in bfloat16 or float16, summed in fp32.
        single: TFLOP/s in float32 outside the tensor cores; TF32 is off unless a program asks.
        memory: TB/s.
    """

    half: float
    single: float
    memory: float

    def peak(self, dtype: str) -> float:
        """TFLOP/s of products of this type."""
        return self.half if getattr(torch, dtype).itemsize <= 2 else self.single


GPUS = {
    "A100 80GB SXM": GPU(312, 19.5, 2.039),
    "H100 SXM": GPU(989, 67, 3.35),
    "H200 SXM": GPU(989, 67, 4.8),
    "L40S": GPU(362, 91.6, 0.864),
    "RTX 4090": GPU(165, 82.6, 1.008),
    "RTX A6000": GPU(155, 38.7, 0.768),
}


class Hours(NamedTuple):
    """Time on one kind of GPU.

    Attributes:
        step: seconds of an optimizer step; 0 if nothing is learned.
        calibration: GPU-hours, of all devices, as those that wait for the first one count too.
        learning: GPU-hours of all steps; None if the run has no number of steps.
        moving: those of all these hours in which bytes are moved.
    """

    step: float
    calibration: float
    learning: float | None
    moving: float | None

    @property
    def total(self) -> float | None:
        """GPU-hours of the run."""
        return None if self.learning is None else self.calibration + self.learning


def device_work(settings: PlanSettings, seen: Mapping[str, Work]) -> dict[str, Work]:
    """What one device does in all of calibration and in the phases of one optimizer step.

    Args:
        settings: of the run.
        seen: what a dry run with its batch and block size did.
    """
    samples = settings.module.calibration.samples / WINDOWS
    window = seen.get(WINDOW, Work()).times(samples)
    found = {CALIBRATION: seen.get(CALIBRATION, Work()) + window}
    # A sharded optimizer works on the rows of its rank alone.
    shards = settings.ranks if settings.shard else 1
    for phase in (phase for phase in LEARNING if phase in seen):
        found[phase] = seen[phase].times(1 / shards if phase == STEP else settings.accumulate)
    return found


def step_work(work: Mapping[str, Work]) -> Work:
    """The sum over the phases of a step; no work if nothing is learned."""
    return sum((found for phase, found in work.items() if phase in LEARNING), Work())


def total_flops(settings: PlanSettings, work: Mapping[str, Work]) -> float | None:
    """Floating-point operations of the run, on all devices; the first one calibrates for all. None
    if the run has no number of steps.
    """
    step = step_work(work).flops.total() * settings.ranks
    if step and settings.steps is None:
        return None
    return work[CALIBRATION].flops.total() + step * (settings.steps or 0)


def hours(settings: PlanSettings, work: Mapping[str, Work], gpu: GPU) -> Hours:
    """The time of the run, given the work of one device."""

    def moving(done: Work) -> float:
        return done.moved / 1e12 / gpu.memory

    def seconds(done: Work) -> float:
        products = sum(flops / gpu.peak(dtype) for dtype, flops in done.flops.items())
        return products / 1e12 / settings.utilisation + moving(done)

    first, step = work[CALIBRATION], step_work(work)
    known = settings.steps is not None or not step.moved
    steps, gpu_hour = settings.steps or 0, settings.ranks / 3600
    return Hours(
        seconds(step),
        gpu_hour * seconds(first),
        gpu_hour * seconds(step) * steps if known else None,
        gpu_hour * (moving(first) + moving(step) * steps) if known else None,
    )
