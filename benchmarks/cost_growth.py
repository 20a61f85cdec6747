"""How the time of calibration and of a step grows with width, tokens and layers.

Random Llama models; one size changes, the others keep the values of ``BASE``. The exponent of each
growth is the slope of a straight line through the logarithms, by least squares. Beside it stands
what the algorithm leads one to expect of large models; on small ones, work that does not grow
takes a share, and the slope is lower.
"""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from cost_oneshot import ours
from cost_steps import LearningStep, Shapes, model_of, take
from measuring import Contestant, in_turns

BASE = Shapes(hidden=256, intermediate=768, heads=8, kv_heads=8, blocks=2, windows=2, window=256)
SIZES = {"width": (256, 512, 1024), "tokens": (512, 1024, 2048), "layers": (2, 4, 8)}
QUICK_BASE = replace(BASE, hidden=32, intermediate=96, heads=1, kv_heads=1, blocks=1, window=16)
QUICK_SIZES = {"width": (32, 64), "tokens": (32, 64), "layers": (1, 2)}

ALIKE = "each block is alike"
PRODUCTS = "nearly all is products of each token with matrices of width x width"
ALL_PRODUCTS = {"width": ("2", PRODUCTS), "tokens": ("1", PRODUCTS), "layers": ("1", ALIKE)}
# The exponents, and why.
EXPECTED = {
    "selfmask": ALL_PRODUCTS,
    "wanda": ALL_PRODUCTS,
    "sparsegpt": {
        "width": ("2 to 3", "Hessians take width^2 a token, their factors and updates width^3"),
        "tokens": ("0 to 1", "Hessians grow with tokens, their factors and updates do not"),
        "layers": ("1", ALIKE),
    },
}


def shapes_of(base: Shapes, what: str, size: int) -> Shapes:
    """The base with one size changed; a head has 32 channels."""
    if what == "width":
        heads = size // 32
        return replace(base, hidden=size, intermediate=3 * size, heads=heads, kv_heads=heads)
    if what == "tokens":
        return replace(base, windows=size // base.window)
    return replace(base, blocks=size)


def contestant(name: str, shapes: Shapes) -> Contestant:
    """A whole step, or the calibration of a model that is new in each round."""
    tokens = torch.randint(0, 64, (shapes.windows, shapes.window))
    if name != "selfmask":
        model = model_of(shapes)
        return lambda _: partial(ours, copy.deepcopy(model), tokens, name)
    step = LearningStep(name, shapes)
    return lambda turn: partial(take, step, tokens, turn)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """Of each algorithm the exponents; all whose sizes differ in one way take turns."""
    base, all_sizes = (QUICK_BASE, QUICK_SIZES) if quick else (BASE, SIZES)
    rows: dict[str, Any] = {}
    for what, sizes in all_sizes.items():
        cases = [(name, size) for name in EXPECTED for size in sizes]
        turns = {(n, size): contestant(n, shapes_of(base, what, size)) for n, size in cases}
        times = in_turns(turns, rounds)
        for name in EXPECTED:
            medians = [statistics.median(times[name, size]) for size in sizes]
            expected, reason = EXPECTED[name][what]
            rows[f"{name}, {what}"] = {
                "exponent": exponent(sizes, medians),
                "expected": expected,
                "because": reason,
                "sizes": sizes,
                "medians": medians,
                "times": [times[name, size] for size in sizes],
            }
    return {"base": vars(base), "rows": rows}
