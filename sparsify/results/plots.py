"""Figures of mask differences and of sensitivity."""

from collections.abc import Mapping
from pathlib import Path

from sparsify.results.sensitivity import Sensitivity

INCREASE, DECREASE, ZERO = "#b5442e", "#2f6690", "#555555"

MISSING = "#e8e8e8"


def plot_heat_map(
    shares: Mapping[str, Mapping[str, float]], title: str, file: Path, most_numbers: int = 100
) -> None:
    """Draw shares, rows over columns, into a PNG; up to ``most_numbers`` cells show their number.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    # Not through pyplot, whose windows and global state nothing here needs.
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    columns = list(dict.fromkeys(column for row in shares.values() for column in row))
    values = [[row.get(column, float("nan")) for column in columns] for row in shares.values()]
    present = [share for row in values for share in row if share == share]  # not NaN
    top = max(present) or 1.0
    labels = max((len(name) for name in shares), default=0)
    size = (2.6 + 0.075 * labels + 0.72 * len(columns), 2.0 + 0.3 * len(shares))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    colours = colormaps["viridis"].with_extremes(bad=MISSING)
    image = axes.imshow(values, cmap=colours, vmin=0.0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(shares)), list(shares))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(present) <= most_numbers:
        for y, row in enumerate(values):
            for x, share in enumerate(row):
                if share == share:
                    ink = "black" if share > 0.6 * top else "white"
                    axes.text(x, y, f"{share:.1%}", ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, format=PercentFormatter(1.0, decimals=None))
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
