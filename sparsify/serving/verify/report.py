"""What ``sparsify verify`` found, for people and as JSON."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsify.common.errors import SparsifyError
from sparsify.masking.coverage import Coverage
from sparsify.models.layer_names import family
from sparsify.serving.device_check import DeviceReport, Product

REPORT_SCHEMA = "sparsify.verify/1"
LONGEST = 40  # of a layer's name that is kept whole in a table


@dataclass
class LayerReport:
    """What was found in one layer.

    Attributes:
        name: its qualified name.
        shape: (O, I).
        pattern: the pattern that it should hold; None where it is plainly dense.
        nonzero: the share of its weights that are not zero; None where they could not be read.
        problems: each breaks a rule.
        notes: what a user may want to know.
        backends: what can run it sparse.
        cast: the type that it must be cast to before any of them packs it; None for its own.
        product: the sparse product on the device, if one was made.
    """

    name: str
    shape: tuple[int, int]
    pattern: str | None
    nonzero: float | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)
    cast: str | None = None
    product: Product | None = None

    @property
    def backend_text(self) -> str:
        """The backends in a few words."""
        return ", ".join(self.backends) or "none"


@dataclass
class BaseReport:
    """What was compared with the dense model.

    Attributes:
        base: as it was named.
        kept: layers whose kept weights were compared.
        whole: other tensors, compared in every value.
        left: what was not compared, by the reason.
    """

    base: str
    kept: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        done = [
            f"{what} of {len(names)} {unit}"
            for what, names, unit in (
                ("kept weights", self.kept, "layers"),
                ("all values", self.whole, "other tensors"),
            )
            if names
        ]
        text = f"compared with {self.base}: {' and '.join(done) or 'nothing'}"
        for reason, names in self.left.items():
            text += f"; NOT compared: {len(names)} tensors ({reason})"
        return text


@dataclass
class Report:
    """What was found in a folder.

    Attributes:
        folder: as it was named.
        problems: those of no single layer: files, manifest, dense tensors.
        notes: the same.
        layers: the layers in the order of the manifest, or of the files.
        base: what was compared with the dense model, if one was given.
        coverage: which share of the stored weights holds its pattern.
        device: products and times on an accelerator, if it was asked for them.
    """

    folder: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    base: BaseReport | None = None
    coverage: Coverage | None = None
    device: DeviceReport | None = None

    @property
    def ok(self) -> bool:
        """Whether no rule is broken; notes do not count."""
        return self.count == 0

    @property
    def count(self) -> int:
        """The number of problems."""
        return len(self.problems) + sum(len(layer.problems) for layer in self.layers)

    def summary(self) -> str:
        """One line that begins with ``ok`` or the number of problems, and ends with what was
        compared with a base model, where one was given.
        """
        verdict = "ok" if self.ok else f"{self.count} problem{'s' * (self.count > 1)}"
        sparse = [layer for layer in self.layers if layer.pattern]
        patterns = sorted({str(layer.pattern) for layer in sparse})
        of = f" of {', '.join(patterns)}" if patterns else ""
        against = "" if self.base is None else f"; {self.base}"
        return f"{verdict}: {self.folder}, {len(sparse)} sparse layers{of}{against}"

    def table(self) -> RenderableType:
        """The summary, every problem, the layers by family, and the notes, for the console."""
        parts: list[RenderableType] = [Text(self.summary(), style="green" if self.ok else "red")]
        parts += [Text(f"  {problem}") for problem in self.problems]
        for layer in self.layers:
            parts += [Text(f"  {layer.name}: {problem}") for problem in layer.problems]
        if self.layers:
            parts.append(self._layer_table())
        if self.coverage is not None:
            parts += [Text(line) for line in self.coverage.lines()]
            if (warning := self.coverage.warning()) is not None:
                parts.append(Text(f"note: {warning}"))
        if self.device is not None:
            parts.append(self.device.table())
        noted = ((note, layer.name) for layer in self.layers for note in layer.notes)
        parts += [Text(f"note: {note}") for note in self.notes]
        for note, group in _grouped(noted, lambda item: item[0]):
            names = [name for _, name in group]
            families = ", ".join(dict.fromkeys(family(name) for name in names))
            parts.append(Text(f"note: {families} ({len(names)}): {note}"))
        return Group(*parts)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"schema": REPORT_SCHEMA, "ok": self.ok, "summary": self.summary()} | asdict(self)

    def _layer_table(self) -> Table:
        rows = list(self._rows())
        # The summary names a pattern that all have, and says if there is no problem.
        said = {"pattern"} if len({row["pattern"] for row in rows}) == 1 else set()
        said |= {"problems"} if not any(row["problems"] for row in rows) else set()
        columns = [name for name in rows[0] if name not in said]
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        casts = dict.fromkeys(layer.cast for layer in self.layers if layer.cast and layer.backends)
        titles = {"backends": f"backends as {', '.join(casts)}"} if casts else {}
        for name in columns:
            # Names are kept whole, unless one leaves no room for the rest.
            whole = name == "layer" and max(len(row[name]) for row in rows) <= LONGEST
            justify: Any = "right" if name in ("n", "nonzero") else "left"
            table.add_column(
                titles.get(name, name), justify=justify, no_wrap=whole, overflow="fold"
            )
        for row in rows:
            table.add_row(*(row[name] for name in columns))
        return table

    def _rows(self) -> Iterator[dict[str, str]]:
        """A row for each family of sound layers, and one for each layer that has a problem."""

        def key(layer: LayerReport) -> tuple[object, ...]:
            name = layer.name if layer.problems else family(layer.name)
            return name, layer.shape, layer.pattern, layer.backend_text, bool(layer.problems)

        for _, group in _grouped(self.layers, key):
            first, count = group[0], len(group)
            yield {
                "layer": first.name if first.problems else family(first.name),
                "n": str(count),
                "out x in": f"{first.shape[0]} x {first.shape[1]}",
                "pattern": first.pattern or "dense",
                "nonzero": _range([layer.nonzero for layer in group if layer.nonzero is not None]),
                "backends": first.backend_text if first.pattern else "",
                "problems": str(sum(len(layer.problems) for layer in group) or ""),
            }


def unchecked(what: str, error: Exception) -> str:
    """The problem that a check could not be made to its end, so that the others go on."""
    if isinstance(error, SparsifyError):
        return str(error)
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{what}: not checked to the end ({type(error).__name__}: {reason})"


def _range(shares: list[float]) -> str:
    if not shares:
        return "?"
    texts = dict.fromkeys(f"{100 * share:.1f} %" for share in (min(shares), max(shares)))
    return " to ".join(texts)


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Items by key, in the order in which the keys first appear."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    yield from groups.items()
