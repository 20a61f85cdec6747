"""Tells runs apart by their settings without seeds, and gives them short names."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sparsify.masking import registry
from sparsify.results.compare.loading import CONFIG, Run

# What the command line was told and the result does not hold: what decides which layers are masked,
# what is read, and how is learned. (The trainer's part of the last is the command's own.)
ALWAYS = ("model.exclude", "model.include")
READING = ("data.train", "data.bos")
LEARNING = (
    "data.batch_size",
    "data.block_size",
    "model.lr_final",
    "model.optimizer",
    "model.warmup_steps",
)
FITTING = ("trainer.gradient_clip_val",)
# Settings that other settings imply, or that people look for last.
LATE = ("pattern", "overrides", "steps", "tokens", "weights", "sparsity")
LONGEST = 24

short_name = cache(registry.short_name)  # each reading of entry points takes a while


def settings(run: Run, fitting: bool = True) -> dict[str, str]:
    """All settings of a run, except seeds, by dotted name.

    Args:
        run: the run.
        fitting: also what its configuration says of the trainer, if that is the fit's.
    """
    record = run.record
    found = _flat("", record["strategy"]["settings"])
    if record.get("distillation"):
        found["distilled"] = "yes"
        found |= _flat("distilled", record["distillation"])
    if permuted := record.get("permutation"):
        parts = [str(part).rpartition(".")[2] for part in permuted.get("parts", ())]
        found["permuted"] = ", ".join(parts)
    for key in ("samples", "block_size", "bos", "activations"):
        if key in run.calibration:
            found[f"calibration.{key}"] = _text(run.calibration[key])
    found |= _flat("calibration.text", _text_of(run.calibration))
    return (
        found
        | _configured(run, fitting)
        | {
            "pattern": str(record["pattern"]),
            "steps": str(record["steps"]),
            "tokens": str(record["tokens"]),
            "weights": record["strategy"]["weights"],
            "sparsity": f"{record['sparsity']:.1%}",
            **({"overrides": "yes"} if record.get("overrides") else {}),
            **_flat("overrides", record.get("overrides") or {}),
        }
    )


def seeds(run: Run) -> tuple[str, ...]:
    """Everything random in a run: its seed, its data's seed, its calibration text."""
    data = run.told("data.seed")
    calibration = run.calibration.get("seed"), run.calibration.get("sha256")
    return tuple(map(str, (run.record.get("seed"), data, *calibration)))


def labels(strategies: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A name for every row: its strategy, and as few settings as are needed to tell rows apart.

    Args:
        strategies: the strategy of each row.
        rows: the settings of each row.
    """
    found = list(strategies)
    for name in dict.fromkeys(strategies):
        own = [number for number, strategy in enumerate(strategies) if strategy == name]
        for number, words in zip(own, _words([rows[number] for number in own]), strict=True):
            found[number] = ", ".join([name, *words])
    return found


def differing(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The settings that differ between rows; those that readers look for first come first."""
    names = dict.fromkeys(name for row in rows for name in row)
    several = [name for name in names if len({row.get(name) for row in rows}) > 1]
    return sorted(
        several,
        key=lambda name: (
            name != CONFIG,
            name.partition(".")[0] in LATE,
            name.startswith("calibration"),
        ),
    )


def _words(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """For each row, the settings that its name needs to differ from the other rows' names."""
    words: list[list[str]] = [[] for _ in rows]
    alike = [list(range(len(rows)))]
    for name in differing(rows):
        finer = []
        for some in alike:
            values = dict.fromkeys(rows[number].get(name) for number in some)
            finer += [[n for n in some if rows[n].get(name) == value] for value in values]
            if len(values) > 1:
                for number in some:
                    if name in rows[number]:
                        words[number].append(_word(name, rows[number][name]))
        alike = finer
    return words


def _word(name: str, value: str) -> str:
    value = value if len(value) <= LONGEST else f"{value[:LONGEST]}..."
    if name in ("pattern", "weights"):
        return value
    if name in ("steps", "tokens"):
        return f"{int(value):,} {name}"
    name = name.removeprefix("optimizer.")
    if value in ("yes", "no"):
        return name if value == "yes" else f"no {name}"
    return f"{name} {value}"


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Values by dotted name, without seeds; a strategy within one is named by its short name."""
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        if key == "seed" or value is None:  # older results do not hold what is not set
            continue
        if isinstance(value, dict) and isinstance(value.get("class"), str):
            found[name] = short_name(value["class"])
            found |= _flat(name, value.get("settings") or {})
        elif isinstance(value, dict):
            found |= _flat(name, value)
        else:
            found[name] = _text(value)
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text_of(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """The hashes of the texts from which the windows were drawn, where they are recorded."""
    sources = calibration.get("sources") or {}
    return {name: str(source.get("sha256", source))[:12] for name, source in sources.items()}


def _configured(run: Run, fitting: bool) -> dict[str, str]:
    if run.config is None:
        return {CONFIG: "missing"}
    paths = list(ALWAYS)
    if run.record["steps"] or run.calibration:
        paths += READING
    if run.record["steps"]:
        paths += LEARNING
        if fitting and run.is_fit:
            paths += FITTING
    found: dict[str, str] = {}
    for path in paths:
        value, key = run.told(path), path.rpartition(".")[2]
        if isinstance(value, dict) and "class_path" in value:
            found["optimizer"] = str(value["class_path"]).rpartition(".")[2]
            found |= _flat("optimizer", value.get("init_args") or {})
        elif value is not None:
            found[key] = _text(value)
    return found
