"""What the record of a run holds of a strategy's settings."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsify.masking.registry import STRATEGIES, plugins
from sparsify.masking.strategy import SparsityStrategy
from sparsify.results.compare.loading import Run
from sparsify.results.compare.rows import make_rows
from tests.results.compare.made import result


@dataclass
class Part:
    size: int = 3


class Odd(SparsityStrategy):
    """Has settings of all kinds, and state that is none."""

    def __init__(
        self, pair: Any = (1, 2), table: Any = None, nothing: Any = None, thing: Any = None
    ) -> None:
        super().__init__()
        self.pair, self.table, self.nothing, self.thing = pair, table, nothing, thing
        self.found: dict[str, float] = {"loss": 1.0}
        self.last = None
        self._secret = 3


def settings(**given: Any) -> dict[str, Any]:
    strategy = Odd(**given)
    strategy.values["tau"] = 0.5
    found = strategy.describe()["settings"]
    assert json.loads(json.dumps(found)) == found
    return found


def test_tuples_tables_and_none_are_settings_and_state_is_not() -> None:
    assert settings() == {"pair": [1, 2], "table": None, "nothing": None, "thing": None, "seed": 0}
    found = settings(pair=(3, (4,)), table={1: {"a": (0.5,)}})
    assert (found["pair"], found["table"]) == ([3, [4]], {"1": {"a": [0.5]}})


def test_objects_are_told_the_same_each_time() -> None:
    assert settings(thing=object())["thing"] == "builtins.object"
    assert settings(thing=torch.float16)["thing"] == "torch.float16"
    assert settings(thing=Odd)["thing"].endswith("test_strategy_describe.Odd")
    assert settings(thing=settings)["thing"].endswith("test_strategy_describe.settings")
    assert settings(thing={"b", "a"})["thing"] == ["a", "b"]
    part = settings(thing=Part(5))["thing"]
    assert part["class"].endswith("test_strategy_describe.Part")
    assert part["size"] == 5


@pytest.mark.parametrize("one", [(1, 2), {"a": 1}, None])
def test_runs_of_different_such_settings_are_two_rows(one: Any) -> None:
    from pathlib import Path

    def run(number: int, pair: Any) -> Run:
        described = settings(pair=pair)
        content = result(loss=3.0, seed=number, settings=described | {"seed": number})
        return Run(Path(f"{number}/result.json"), content, {})

    same, _ = make_rows([run(0, one), run(1, one)])
    assert len(same) == 1
    other, _ = make_rows([run(0, one), run(1, (1, 3))])
    assert len(other) == 2


@pytest.mark.parametrize("name", sorted(plugins(STRATEGIES)))
def test_no_strategy_of_ours_tells_state(name: str) -> None:
    kind = plugins(STRATEGIES)[name].load()
    try:
        strategy = kind()
    except Exception:
        pytest.skip("it needs an argument")
    before = strategy.describe()
    strategy.anneal(0.5)
    assert strategy.describe() == before
    assert not {"schedules", "values", "average", "training"} & set(before["settings"])
    assert json.loads(json.dumps(before)) == before
