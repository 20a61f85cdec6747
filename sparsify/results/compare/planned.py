"""What rows would cost on a larger model: computed by a plan, never measured."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparsify.training.plan import PlanSettings, make_plan
from sparsify.training.plan.hours import GPUS, hours

HEADLINE_GPU = "A100 80GB SXM"  # what published runs on models of 7B state their hours of
GIB = 1 << 30


@dataclass(frozen=True)
class PlannedCost:
    """The cost of one row.

    Attributes:
        peak: GiB on each GPU.
        hours: GPU-hours of the run, of all GPUs together, by the GPU's name.
        devices: how many GPUs share the run.
    """

    peak: float
    hours: dict[str, float]
    devices: int

    @property
    def sentence(self) -> str:
        """Memory and time in words."""
        many = f"each of {self.devices} GPUs" if self.devices > 1 else "one GPU"
        return (
            f"{self.peak:,.1f} GiB on {many}, {self.hours[HEADLINE_GPU]:,.0f} GPU-hours "
            f"({HEADLINE_GPU})"
        )


@dataclass(frozen=True)
class Planned:
    """The costs of all rows that could be planned.

    Attributes:
        model: the model's name and size.
        run: the settings that all rows share.
        costs: by the row's label.
        reasons: why other rows have no plan, by label.
    """

    model: str
    run: str
    costs: Mapping[str, PlannedCost]
    reasons: Mapping[str, str]


def planned_cost(settings: PlanSettings) -> PlannedCost:
    """Plan a run; errors as :func:`~sparsify.training.plan.make_plan`. Weights that train are in
    float32, as training needs them, and are multiplied in the type that was asked for.
    """
    if settings.module.strategy.effect.trains_weights:
        mixed = settings.with_model(dtype_name="float32")
        settings = replace(mixed, precision="bf16-mixed")
    found = make_plan(settings).best
    spent = {name: hours(found.settings, found.work, gpu).total for name, gpu in GPUS.items()}
    known = {name: total for name, total in spent.items() if total is not None}
    return PlannedCost(found.total / GIB, known, settings.ranks)


def describe_run(settings: PlanSettings) -> str:
    """What all planned rows have in common, in words."""
    windows = settings.tokens // settings.block_size
    shared = f", sharded over {settings.ranks} GPUs" if settings.shard else ""
    return (
        f"{settings.steps:,} steps of {windows:,} windows of {settings.block_size:,} tokens in "
        f"{settings.module.dtype_name} (weights that train: float32, multiplied in bfloat16), with "
        f"gradient checkpointing{shared}; matrix products at {settings.utilisation:.0%} of a GPU's "
        "peak"
    )
