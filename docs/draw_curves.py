"""Draws docs/images/smollm2_curve.svg from the newest real_models_smollm2-*.json of
benchmarks/results, and from smollm2_table-*.json what that file has not.

python docs/draw_curves.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from draw_axes import GREY, RESULTS, newest, plain
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "smollm2_curve.svg"
# Rows that learn masks alone.
COLOURS = {
    "selfmask": "#d62728",
    "selfmask, no teacher": "#ff9896",
    "maskllm": "#1f77b4",
    "maskllm, distilled": "#17becf",
}


def draw(results: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Held-out perplexity of the first seed, over tokens and over minutes."""
    mpl.rcParams.update({"svg.hashsalt": "sparsify", "font.size": 9})
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    tokens, minutes = figure.subplots(1, 2, sharey=True)
    for name, colour in COLOURS.items():
        if name in results:
            row = results[name][0]  # earlier ones have no times
            course = row["history"]["validation"] if "history" in row else row["held_out_c4"]
            perplexities = [look["perplexity"] for look in course]
            line = {"color": colour, "marker": "o", "markersize": 3, "label": name}
            tokens.plot([look["tokens"] / 1000 for look in course], perplexities, **line)
            if "history" in row:
                minutes.plot([look["seconds"] / 60 for look in course], perplexities, **line)
    tokens.set_ylabel("perplexity of held-out C4", color=GREY)
    finish(tokens, "thousand tokens learned from")
    finish(minutes, "minutes of learning")
    tokens.legend(frameon=False, labelcolor="linecolor")
    figure.savefig(picture, transparent=True, metadata={"Date": None})


def finish(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    ticks = [50, 60, 80, 100, 150, 200, 300]
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xlim(left=0)
    axes.set_xlabel(label, color=GREY)
    plain(axes)


def main() -> None:
    files = sorted(RESULTS.glob("smollm2_table-*.json"))[-1:]
    files += [newest("real_models_smollm2-*.json", "benchmarks/real_models.py --model smollm2")]
    results: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for name, rows in json.loads(file.read_text(encoding="utf-8")).items():
            results[name] = rows if isinstance(rows, list) else [rows]
    draw(results, PICTURE)


if __name__ == "__main__":
    main()
