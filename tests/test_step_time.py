"""The benchmark of a step's time, in short: who takes part, and what its shares are shares of."""

from pathlib import Path

import pytest


def test_all_that_learn_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from step_time import TINY, learned, measure, summary

    names = learned()
    assert {"maskllm", "maskpro", "proxsparse", "sr_ste"} <= set(names)
    assert not {"dense", "wanda", "sparsegpt"} & set(names)
    rows = measure([*names, "maskllm:hard=True"], TINY, 2, [0.0, 0.5])["steps"]
    assert len(rows) == 1 + 2 * (len(names) + 2)
    assert all(len(row["times"]) == 2 for row in rows.values())
    assert rows["dense"]["blocks"] == rows["dense"]["whole"] == 1
    assert "whole" not in rows["maskpro"]

    times = {"dense": [[2, 1]] * 3, "head": [[10, 0]] * 3, "a": [[3, 1], [4, 0.5], [90, 9]]}
    row = summary(times, 10, set())["a"]
    assert (row["blocks"], row["blocks_with_update"]) == (2, 2.5)
    assert (row["whole"], row["whole_with_update"]) == (50 / 30, 60 / 30)
