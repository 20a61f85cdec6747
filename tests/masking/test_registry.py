"""Strategies by name."""

from pathlib import Path

import pytest

from sparsify.common.errors import SparsifyError
from sparsify.masking.registry import (
    CALLBACKS,
    STRATEGIES,
    find_strategy,
    make_strategy,
    plugins,
    strategy_name,
)
from sparsify.masking.strategy import SparsityStrategy
from sparsify.strategies.dense import Dense
from sparsify.strategies.maskllm import MaskLLM


@pytest.mark.parametrize(
    "name", ["maskllm", "MaskLLM", "MASKLLM", "sparsify.strategies.maskllm.MaskLLM"]
)
def test_a_strategy_by_name_in_any_case_or_by_path(name: str) -> None:
    assert find_strategy(name) is MaskLLM


def test_options_reach_the_strategy() -> None:
    assert make_strategy("maskllm", alpha=5.0).alpha == 5.0


@pytest.mark.parametrize("name", sorted(plugins(STRATEGIES)))
def test_every_entry_point_is_a_strategy_named_as_its_class(name: str) -> None:
    cls = find_strategy(name)
    assert issubclass(cls, SparsityStrategy)
    assert cls.__name__.lower() == name.replace("_", "")
    assert strategy_name(cls) == name


def test_a_strategy_that_is_not_plugged_in_has_its_own_name() -> None:
    assert strategy_name(SparsityStrategy) == "SparsityStrategy"


def test_every_callback_loads() -> None:
    assert all(point.load() for point in plugins(CALLBACKS).values())


def test_a_strategy_of_a_module_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_for_the_registry.py").write_text(
        "from sparsify.strategies.dense import Dense as Mine\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_strategy("mine_for_the_registry.Mine") is Dense


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maskllmm", "did you mean 'maskllm'"),
        ("zzz", "there is no strategy 'zzz'; .*dense.*magnitude.*maskllm"),
        ("nowhere.Mine", "'nowhere.Mine' cannot be imported .*No module named 'nowhere'"),
        ("pathlib.Nothing", "'pathlib.Nothing' cannot be imported .*no attribute 'Nothing'"),
        ("pathlib.Path", "'pathlib.Path' is not a strategy"),
        ("math.pi", "'math.pi' is not a strategy"),
    ],
)
def test_errors(name: str, message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        find_strategy(name)
