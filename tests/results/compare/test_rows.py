import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparsify.export.mask_file.index import open_index
from sparsify.results.compare.loading import Run
from sparsify.results.compare.rows import Row, make_rows
from sparsify.results.compare.settings import short_name
from tests.results.compare.made import DENSE, MAGNITUDE, MASKLLM, SRSTE, WANDA, result, row, write
from tests.results.compare.pages import write_export

NUMBERS = itertools.count()


def run(config: Any = None, date: str = "2026-11-22", **more: Any) -> Run:
    """A run in a folder of its own, with a configuration that says nothing."""
    path = Path(f"run {next(NUMBERS)}/result.json")
    return Run(path, result(**more) | {"date": date}, {} if config is None else config)


def bare(**more: Any) -> Run:
    """One without configuration."""
    return dataclasses.replace(run(**more), config=None)


def told(lr: float) -> dict[str, Any]:
    """A configuration, as the command line writes it."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}}
    return {"model": {"optimizer": optimizer}, "data": {"seed": 0, "train": "t.txt"}}


def clipped(value: float, **more: Any) -> dict[str, Any]:
    return {"trainer": {"gradient_clip_val": value}} | more


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
    assert rows[0].perplexity == pytest.approx(sum(map(math.exp, (3.0, 3.1, 3.2))) / 3)


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
    runs = [run(config=told(0.1), loss=3.0), run(config=told(0.2), loss=3.1)]
    assert list(labels(make_rows(runs)[0])) == ["maskllm, lr 0.1", "maskllm, lr 0.2"]
    # What only learning depends on is none of a one-shot strategy's.
    runs = [run(config=told(lr), strategy=MAGNITUDE) for lr in (0.1, 0.2)]
    assert labels(make_rows(runs)[0]) == {"magnitude": 1}


def test_other_special_tokens_in_front_of_windows_tell_rows_apart() -> None:
    runs = [run({"data": {"bos": bos}}, loss=3.0) for bos in (None, False)]
    assert list(labels(make_rows(runs)[0])) == ["maskllm", "maskllm, no bos"]
    # Calibrated by an earlier version, which had none, and tested by this one.
    calibrations = [calibrated(0), calibrated(0, sha256="text with <s>", bos=["<s>"])]
    runs = [run(strategy=WANDA, loss=3.0, calibration=one) for one in calibrations]
    assert len(make_rows(runs)[0]) == 2


def test_runs_without_a_configuration_are_a_row_of_their_own() -> None:
    """And make no other run disappear."""
    runs = [run(told(0.1), loss=3.0), run(told(0.2), loss=3.1), bare(loss=3.2), bare(loss=3.3)]
    rows, remarks = make_rows(runs)
    assert labels(rows) == {
        "maskllm, lr 0.1": 1,
        "maskllm, lr 0.2": 1,
        "maskllm, config.yaml missing": 2,  # of one seed, and not known to be repeats
    }
    places = ", ".join(str(one.path.parent) for one in runs[2:])
    assert remarks == [
        f"Without config.yaml, and so in rows of their own: {places}. Those of them that differ "
        "only in what stands there alone (optimizer, batch size, training text) are counted as "
        "seeds of one row."
    ]
    rows, _ = make_rows([bare(loss=3.0), bare(loss=3.0)])
    assert labels(rows) == {"maskllm": 1}


def test_the_newest_of_two_runs_of_one_seed_counts() -> None:
    old, new = run(loss=3.0), run(loss=3.1, date="2027-01-01")
    rows, remarks = make_rows([new, old, run(seed=1, loss=3.2)])
    assert rows[0].losses == [3.1, 3.2]
    (remark,) = remarks
    assert remark.startswith(
        "1 of 3 runs repeat the settings and seeds of another and are left out: "
        f"{old.path.parent}. What"
    )


@pytest.mark.parametrize("command", ["export", "test"])
def test_a_fit_counts_before_what_was_exported_of_it_later(command: str) -> None:
    """Though the configuration of the later command has another trainer."""
    fit = run(clipped(0.5), loss=3.0, command="fit")
    again = run(clipped(1.0), loss=3.1, command=command, date="2027-01-01")
    for runs in ([fit, again], [again, fit]):
        rows, remarks = make_rows(runs)
        assert rows[0].runs == [fit]
        assert len(rows) == 1
        assert str(again.path.parent) in remarks[0]


def test_older_results_that_began_from_a_checkpoint_are_no_fits() -> None:
    fit = run(clipped(0.5), loss=3.0)
    again = run(clipped(1.0, ckpt_path="a/last.ckpt"), loss=3.1, date="2027-01-01")
    assert make_rows([again, fit])[0][0].runs == [fit]
    assert labels(make_rows([run(clipped(0.5)), run(clipped(1.0))])[0]) == {
        "maskllm, gradient_clip_val 0.5": 1,
        "maskllm, gradient_clip_val 1": 1,
    }
    told_fit = run(clipped(0.5), loss=3.2, command="fit", date="2025-01-01")
    assert make_rows([again, fit, told_fit])[0][0].runs == [told_fit]


def test_exports_without_their_fit_are_told_apart_by_all_but_the_trainer() -> None:
    runs = [
        run(clipped(clip, **told(lr)), command="export", loss=3 + lr, date=f"2026-11-2{clip}")
        for lr in (0.1, 0.2)
        for clip in (1, 2)
    ]
    rows, _ = make_rows(runs)
    assert labels(rows) == {"maskllm, lr 0.1": 1, "maskllm, lr 0.2": 1}
    assert [one.runs for one in rows] == [[runs[1]], [runs[3]]]
    assert "gradient_clip_val" not in rows[0].settings


def test_an_export_of_another_fit_is_no_repeat() -> None:
    runs = [run(told(0.1), command="fit"), run(told(0.2), command="export", loss=3.1)]
    assert list(labels(make_rows(runs)[0])) == ["maskllm, lr 0.1", "maskllm, lr 0.2"]


def test_gathered_gradients_are_told_by_tokens_and_steps() -> None:
    configs = [{"trainer": {"accumulate_grad_batches": k}} for k in (1, 4)]
    runs = [run(config, seed=seed) for seed, config in enumerate(configs)]
    assert labels(make_rows(runs)[0]) == {"maskllm": 2}


def test_one_shot_rows_that_mask_other_layers_stay_apart() -> None:
    configs = [{"model": {"exclude": exclude}} for exclude in (None, ["*down*"])]
    runs = [run(config, strategy=MAGNITUDE, loss=3.0) for config in configs]
    assert len(make_rows(runs)[0]) == 2
    runs = [run(strategy=MAGNITUDE, sparsity=sparsity) for sparsity in (0.5, 0.5004, 0.4)]
    rows, _ = make_rows(runs)
    assert sorted(one.settings["sparsity"] for one in rows) == ["40.0%", "50.0%"]
    # The training text is none of what reads none.
    runs = [run({"data": {"train": train}}, strategy=MAGNITUDE) for train in ("a", "b")]
    assert len(make_rows(runs)[0]) == 1


def test_rows_are_ranked_by_mean_perplexity() -> None:
    """Which a bad seed raises more than it raises the mean loss."""
    runs = [run(seed=seed, loss=loss) for seed, loss in enumerate((2.0, 4.0))]
    even = {"alpha": 1.0}
    runs += [run(seed=seed, loss=loss, settings=even) for seed, loss in enumerate((3.05, 3.05))]
    rows, _ = make_rows(runs)
    assert list(labels(rows)) == ["maskllm, alpha 1", "maskllm"]


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


def test_the_search_for_orders_is_part_of_the_cost() -> None:
    found = {"parts": ["residual"], "sha256": "orders", "seconds": 5.0, "device": "cpu"}
    costs = [(found, [74.0]), (found | {"device": "NVIDIA H100"}, []), (None, [69.0])]
    costs += [({"parts": ["residual"], "sha256": "orders"}, [69.0])]  # given by a folder
    for permutation, seconds in costs:
        made = row([3.0], calibration=calibrated(0), permutation=permutation)
        assert made.costs("seconds") == seconds


def test_what_was_not_recorded_is_no_cost() -> None:
    cached = calibrated(0, seconds=0.1, cached=True)
    assert row([3.0], calibration=cached).costs("seconds") == []
    newer = run(calibration=cached)
    newer.result["history"] = {}
    assert make_rows([newer])[0][0].costs("seconds") == [60.1]
    for device, seconds in (("cpu", [69.0]), ("NVIDIA H100", []), (None, [69.0])):
        assert row([3.0], calibration=calibrated(0, device=device)).costs("seconds") == seconds
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
    prior = {
        "class": "sparsify.calibration.prior.SavedMasks",
        "weights": "frozen",
        "settings": {"path": "a"},
    }
    _, remarks = make_rows([run(settings={"prior": prior})])
    assert remarks == [
        "maskllm: starts from the masks of another run, whose cost is not counted here."
    ]


def test_seeds_that_start_from_the_seeds_of_one_row_are_one_row(tmp_path: Path) -> None:
    runs = []
    for seed, (strategy, name) in enumerate([(MASKLLM, "a"), (MASKLLM, "a"), (SRSTE, "b")]):
        start = tmp_path / f"{name}{seed}"
        file = write(start, result(strategy, 3.3 + seed / 100, seed))
        write_export(start / "export", seed)
        prior = {
            "class": "sparsify.calibration.prior.SavedMasks",
            "weights": "frozen",
            "settings": {"path": "export", "digest": open_index(start / "export").digest},
        }
        then = result("a.Then", 3.0 + seed / 100, seed, settings={"prior": prior})
        kept = write(tmp_path / f"then{seed}", then)
        write_export(kept.parent / "export", seed)  # the same masks
        runs += [Run(file, json.loads(file.read_text()), {}), Run(kept, then, {})]
    rows, _ = make_rows(runs)
    found = [(short_name(row.record["strategy"]["class"]), len(row.runs)) for row in rows]
    assert found == [("Then", 2), ("Then", 1), ("maskllm", 2), ("sr_ste", 1)]
