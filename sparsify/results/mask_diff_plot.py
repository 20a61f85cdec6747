"""The figures of mask differences; needs Matplotlib."""

from collections.abc import Mapping
from pathlib import Path

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
