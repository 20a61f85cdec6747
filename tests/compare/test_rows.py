from pathlib import Path
from typing import Any

import pytest

from sparsify.compare.loading import Run
from sparsify.compare.rows import Row, make_rows
from tests.compare.made import DENSE, MAGNITUDE, MASKLLM, SRSTE, WANDA, result, row


def run(name: str = "x", config: Any = None, **more: Any) -> Run:
    return Run(Path(name) / "result.json", result(**more), {} if config is None else config)


def calibrated(seed: int, **more: Any) -> dict[str, Any]:
    return {
        "samples": 128,
        "block_size": 256,
        "seed": seed,
        "sha256": f"text {seed}",
        "activations": "pruned",
        "seconds": 9.0,
        "cached": False,
    } | more


def labels(rows: list[Row]) -> dict[str, int]:
    return {one.label: len(one.runs) for one in rows}


def test_seeds_are_one_row_and_settings_several() -> None:
    runs = [run(seed=seed, loss=3 + seed / 10) for seed in range(3)]
    runs += [run(seed=seed, loss=4 + seed / 10, settings={"alpha": 9.0}) for seed in range(2)]
    runs += [run(strategy=MAGNITUDE, loss=5.0)]
    rows, remarks = make_rows(runs)
    assert labels(rows) == {"maskllm": 3, "maskllm, alpha 9": 2, "magnitude": 1}
    assert remarks == []
    assert rows[0].losses == [3.0, 3.1, 3.2]
    assert rows[0].loss == pytest.approx(3.1)


def test_labels_take_the_fewest_settings_that_tell_rows_apart() -> None:
    prior = {"class": WANDA, "weights": "frozen", "settings": {"seed": 0, "power": 1.0}}
    runs = [
        run(loss=3.0, settings={"estimator": "residual", "grading": 16.0}, steps=600),
        run(loss=3.1, settings={"estimator": "linear", "grading": 8.0}, steps=300),
        run(loss=3.2, settings={"estimator": "linear", "grading": 8.0}, steps=900),
        run(loss=3.3, settings={"estimator": "linear", "grading": 8.0, "prior": prior}, steps=900),
        run(loss=3.4, strategy=SRSTE, distillation={"weight": 0.5, "temperature": 1.0}),
        run(loss=3.5, strategy=SRSTE),
        run(loss=3.6, strategy=WANDA, settings={"update": True}),
        run(loss=3.7, strategy=WANDA, settings={"update": False}),
        run(loss=3.8, strategy="their.package.Own"),
    ]
    rows, _ = make_rows(runs)
    assert list(labels(rows)) == [
        "maskllm, estimator residual",
        "maskllm, estimator linear, 300 steps",
        "maskllm, estimator linear, 900 steps",
        "maskllm, estimator linear, prior wanda",
        "sr_ste, distilled",
        "sr_ste",
        "wanda, update",
        "wanda, no update",
        "Own",
    ]
    assert rows[3].settings["prior.power"] == "1"


def test_patterns_tell_rows_apart() -> None:
    rows, _ = make_rows([run(loss=3.0), run(loss=2.9, pattern="4:8")])
    assert list(labels(rows)) == ["maskllm, 4:8", "maskllm, 2:4"]


def test_what_only_the_configuration_holds_tells_rows_apart() -> None:
    def told(lr: float) -> Any:
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}}
        return {"model": {"optimizer": optimizer}, "data": {"seed": 0, "train": "t.txt"}}

    runs = [run(config=told(0.1), loss=3.0), run(config=told(0.2), loss=3.1)]
    assert list(labels(make_rows(runs)[0])) == ["maskllm, lr 0.1", "maskllm, lr 0.2"]
    # What only learning depends on is none of a one-shot strategy's.
    runs = [run(config=told(lr), strategy=MAGNITUDE) for lr in (0.1, 0.2)]
    assert labels(make_rows(runs)[0]) == {"magnitude": 1}


def test_without_a_configuration_that_is_said() -> None:
    bare = Run(Path("b/result.json"), result(seed=1, loss=3.1), None)
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}
    rows, remarks = make_rows([run(config={"model": {"optimizer": optimizer}}), bare])
    assert labels(rows) == {"maskllm": 2}
    assert "counted as seeds of one row" in remarks[0]


