"""Draws the panels of a workspace of `sparsify dashboard` from offline runs of Weights & Biases.

The runs lie in docs/dashboards/compare.tar.gz, and the pictures in docs/images/dashboard_*.svg::

    python docs/draw_dashboards.py                 # the pictures, from the runs that are kept
    python docs/draw_dashboards.py runs/compare    # first keep those of `make compare` anew

`make compare` logs to CSV files. What they and the results hold is logged again, offline, under the
names and keys that ``--logger wandb`` gives; tables of layers and artifacts are left out.
"""

import csv
import sys
import tarfile
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import wandb
from draw_axes import GREY, plain
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sparsify.callbacks.wandb_record import keys_of_result  # noqa: E402
from sparsify.common.files import read_json  # noqa: E402
from sparsify.results.dashboard import SCORE, STEP  # noqa: E402
from tests.callbacks.wandb_files import OfflineRun, read_file  # noqa: E402

KEPT = ROOT / "docs" / "dashboards" / "compare.tar.gz"
PICTURES = ROOT / "docs" / "images"
STYLES = ("-", "--", ":")  # of the rows of one strategy
PERPLEXITY, TOKENS, SECONDS, MEMORY = (
    "val/perplexity",
    "run/tokens",
    "run/seconds",
    "run/peak_memory_gib",
)
COURSE = {  # every line panel over steps, with what its axis says
    "train/task_loss": "nats a token",
    "masks/flips": "share of groups",
    "masks/distance": "share of groups",
    "masks/retained_norm": "share of magnitude's",
    "masks/max_probability": "probability",
    "masks/entropy": "nats a group",
    "masks/sample_change": "share of weights",
    "masks/soft_hard_gap": "nats a token",
    "speed/tokens_per_second": "tokens a second",
    "speed/peak_memory_gib": "GiB",
}

Rows = dict[str, list[OfflineRun]]  # the runs of one row, a seed each


def record(folder: Path, kept: Path) -> None:
    """Log every finished run below a folder of `make compare` again, and keep the files."""
    results = sorted(folder.glob("*-seed_*/runs/*/version_*/result.json"))
    if not results:
        raise SystemExit(f"{folder}: it holds no ROW-seed_N/runs/*/version_*/result.json")
    kept.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for file in results:
            log(file, file.relative_to(folder).parts[0], Path(temporary))
        wandb.teardown()  # waits until all is written
        with tarfile.open(kept, "w:gz") as archive:
            for file in sorted(Path(temporary).rglob("run-*.wandb")):
                archive.add(file, f"compare/{file.parent.name}/{file.name}", filter=anonymous)


