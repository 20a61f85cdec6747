"""Computes the peak memory of each device, by part, and its work, from what a dry run showed."""

from dataclasses import dataclass, field

from sparsify.data.windows import logit_bytes, vocabulary_of
from sparsify.training.plan.calibration import WINDOWS
from sparsify.training.plan.dry_run import (
    CALIBRATION,
    GRADIENTS,
    MASKERS,
    OPTIMIZER,
    STEP,
    TEACHER,
    WEIGHTS,
    DryRun,
)
from sparsify.training.plan.hours import device_work
from sparsify.training.plan.ledger import TEMPORARY
from sparsify.training.plan.settings import PlanSettings
from sparsify.training.plan.work import Work

# Resident memory of a process that has imported Python's, torch's, Transformers' and Lightning's
# modules and read the embedded text, measured on Linux, torch 2.13 for CPU
# (one run that prunes in one shot, less its tensors). A CUDA context takes a few hundred MiB more
# that were not measured.
CPU_BASE = 448 << 20
BASE, BUCKETS = "process", "gradient buckets"


@dataclass(frozen=True)
class Estimate:
    """The memory and the work of one device.

    Attributes:
        settings: what was planned for.
        phases: bytes by part at the peak of every phase of the run.
        work: of all of calibration, and of each phase of one optimizer step.
        logits: bytes of those of a validation or test batch, in fp32; no phase counts them.
    """

    settings: PlanSettings
    phases: dict[str, dict[str, int]]
    work: dict[str, Work] = field(default_factory=dict)
    logits: int = 0

    @property
    def phase(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part at the highest peak."""
        return self.phases[self.phase]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(settings: PlanSettings, seen: DryRun) -> Estimate:
    """The peak and the work of every phase on one device."""
    phases = {}
    for phase, peak in seen.peaks.items():
        parts = {name: size for name, size in peak.parts.items() if size}
        if phase == CALIBRATION:
            parts = _calibration(parts, settings, seen)
        elif settings.shard:
            parts = _sharded(parts, settings, seen, phase)
        elif settings.ranks > 1 and GRADIENTS in parts:
            # DistributedDataParallel sums gradients in buffers of their size.
            parts[BUCKETS] = parts[GRADIENTS]
        phases[phase] = {BASE: CPU_BASE if settings.device == "cpu" else 0} | parts
    windows, words = settings.eval_batch_size or 0, vocabulary_of(seen.masked.model)
    logits = logit_bytes(windows, settings.block_size, words)
    return Estimate(settings, phases, device_work(settings, seen.work), logits)


def _calibration(parts: dict[str, int], settings: PlanSettings, seen: DryRun) -> dict[str, int]:
    """Add the inputs of all windows.

    They are collected in a list that becomes one buffer, so that for a moment they exist twice.
    Every process calibrates all blocks before anything is sharded; on a GPU one block at a time.
    """
    found = dict(parts)
    inputs = settings.module.calibration.samples * seen.window
    if settings.device == "cuda":
        found[WEIGHTS], found[MASKERS] = max(seen.block, seen.outside), seen.block_maskers
        inputs = 0 if settings.module.calibration.offload else inputs
    first = WINDOWS * seen.window
    statistics = found.pop(TEMPORARY, 0) - first
    found[CALIBRATION] = max(statistics + inputs, 2 * inputs, 0)
    return found


def _sharded(
    parts: dict[str, int], settings: PlanSettings, seen: DryRun, phase: str
) -> dict[str, int]:
    """A share of all that is held for a run, and one block whole.

    What lies outside the blocks is one unit that stays gathered from forward to backward. The
    optimizer works on the rows of its rank alone, and so does what it makes for a moment. Where
    masked weights are gathered, no masker is whole anywhere, and a block's gradients are those of
    its weights; what makes the masks of a rank's rows is counted as if it made all of them.
    """
    masked = settings.module.gather == "masked"
    whole = {
        WEIGHTS: seen.outside + seen.block,
        TEACHER: seen.outside + seen.block,
        MASKERS: 0 if masked else seen.block_maskers,
        GRADIENTS: seen.block if masked else seen.learned,
        OPTIMIZER: 0,
    }
    if phase == STEP:
        whole[TEMPORARY] = 0
    ranks = settings.ranks
    return {
        name: min(size, -(-size // ranks) + whole[name]) if name in whole else size
        for name, size in parts.items()
    }
