"""Draws the one figure of ``cost.py`` from its results."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

DARK, LIGHT, INK = "#2f6690", "#b9d0e2", "#333333"
LINES = {"selfmask": ("#b5442e", "o"), "wanda": ("#2f6690", "s"), "sparsegpt": ("#5a8f3c", "^")}
# A panel of a part that was not measured stays empty.
LAYOUT = [["steps", "bytes"], ["oneshot", "files"], ["startup", "width"], ["tokens", "layers"]]
# Panel: its part, the values of dark and light bars, the title, and what the two bars are.
PANELS: dict[str, tuple[str, tuple[str, ...], str, tuple[str, ...]]] = {
    "steps": (
        "steps",
        ("blocks", "blocks_with_update"),
        "Time of a learning step, dense = 1",
        ("forward, backward", "with the optimizer"),
    ),
    "bytes": (
        "steps",
        ("held_bytes", "peak_bytes"),
        "Bytes a masked weight, beyond the model",
        ("between steps", "at the peak"),
    ),
    "oneshot": ("oneshot", ("seconds",), "One shot, CPU seconds", ()),
    "files": (
        "files",
        ("bits", "packbits_zlib_bits"),
        "Mask file, bits a weight",
        ("mask file", "packbits, zlib"),
    ),
    "startup": ("startup", ("seconds",), "Start-up, CPU seconds", ()),
}


def draw_bars(axes: Any, bars: dict[str, list[float]], labels: tuple[str, ...]) -> None:
    """A dark bar for each name, on a wider light one where there are two values."""
    top = max(max(values) for values in bars.values())
    looks = [(0.5, DARK), (0.85, LIGHT)][: len(next(iter(bars.values())))]
    for number, (height, colour) in reversed(list(enumerate(looks))):
        widths = [values[number] for values in bars.values()]
        axes.barh(range(len(bars)), widths, height, color=colour)
    for place, values in enumerate(bars.values()):
        text = " / ".join(f"{value:.2f}" for value in values)
        axes.text(max(values) + 0.02 * top, place, text, va="center", color=INK, fontsize=7)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * top)
    if labels:
        axes.set_xlabel(f"dark: {labels[0]}; light: {labels[1]}", color=INK)


def draw_growth(axes: Any, what: str, rows: dict[str, dict[str, Any]]) -> None:
    """Seconds over one size, with each fitted exponent and what was expected."""
    for name, (colour, marker) in LINES.items():
        row = rows[f"{name}, {what}"]
        label = f"{name}: {row['exponent']:.2f}, expected {row['expected']}"
        axes.plot(row["sizes"], row["medians"], color=colour, marker=marker, ms=4, label=label)
        sizes = row["sizes"]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.6)  # room for the legend
    axes.legend(fontsize=7, frameon=False, loc="upper left")


def draw(result: dict[str, Any], file: Path) -> None:
    """Write the figure; the file's ending says in which format."""
    mpl.rcParams.update({"svg.hashsalt": "sparsify", "font.size": 8, "axes.edgecolor": "#999999"})
    figure = Figure(figsize=(8.2, 10.0), layout="constrained")
    panels = figure.subplot_mosaic(LAYOUT, height_ratios=[1.7, 0.6, 1.0, 1.0])
    for name, axes in panels.items():
        growth = ("growth", (), f"CPU seconds over {name}; exponents", ())
        part, keys, title, labels = PANELS.get(name, growth)
        axes.set_title(title, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        if part not in result:
            axes.set_axis_off()
            continue
        rows = result[part]["rows"]
        if name in PANELS:
            bars = {n: [row[key] for key in keys] for n, row in rows.items() if keys[0] in row}
            draw_bars(axes, bars, labels)
        else:
            draw_growth(axes, name, rows)
    panels["bytes"].set_yticklabels([])  # those of its neighbour
    about = f"{result['cpu']}, {result['threads']} thread, medians of {result['rounds']} rounds"
    figure.supxlabel(f"{about}, {result['date']}", fontsize=7, color="#777777")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
