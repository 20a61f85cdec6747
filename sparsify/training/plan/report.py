"""A plan as a table or as JSON."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table

from sparsify.masking.registry import strategy_name
from sparsify.training.plan.estimate import Estimate
from sparsify.training.plan.hours import GPUS, hours, step_work, total_flops
from sparsify.training.plan.search import Plan, as_words
from sparsify.training.plan.settings import PlanSettings

GIB = 1 << 30
AS_ASKED = "as asked"


def to_dict(plan: Plan) -> dict[str, Any]:
    """Plain values; sizes in bytes. Settings and changes are by option of ``sparsify fit``."""
    return {
        "memory": plan.memory,
        "fits": plan.fits,
        "short_by": max(0, plan.short(plan.best)),
        "best": plan.tries.index(next(t for t in plan.tries if t[1] is plan.best)),
        "changes": as_words(plan.changes),
        "tries": [
            {
                "change": as_words(change),
                "settings": _settings(found.settings),
                "peak": found.total,
                "phase": found.phase,
                "parts": found.parts,
                "phases": found.phases,
                "evaluation": {"logits": found.logits},
                "time": _time(found),
            }
            for change, found in plan.tries
        ],
    }


def _time(found: Estimate) -> dict[str, Any]:
    """Operations and bytes of one device: of all of calibration, and of a step by phase. Peaks in
    TFLOP/s and TB/s; hours are of all devices.
    """
    settings, times = found.settings, {}
    for name, gpu in GPUS.items():
        took = hours(settings, found.work, gpu)
        times[name] = {"peaks": gpu._asdict(), **took._asdict(), "hours": took.total}
    return {
        "utilisation": settings.utilisation,
        "tokens_a_step": settings.tokens if step_work(found.work).moved else None,
        "work": {k: {"flops": dict(w.flops), "moved": w.moved} for k, w in found.work.items()},
        "flops": total_flops(settings, found.work),
        "gpus": times,
    }


def _settings(settings: PlanSettings) -> dict[str, Any]:
    module = settings.module
    selection = module.selection
    return {
        "model.strategy": strategy_name(type(module.strategy)),
        "model.name_or_path": module.name_or_path,
        "model.pattern": str(selection.pattern),
        "model.include": selection.include,
        "model.exclude": selection.exclude,
        "model.overrides": selection.overrides.describe(),
        "model.dtype": module.dtype_name,
        "model.gradient_checkpointing": module.gradient_checkpointing,
        "model.gather": module.gather,
        "data.batch_size": settings.batch_size,
        "data.block_size": settings.block_size,
        "data.eval_batch_size": settings.eval_batch_size,
        "trainer.precision": settings.precision,
        "trainer.accelerator": settings.device,
        "trainer.devices": settings.devices,
        "trainer.num_nodes": settings.nodes,
        "trainer.accumulate_grad_batches": settings.accumulate,
        "trainer.max_steps": -1 if settings.steps is None else settings.steps,
        "shard": settings.shard,
    }


def to_table(plan: Plan) -> Group:
    """The best settings by part, what was tried, and the verdict."""
    best = plan.best
    name, device = strategy_name(type(best.settings.module.strategy)), best.settings.device
    parts = Table(title=f"{name} on {device}: GiB a device, at the peak of each phase of learning")
    parts.add_column("part")
    for phase in best.phases:
        parts.add_column(phase, justify="right")
    for part in dict.fromkeys(p for found in best.phases.values() for p in found):
        sizes = (found.get(part) for found in best.phases.values())
        parts.add_row(part, *("" if size is None else f"{size / GIB:.2f}" for size in sizes))
    parts.add_section()
    parts.add_row("sum", *(f"{sum(p.values()) / GIB:.2f}" for p in best.phases.values()))
    tries = Table(title="tried, each on top of those above")
    for column in ("options of fit", "peak GiB", "in", "fits"):
        left = column in ("options of fit", "in")
        tries.add_column(column, justify="left" if left else "right")
    for change, found in plan.tries:
        fits = "" if plan.memory is None else "yes" if plan.short(found) <= 0 else "no"
        row = f"{found.total / GIB:.2f}", found.phase, fits
        tries.add_row(as_words(change) or AS_ASKED, *row)
    test = f"validation and test, not counted: {best.settings.eval_batch_size} windows a batch, "
    test += f"whose logits take {best.logits / GIB:.2f} GiB in fp32, thrice while losses are made"
    return Group(parts, tries, *_time_tables(best), test, verdict(plan))


def _time_tables(found: Estimate) -> Iterator[Table]:
    """The work of a device, and the hours on every GPU."""
    settings, total = found.settings, total_flops(found.settings, found.work)
    learns = bool(step_work(found.work).moved)
    types = list(dict.fromkeys(t for work in found.work.values() for t in work.flops))
    work = Table(title="work of a device" + ", one step" * learns)
    work.add_column("phase")
    for column in (*(f"TFLOP in {t}" for t in types), "GB moved"):
        work.add_column(column, justify="right")
    for phase, done in found.work.items():
        flops = (_short(done.flops[t] / 1e12) if t in done.flops else "" for t in types)
        work.add_row(phase, *flops, _short(done.moved / 1e9))
    yield work
    run = f"{settings.module.calibration.samples} windows of {settings.block_size:,} tokens"
    if learns:
        steps = "each step" if settings.steps is None else f"{settings.steps:,} steps"
        run = f"{steps} of {settings.tokens:,} tokens"
    share = f"products at {settings.utilisation:.0%} of peak"
    spent = "" if total is None else f", {total:.2e} FLOP"
    table = Table(title=f"GPU-hours: {run}{spent}, {share}")
    table.add_column("GPU")
    columns = ["s a step", "learning"] if learns else []
    for column in (*columns, "calibration", "sum", "of it moving bytes"):
        table.add_column(column, justify="right")
    for name, gpu in GPUS.items():
        took = hours(settings, found.work, gpu)
        row = [took.step, took.learning] if learns else []
        row += [took.calibration, took.total]
        moving = "" if not took.total else f"{(took.moving or 0) / took.total:.0%}"
        table.add_row(name, *map(_short, row), moving)
    yield table


def _short(number: float | None) -> str:
    """Three digits, or all before the point; nothing if it is not known."""
    if number is None:
        return ""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def verdict(plan: Plan) -> str:
    """One sentence."""
    best = plan.best
    peak = f"{best.total / GIB:.2f} GiB"
    if plan.memory is None:
        return f"peak {peak}; with --memory GIB it is compared, and settings that fit are sought"
    if plan.fits:
        how = f"with {as_words(plan.changes)}" if plan.changes else AS_ASKED
        return f"fits {plan.memory / GIB:g} GiB {how}: {peak}"
    short = plan.short(best) / GIB
    return f"nothing fits {plan.memory / GIB:g} GiB: the best of these needs {short:.2f} GiB more"