def test_the_newest_of_two_runs_of_one_seed_counts() -> None:
    old, new = run(loss=3.0), run(loss=3.1)
    new.result["date"] = "2027-01-01T00:00:00+00:00"
    rows, remarks = make_rows([new, old, run(seed=1, loss=3.2)])
    assert rows[0].losses == [3.1, 3.2]
    assert remarks == ["maskllm: 1 of 3 runs repeat the seeds of a newer one and are left out."]


def test_the_seed_of_the_data_is_a_seed() -> None:
    runs = [run(config={"data": {"seed": seed}}, loss=3 + seed / 10) for seed in range(2)]
    assert make_rows(runs)[0][0].losses == [3.0, 3.1]


def test_seeds_that_change_nothing_are_one_sample() -> None:
    """As those of a one-shot strategy with one calibration text."""
    runs = [run(strategy=WANDA, seed=seed, calibration=calibrated(0)) for seed in range(3)]
    (one,), remarks = make_rows(runs)
    assert (one.spread, one.is_exact, len(one.runs)) == ("one run", False, 3)
    assert "3 runs gave 1 different results" in remarks[0]
    runs = [
        run(strategy=WANDA, loss=3 + seed / 10, calibration=calibrated(seed)) for seed in range(3)
    ]
    (one,), remarks = make_rows(runs)
    assert (one.spread, remarks) == ("3 seeds", [])


def test_other_calibration_is_another_row() -> None:
    texts = [{"t": {"sha256": sha}} for sha in "ab"]
    runs = [
        run(strategy=WANDA, loss=3.0, calibration=calibrated(0)),
        run(strategy=WANDA, loss=3.1, calibration=calibrated(0, samples=64)),
        run(strategy=WANDA, loss=3.2, calibration=calibrated(0, sources=texts[0])),
        run(strategy=WANDA, loss=3.3, calibration=calibrated(0, sources=texts[1])),
    ]
    assert len(make_rows(runs)[0]) == 4


def test_where_nothing_random_enters_a_row_is_exact() -> None:
    assert row([3.0], MAGNITUDE).is_exact
    assert row([3.0, 3.0], MAGNITUDE).is_exact
    assert not row([3.0, 3.1], MAGNITUDE).is_exact
    assert not row([3.0], MASKLLM).is_exact
    assert not row([3.0], WANDA, calibration=calibrated(0)).is_exact
    assert [row([3.0], kind).spread for kind in (MAGNITUDE, MASKLLM)] == ["exact", "one run"]
    assert row([3.0, 3.1]).spread == "2 seeds"


def test_costs_are_of_calibration_and_training_together() -> None:
    one = row([3.0, 3.1], calibration=[calibrated(0), calibrated(1)], seconds=[60.0, 70.0])
    assert one.costs("tokens") == [1000 + 128 * 256] * 2
    assert one.costs("seconds") == [69.0, 79.0]
    assert one.cost("seconds") == 74.0
    assert one.cost("memory") == 1.0
    assert row([3.0], calibration=calibrated(0, tokens=5)).cost("tokens") == 1005


def test_what_was_not_recorded_is_no_cost() -> None:
    cached = calibrated(0, seconds=0.1, cached=True)
    assert row([3.0], calibration=cached).costs("seconds") == []
    newer = run(calibration=cached)
    newer.result["history"] = {}
    assert make_rows([newer])[0][0].costs("seconds") == [60.1]
    assert row([3.0], peak_memory_gib=None).cost("memory") is None


@pytest.mark.parametrize(
    ("strategy", "weights", "changes", "keeps"),
    [
        (MASKLLM, "frozen", "masks", True),
        (MASKLLM, "proxy", "masks", True),
        (MASKLLM, "updated", "masks, kept weights", False),
        (SRSTE, "trained", "masks, all weights", False),
        (DENSE, "frozen", "nothing", True),
    ],
)
def test_what_changes(strategy: str, weights: str, changes: str, keeps: bool) -> None:
    one = row([3.0], strategy, weights=weights)
    assert (one.changes, one.keeps_base) == (changes, keeps)


def test_two_classes_of_one_name_stay_apart() -> None:
    rows, _ = make_rows([run(strategy="a.Own", loss=3.0), run(strategy="b.Own", loss=3.1)])
    assert list(labels(rows)) == ["Own #1", "Own #2"]


def test_a_start_from_other_masks_is_said() -> None:
    prior = {"class": "sparsify.prior.SavedMasks", "weights": "frozen", "settings": {"path": "a"}}
    _, remarks = make_rows([run(settings={"prior": prior})])
    assert remarks == [
        "maskllm: starts from the masks of another run, whose cost is not counted here."
    ]
