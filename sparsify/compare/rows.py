"""Runs that differ only in their seeds are one row."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.compare.loading import Run
from sparsify.compare.settings import labels, seeds, settings, short_name
from sparsify.evaluation import OVERALL
from sparsify.prior import SavedMasks

COSTS = ("tokens", "seconds", "memory")
CHANGES = {
    "frozen": "masks",
    "proxy": "masks",
    "updated": "masks, kept weights",
    "trained": "masks, all weights",
}


@dataclass(frozen=True)
class Row:
    """A strategy with its settings, and its runs over seeds.

    Attributes:
        label: what it is called.
        settings: all that its runs were told, besides seeds.
        runs: one for each combination of seeds, in the seeds' order.
        samples: those of the runs whose results differ.
    """

    label: str
    settings: dict[str, str]
    runs: list[Run]
    samples: list[Run]

    @property
    def record(self) -> dict[str, Any]:
        """What was done, from the first run."""
        return self.runs[0].record

    @property
    def is_dense(self) -> bool:
        """Whether it is the reference that prunes nothing."""
        return bool(self.record["pattern"] == "dense")

    @property
    def changes(self) -> str:
        """What it changes in the base model."""
        weights = self.record["strategy"]["weights"]
        return "nothing" if self.is_dense else CHANGES.get(weights, weights)

    @property
    def keeps_base(self) -> bool:
        """Whether the kept weights are the base model's."""
        return self.record["strategy"]["weights"] in ("frozen", "proxy")

    @property
    def is_exact(self) -> bool:
        """Whether nothing random entered: no step, no calibration text."""
        random = self.record["steps"] or self.record.get("calibration")
        return not random and len(self.samples) == 1

    @property
    def losses(self) -> list[float]:
        """The overall losses of the samples."""
        return [run.losses()[OVERALL] for run in self.samples]

    @property
    def loss(self) -> float:
        """Their mean, nats a token."""
        return statistics.fmean(self.losses)

    def perplexities(self, text: str) -> list[float]:
        """Of the samples, on one text."""
        return [run.result["scores"][text]["perplexity"] for run in self.samples]

    def costs(self, what: str) -> list[float]:
        """What the runs took, calibration included: tokens, seconds, or peak memory in GiB; none
        where a run does not tell.
        """
        found = [_cost(run, what) for run in self.runs]
        known = [cost for cost in found if cost is not None]
        return known if len(known) == len(found) else []

    def cost(self, what: str) -> float | None:
        """Their mean."""
        costs = self.costs(what)
        return statistics.fmean(costs) if costs else None

    @property
    def spread(self) -> str:
        """From how many different results its numbers come."""
        if self.is_exact:
            return "exact"
        return "one run" if len(self.samples) == 1 else f"{len(self.samples)} seeds"


def make_rows(runs: Sequence[Run]) -> tuple[list[Row], list[str]]:
    """Rows by rising mean loss, and remarks on what was left out or is not known."""
    remarks = []
    with_config = all(run.config is not None for run in runs)
    if not with_config:
        remarks.append(
            "Not every run has its config.yaml beside it: runs that differ only in what stands "
            "there alone (optimizer, batch size, training text) are counted as seeds of one row."
        )
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        own = settings(run, with_config) | {"class": run.record["strategy"]["class"]}
        groups.setdefault(tuple(sorted(own.items())), []).append(run)
    strategies = [short_name(group[0].record["strategy"]["class"]) for group in groups.values()]
    told = [settings(group[0], with_config) for group in groups.values()]
    rows = []
    names = _unique(labels(strategies, told))
    for label, one, group in zip(names, told, groups.values(), strict=True):
        kept = _one_per_seed(group)
        if len(kept) < len(group):
            remarks.append(
                f"{label}: {len(group) - len(kept)} of {len(group)} runs repeat the seeds of a "
                "newer one and are left out."
            )
        if SavedMasks.__name__ in one.values():
            remarks.append(
                f"{label}: starts from the masks of another run, whose cost is not counted here."
            )
        samples = list({tuple(run.losses().items()): run for run in kept}.values())
        row = Row(label, one, kept, samples)
        if len(samples) < len(kept) and not row.is_exact:
            remarks.append(
                f"{label}: {len(kept)} runs gave {len(samples)} different results; equal ones "
                "count once (a calibration text is drawn by --model.calibration.seed)."
            )
        rows.append(row)
    return sorted(rows, key=lambda row: row.loss), remarks


def _one_per_seed(runs: Sequence[Run]) -> list[Run]:
    by_date = sorted(runs, key=lambda run: str(run.result.get("date")))
    newest = {seeds(run): run for run in by_date}
    return [newest[key] for key in sorted(newest)]


def _unique(names: list[str]) -> list[str]:
    return [
        f"{name} #{names[: number + 1].count(name)}" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]


def _cost(run: Run, what: str) -> float | None:
    record = run.record
    if what == "memory":
        return record.get("peak_memory_gib")
    if what == "tokens":
        return record["tokens"] + calibration_tokens(run)
    seconds = calibration_seconds(run)
    return None if seconds is None else record["seconds"] + seconds


def calibration_tokens(run: Run) -> int:
    """The tokens of its calibration text."""
    calibration = run.calibration
    windows = calibration.get("samples", 0) * calibration.get("block_size", 0)
    return int(calibration.get("tokens", windows))


def calibration_seconds(run: Run) -> float | None:
    """What its calibration took to compute; None where that is not known."""
    if run.calibration.get("cached") and "history" not in run.result:
        return None  # older results hold the time to read the cache instead
    return float(run.calibration.get("seconds", 0.0))
