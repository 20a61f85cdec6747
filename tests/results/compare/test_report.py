import base64
import copy
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from sparsify.export.mask_file import read_masks
from sparsify.models.permutation_file import Permutation
from sparsify.results.compare import Comparison, compare
from sparsify.results.compare.drawing import GREY, LONGEST_NAME, chart, letter, row_name
from sparsify.results.compare.figures import Picture, cost_pictures, learning_pictures
from sparsify.results.compare.focus import MOST_COLOURED, foremost, looks, order
from sparsify.results.compare.mask_figures import (
    difference_picture,
    move_pictures,
    norm_pictures,
    sensitivity_pictures,
)
from sparsify.results.compare.planned import Planned, PlannedCost
from sparsify.results.compare.report import MOST_FIGURES, PLANNED_GPUS, in_view, render
from sparsify.results.mask_diff import diff
from sparsify.results.plots import heat_map
from tests.browser import browser, open_page
from tests.results.compare.made import MASKLLM, result, write
from tests.results.compare.pages import LAYERS, make_runs, write_export

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def comparison(runs: Path) -> Comparison:
    return compare([runs])


@pytest.fixture(scope="module")
def page(comparison: Comparison) -> str:
    return render(comparison, "Which <one> & why")


class Elements(HTMLParser):
    """The tags of a page that are still open, and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def drawings(page: str) -> list[str]:
    """The images of a page, which browsers show only if they are sound XML."""
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)"', page)
    svgs = [base64.b64decode(one).decode() for one in found]
    for svg in svgs:
        ElementTree.fromstring(svg)  # noqa: S314
    return svgs


def test_the_page_asks_nobody_for_anything(page: str) -> None:
    parsed = Elements(page)
    assert parsed.open == []
    for tag, name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    bare = re.sub(r'src="data:[^"]*"', "", page)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<iframe", bare)
    for svg in drawings(page):
        assert not re.search(r"@import|<script|<foreignObject", svg)
        assert not re.search(r'(href="|url\()(?!#|data:)', svg)


def test_what_is_hostile_is_text(tmp_path: Path) -> None:
    bad = '<i>"漢\n$</i>$\\frac{1}{0}$<script>alert("x")</script>'
    for seed in range(2):
        content = result(f"own.{bad}", 3 + seed / 10, seed, settings={bad: bad})
        content["versions"]["torch"] = content["run"]["device"] = bad
        content["history"] = {
            "validation": [{"step": 1, "tokens": 1, "seconds": 1, "perplexity": 3}]
        }
        content["scores"][bad] = content["scores"].pop("a")
        write(tmp_path / f"<b>{seed}", content)
    page = render(compare([tmp_path]), bad)
    assert "<script>alert" not in page
    assert "<b>0" not in page
    assert "&lt;script&gt;alert" in page
    assert Elements(page).open == []
    shown = drawings(page)
    assert any("A  &lt;i&gt;" in svg for svg in shown)
    assert not any("<script" in svg for svg in shown)


def test_the_page_holds_the_answer_the_numbers_and_the_rule(page: str) -> None:
    assert "<title>Which &lt;one&gt; &amp; why</title>" in page
    text = re.sub(r"<[^>]+>", " ", page)
    text = re.sub(r"\s+", " ", text)
    assert "maskllm (27.39 ± 0.27, 3 seeds) is ahead of magnitude in every seed." in text
    assert "Base weights kept, 2:4, 50.0%" in text
    assert "by chance once in 10" in text
    assert "c3f59e483b27" in text
    assert any("dense 20.09" in svg for svg in drawings(page))
    for title in (
        "Test perplexity over tokens",
        "Validation perplexity over seconds",
        "Mask change per step",
        "Largest mask probability",
        "Norm of kept weights by block",
        "Mask differences",
        "Each block pruned alone",
        "Settings that differ",
        "Runs, versions, devices",
    ):
        assert title in text
    assert "Looks are 25 steps apart." in text


def test_figures_have_text_alternatives_and_numbers(page: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == len(drawings(page)) == 14
    for figure in figures:
        (title,) = re.findall(r"<h3>(.*?)</h3>", figure)
        assert f'alt="{title}"' in figure
        assert "<summary>Numbers</summary>" in figure


def test_at_most_eight_figures_are_in_view_each_with_a_sentence(page: str) -> None:
    seen, fold = page.split('<details class="more">')
    figures = re.findall(r"<figure>.*?</figure>", seen, re.DOTALL)
    assert 0 < len(figures) <= MOST_FIGURES == 8
    for figure in figures:
        assert re.search(r"</h3>\s*<p class=\"reading\">[^<]{20,}\.</p>\s*<img ", figure)
    assert fold.count("<figure>") == 14 - len(figures)
    many = [Picture(str(number), "", "svg", reading="So." * (number % 2)) for number in range(30)]
    chosen, others = in_view(many)
    assert titles(chosen) == [str(number) for number in range(1, 17, 2)]
    assert len(others) == 22


def test_of_many_rows_a_few_are_in_colour_and_look_alike_everywhere(tmp_path: Path) -> None:
    for number in range(30):
        settings = {"alpha": number}
        content = result(MASKLLM, 3 + number / 100, 0, settings=settings, seconds=99.0 - number)
        write(tmp_path / str(number), content)
    found = compare([tmp_path])
    rows = found.rows
    assert order(rows)[0] == 0
    assert sorted(order(rows)) == list(range(30))
    assert len(foremost(rows, range(20, 30))) == MOST_COLOURED
    everywhere, part = looks(rows, range(30)), looks(rows, range(25))
    assert sum(look is not None for look in everywhere.values()) == MOST_COLOURED
    assert all(part[n] == look for n, look in everywhere.items() if look and part.get(n))
    tokens = cost_pictures(found)[0]
    assert len(legend(tokens)) == MOST_COLOURED
    assert "22 more, in the table" in tokens.svg
    assert GREY in tokens.svg
    assert len(tokens.numbers) == 30


def test_costs_on_a_larger_model_are_said_to_be_computed(comparison: Comparison) -> None:
    cost = PlannedCost(24.04, dict.fromkeys(PLANNED_GPUS, 1150.4), 8)
    planned = Planned("a/7b (6.7 billion parameters)", "9 steps", {"maskllm": cost}, {"x": "Why"})
    text = " ".join(re.sub(r"<[^>]+>", " ", render(comparison, "x", planned)).split())
    assert "maskllm would take 24.0 GiB on each of 8 GPUs, 1,150 GPU-hours" in text
    assert "On a/7b (6.7 billion parameters)" in text
    assert "not measured, with the strategy and the settings of each row" in text
    assert "9 steps" in text
    assert "No plan of x: Why" in text
    assert "hours of A100" not in render(comparison, "x")


def test_forty_runs_stay_below_two_megabytes(runs: Path, tmp_path: Path) -> None:
    source = json.loads((runs / "maskllm/version_0/result.json").read_text())
    looks = source["history"]
    for part in looks:
        looks[part] = [looks[part][0] | {"step": k, "tokens": 9 * k} for k in range(500)]
    for number in range(40):
        source["run"]["seed"] = number % 2
        source["run"]["strategy"]["settings"] = {"alpha": number // 2}
        source["scores"]["overall"]["loss"] = 3 + number / 100
        write(tmp_path / str(number), source)
    assert len(render(compare([tmp_path]), "Many").encode()) < 2_000_000


def legend(picture: Picture) -> list[str]:
    """The names in a drawing."""
    return re.findall(r">(dense [^<]*|[A-Z]  [^<]*)</text>", picture.svg)


def test_names_are_as_long_as_a_legend_has_room_for() -> None:
    assert row_name(1, "x" * LONGEST_NAME) == "B  " + "x" * LONGEST_NAME
    assert row_name(27, "x" * LONGEST_NAME + "y") == "AB  " + "x" * (LONGEST_NAME - 1) + "…"


def test_a_legend_of_many_rows_takes_no_room_from_the_axes() -> None:
    def heights(rows: int) -> tuple[float, float]:
        with chart() as (axes, svg):
            for number in range(rows):
                axes.plot([0, 1], [0, 1], label=row_name(number, "x" * LONGEST_NAME))
            svg()
            axes.figure.draw_without_rendering()
            names_box = axes.figure.legends[0].get_window_extent()
            box = axes.figure.bbox
            assert box.x0 <= names_box.x0
            assert names_box.x1 <= box.x1
            assert names_box.y1 < axes.get_tightbbox().y0
            return axes.get_window_extent().height, box.height

    few, many = heights(2), heights(24)
    assert many[0] == pytest.approx(few[0], rel=0.03)
    assert many[1] > few[1] + 100


def titles(pictures: list[Picture]) -> list[str]:
    return [picture.title for picture in pictures]


def test_every_row_is_in_the_figures_of_cost(comparison: Comparison) -> None:
    tokens, seconds, memory = cost_pictures(comparison)
    for picture in (tokens, seconds, memory):
        assert legend(picture) == ["B  sr_ste", "C  maskllm", "D  magnitude", "dense 20.09"]
    assert tokens.numbers[0] == ["sr_ste", "1,000", "22.422 ± 0.224", "3 seeds"]
    assert tokens.numbers[2] == ["magnitude", "0", "60.340", "exact"]


def test_across_devices_there_is_no_figure_of_time(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    file = tmp_path / "runs/maskllm/version_0/result.json"
    file.write_text(file.read_text().replace('"cpu"', '"NVIDIA H100"'))
    found = compare([tmp_path])
    tokens, seconds, memory = cost_pictures(found)
    assert (bool(tokens.svg), seconds.svg, memory.svg) == (True, "", "")
    assert "different devices (NVIDIA H100, cpu)" in seconds.about
    by_tokens, by_seconds = learning_pictures(found)
    assert (bool(by_tokens.svg), by_seconds.svg) == (True, "")
    assert "No winner by time" in render(found, "x")


def test_validation_and_test_do_not_share_a_figure(comparison: Comparison) -> None:
    tokens, _ = learning_pictures(comparison)
    assert sorted(legend(tokens)) == ["B  sr_ste", "C  maskllm", "dense 20.10"]
    assert "Not measured on validation text, or at unknown cost: magnitude." in tokens.about
    assert ["maskllm", "25", "250", "57.4", "57.4", "57.4", "3"] in tokens.numbers


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("{data: {seed: 0, validation: x.txt}}", "the model's own; x.txt."),
        ("{data: {seed: 0}, trainer: {limit_val_batches: 2}}", "own; the model's own (2 batches)."),
    ],
)
def test_different_validation_texts_do_not_share_a_figure(
    told: str, said: str, runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs/maskllm/version_1/config.yaml").write_text(told)
    for picture in learning_pictures(compare([tmp_path])):
        assert picture.svg == ""
        assert said in picture.about


def test_moves_that_no_run_recorded_have_no_figure(runs: Path) -> None:
    rows = compare([runs]).rows
    for row in rows:
        for run in row.runs:
            for look in run.result["history"]["masks"]:
                look.pop("sample_change")
    assert "Mask change between samples" not in titles(move_pictures(rows))


def test_unequal_looks_are_said(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    for seed in range(3):
        file = tmp_path / f"runs/maskllm/version_{seed}/result.json"
        content = json.loads(file.read_text())
        del content["history"]["masks"][::2]
        file.write_text(json.dumps(content))
    flips = move_pictures(compare([tmp_path]).rows)[0]
    assert "undone between two looks do not count" in flips.about
    assert "Steps between looks: 25 in sr_ste; 50 in maskllm." in flips.about
    # At step 50 the share 0.075 of the groups changed within 25 steps or, with half the looks, 50.
    assert ["sr_ste", "50", "0.003", "0.003", "0.003", "3"] in flips.numbers
    assert ["maskllm", "50", "0.0015", "0.0015", "0.0015", "3"] in flips.numbers


def test_the_rows_that_look_otherwise_than_most_are_named(runs: Path) -> None:
    rows = compare([runs]).rows
    learned = [row for row in rows if row.record["steps"]]
    odd = replace(learned[0], label="odd", samples=[copy.deepcopy(learned[0].samples[0])])
    del odd.samples[0].result["history"]["masks"][::2]
    flips = move_pictures([*rows, odd])[0]
    assert flips.about.endswith(" Looks are 25 steps apart; 50 in odd.")


def test_norms_are_of_blocks_and_of_all(comparison: Comparison) -> None:
    overall, blocks = norm_pictures(comparison.rows)
    assert overall.numbers[0] == ["sr_ste", "0.95000", "3"]
    assert blocks.numbers[:3] == [
        ["sr_ste", "0", "0.905", "0.905", "0.905", "3"],
        ["sr_ste", "1", "0.925", "0.925", "0.925", "3"],
        ["sr_ste", "2", "0.945", "0.945", "0.945", "3"],
    ]


def test_norms_of_updated_weights_are_1_by_construction_and_not_drawn(
    runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    for seed in range(3):
        file = tmp_path / f"runs/sr_ste/version_{seed}/result.json"
        file.write_text(file.read_text().replace('"trained"', '"updated"'))
    for picture in norm_pictures(compare([tmp_path]).rows):
        assert {numbers[0] for numbers in picture.numbers} == {"maskllm", "magnitude"}
        assert "1 by construction; not drawn: sr_ste." in picture.about
    for picture in norm_pictures(compare([runs]).rows):
        assert "all weights were trained, it is of the weights at the end" in picture.about
        assert "by construction" not in picture.about


def test_differences_are_those_of_the_exported_masks(runs: Path, comparison: Comparison) -> None:
    picture = difference_picture(comparison.rows)
    a, b = (read_masks(runs / name / "version_0/export") for name in ("sr_ste", "maskllm"))
    share = diff(a, b, a.patterns).overall.shares()["weights"]
    assert picture.columns == ["", "B", "C", "D"]
    assert picture.numbers[0][:3] == ["B  sr_ste", "0.00%", f"{share:.2%}"]
    assert f"Over {len(LAYERS)} layers." in picture.about
    assert f">{share:.0%}</text>" in picture.svg
    assert legend(picture) == ["B  sr_ste", "C  maskllm", "D  magnitude"]


def test_masks_of_another_order_of_channels_are_named_and_left_out(
    runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    export = tmp_path / "runs/magnitude/version_0/export"
    shutil.rmtree(export)
    order = Permutation({"a": torch.tensor([1, 0])}, "x", "h")
    write_export(export, 0, permutation=order)
    picture = difference_picture(compare([tmp_path]).rows)
    assert picture.columns == ["", "B", "C"]
    assert "Not compared are magnitude, as their channels are in another order." in picture.about
    assert picture.reading.startswith("The masks of sr_ste and maskllm differ in ")


@pytest.mark.parametrize(("rows", "numbers"), [(10, True), (11, False)])
def test_many_differences_have_numbers_where_they_can_be_read(rows: int, numbers: bool) -> None:
    names = [letter(number) for number in range(rows)]
    shares = {a: {b: 0.23 * (a != b) for b in names} for a in names}
    with chart() as (axes, svg):
        heat_map(axes, shares, names, cell=".0%")
        drawing = svg()
    assert (">23%</text>" in drawing) is numbers
    assert "20.0%</text>" in drawing  # the scale


def test_seconds_below_ten_have_a_decimal(tmp_path: Path) -> None:
    for seed, seconds in enumerate((9.0, 9.6, 10.2)):
        write(tmp_path / str(seed), result(MASKLLM, 3 + seed / 10, seed, seconds=seconds))
    assert "<td>9.6 ± 0.6</td>" in render(compare([tmp_path]), "x")


def test_masks_that_are_missing_or_of_another_shape_are_a_reason(
    runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/magnitude/version_0/export")
    rows = compare([tmp_path]).rows
    assert "No masks lie beside the result of magnitude." in difference_picture(rows).about
    shutil.rmtree(tmp_path / "runs/sr_ste/version_0/export")
    picture = difference_picture(rows)
    assert (picture.svg, picture.about[:34]) == ("", "It takes the exports of two rows. ")
    write_export(tmp_path / "runs/sr_ste/version_0/export", 0, width=16)
    picture = difference_picture(rows)
    assert picture.svg == ""
    assert "do not compare: " in picture.about


def test_sensitivity_is_of_the_same_masks(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    file = tmp_path / "runs/sensitivity/version_0/sensitivity.json"
    increase, decrease = sensitivity_pictures(compare([tmp_path]).rows)
    assert increase.numbers[0] == ["magnitude", "0", "0.1", "0.1", "0.1", "1"]
    assert decrease.numbers[2][2] == "0.15"
    content = json.loads(file.read_text())
    for part, change in (
        ("run", {"seed": 5}),
        ("run", {"steps": 7}),
        ("run", {"pattern": "4:8"}),
        ("protocol", {"base": {"hash": "other"}}),
    ):
        file.write_text(json.dumps(content | {part: content[part] | change}))
        assert sensitivity_pictures(compare([tmp_path]).rows) == [], change
    file.write_text("{")
    assert sensitivity_pictures(compare([tmp_path]).rows) == []


def test_older_results_make_a_page(tmp_path: Path) -> None:
    """Without history and masks, as before they were recorded."""
    for seed in range(2):
        write(tmp_path / str(seed), result(MASKLLM, 3 + seed / 10, seed))
    page = render(compare([tmp_path]), "Old")
    assert page.count("No run recorded this.") == 3
    assert "It takes the exports of two rows." in page


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(dark: bool, driver: Any, page: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    for width in (360, 1200):
        seen = open_page(driver, file, width, dark)
        assert seen.console == []
        asked = [address for address in seen.requests if not address.startswith("data:")]
        assert asked == [file.as_uri()]
        assert seen.overflow == []
    assert seen.colour("body", "backgroundColor") == (
        "rgb(20, 23, 26)" if dark else "rgb(252, 252, 250)"
    )
    assert seen.colour("figure img", "filter") == (
        "invert(1) hue-rotate(180deg)" if dark else "none"
    )


@pytest.mark.browser
def test_print_cuts_nothing_off_and_leaves_folds_out(
    driver: Any, page: str, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    open_page(driver, file, 700)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    ask = driver.execute_script
    assert ask("return document.documentElement.scrollWidth") <= 700
    tables = "[...document.querySelectorAll('.scroll')].filter(one => one.offsetParent)"
    assert ask(f"return {tables}.length") == 1
    assert ask(f"return {tables}.every(one => one.scrollWidth <= one.clientWidth)")
    shown = "[...document.querySelectorAll('figure')].filter(one => one.offsetParent).length"
    assert ask(f"return {shown}") == page.split('<details class="more">')[0].count("<figure>")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.browser
def test_the_browser_sees_what_is_wrong_with_a_page(driver: Any, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text(
        "<title>Bad</title><meta name=viewport content='width=device-width'>"
        "<link rel=icon href=data:,><script>oops()</script>"
        "<p style='width: 500px'>wide</p><img src='https://example.invalid/x.png'>"
    )
    seen = open_page(driver, file, 360)
    assert any("oops is not defined" in message for message in seen.console)
    assert seen.foreign == ["https://example.invalid/x.png"]
    assert seen.overflow == ["P wide"]
    assert open_page(driver, file, 700).overflow == []
