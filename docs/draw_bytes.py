"""Draws docs/images/bytes.svg from the newest benchmarks/results/bytes_MODEL_STRATEGY-*.json::

    python docs/draw_bytes.py

A panel for each model and strategy that was measured: test perplexity, as a multiple of the dense
model's, over the bytes of the masked layers.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from draw_axes import GREY, RESULTS, newest, plain
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "bytes.svg"
PANELS = {
    "embedded_wanda": "embedded model, Wanda",
    "embedded_selfmask": "embedded model, selfmask",
    "smollm2_wanda": "SmolLM2-135M, Wanda",
}
# By whether patterns were chosen by layer, and whether channels were permuted.
LINES = {
    (False, False): ("one pattern", "#888888", "s"),
    (False, True): ("one pattern, permuted", "#1f77b4", "^"),
    (True, False): ("a pattern for each layer", "#ff7f0e", "o"),
    (True, True): ("both", "#d62728", "D"),
}
TICKS = (1, 1.1, 1.2, 1.5, 2, 3, 5, 10)


def line_of(name: str) -> tuple[bool, bool]:
    return name.startswith("budget"), name.endswith("permuted")


def perplexity(row: dict[str, Any]) -> float:
    return float(row["scores"]["overall"]["perplexity"])


def draw(axes: Axes, rows: dict[str, dict[str, Any]], title: str) -> None:
    dense = perplexity(rows["dense"])
    for line, (label, colour, marker) in LINES.items():
        own = [row for name, row in rows.items() if name != "dense" and line_of(name) == line]
        own.sort(key=lambda row: row["bytes"])
        places = [row["bytes"] / 2**20 for row in own]
        ratios = [perplexity(row) / dense for row in own]
        axes.plot(places, ratios, marker=marker, markersize=4, color=colour, label=label)
    axes.set(yscale="log", title=title)
    axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    highest = max(perplexity(row) for row in rows.values()) / dense
    axes.set_ylim(0.97, highest * 1.1)
    axes.set_xlabel("MiB of the masked layers", color=GREY)
    axes.title.set_color(GREY)
    plain(axes)


def main() -> None:
    newest("bytes_embedded_wanda-*.json", "benchmarks/bytes_table.py --folder FOLDER")
    found = {
        title: sorted(RESULTS.glob(f"bytes_{name}-*.json"))[-1:] for name, title in PANELS.items()
    }
    shown = {title: files[0] for title, files in found.items() if files}
    mpl.rcParams.update({"svg.hashsalt": "sparsify", "font.size": 9})
    figure = Figure(figsize=(3.7 * len(shown), 3.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, file) in zip(panels, shown.items(), strict=True):
        draw(axes, json.loads(file.read_text(encoding="utf-8")), title)
    panels[0].set_ylabel("perplexity / dense", color=GREY)
    panels[0].legend(frameon=False, labelcolor="linecolor")
    figure.savefig(PICTURE, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
