"""Settings that fit a device: remedies one upon another, the cheapest first.

1. gradient checkpointing: costs one more forward pass; what is learned stays the same
2. half the batch, again and again, down to one window: more steps, or more of them accumulated
3. base weights in bfloat16, where they are not trained
4. sharding over 2, 4, ... devices, or twice those asked for
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sparsify.masking.registry import make_strategy
from sparsify.training.plan.dry_run import FORWARD, DryRun, dry_run
from sparsify.training.plan.estimate import Estimate, estimate
from sparsify.training.plan.settings import PlanSettings

MOST_DEVICES = 64


@dataclass(frozen=True)
class Plan:
    """What was tried, in order.

    Attributes:
        tries: (what was changed last, the estimate); the first is what was asked for.
        memory: bytes of a device; None if nothing has to fit.
    """

    tries: list[tuple[str, Estimate]]
    memory: int | None

    @property
    def best(self) -> Estimate:
        """The first that fits, or the smallest."""
        fitting = [found for _, found in self.tries if self.short(found) <= 0]
        return fitting[0] if fitting else min((e for _, e in self.tries), key=lambda e: e.total)

    def short(self, found: Estimate) -> int:
        """The bytes by which a device is too small; 0 or less if it is not."""
        return 0 if self.memory is None else found.total - self.memory

    @property
    def fits(self) -> bool:
        return self.short(self.best) <= 0


def make_plan(settings: PlanSettings, memory: int | None = None) -> Plan:
    """Estimate the settings, and if they do not fit, others until some do.

    Args:
        settings: what was asked for.
        memory: bytes of a device.

    Raises:
        SparsifyError: of an unknown strategy or model, or as a run would.
    """
    plan = Plan([], memory)
    seen = dry_run(settings)
    plan.tries.append(("as asked", estimate(settings, seen)))
    for change, settings in _remedies(settings, seen):
        if plan.fits:
            break
        last = plan.tries[-1][1].settings
        if replace(settings, devices=1, shard=False) != replace(last, devices=1, shard=False):
            seen = dry_run(settings)
        plan.tries.append((change, estimate(settings, seen)))
    return plan


def _remedies(settings: PlanSettings, seen: DryRun) -> Iterator[tuple[str, PlanSettings]]:
    effect = make_strategy(settings.strategy, **settings.strategy_args).effect
    learns = FORWARD in seen.peaks
    if learns and not settings.gradient_checkpointing and not effect.without_gradients:
        settings = replace(settings, gradient_checkpointing=True)
        yield "gradient checkpointing", settings
    while learns and settings.batch_size > 1:
        settings = replace(settings, batch_size=settings.batch_size // 2)
        yield f"batch of {settings.batch_size}", settings
    if settings.dtype == "float32" and not effect.trains_weights:
        settings = replace(settings, dtype="bfloat16")
        yield "bfloat16 weights", settings
    devices = settings.devices if not settings.shard else 2 * settings.devices
    devices = max(2, devices)
    while learns and devices <= MOST_DEVICES:
        settings = replace(settings, devices=devices, shard=True)
        yield f"sharded over {devices}", settings
        devices *= 2
