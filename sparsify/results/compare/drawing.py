"""Small charts as SVG, which a page shows as images. Needs Matplotlib.

Rows are told apart by colour, marker and dashes, and named in a legend beneath the axes. Of many
rows, a few are in colour, and the others grey.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

COLOURS = ("#0067a5", "#c24a00", "#00795a", "#a33b78", "#8a6500", "#4e44b0", "#b3001b", "#0095a8")
MARKERS = "os^DvPX"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
INK, FAINT, GREY = "#1d2126", "#d3d7dc", "#8d959e"
WIDTH, HEIGHT = 4.8, 3.0  # about a phone's width, so that a phone need not shrink the text
FONT = 10.5
LEGEND_COLUMNS, LEGEND_LINE = 2, 0.19  # inches
LONGEST_NAME = 22  # as many characters as fit a column of the legend
# Ranges wider than these factors are drawn on a log scale.
WIDE, WIDE_COST = 2.5, 8.0

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsify",  # the same results give the same file
    "text.parse_math": False,  # names of rows are no formulas
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": FONT,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": FONT - 1,
    "ytick.labelsize": FONT - 1,
    "lines.linewidth": 1.8,
    "legend.fontsize": FONT - 1.5,
    "legend.frameon": False,
    "legend.borderpad": 0.0,
    "legend.columnspacing": 1.0,
    "legend.handletextpad": 0.6,
}


def letter(number: int) -> str:
    """A, B, ... Z, AA, AB: the row's name where its label does not fit."""
    first = letter(number // 26 - 1) if number >= 26 else ""
    return first + chr(ord("A") + number % 26)


def row_name(number: int, label: str) -> str:
    """A row's letter and as much of its label as a legend has room for."""
    text = " ".join(label.split())  # a legend's entry is one line
    short = text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"
    return f"{letter(number)}  {short}"


def style(place: int) -> dict[str, Any]:
    """How the line of a row is drawn.

    Args:
        place: the row's place among all, by how much a reader wants to see it.
    """
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[(place // len(COLOURS)) % len(DASHES)],
        "markersize": 5.5,
    }


def quiet() -> dict[str, Any]:
    """How the line of a row is drawn that stands behind the others."""
    return {
        "color": GREY,
        "marker": ".",
        "linestyle": "-",
        "linewidth": 0.9,
        "markersize": 3,
        "zorder": 1,
    }


def others(axes: Any, count: int) -> None:
    """Name in the legend the rows that are grey, if there are some."""
    if count:
        axes.plot([], [], label=f"{count} more, in the table", **quiet())


@contextmanager
def chart(height: float = HEIGHT) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Yield axes to draw on, and a function that returns the SVG with a legend of labelled items.

    Args:
        height: the height of the axes with their labels, inches.
    """
    # Not through pyplot, whose windows and global state nothing here needs.
    with rc_context(SETTINGS):
        axes = Figure(figsize=(WIDTH, height), layout="constrained").subplots()
        yield axes, lambda: _svg(axes, height)


def _svg(axes: Any, height: float) -> str:
    handles, names = axes.get_legend_handles_labels()
    if names:
        axes.figure.set_figheight(height + LEGEND_LINE * math.ceil(len(names) / LEGEND_COLUMNS))
        axes.figure.legend(handles, names, loc="outside lower left", ncols=LEGEND_COLUMNS)
    file = io.StringIO()
    with warnings.catch_warnings():
        # A browser has fonts for characters that Matplotlib's own lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        axes.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def reference(axes: Any, value: float) -> None:
    """A dashed line across, at the value of the dense model."""
    look = {"color": INK, "linewidth": 1.1, "linestyle": (0, (4, 3))}
    axes.axhline(value, label=f"dense {value:,.2f}", **look)


def loss_axis(axes: Any, values: Sequence[float]) -> None:
    """Make y logarithmic where perplexities range widely, with plain numbers at its ticks."""
    if max(values) > WIDE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def cost_axis(axes: Any, values: Sequence[float]) -> None:
    """Make x logarithmic where costs range widely, with a place at 0 for what costs nothing."""
    above = [value for value in values if value > 0]
    if above and max(above) > WIDE_COST * min(above):
        least = 10 ** math.floor(math.log10(min(above)))
        axes.set_xscale("symlog", linthresh=least, linscale=0.4)
        axes.set_xlim(-0.25 * least if min(values) == 0 else 0.8 * min(above), 1.6 * max(above))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if above and max(above) >= 10_000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def count_axis(axes: Any) -> None:
    """Large whole numbers along x: 200k, 1.5M."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