def log(file: Path, name: str, folder: Path) -> None:
    """Log one finished run offline, without a word on the machine that does it."""
    keys = keys_of_result(read_json(file))
    settings = wandb.Settings(
        mode="offline",
        root_dir=str(folder),
        silent=True,
        console="off",
        host="",
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    tags = [keys["strategy"], keys["pattern"]]
    about: dict[str, Any] = {"project": "sparsify", "id": name, "name": name, "tags": tags}
    with wandb.init(config=keys, settings=settings, **about) as run:
        run.define_metric("*", step_metric=STEP)
        with (file.parent / "metrics.csv").open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                values = {k: float(v) for k, v in row.items() if v and k not in ("epoch", "step")}
                run.log(values | {STEP: int(row["step"])})


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uname = member.gname = ""
    member.uid = member.gid = 0
    return member


def read(kept: Path) -> Rows:
    """The kept runs, by the name of their row."""
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as temporary, tarfile.open(kept) as archive:
        archive.extractall(temporary, filter="data")
        for file in sorted(Path(temporary).rglob("run-*.wandb")):
            row, _, _ = file.stem.removeprefix("run-").partition("-seed_")
            rows.setdefault(row, []).append(read_file(file))
    return rows


def points(run: OfflineRun, y: str, x: str = STEP) -> tuple[list[float], list[float]]:
    """One metric over another, wherever both were logged."""
    both = [(row[x], row[y]) for row in run.history if x in row and y in row]
    return [at for at, _ in both], [value for _, value in both]


def learned(rows: Rows) -> Rows:
    """The rows that took optimizer steps, so that there is a course to draw; shortest names first,
    which are the strategies as they come.
    """
    names = [name for name, (run, *_) in rows.items() if len(points(run, PERPLEXITY)[0]) > 2]
    return {name: rows[name] for name in sorted(names, key=len)}


def looks(rows: Rows) -> dict[str, dict[str, Any]]:
    """A colour for each strategy, and a line style for each of its rows."""
    found: dict[str, dict[str, Any]] = {}
    colours: dict[str, int] = {}
    used: dict[str, int] = {}
    for name, (run, *_) in rows.items():
        strategy = run.config["strategy"]
        number, style = colours.setdefault(strategy, len(colours)), used.get(strategy, 0)
        used[strategy] = style + 1
        found[name] = {"color": f"C{number}", "linestyle": STYLES[style % len(STYLES)]}
    return found


def lines(axes: Axes, rows: Rows, y: str, x: str = STEP) -> None:
    """A line for every row: the mean of its seeds, which look at the same steps."""
    for name, look in looks(rows).items():
        seeds = [points(run, y, x) for run in rows[name]]
        mean = [list(map(fmean, zip(*values, strict=True))) for values in zip(*seeds, strict=True)]
        axes.plot(*mean, linewidth=1, label=name, **look)


def clear(axes: Axes, title: str, x: str, y: str = "") -> None:
    axes.set_title(title, color=GREY, fontsize=9)
    axes.set_xlabel(x, color=GREY)
    axes.set_ylabel(y, color=GREY)
    plain(axes)


def perplexities(axes: Axes, along: str = "y") -> None:
    """A logarithmic axis with numbers that can be read."""
    getattr(axes, f"set_{along}scale")("log")
    ticks = [20, 25, 30, 40, 50, 60, 80]
    getattr(axes, f"set_{along}ticks")(ticks, map(str, ticks))
    axes.minorticks_off()


def draw_ship(rows: Rows) -> Figure:
    """Test perplexity, a bar for each row and a dot for each of its runs."""
    scores = {name: [points(run, SCORE)[1][-1] for run in runs] for name, runs in rows.items()}
    order = sorted(scores, key=lambda name: -fmean(scores[name]))
    figure = Figure(figsize=(6.2, 0.5 + 0.19 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    for at, name in enumerate(order):
        axes.barh(at, fmean(scores[name]), color="C0", height=0.6)
        axes.plot(scores[name], [at] * len(scores[name]), ".", color=GREY, markersize=3)
    clear(axes, SCORE, "")
    perplexities(axes, "x")
    axes.set_xlim(left=18)
    axes.set_yticks(range(len(order)), order)
    return figure


def draw_cost(rows: Rows) -> Figure:
    """Perplexity over what was spent."""
    figure = Figure(figsize=(6.2, 5.6), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    courses = learned(rows)
    for axes, cost in ((first, TOKENS), (second, SECONDS)):
        lines(axes, courses, PERPLEXITY, cost)
        clear(axes, PERPLEXITY, cost)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    for axes, cost in ((third, SECONDS), (fourth, MEMORY)):
        for name, runs in rows.items():
            look = {"color": GREY} if name not in courses else looks(courses)[name]
            for run in runs:
                at, score = points(run, SCORE, cost)
                axes.plot(at, score, "o", markersize=4, color=look["color"])
        clear(axes, SCORE, cost)
    for axes in (first, second, third, fourth):
        perplexities(axes)
    legend(figure, first)
    return figure


def draw_course(rows: Rows) -> Figure:
    """What moved while strategies learned."""
    figure = Figure(figsize=(6.2, 9.5), layout="constrained")
    panels = figure.subplots(5, 2).flat
    for axes, (metric, unit) in zip(panels, COURSE.items(), strict=True):
        lines(axes, learned(rows), metric)
        clear(axes, metric, "step", unit)
    legend(figure, figure.axes[0])
    return figure


def legend(figure: Figure, axes: Axes) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        labelcolor=GREY,
    )


DRAWINGS = {"ship": draw_ship, "cost": draw_cost, "course": draw_course}


def main(folders: list[str]) -> None:
    for folder in folders:
        record(Path(folder).resolve(), KEPT)
    rows = read(KEPT)
    for name, draw in DRAWINGS.items():
        # One salt for each: all stand in one page, and their parts must not share names.
        mpl.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 8})
        draw(rows).savefig(
            PICTURES / f"dashboard_{name}.svg", transparent=True, metadata={"Date": None}
        )


if __name__ == "__main__":
    main(sys.argv[1:])
