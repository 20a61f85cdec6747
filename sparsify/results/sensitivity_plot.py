"""The figure of ``sparsify sensitivity``; needs Matplotlib."""

from pathlib import Path

from sparsify.results.sensitivity import Sensitivity

INCREASE, DECREASE, ZERO = "#b5442e", "#2f6690", "#555555"


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
