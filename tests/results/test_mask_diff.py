"""Differences of masks, against loops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console
from torch import Tensor

from sparsify import NMPattern, SparsifyError
from sparsify.results.mask_diff import Counts, MaskDiff, diff
from tests.export.mask_file.cases import random_mask


def text_of(table: Any) -> str:
    """What a table prints."""
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def slow_counts(a: Tensor, b: Tensor, m: int) -> Counts:
    differ = lost = groups = 0
    for row in range(a.shape[0]):
        for start in range(0, a.shape[1], m):
            pairs = [(bool(a[row, i]), bool(b[row, i])) for i in range(start, start + m)]
            differ += sum(x != y for x, y in pairs)
            lost += sum(x and not y for x, y in pairs)
            groups += any(x != y for x, y in pairs)
    return Counts(a.numel(), differ, int(a.sum()), lost, a.numel() // m, groups)


def test_an_example_that_can_be_checked_by_eye() -> None:
    a = {"q": torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0]]).bool()}
    b = {"q": torch.tensor([[1, 0, 1, 0, 1, 0, 1, 0]]).bool()}
    found = diff(a, b, {"q": NMPattern(2, 4)})
    assert found.overall.shares() == {"weights": 2 / 8, "kept_lost": 1 / 4, "groups": 1 / 2}
    assert diff(a, a, {"q": NMPattern(2, 4)}).overall == Counts(8, 0, 4, 0, 2, 0)


@settings(deadline=None, max_examples=25)
@given(
    seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    patterns=st.tuples(*[st.sampled_from(["2:4", "1:4", "4:8", "3:8"])] * 2),
)
def test_counts_are_those_of_a_loop(seeds: tuple[int, int], patterns: tuple[str, str]) -> None:
    masks = [random_mask(5, 16, p, s) for p, s in zip(patterns, seeds, strict=True)]
    nm = NMPattern.parse(patterns[0])
    found = diff({"q": masks[0]}, {"q": masks[1]}, {"q": nm})
    assert found.layers == {"q": slow_counts(masks[0], masks[1], nm.m)}
    back = diff({"q": masks[1]}, {"q": masks[0]}, {"q": nm}).overall
    assert back.differ == found.overall.differ == back.lost + found.overall.lost


NAMES = [f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1, 10) for kind in "qk"]


def two_sets(names: list[str] = NAMES) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    a = {name: random_mask(4, 8 * (1 + i), "2:4", i) for i, name in enumerate(names)}
    b = {name: random_mask(4, 8 * (1 + i), "2:4", 100 + i) for i, name in enumerate(names)}
    return a, b


def compare(a: dict[str, Tensor], b: dict[str, Tensor]) -> MaskDiff:
    return diff(a, b, dict.fromkeys([*a, *b], NMPattern(2, 4)))


def test_layers_of_one_only_are_named() -> None:
    a, b = two_sets()
    del a[NAMES[0]], b[NAMES[1]]
    found = compare(a, b)
    assert list(found.layers) == NAMES[2:]
    assert found.only_a == [NAMES[1]]
    assert found.only_b == [NAMES[0]]
    plain = found.to_dict()
    assert plain["only_a"] == [NAMES[1]]
    assert plain["only_b"] == [NAMES[0]]
    assert list(plain["layers"]) == NAMES[2:]
    wanted = slow_counts(a[NAMES[2]], b[NAMES[2]], 4)
    assert plain["layers"][NAMES[2]]["counts"]["differ"] == wanted.differ
    assert plain["layers"][NAMES[2]]["shares"]["groups"] == wanted.groups_differ / wanted.groups
    total = sum(slow_counts(a[name], b[name], 4).differ for name in NAMES[2:])
    assert plain["overall"]["counts"]["differ"] == total
    assert found.overall.shares()["weights"] == total / sum(a[name].numel() for name in NAMES[2:])


def test_the_table_sums_over_blocks_and_kinds() -> None:
    a, b = two_sets()
    found = compare(a, b)
    rows = [line.replace("│", " ").split() for line in text_of(found.table()).splitlines()]
    differ = {name: slow_counts(a[name], b[name], 4).differ for name in NAMES}

    def share(*names: str) -> str:
        return f"{sum(differ[n] for n in names) / sum(a[n].numel() for n in names):.2%}"

    for block, (q, k) in zip((0, 1, 10), zip(NAMES[::2], NAMES[1::2], strict=True), strict=True):
        assert [str(block), share(q), share(k), share(q, k)] in rows
    assert ["all", share(*NAMES[::2]), share(*NAMES[1::2]), share(*NAMES)] in rows


def test_kinds_keep_what_tells_them_apart() -> None:
    names = [
        "h.0.attn.c_proj",
        "h.0.mlp.c_proj",
        "h.0.mlp.c_fc",
        "h.0.experts.0.up",
        "h.0.experts.1.up",
        "lm_head",
    ]
    found = compare(*two_sets(names))
    grid = found.grid()
    assert list(grid) == ["h.0", "other"]
    assert list(grid["h.0"]) == ["attn.c_proj", "mlp.c_proj", "c_fc", "up"]
    assert grid["h.0"]["up"] == found.layers[names[3]] + found.layers[names[4]]
    assert list(grid["other"]) == ["lm_head"]
    assert "lm_head" in text_of(found.table())


def test_what_cannot_be_compared_is_an_error() -> None:
    a, b = two_sets()
    with pytest.raises(SparsifyError, match="no layer in common: one has 'model.layers.0.*'x'"):
        compare(a, {"x": b[NAMES[0]]})
    b[NAMES[0]] = random_mask(4, 16)
    with pytest.raises(SparsifyError, match=rf"{NAMES[0]}: the masks are \(4, 8\) and \(4, 16\)"):
        compare(a, b)


def test_the_heat_map_is_a_picture(tmp_path: Path) -> None:
    a, b = two_sets([*NAMES, "lm_head"])
    found = compare(a, b)
    found.plot(tmp_path / "a.png")
    compare(a, a).plot(tmp_path / "same.png")
    pictures = [imread(tmp_path / name) for name in ("a.png", "same.png")]
    assert all(picture.shape[0] > 300 and picture.shape[1] > 300 for picture in pictures)
    assert len({tuple(p) for p in pictures[0].reshape(-1, 4).round(2)}) > 50
