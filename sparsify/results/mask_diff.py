"""Measures how much masks differ.

The measure is the share of weights that only one of two masks keeps, which is the masks' mean
absolute difference. Fang et al. 2024 (arXiv 2409.17481, appendix I) give such percentages for
learned and one-shot masks, without a formula.

Shapes: O out, I in, G groups.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.masking.pattern import NMPattern
from sparsify.models.layer_names import block_and_kind


@dataclass(frozen=True)
class Counts:
    """Counts the differences of two masks ``a`` and ``b``, of one layer or of several.

    Attributes:
        weights: how many weights there are.
        differ: weights that one mask keeps and the other drops.
        kept: weights that ``a`` keeps.
        lost: weights that ``a`` keeps and ``b`` drops.
        groups: how many groups there are.
        groups_differ: groups in which at least one weight differs.
    """

    weights: int = 0
    differ: int = 0
    kept: int = 0
    lost: int = 0
    groups: int = 0
    groups_differ: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})

    def shares(self) -> dict[str, float]:
        """Three shares: weights that differ; weights that ``b`` drops, of those that ``a`` keeps;
        groups that differ. A share of nothing is 0.
        """
        return {
            "weights": self.differ / max(self.weights, 1),
            "kept_lost": self.lost / max(self.kept, 1),
            "groups": self.groups_differ / max(self.groups, 1),
        }


def _count(a_OI: Tensor, b_OI: Tensor, pattern: NMPattern) -> Counts:
    differ_OI = a_OI != b_OI
    differ_OG = pattern.groups(differ_OI).any(-1)
    return Counts(
        a_OI.numel(),
        int(differ_OI.sum()),
        int(a_OI.sum()),
        int((a_OI & ~b_OI).sum()),
        differ_OG.numel(),
        int(differ_OG.sum()),
    )


@dataclass(frozen=True)
class MaskDiff:
    """The differences of two sets of masks.

    Attributes:
        layers: the counts by qualified name, for layers that both sets mask.
        only_a: the layers that only the first set masks.
        only_b: the layers that only the second set masks.
    """

    layers: Mapping[str, Counts]
    only_a: list[str]
    only_b: list[str]

    @property
    def overall(self) -> Counts:
        """The sum of the counts of all layers that both sets mask."""
        return sum(self.layers.values(), Counts())

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as plain values."""
        parts = {"overall": self.overall, **self.layers}
        found = {name: {"counts": asdict(c), "shares": c.shares()} for name, c in parts.items()}
        overall = found.pop("overall")
        return {
            "overall": overall,
            "layers": found,
            "only_a": self.only_a,
            "only_b": self.only_b,
        }

    def grid(self) -> dict[str, dict[str, Counts]]:
        """The counts by decoder block and kind of layer: ``{"model.layers.0": {"q_proj": ...}}``.
        Layers outside of all blocks are under ``other``.
        """
        places = {name: block_and_kind(name) for name in self.layers}
        kinds = _short_kinds({kind for _, kind in places.values()})
        grid: dict[str, dict[str, Counts]] = {}
        for name, (block, kind) in places.items():
            row = grid.setdefault(block, {})
            row[kinds[kind]] = row.get(kinds[kind], Counts()) + self.layers[name]
        return grid

    def table(self) -> Table:
        """The share of weights that differ, by decoder block and kind of layer."""
        grid = self.grid()
        kinds = list(dict.fromkeys(kind for row in grid.values() for kind in row))
        # If all blocks are in one list, their numbers name them.
        alike = len({block.rpartition(".")[0] for block in grid}) == 1
        left = len(self.only_a) + len(self.only_b)
        table = Table(
            title="weights that differ",
            caption=f"{left} layers are in one of the two alone, and left out" if left else None,
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for header in ("block", *kinds, "all"):
            table.add_column(header, justify="left" if header == "block" else "right")
        for block, row in grid.items():
            name = block.rpartition(".")[2] if alike else block
            table.add_row(name, *(_percent(row.get(kind)) for kind in kinds), _total(row.values()))
        columns = [[row[kind] for row in grid.values() if kind in row] for kind in kinds]
        table.add_section()
        table.add_row("all", *map(_total, columns), _percent(self.overall))
        return table

    def plot(self, file: Path, title: str = "Weights that differ") -> None:
        """Draw the table as a heat map into a PNG.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        from sparsify.results.plots import plot_heat_map

        cells = {
            block: {kind: counts.shares()["weights"] for kind, counts in row.items()}
            for block, row in self.grid().items()
        }
        plot_heat_map(cells, title, file)


def diff(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], patterns: Mapping[str, NMPattern]
) -> MaskDiff:
    """Compare two sets of masks layer by layer.

    Args:
        a: bool ``[O, I]`` by qualified layer name; layers are looked up one by one.
        b: the other set, likewise.
        patterns: the patterns of ``a`` by layer name, which define the groups.

    Raises:
        SparsifyError: no layer is in both sets, or a layer has different shapes.
    """
    common = [name for name in a if name in b]
    if not common:
        raise SparsifyError(
            f"the masks have no layer in common: one has {next(iter(a), None)!r}, the other "
            f"{next(iter(b), None)!r}; compare masks of one model"
        )
    layers = {}
    for name in common:
        a_OI, b_OI = a[name], b[name]
        check_shapes(name, [a_OI, b_OI])
        layers[name] = _count(a_OI, b_OI, patterns[name])
    only_a, only_b = [n for n in a if n not in b], [n for n in b if n not in a]
    return MaskDiff(layers, only_a, only_b)


def check_shapes(name: str, masks: Iterable[Tensor]) -> None:
    """Refuse masks of one layer that have different shapes."""
    shapes = {tuple(mask.shape) for mask in masks}
    if len(shapes) > 1:
        raise SparsifyError(
            f"{name}: the masks are {' and '.join(map(str, sorted(shapes)))}; compare masks of one "
            "model"
        )


def _short_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """Short names for kinds of layers: their last part, if no two kinds share it."""
    short = {kind: kind.rpartition(".")[2] for kind in kinds}
    count = Counter(short.values())
    return {kind: last if count[last] == 1 else kind for kind, last in short.items()}


def _total(parts: Iterable[Counts]) -> str:
    return _percent(sum(parts, Counts()))


def _percent(counts: Counts | None) -> str:
    return "" if counts is None else f"{counts.shares()['weights']:.2%}"


@dataclass(frozen=True)
class DiffMatrix:
    """The differences of each pair of several sets of masks.

    Attributes:
        shares: the share of weights that differ, by the names of the two sets.
        layers: the layers that were compared: those that all sets mask.
    """

    shares: Mapping[str, Mapping[str, float]]
    layers: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as plain values."""
        return asdict(self)

    def table(self) -> Table:
        """The matrix."""
        table = Table(
            "",
            title="weights that differ",
            caption=f"over {len(self.layers)} layers",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for name in self.shares:
            table.add_column(name, justify="right")
        for name, row in self.shares.items():
            table.add_row(name, *(f"{share:.2%}" for share in row.values()))
        return table

    def plot(self, file: Path, title: str = "Weights that differ") -> None:
        """Draw the matrix into a PNG.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        from sparsify.results.plots import plot_heat_map

        plot_heat_map(self.shares, title, file)


def diff_matrix(masks: Mapping[str, Mapping[str, Tensor]]) -> DiffMatrix:
    """Compare each pair of several sets of masks, over the layers that all of them hold.

    Args:
        masks: by the name of the set: bool ``[O, I]`` by qualified layer name. Each mask is looked
            up once.

    Raises:
        SparsifyError: no layer is in all sets, or a layer has different shapes.
    """
    first, *others = masks.values()
    common = [name for name in first if all(name in other for other in others)]
    if not common:
        raise SparsifyError(f"no layer is in all of {', '.join(masks)}; compare masks of one model")
    weights, differ = 0, dict.fromkeys(itertools.combinations(masks, 2), 0)
    for name in common:
        of = {key: one[name] for key, one in masks.items()}
        check_shapes(name, of.values())
        weights += next(iter(of.values())).numel()
        for a, b in differ:
            differ[a, b] += int((of[a] != of[b]).sum())
    differ |= {(b, a): count for (a, b), count in differ.items()}
    shares = {a: {b: differ.get((a, b), 0) / weights for b in masks} for a in masks}
    return DiffMatrix(shares, common)
