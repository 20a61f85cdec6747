"""What a model card knows of an export. Its manifest and its result may lack anything."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.common.values import cut
from sparsify.masking.registry import short_name

_HUB = "hf://"
_LONGEST = 200
# OWNER/NAME, by the Hub's rules.
_ID = re.compile(r"(?!.*(--|\.\.))[a-z0-9_][\w.-]*/[\w.-]*[a-z0-9_]", re.ASCII | re.IGNORECASE)
_LONGEST_ID = 96
_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Facts:
    """What is known of an export.

    Attributes:
        manifest: its manifest.
        config: its configuration.
        record: ``run``, ``protocol`` and ``scores``, as far as they are there.
        dense: the scores of the dense model by text.
        tasks: the report of downstream tasks.
    """

    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    dense: Mapping[str, Any]
    tasks: Mapping[str, Any]

    @property
    def task(self) -> str:
        """What it does, as the Hub names it."""
        return "image-text-to-text" if "vision_config" in self.config else "text-generation"

    @property
    def base_name(self) -> str:
        """The base's name; of what looks like a path only the last part."""
        name = str(at(self.manifest, "base.name") or "unknown")
        return self.base_id or name.replace("\\", "/").rstrip("/").rpartition("/")[2]

    @property
    def base_id(self) -> str | None:
        """The base's id on the Hub; None if it has none."""
        name = str(at(self.manifest, "base.name"))
        if name.lower().endswith(".gguf"):  # a file within a repository
            name = name.rpartition("/")[0]
        # A record keeps only the last part of a local path, in which there is no owner.
        return name if len(name) <= _LONGEST_ID and _ID.fullmatch(name) else None

    @property
    def licence(self) -> dict[str, Any]:
        stated = table(at(self.manifest, "base.license"))
        return {key: str(stated[key]) for key in _LICENCE if key in stated}

    @property
    def strategy(self) -> str:
        return short_name(str(at(self.manifest, "strategy.class") or "unknown"))

    @property
    def patterns(self) -> Counter[str]:
        """How many layers have each pattern."""
        layers = table(self.manifest.get("layers")).values()
        return Counter(str(table(layer).get("pattern")) for layer in layers)

    @property
    def title(self) -> str:
        """The base's name and the pattern of most layers."""
        patterns = (_as_tag(name) for name, _ in self.patterns.most_common(1))
        return "-".join([_short(self.base_name.split("/")[-1]), *patterns])

    def tags(self) -> list[str]:
        return ["sparsify", "sparsity", *map(_as_tag, sorted(self.patterns)), _short(self.strategy)]

    def scores(self) -> dict[str, Mapping[str, Any]]:
        """The scores by text; those that are no numbers are left out."""
        stated = table(self.record.get("scores"))
        return {text: score for text, score in stated.items() if has_perplexity(score)}

    def eval_results(self) -> Iterator[dict[str, Any]]:
        """The arguments of huggingface_hub's ``EvalResult`` for each number."""
        protocol = table(self.record.get("protocol"))
        window, bos = at(protocol, "data.block_size"), at(protocol, "data.bos")
        how = {"window": window, "first_tokens": bos or [], "dtype": at(protocol, "base.dtype")}
        for text, score in self.scores().items():
            source = table(table(at(protocol, "data.sources")).get(text))
            file = str(source.get("file", ""))
            hub = file.removeprefix(_HUB) if file.startswith(_HUB) else None
            yield {
                "task_type": self.task,
                "dataset_type": hub or text,
                "dataset_name": text,
                "dataset_config": source.get("config"),
                "dataset_split": source.get("split") or protocol.get("split"),
                "dataset_args": how | {"windows": score.get("windows")},
                "metric_type": "perplexity",
                "metric_name": "token perplexity",
                "metric_value": score["perplexity"],
            }
        shared = table(self.tasks.get("protocol"))
        for task, row in table(self.tasks.get("results")).items():
            if (value := at(row, "sparse.value")) is None:
                continue
            shots = table(table(shared.get("tasks")).get(task)).get("num_fewshot")
            yield {
                "task_type": self.task,
                "dataset_type": task,
                "dataset_name": task,
                "dataset_args": {"num_fewshot": shots, "limit": shared.get("limit")},
                "metric_type": str(row.get("metric")),
                "metric_value": value,
            }


def has_perplexity(score: Any) -> bool:
    value = table(score).get("perplexity")
    return isinstance(value, float | int) and math.isfinite(value) and value > 0


def table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def at(content: Any, path: str) -> Any:
    """The value at a dotted path, None if there is none."""
    for key in path.split("."):
        content = table(content).get(key)
    return content


def _as_tag(pattern: str) -> str:
    return pattern.replace(":", "of")  # in the Hub's tags a colon has a meaning of its own


def line(value: Any) -> str:
    """Text for one cell of a table: no markup and no line of its own."""
    return "".join(f"\\{char}" if char in "|<>[]`" else char for char in _short(value))


def code(value: Any) -> str:
    """The same as code, which holds no markup anyway."""
    return f"`{_short(value).replace('`', '').replace('|', '/')}`"


def _short(value: Any) -> str:
    return cut(" ".join(str(value).split()), _LONGEST)
