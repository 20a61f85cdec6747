"""A plan as a table or as JSON."""

from typing import Any

from rich.console import Group
from rich.table import Table

from sparsify.training.plan.search import Plan

GIB = 1 << 30


def to_dict(plan: Plan) -> dict[str, Any]:
    """Plain values; sizes in bytes."""
    return {
        "memory": plan.memory,
        "fits": plan.fits,
        "short_by": max(0, plan.short(plan.best)),
        "best": plan.tries.index(next(t for t in plan.tries if t[1] is plan.best)),
        "tries": [
            {
                "change": change,
                "settings": {
                    name: getattr(found.settings, name)
                    for name in ("strategy", "pattern", "dtype", "precision", "device", "devices")
                    + ("shard", "batch_size", "block_size", "gradient_checkpointing")
                },
                "peak": found.total,
                "phase": found.phase,
                "parts": found.parts,
                "phases": found.phases,
            }
            for change, found in plan.tries
        ],
    }


def to_table(plan: Plan) -> Group:
    """The best settings by part, what was tried, and the verdict."""
    best = plan.best
    parts = Table(
        title=f"{best.settings.strategy}: GiB a device, at the peak of each phase of learning"
    )
    parts.add_column("part")
    for phase in best.phases:
        parts.add_column(phase, justify="right")
    for part in dict.fromkeys(p for found in best.phases.values() for p in found):
        sizes = (found.get(part) for found in best.phases.values())
        parts.add_row(part, *("" if size is None else f"{size / GIB:.2f}" for size in sizes))
    parts.add_section()
    parts.add_row("sum", *(f"{sum(p.values()) / GIB:.2f}" for p in best.phases.values()))
    tries = Table(title="tried, each on top of those above")
    for column in ("change", "peak GiB", "in", "fits"):
        tries.add_column(column, justify="left" if column in ("change", "in") else "right")
    for change, found in plan.tries:
        fits = "" if plan.memory is None else "yes" if plan.short(found) <= 0 else "no"
        tries.add_row(change, f"{found.total / GIB:.2f}", found.phase, fits)
    return Group(parts, tries, verdict(plan))


def verdict(plan: Plan) -> str:
    """One sentence."""
    best = plan.best
    peak = f"{best.total / GIB:.2f} GiB"
    if plan.memory is None:
        return f"peak {peak}; with --memory GIB it is compared, and settings that fit are sought"
    if plan.fits:
        change = next(change for change, found in plan.tries if found is best)
        return f"fits {plan.memory / GIB:g} GiB with {peak}: {change}"
    short = plan.short(best) / GIB
    return f"nothing fits {plan.memory / GIB:g} GiB: the best of these needs {short:.2f} GiB more"
