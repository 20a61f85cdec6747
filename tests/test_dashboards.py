"""The kept runs of Weights & Biases hold what the dashboards page shows."""

import re
import sys
import tarfile
from pathlib import Path

import pytest

from sparsify.common.files import read_json
from sparsify.results.dashboard import SCORE, describe_workspace, make_workspace
from tests.conftest import Cli

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks")]
import draw_dashboards  # noqa: E402
import embedded_table  # noqa: E402
from draw_dashboards import (  # noqa: E402
    COURSE,
    DRAWINGS,
    KEPT,
    MEMORY,
    PERPLEXITY,
    PICTURES,
    SECONDS,
    TOKENS,
    Rows,
    learned,
    points,
)

EVERY_LEARNER = ("train/task_loss", "masks/distance", "masks/retained_norm")


@pytest.fixture(scope="module")
def rows() -> Rows:
    return draw_dashboards.read(KEPT)


def test_every_row_of_the_comparison_is_kept(rows: Rows) -> None:
    names = {name.replace(", ", "-").replace(" ", "_") for name in embedded_table.RUNS}
    assert set(rows) == names, "run docs/draw_dashboards.py FOLDER"
    runs = [run for seeds in rows.values() for run in seeds]
    assert len({run.config["protocol"] for run in runs}) == 1
    for run in runs:
        [score] = points(run, SCORE)[1]
        assert 15 < score < 100
        assert run.summary[SCORE] == score
        assert [len(points(run, SCORE, cost)[0]) for cost in (SECONDS, MEMORY)] == [1, 1]
    assert {run.config["pattern"] for run in rows["dense"]} == {"dense"}


def test_rows_that_learn_have_a_course(rows: Rows) -> None:
    courses = learned(rows)
    assert set(courses) == {
        name.replace(", ", "-").replace(" ", "_")
        for name in embedded_table.RUNS
        if name not in (*embedded_table.ONE_SHOT, "dense", "magnitude")
    }
    for seeds in courses.values():
        for run in seeds:
            assert len(points(run, PERPLEXITY, TOKENS)[0]) == 5
            assert len(points(run, PERPLEXITY, SECONDS)[0]) == 5
            assert all(len(points(run, metric)[0]) >= 15 for metric in EVERY_LEARNER)
    assert set(COURSE) <= set.union(*(run.keys() for seeds in courses.values() for run in seeds))


def test_it_is_small_and_names_no_machine() -> None:
    assert KEPT.stat().st_size < 1.5e6
    with tarfile.open(KEPT) as archive:
        for member in archive:
            assert (member.uname, member.gname) == ("", "")
            content = archive.extractfile(member)
            assert content is not None
            found = re.search(rb"/(home|root|tmp|usr|work|Users)/", content.read())
            assert found is None, member.name


@pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")
def test_the_pictures_are_of_panels_that_the_workspace_has(rows: Rows) -> None:
    bank = describe_workspace(make_workspace("p", "e", "n"))["spec"]["section"]["panelBankConfig"]
    panels = [panel["config"] for section in bank["sections"] for panel in section["panels"]]
    named = {metric for panel in panels for metric in panel.get("metrics", ())}
    regexes = [panel["metricRegex"] for panel in panels if "metricRegex" in panel]
    for metric in (SCORE, PERPLEXITY, *COURSE):
        assert metric in named or any(re.search(regex, metric) for regex in regexes), metric
    for name in DRAWINGS:
        drawing = (PICTURES / f"dashboard_{name}.svg").read_text(encoding="utf-8")
        shown = rows if name == "ship" else learned(rows)
        assert [row for row in shown if f">{row}</text>" not in drawing] == []


def test_a_finished_run_is_logged_again(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb_home"))
    with pytest.raises(SystemExit, match="holds no ROW-seed_N/runs"):
        draw_dashboards.record(tmp_path, tmp_path / "kept.tar.gz")
    cli("fit", "--strategy=maskllm", "--logger=csv", "--trainer.log_every_n_steps=1")
    [run] = cli.runs()
    folder = tmp_path / "compare"
    (folder / "mine-seed_3").mkdir(parents=True)
    (run.parents[1]).rename(folder / "mine-seed_3" / "runs")
    draw_dashboards.record(folder, tmp_path / "kept.tar.gz")
    [(name, [logged])] = draw_dashboards.read(tmp_path / "kept.tar.gz").items()
    result = read_json(next(folder.rglob("result.json")))
    assert (name, logged.config["strategy"], logged.tags) == ("mine", "maskllm", ["maskllm", "2:4"])
    assert points(logged, SCORE)[1] == [pytest.approx(result["scores"]["overall"]["perplexity"])]
    assert len(points(logged, "train/loss")[1]) == 2
