"""The figures of a report that show masks: how they moved, what they keep, how far apart they are.

After figures 5 to 8 of Fang et al. 2024 (arXiv 2409.17481). Needs Matplotlib.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from sparsify.common.errors import SparsifyError
from sparsify.export.mask_file.file import MaskFile, read_masks
from sparsify.models.layer_names import block_number
from sparsify.results.compare.curves import FLIPS, Curve, intervals
from sparsify.results.compare.drawing import chart, letter, quiet, row_name
from sparsify.results.compare.figures import Picture, curves_of, lines
from sparsify.results.compare.focus import foremost, looks
from sparsify.results.compare.loading import Run
from sparsify.results.compare.readings import (
    read_blocks,
    read_differences,
    read_flips,
    read_norms,
)
from sparsify.results.compare.rows import Row
from sparsify.results.mask_diff import diff_matrix
from sparsify.results.plots import heat_map

MOVES = {
    FLIPS: (
        "Mask change per step",
        "Share of groups whose hard mask changed since the last look, divided by the steps since "
        "then. Changes that are undone between two looks do not count, so that looks farther apart "
        "show less.",
    ),
    "sample_change": (
        "Mask change between samples",
        "Expected share of weights whose state differs between two samples of the masks: how "
        "much is still explored.",
    ),
    "max_probability": (
        "Largest mask probability",
        "Mean probability of the most probable mask of a group; near 1 the choice is made.",
    ),
    "distance": (
        "Distance from the start",
        "Share of groups whose hard mask differs from the one at the start.",
    ),
}
NORM = (
    "L1 norm of the kept weights, relative to that of the largest N of every group; 1 is what "
    "magnitude keeps. Where all weights were trained, it is of the weights at the end."
)


def move_pictures(rows: Sequence[Row]) -> list[Picture]:
    """How masks moved while they were learned; values that no run recorded have no picture."""
    pictures = []
    for value, (title, about) in MOVES.items():
        curves = curves_of(rows, "masks", value, "step")
        if curves:
            reading = ""
            if value == FLIPS:
                about += _looks([rows[one.number] for one in curves])
                reading = read_flips(rows, curves)
            drawn = lines(title, about, rows, curves, "step", value.replace("_", " "))
            pictures.append(replace(drawn, reading=reading))
    return pictures


def _looks(rows: Sequence[Row]) -> str:
    apart = {row.label: intervals(row) for row in rows}
    steps = set.union(*apart.values())
    if len(steps) == 1:
        return f" Looks are {steps.pop()} steps apart."
    if not steps:
        return ""
    told = {label: " or ".join(map(str, sorted(own))) or "unknown" for label, own in apart.items()}
    common, count = Counter(told.values()).most_common(1)[0]
    if 2 * count <= len(told):
        each = [f"{own} in {label}" for label, own in told.items()]
        return f" Steps between looks: {'; '.join(each)}."
    each = [f"{own} in {label}" for label, own in told.items() if own != common]
    return f" Looks are {common} steps apart; {'; '.join(each)}."


def norm_pictures(rows: Sequence[Row]) -> list[Picture]:
    """The norm of what is kept: over all, and by block."""
    about = NORM
    if updated := [row.label for row in rows if not _has_norm(row) and not row.is_dense]:
        about += (
            " Where kept weights were updated, dropped ones are 0, and the norm is 1 by "
            f"construction; not drawn: {'; '.join(updated)}."
        )
    overall, by_block = _overall_norm(rows, about), _block_curves(rows, _kept_norms)
    title = "Norm of kept weights by block"
    blocks = lines(title, about, rows, by_block, "block", "relative norm")
    return [overall, blocks] if by_block else [overall]


def _has_norm(row: Row) -> bool:
    return not row.is_dense and row.record["strategy"]["weights"] != "updated"


def sensitivity_pictures(rows: Sequence[Row]) -> list[Picture]:
    """What each block loses by its masks, where it was measured beside a run."""
    texts = (
        ("loss_increase", "Each block pruned alone", "costs", "Loss above the dense model's"),
        ("loss_decrease", "Each block kept dense alone", "saves", "Loss below the pruned model's"),
    )
    pictures = []
    for value, title, does, about in texts:
        curves = _block_curves(rows, partial(_sensitivity, value))
        if curves:
            about += ", on validation text: how much this block costs."
            drawn = lines(title, about, rows, curves, "block", "nats a token")
            pictures.append(replace(drawn, reading=read_blocks(curves, does)))
    return pictures


def difference_picture(rows: Sequence[Row]) -> Picture:
    """How far the exported masks of every two rows are apart."""
    title = "Mask differences"
    about = "Share of weights whose state differs, between the first seeds of every two rows."
    found: dict[str, MaskFile] = {}
    names: dict[int, str] = {}
    absent = []
    for number, row in enumerate(rows):
        if row.is_dense:
            continue
        try:
            found[letter(number)] = read_masks(row.samples[0].path.parent / "export")
            names[number] = row_name(number, row.label)
        except SparsifyError:
            absent.append(row.label)
    if left_out := _reordered({number: found[letter(number)] for number in names}):
        labels = "; ".join(rows[number].label for number in left_out)
        about += f" Not compared are {labels}, as their channels are in another order."
        for number in left_out:
            del found[letter(number)], names[number]
    if absent:
        about += f" No masks lie beside the result of {'; '.join(absent)}."
    if len(found) < 2:
        return Picture(title, f"It takes the exports of two rows. {about}")
    try:
        matrix = diff_matrix(found)
    except SparsifyError as error:
        return Picture(title, f"These masks do not compare: {error}. {about}")
    about += f" Over {len(matrix.layers)} layers."
    shown = foremost(rows, list(names))
    if len(shown) < len(names):
        about += f" Drawn are {len(shown)} of {len(names)} rows; the table has all."
    part = {
        letter(a): {letter(b): matrix.shares[letter(a)][letter(b)] for b in shown} for a in shown
    }
    with chart(0.8 + 0.25 * len(shown)) as (axes, svg):
        heat_map(axes, part, [names[number] for number in shown], cell=".0%", size=7)
        drawing = svg()
    shares = [[f"{share:.2%}" for share in row.values()] for row in matrix.shares.values()]
    numbers = [[one, *row] for one, row in zip(names.values(), shares, strict=True)]
    pairs = {(a, b): matrix.shares[letter(a)][letter(b)] for a in names for b in names if a < b}
    reading = read_differences(rows, pairs)
    return Picture(title, about, drawing, ["", *found], numbers, reading)


def _reordered(masks: Mapping[int, MaskFile]) -> list[int]:
    """The rows whose masks are of another order of channels than most."""
    orders = {n: None if m.permutation is None else m.permutation.digest for n, m in masks.items()}
    known = list(orders.values())
    most = max(known, key=known.count, default=None)
    return [number for number, order in orders.items() if order != most]


def _overall_norm(rows: Sequence[Row], about: str) -> Picture:
    title = "Norm of kept weights"
    norms: dict[int, list[float]] = {}
    for number, row in enumerate(rows):
        states = [(run.result.get("masks") or {}).get("retained_norm") for run in row.samples]
        if _has_norm(row) and (known := [norm for norm in states if norm is not None]):
            norms[number] = known
    if not norms:
        return Picture(title, f"No run recorded this. {about}")
    about += " Lines span the seeds; the axis does not start at 0."
    names = [row_name(number, rows[number].label) for number in norms]
    own = looks(rows, list(norms))
    with chart(0.7 + 0.25 * len(norms)) as (axes, svg):
        for place, (number, values) in enumerate(norms.items()):
            look = (own[number] or quiet()) | {"linestyle": "none", "markersize": 7}
            axes.plot([min(values), max(values)], [place, place], color=look["color"])
            axes.plot([statistics.fmean(values)], [place], **look)
        axes.set_yticks(range(len(norms)), names)
        axes.set_ylim(len(norms) - 0.4, -0.6)
        axes.set_xlabel("relative norm")
        drawing = svg()
    numbers = [
        [rows[number].label, f"{statistics.fmean(values):.5f}", str(len(values))]
        for number, values in norms.items()
    ]
    reading = read_norms(rows, {n: statistics.fmean(values) for n, values in norms.items()})
    columns = ["row", "relative norm", "seeds"]
    return Picture(title, about, drawing, columns, numbers, reading)


def _block_curves(rows: Sequence[Row], values: Callable[[Run], Mapping[int, float]]) -> list[Curve]:
    """A value over block numbers, for the rows whose runs have it."""
    curves = []
    for number, row in enumerate(rows):
        runs = [one for run in row.samples if not row.is_dense and (one := values(run))]
        if not runs:
            continue
        blocks = sorted(set.intersection(*(set(one) for one in runs)))
        each = [[one[block] for one in runs] for block in blocks]
        curves.append(Curve.over(number, blocks, list(map(float, blocks)), each, len(runs)))
    return curves


def _kept_norms(run: Run) -> dict[int, float]:
    """By block the mean over its layers; layers outside of blocks have none, nor have updated
    weights.
    """
    if run.record["strategy"]["weights"] == "updated":
        return {}
    layers = (run.result.get("masks") or {}).get("layers") or {}
    found: dict[int, list[float]] = {}
    for name, state in layers.items():
        block = block_number(name)
        if block is not None and state.get("retained_norm") is not None:
            found.setdefault(block, []).append(state["retained_norm"])
    return {block: statistics.fmean(values) for block, values in found.items()}


def _sensitivity(value: str, run: Run) -> dict[int, float]:
    blocks = (run.sensitivity or {}).get("blocks", [])
    return {number: block[value] for number, block in enumerate(blocks)}
