"""Draws figures of mask differences and of sensitivity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify.results.sensitivity import Sensitivity

INCREASE, DECREASE, ZERO = "#b5442e", "#2f6690", "#555555"
MISSING = "#e8e8e8"  # the colour of a heat map's cells without a value
MOST_NUMBERS = 100  # a heat map with more cells shows no numbers


def heat_map(
    axes: Any,
    shares: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    cell: str = ".1%",
    size: float = 8,
) -> None:
    """Draw shares as a heat map; with up to a hundred cells, each shows its number.

    Args:
        axes: Matplotlib's axes to draw on.
        shares: the shares of each row, by column; a row may lack columns.
        names: the names of the rows.
        cell: how a number is formatted.
        size: the font size of a number, points.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    columns = list(dict.fromkeys(column for row in shares.values() for column in row))
    values = [[row.get(column, float("nan")) for column in columns] for row in shares.values()]
    present = [share for row in values for share in row if share == share]  # not NaN
    top = max(present) or 1.0
    # Start from the white background, so that colours still rise from it on an inverted page.
    colours = colormaps["Blues"].with_extremes(bad=MISSING)
    # Not imshow: an SVG would hold its image as pixels, which browsers blur.
    look = {"edgecolors": "face", "linewidth": 0.3}
    mesh = axes.pcolormesh(values, cmap=colours, vmin=0.0, vmax=top, **look)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns)
    axes.set_yticks([y + 0.5 for y in range(len(values))], names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(present) <= MOST_NUMBERS:
        for y, row in enumerate(values):
            for x, share in enumerate(row):
                if share == share:
                    ink = "white" if share > 0.6 * top else "black"
                    look = {"ha": "center", "va": "center", "color": ink, "fontsize": size}
                    axes.text(x + 0.5, y + 0.5, f"{share:{cell}}", **look)
    scale = axes.figure.colorbar(mesh, ax=axes, format=PercentFormatter(1.0, decimals=None))
    scale.outline.set_visible(False)


def plot_heat_map(shares: Mapping[str, Mapping[str, float]], title: str, file: Path) -> None:
    """Draw shares, rows over columns, into a PNG.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    # Not through pyplot, whose windows and global state nothing here needs.
    from matplotlib.figure import Figure

    columns = {column for row in shares.values() for column in row}
    labels = max((len(name) for name in shares), default=0)
    size = (2.6 + 0.075 * labels + 0.72 * len(columns), 2.0 + 0.3 * len(shares))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    heat_map(axes, shares, list(shares))
    axes.tick_params(axis="x", rotation=35)
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    axes.set_title(title, loc="left", fontsize=11)
    figure.savefig(file, dpi=150)


def plot_sensitivity(found: Sensitivity, title: str, path: Path) -> None:
    """Draw the two differences of every block, one panel each, into a PNG.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    # Not through pyplot, whose windows and global state nothing here needs.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    numbers = list(range(len(found.blocks)))
    width = min(12.0, max(6.0, 2.0 + 0.25 * len(numbers)))
    figure = Figure(figsize=(width, 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    panels = (
        (above, "loss_increase", INCREASE, "Pruned alone: loss above the dense model"),
        (below, "loss_decrease", DECREASE, "Kept dense alone: loss below the pruned model"),
    )
    for axes, name, colour, label in panels:
        axes.bar(numbers, [getattr(block, name) for block in found.blocks], color=colour)
        axes.axhline(0, color=ZERO, linewidth=0.8)
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_ylabel("nats a token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    below.set_xlabel("decoder block")
    below.set_xlim(-0.6, len(numbers) - 0.4)
    below.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)
