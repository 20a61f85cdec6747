"""Small charts as SVG that takes its colours from the page, so that it fits light and dark.

Matplotlib draws with stand-in colours, which are replaced by the page's variables afterwards. Rows
are told apart by colour, marker and dashes, and named by letters, so that no label of theirs is
part of a drawing. Needs Matplotlib.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

COLOURS = 6  # as many as the page defines: --s0 to --s5
MARKERS = "os^DvPX"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
INK, FAINT, PAGE = "#010203", "#010204", "#010205"
REFERENCE = {"color": INK, "linewidth": 1.1, "linestyle": (0, (4, 3))}
SERIES = "#0a0b{:02x}"
WIDTH, HEIGHT = 4.8, 3.1  # about as wide as a phone, whose text is then as large as it was drawn
FONT = 10.5
LEVELS = 40  # of a heat map's colours
MOST_CELLS = 20  # along a heat map, for numbers in it
# Ranges wider than these factors are drawn on a log scale.
WIDE, WIDE_COST = 4.0, 8.0

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
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
}


def letter(number: int) -> str:
    """A, B, ... Z, AA, AB: how a row is named in drawings."""
    first = letter(number // 26 - 1) if number >= 26 else ""
    return first + chr(ord("A") + number % 26)


def style(number: int) -> dict[str, Any]:
    """How the line of a row is drawn."""
    return {
        "color": SERIES.format(number % COLOURS),
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[(number // COLOURS) % len(DASHES)],
        "markersize": 5.5,
    }


@contextmanager
def chart(
    title: str = "", about: str = "", size: tuple[float, float] = (WIDTH, HEIGHT)
) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Axes to draw on, and what then gives the SVG.

    Args:
        title: the text alternative's heading; without one the drawing is decoration.
        about: the text alternative.
        size: width and height, inches.
    """
    # Not through pyplot, whose windows and global state nothing here needs. Names of clip paths are
    # hashes with the title, since all charts share a page.
    with rc_context(SETTINGS | {"svg.hashsalt": title or "key"}):
        figure = Figure(figsize=size, layout="constrained" if title else None)
        axes = figure.subplots() if title else figure.add_axes((0, 0, 1, 1))
        yield axes, lambda: _svg(figure, title, about)


def _svg(figure: Figure, title: str, about: str) -> str:
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Hundredths of a point are finer than any screen, and half as many characters.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r"#0a0b0([0-9a-f])", r"var(--s\1)", svg)
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)").replace(PAGE, "var(--page)")
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    # Numbered names, as axes_1, are in every drawing, and nothing refers to them.
    svg = re.sub(r' id="[A-Za-z.]+_\d+"', "", svg)
    names = f"<title>{escape(title)}</title><desc>{escape(about)}</desc>" if title else ""
    role = f'role="img" aria-label="{escape(title)}"' if title else 'aria-hidden="true"'
    head, _, rest = svg.partition(">")
    return f"{head} {role}>{names}{rest}"


def reference(axes: Any, value: float) -> None:
    """A dashed line across, at the value of the dense model."""
    axes.axhline(value, **REFERENCE)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(f"dense {value:,.2f}", (0, value), xytext=(4, 3), **place)


def key(number: int, is_dense: bool) -> str:
    """The line and marker of a row, for a legend or a table."""
    look = REFERENCE if is_dense else style(number)
    with chart(size=(0.5, 0.2)) as (axes, svg):
        axes.set_axis_off()
        axes.set(xlim=(0, 2), ylim=(-1, 1))
        axes.plot([0.1, 1, 1.9], [0, 0, 0], markevery=[1], **look)
        return svg()


def loss_axis(axes: Any, values: Sequence[float]) -> None:
    """Make y logarithmic where perplexities range widely, with plain numbers at its ticks."""
    if max(values) > WIDE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
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


def heat_map(axes: Any, names: Sequence[str], shares: Mapping[str, Mapping[str, float]]) -> None:
    """Draw shares of every two, with a scale; cells hold their percent where there is room."""
    values = [list(row.values()) for row in shares.values()]
    top = max(map(max, values)) or 1.0
    axes.grid(visible=False)
    # Not imshow, nor more levels, which would put a picture of pixels into the SVG.
    colours = colormaps["cividis"].resampled(LEVELS)
    look = {"edgecolors": "face", "linewidth": 0.3}
    mesh = axes.pcolormesh(values, cmap=colours, vmin=0.0, vmax=top, **look)
    scale = axes.figure.colorbar(mesh, ax=axes, format=PercentFormatter(1.0), pad=0.02)
    scale.outline.set_visible(False)
    scale.locator = MaxNLocator(5)
    scale.update_ticks()
    axes.invert_yaxis()
    places = [number + 0.5 for number in range(len(names))]
    axes.set_xticks(places, names)
    axes.set_yticks(places, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(names) <= MOST_CELLS:
        digits, size = (1, FONT - 0.5 * len(names)) if len(names) <= 8 else (0, 7.0)
        for y, row in zip(places, values, strict=True):
            for x, share in zip(places, row, strict=True):
                ink, text = "black" if share > 0.55 * top else "white", f"{100 * share:.{digits}f}"
                axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=size)
