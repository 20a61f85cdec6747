"""Draws docs/images/smollm2_curve.svg from the newest benchmarks/results/smollm2_table-*.json.

python docs/draw_curves.py
"""

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "smollm2_curve.svg"
NEWEST = sorted((ROOT / "benchmarks" / "results").glob("smollm2_table-*.json"))[-1]
COLOURS = {"selfmask": "#d62728", "maskllm": "#1f77b4"}
GREY = "#808080"  # is read on white and on black


def main() -> None:
    results = json.loads(NEWEST.read_text(encoding="utf-8"))
    mpl.rcParams.update({"svg.hashsalt": "sparsify", "font.size": 9})
    figure = Figure(figsize=(6.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in COLOURS.items():
        course = results[name]["held_out_c4"]
        tokens = [point["tokens"] / 1000 for point in course]
        perplexities = [point["perplexity"] for point in course]
        axes.plot(tokens, perplexities, color=colour, marker="o", markersize=4)
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (tokens[-1], perplexities[-1]), color=colour, **place)
    axes.set_yscale("log")
    ticks = [50, 60, 80, 100, 150, 200]
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xlim(0, 570)
    axes.set_xlabel("thousand tokens learned from", color=GREY)
    axes.set_ylabel("perplexity of held-out C4", color=GREY)
    axes.grid(alpha=0.25)
    axes.tick_params(colors=GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    figure.savefig(PICTURE, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
