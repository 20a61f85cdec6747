"""Finds settings that fit a device. Remedies are added one after another, the cheapest first, as
options of ``sparsify fit``.

1. gradient checkpointing: costs one more forward pass; what is learned stays the same
2. half the batch, again and again, down to one window: more steps, or more of them accumulated
3. base weights in bfloat16, where they are not trained
4. sharding over 2, 4, ... devices, or twice those asked for
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sparsify.common.errors import SparsifyError
from sparsify.data.windows import fitting_windows, vocabulary_of
from sparsify.training.parallel.shard_model import check_sharding
from sparsify.training.plan.dry_run import FORWARD, DryRun, dry_run
from sparsify.training.plan.estimate import Estimate, estimate
from sparsify.training.plan.settings import PlanSettings

MOST_DEVICES = 64

Options = dict[str, str]  # of sparsify fit, with their values; a flag's is empty


def as_words(options: Options) -> str:
    """Options as they are typed."""
    return " ".join(f"{name} {value}".strip() for name, value in options.items())


@dataclass(frozen=True)
class Plan:
    """What was tried, in order.

    Attributes:
        tries: (what was changed last, the estimate); the first is what was asked for, unchanged.
        memory: bytes of a device; None if nothing has to fit.
    """

    tries: list[tuple[Options, Estimate]]
    memory: int | None

    @property
    def best(self) -> Estimate:
        """The first estimate that fits, or else the smallest."""
        fitting = [found for _, found in self.tries if self.short(found) <= 0]
        return fitting[0] if fitting else min((e for _, e in self.tries), key=lambda e: e.total)

    def short(self, found: Estimate) -> int:
        """The bytes by which a device is too small; 0 or less if it is not."""
        return 0 if self.memory is None else found.total - self.memory

    @property
    def fits(self) -> bool:
        return self.short(self.best) <= 0

    @property
    def changes(self) -> Options:
        """All that the best settings change of what was asked for."""
        changes: Options = {}
        for change, found in self.tries:
            changes |= change
            if found is self.best:
                break
        return changes


def make_plan(settings: PlanSettings, memory: int | None = None) -> Plan:
    """Estimate the settings, and if they do not fit, others until some do.

    Args:
        settings: what was asked for.
        memory: bytes of a device.

    Raises:
        SparsifyError: of an unknown model, or as a run would.
    """
    plan = Plan([], memory)
    seen = dry_run(settings)
    if settings.eval_batch_size is None:
        words = vocabulary_of(seen.masked.model)
        settings = replace(settings, eval_batch_size=fitting_windows(settings.block_size, words))
    plan.tries.append(({}, estimate(settings, seen)))
    for change, tried in _remedies(settings, seen):
        if plan.fits:
            break
        last = plan.tries[-1][1].settings
        if replace(tried, devices=1, shard=False) != replace(last, devices=1, shard=False):
            seen = dry_run(tried)
        plan.tries.append((change, estimate(tried, seen)))
    return plan


def _remedies(settings: PlanSettings, seen: DryRun) -> Iterator[tuple[Options, PlanSettings]]:
    module = settings.module
    effect = module.strategy.effect
    learns = FORWARD in seen.peaks
    if learns and not module.gradient_checkpointing and not effect.without_gradients:
        settings = settings.with_model(gradient_checkpointing=True)
        yield {"--model.gradient_checkpointing": "true"}, settings
    while learns and settings.batch_size > 1:
        settings = replace(settings, batch_size=settings.batch_size // 2)
        yield {"--data.batch_size": str(settings.batch_size)}, settings
    if module.dtype_name == "float32" and not effect.trains_weights:
        settings = settings.with_model(dtype_name="bfloat16")
        yield {"--model.dtype": "bfloat16"}, settings
    devices = max(2, settings.devices if not settings.shard else 2 * settings.devices)
    while learns and devices * settings.nodes <= MOST_DEVICES:
        settings = replace(settings, devices=devices, shard=True)
        try:
            check_sharding(seen.masked, module.gather, settings.ranks)
        except SparsifyError:
            return
        yield {"--devices": str(devices), "--shard": ""}, settings
        devices *= 2
