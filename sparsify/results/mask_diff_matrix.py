"""How much every two of several sets of masks differ, as those of several domains."""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.results.mask_diff import check_shapes


@dataclass(frozen=True)
class DiffMatrix:
    """The differences of every two of several sets of masks.

    Attributes:
        shares: the share of weights that differ, by the names of the two.
        layers: the layers that were compared: those that all mask.
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
        from sparsify.results.mask_diff_plot import plot_heat_map

        plot_heat_map(self.shares, title, file)


def diff_matrix(masks: Mapping[str, Mapping[str, Tensor]]) -> DiffMatrix:
    """Compare every two of several sets of masks, over the layers that all of them hold.

    Args:
        masks: by the name of the set, bool ``[O, I]`` by qualified layer name; each is looked up
            once.

    Raises:
        SparsifyError: no layer is in all, or one has two shapes.
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
