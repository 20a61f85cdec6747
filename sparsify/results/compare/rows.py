"""Groups runs into rows: runs that differ only in their seeds are one row."""

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.calibration.prior import SavedMasks
from sparsify.common.errors import SparsifyError
from sparsify.common.values import first_few
from sparsify.export.mask_file.index import open_index
from sparsify.masking.coverage import LOW
from sparsify.models.perplexity import OVERALL
from sparsify.results.compare.loading import CONFIG, Run
from sparsify.results.compare.settings import labels, seeds, settings, short_name

Settings = tuple[tuple[str, str], ...]
MOST_NAMED = 5
COSTS = ("tokens", "seconds", "memory")
CHANGES = {
    "frozen": "masks",
    "proxy": "masks",
    "updated": "masks, kept weights",
    "trained": "masks, all weights",
    "adapted": "masks, kept weights",
}


@dataclass(frozen=True)
class Row:
    """A strategy with its settings, and its runs over seeds.

    Attributes:
        label: the row's name.
        settings: all settings of its runs, except seeds.
        runs: one run for each combination of seeds, in the order of the seeds.
        samples: the runs, without those that repeat another's result.
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
    def covered(self) -> float | None:
        """The share of the block weights that are N:M; None if the run does not tell."""
        share = (self.record.get("coverage") or {}).get("blocks")
        return None if share is None or self.is_dense else float(share)

    @property
    def keeps_base(self) -> bool:
        """Whether the kept weights are the base model's."""
        return self.record["strategy"]["weights"] in ("frozen", "proxy")

    @property
    def is_exact(self) -> bool:
        """Whether nothing in it is random: no training step and no calibration text."""
        random = self.record["steps"] or self.record.get("calibration")
        return not random and len(self.samples) == 1

    @property
    def losses(self) -> list[float]:
        """The overall losses of the samples, nats a token."""
        return [run.losses()[OVERALL] for run in self.samples]

    @property
    def perplexity(self) -> float:
        """The samples' mean overall perplexity, by which rows are ranked."""
        return statistics.fmean(self.perplexities())

    def perplexities(self, text: str = OVERALL) -> list[float]:
        """The samples' perplexities on one text."""
        return [run.result["scores"][text]["perplexity"] for run in self.samples]

    def costs(self, what: str) -> list[float]:
        """What the runs took, calibration included: tokens, seconds, or peak memory in GiB; none
        where a run does not tell.
        """
        found = [_cost(run, what) for run in self.runs]
        known = [cost for cost in found if cost is not None]
        return known if len(known) == len(found) else []

    def cost(self, what: str) -> float | None:
        """The mean of the runs' costs."""
        costs = self.costs(what)
        return statistics.fmean(costs) if costs else None

    @property
    def spread(self) -> str:
        """Says from how many different results the row's numbers come."""
        if self.is_exact:
            return "exact"
        return "one run" if len(self.samples) == 1 else f"{len(self.samples)} seeds"


def make_rows(runs: Sequence[Run]) -> tuple[list[Row], list[str]]:
    """Make rows, by rising mean perplexity, and remarks on what was left out or is not known."""
    kept = without_repeats(runs)
    remarks = _unknown(runs)
    origins = _origins(runs)
    groups: dict[Settings, list[Run]] = {}
    for run in kept:
        groups.setdefault(_identity(run, origins=origins), []).append(run)
    for group in groups.values():
        group.sort(key=seeds)
    strategies = [short_name(group[0].record["strategy"]["class"]) for group in groups.values()]
    told = [_named(settings(group[0]), origins) for group in groups.values()]
    names = _unique(labels(strategies, told))
    if repeats := [str(run.path.parent) for run in runs if run not in kept]:
        remarks.append(
            f"{len(repeats)} of {len(runs)} runs repeat the settings and seeds of another and are "
            f"left out: {first_few(repeats, MOST_NAMED)}. What `sparsify fit` wrote counts before "
            "tests and exports of it, and what is newer before what is older."
        )
    rows = []
    for label, one, group in zip(names, told, groups.values(), strict=True):
        if SavedMasks.__name__ in one.values():
            remarks.append(
                f"{label}: starts from the masks of another run, whose cost is not counted here."
            )
        samples = list({tuple(run.losses().items()): run for run in group}.values())
        row = Row(label, one, group, samples)
        if row.covered is not None and row.covered < LOW:
            remarks.append(f"{label}: only {row.covered:.1%} of its block weights are N:M.")
        if len(samples) < len(group) and not row.is_exact:
            remarks.append(
                f"{label}: {len(group)} runs gave {len(samples)} different results; equal ones "
                "count once (a calibration text is drawn by --model.calibration.seed)."
            )
        rows.append(row)
    return sorted(rows, key=lambda row: row.perplexity), remarks


def without_repeats(runs: Sequence[Run]) -> list[Run]:
    """Keep one run for each combination of settings and seeds: the newest that ``sparsify fit``
    wrote, or else the newest of all.
    """
    alike: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        # Without its configuration, only a run's result can show that it repeats another.
        scores = tuple(run.losses().items()) if run.config is None else None
        alike.setdefault((_identity(run, fitting=False), seeds(run), scores), []).append(run)
    kept: set[Path] = set()
    for some in alike.values():
        fits = [run for run in some if run.is_fit]
        newest = {_identity(run): run for run in sorted(fits or some, key=_told_and_date)}
        kept |= {run.path for run in newest.values()}
    return [run for run in runs if run.path in kept]


def _identity(run: Run, fitting: bool = True, origins: Mapping[str, str] | None = None) -> Settings:
    own = settings(run, fitting) | {"class": run.record["strategy"]["class"]}
    return tuple(sorted(_named(own, origins or {}).items()))


def _origins(runs: Sequence[Run]) -> dict[str, str]:
    """What made the masks of every export that is there, by their digest: a strategy, and a hash of
    its settings without seeds. Each seed of a row may start from the masks of another run; what
    counts is that those runs are one row too.
    """
    found = {}
    for run in runs:
        with suppress(SparsifyError):  # no export, or one without masks
            digest = open_index(run.path.parent / "export").digest
            if digest not in settings(run).values():  # then it only kept them
                own = hashlib.sha256(repr(_identity(run)).encode()).hexdigest()[:8]
                found[digest] = f"{short_name(run.record['strategy']['class'])}, {own}"
    return found


def _named(own: dict[str, str], origins: Mapping[str, str]) -> dict[str, str]:
    """Settings, with what made the masks in place of their digest."""
    return {name: origins.get(value, value) for name, value in own.items()}


def _told_and_date(run: Run) -> tuple[bool, str]:
    return bool(run.record.get("command")), str(run.result.get("date"))


def _unknown(runs: Sequence[Run]) -> list[str]:
    """A remark on the runs without configuration."""
    bare = [str(run.path.parent) for run in runs if run.config is None]
    if not bare:
        return []
    return [
        f"Without {CONFIG}, and so in rows of their own: {first_few(bare, MOST_NAMED)}. Those of "
        "them that differ only in what stands there alone (optimizer, batch size, training text) "
        "are counted as seeds of one row."
    ]


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
    """How long its calibration and the search for orders took; None if that is not known for the
    run's device.
    """
    if run.calibration.get("cached") and "history" not in run.result:
        return None  # older results hold the time to read the cache instead
    device = run.record.get("device")
    parts = (run.calibration, run.record.get("permutation") or {})
    if any((part.get("device") or device) != device for part in parts):
        return None
    return sum(float(part.get("seconds", 0.0)) for part in parts)
