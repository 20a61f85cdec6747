"""Draws docs/images/paper_figures.svg from the newest benchmarks/results/paper-*.json.

These are figures 4, 5, 6 and 8 of MaskLLM's paper, made again on the embedded model::

    python docs/draw_paper.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from draw_axes import newest
from matplotlib.figure import Figure

from sparsify.models.layer_names import block_number
from sparsify.results.plots import heat_map

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "paper_figures.svg"
BLOCKS = ("wanda", "sparsegpt", "maskllm", "selfmask")
MARKS = "os^D"


def perplexity(run: dict[str, Any]) -> float:
    return float(run["scores"]["overall"]["perplexity"])


def samples(axes: Any, content: dict[str, Any]) -> None:
    runs = content["runs"]
    for mark, (row, some) in zip(MARKS, content["samples"].items(), strict=False):
        windows = [int(one) for one in some]
        reached = [perplexity(runs[name]) for name in some.values()]
        axes.plot(windows, reached, f"{mark}-", label=row)
    axes.axhline(perplexity(runs["dense"]), color="gray", linestyle="--", label="dense")
    axes.set(xscale="log", yscale="log", xlabel="windows of 256 tokens read", ylabel="perplexity")
    axes.set_yticks([20, 30, 40, 60], ["20", "30", "40", "60"])
    axes.minorticks_off()
    axes.set_title("Figure 4: perplexity over text read")
    axes.legend()


def course(axes: Any, content: dict[str, Any], value: str, title: str, label: str) -> None:
    for mark, (kappa, name) in zip(MARKS, content["kappa"].items(), strict=False):
        looks = content["runs"][name]["history"]["masks"]
        known = [look for look in looks if look.get(value) is not None]
        steps = [look["step"] for look in known]
        axes.plot(steps, [look[value] for look in known], f"{mark}-", label=f"kappa {kappa}")
    axes.set(xlabel="step", ylabel=label, title=title)
    axes.legend()


def norms(axes: Any, content: dict[str, Any]) -> None:
    for mark, name in zip(MARKS, BLOCKS, strict=True):
        found: dict[int | None, list[float]] = {}
        for layer, state in content["runs"][name]["masks"]["layers"].items():
            found.setdefault(block_number(layer), []).append(state["retained_norm"])
        means = [sum(found[block]) / len(found[block]) for block in sorted(found)]
        axes.plot(sorted(found), means, f"{mark}-", label=name)
    axes.set(xlabel="block", ylabel="L1 norm, of magnitude's", title="Figure 6: what masks keep")
    axes.margins(y=0.3)
    axes.legend(loc="lower left", ncols=2)


def main() -> None:
    file = newest("paper-*.json", "benchmarks/paper_table.py --folder FOLDER")
    content = json.loads(file.read_text(encoding="utf-8"))
    mpl.rcParams.update({"svg.hashsalt": "sparsify", "font.size": 8, "legend.fontsize": 7})
    figure = Figure(figsize=(8, 8.4), layout="constrained")
    figure.set_facecolor("white")
    places = figure.subplot_mosaic([["4", "6"], ["5a", "5b"], ["8", "8"]])
    four, six, five_a, five_b, eight = places.values()
    samples(four, content)
    norms(six, content)
    title = "Figure 5a: how much draws differ"
    course(five_a, content, "sample_change", title, "share of weights")
    title = "Figure 5b: how sure draws are"
    course(five_b, content, "max_probability", title, "likeliest mask's probability")
    short = {name: name.replace(", ", ",\n") for name in content["differences"]}
    shares = {
        short[row]: {short[column]: share for column, share in found.items()}
        for row, found in content["differences"].items()
    }
    heat_map(eight, shares, list(shares), ".0%", 7)
    eight.set_title("Figure 8: share of weights that differ")
    for axes in (four, six, five_a, five_b):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
