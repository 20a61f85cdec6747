"""The benchmark of costs, in short: its arithmetic, who takes part, its parts and its figure."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Scripts

TWO_SIZES = {"sizes": [1, 2], "medians": [0.1, 0.2], "exponent": 1.0, "expected": "1"}
RESULT = {
    "cpu": "a CPU",
    "threads": 1,
    "rounds": 5,
    "date": "2026-01-01",
    "steps": {
        "rows": {
            "maskllm": {
                "blocks": 1.25,
                "blocks_with_update": 1.5,
                "held_bytes": 18.0,
                "peak_bytes": 30.0,
            },
            "head": {"backward": 1.0},
        }
    },
    "files": {"rows": {"2:4": {"bits": 0.6471, "packbits_zlib_bits": 0.6775}}},
    "growth": {
        "rows": {
            f"{name}, {what}": TWO_SIZES
            for name in ("selfmask", "wanda", "sparsegpt")
            for what in ("width", "tokens", "layers")
        }
    },
}


@pytest.fixture(autouse=True)
def benchmarks(scripts: Scripts) -> None:
    """Scripts can be imported."""


def test_the_first_round_does_not_count() -> None:
    from measuring import in_turns

    now, order = 0.0, []

    def contestant(name: str, seconds: list[float]) -> Callable[[int], Callable[[], None]]:
        def prepare(turn: int) -> Callable[[], None]:
            nonlocal now
            now += 1000  # preparing is not timed

            def run() -> None:
                nonlocal now
                now += seconds[turn]
                order.append(name)

            return run

        return prepare

    contestants = {"a": contestant("a", [9, 1, 3]), "b": contestant("b", [9, 2, 4])}
    assert in_turns(contestants, 2, lambda: now) == {"a": [1, 3], "b": [2, 4]}
    assert order == list("ababab")


def test_bytes_are_those_of_tensors_at_the_peak_and_after() -> None:
    from measuring import allocated

    def prepare() -> Callable[[], None]:
        kept = [torch.zeros(1000)]
        torch.zeros(9000)  # gone before what is counted begins

        def run() -> None:
            torch.zeros(2000)
            kept.append(torch.zeros(500))

        return run

    assert allocated(prepare) == (12000, 6000)


def test_shares_are_of_the_dense_forward_and_backward() -> None:
    from cost_steps import summary

    times = {"dense": [[2] * 3, [1] * 3], "head": [[10] * 3, [0] * 3]}
    times |= {"a": [[3, 4, 90], [1, 0.5, 9]], "b": [[3], [1]]}
    rows = summary(times, 10, {"b"})
    assert (rows["a"]["blocks"], rows["a"]["blocks_with_update"]) == (2, 2.5)
    assert (rows["a"]["whole"], rows["a"]["whole_with_update"]) == (50 / 30, 60 / 30)
    assert "whole" not in rows["b"]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.5])
def test_the_exponent_of_a_power(power: float) -> None:
    from cost_growth import exponent

    sizes = [128, 256, 512]
    assert exponent(sizes, [3e-6 * size**power for size in sizes]) == pytest.approx(power)


def test_both_implementations_choose_the_same_weights() -> None:
    from cost_oneshot import ours, plain
    from cost_steps import TINY, model_of

    windows = torch.randint(0, 64, (4, 32))
    for name in ("wanda", "sparsegpt"):
        one, other = model_of(TINY), model_of(TINY)
        ours(one, windows, name)
        plain(other, windows, name)
        weights = dict(other.named_parameters())
        for key, weight in one.named_parameters():
            torch.testing.assert_close(weight, weights[key], msg=f"{name}, {key}")
            if "_proj" in key:
                assert (weight == 0).sum() == weight.numel() / 2


def test_quick_parts_are_saved_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cost import main

    main(["--quick", "--rounds", "1", "--save", str(tmp_path), "--only", "steps", "oneshot"])
    (file,) = tmp_path.glob("cost-*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert (result["quick"], result["rounds"]) == (True, 1)
    steps, oneshot = result["steps"]["rows"], result["oneshot"]["rows"]
    assert {"maskllm", "maskpro", "proxsparse", "sr_ste", "selfmask, teacher"} <= set(steps)
    assert not {"wanda", "sparsegpt"} & set(steps)
    assert steps["dense"]["blocks"] == 1
    assert steps["dense"]["held_bytes"] == pytest.approx(8, abs=0.1)  # AdamW's two moments
    # Scores, momentum, and a bit; and four bytes a row, of which these layers have many.
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]
    held = 8.125 + 4 * sum(rows for rows, _ in shapes) / sum(o * i for o, i in shapes)
    assert steps["selfmask"]["held_bytes"] == pytest.approx(held, abs=0.02)
    assert oneshot["wanda, plain"]["share_of_plain"] == 1
    assert all(row["peak_bytes"] > 0 for row in oneshot.values())
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("selfmask, teacher", "sparsegpt, ours"))


def test_a_figure_of_a_record_measures_nothing(tmp_path: Path) -> None:
    from cost import main

    record, picture = tmp_path / "cost.json", tmp_path / "pictures" / "cost.svg"
    record.write_text(json.dumps(RESULT), encoding="utf-8")
    main(["--from", str(record), "--figure", str(picture)])
    assert picture.read_text(encoding="utf-8").count("<g id=") > 50


def test_a_median_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from cost import main

    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "--rounds 0: a median needs at least 1" in capsys.readouterr().err
