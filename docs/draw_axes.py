"""What the drawings of results share: the newest results, and axes for light and dark pages."""

from pathlib import Path

from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
GREY = "#808080"  # is read on white and on black


def newest(files: str, command: str) -> Path:
    """The newest results file of these; without one, the command that makes it is said."""
    found = sorted(RESULTS.glob(files))
    if not found:
        raise SystemExit(f"{RESULTS} holds no {files}: run {command} --save benchmarks/results")
    return found[-1]


def plain(axes: Axes) -> None:
    """Grey ticks and two grey sides, with a faint grid."""
    axes.grid(alpha=0.25)
    axes.tick_params(colors=GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
