"""A calibration that was stopped goes on at its next block, and ends as if it had not been."""

import fcntl
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify import Block, LayerResult, SparsityStrategy
from sparsify.calibration import Calibration, Layerwise
from sparsify.calibration.results import INDEX, LOCK
from sparsify.strategies.admm import ADMM
from sparsify.strategies.dsnot import DSnoT
from sparsify.strategies.gblm import GBLM
from sparsify.strategies.maskllm import MaskLLM
from sparsify.strategies.pruner_zero import PrunerZero
from sparsify.strategies.ria import RIA
from sparsify.strategies.sparsegpt import SparseGPT
from sparsify.strategies.wanda import Wanda
from tests.calibration.engine import count_passes, masked
from tests.calibration.test_cache import assert_same
from tests.tiny_models import FAMILIES

MAKES: list[Callable[[], SparsityStrategy]] = [
    ADMM,
    DSnoT,
    GBLM,
    PrunerZero,
    RIA,
    SparseGPT,
    Wanda,
    lambda: MaskLLM(prior="sparsegpt"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def engine(settings: Calibration) -> tuple[Layerwise, list[str]]:
    """Of a fresh model with three blocks, and the blocks that have run."""
    model = FAMILIES["gemma3"]()
    return masked(model, settings), count_passes(model)


def whole(strategy: SparsityStrategy, settings: Calibration) -> dict[str, LayerResult]:
    return dict(engine(settings)[0].run(strategy))


def stop_in(block: int, strategy: SparsityStrategy, settings: Calibration, error: Any) -> None:
    """Run until a block is looked at, and raise there."""
    made, _ = engine(settings)

    def watch(blocks: Iterable[str]) -> Iterator[str]:
        for number, name in enumerate(blocks):
            if number == block:
                raise error
            yield name

    made._watch = watch
    with pytest.raises(type(error)):
        dict(made.run(strategy))


@pytest.mark.parametrize("activations", ["pruned", "dense"])
@pytest.mark.parametrize("make", MAKES)
def test_a_stopped_calibration_goes_on(
    make: Callable[[], SparsityStrategy], activations: Any, folder: Path
) -> None:
    expected = whole(make(), Calibration(cache=False, activations=activations))
    settings = Calibration(activations=activations)
    stop_in(2, make(), settings, KeyboardInterrupt())
    [partial] = folder.iterdir()
    assert partial.suffix == ".partial"
    seen: list[str] = []
    made, passes = engine(settings)
    collect = made.collect

    def watched(block: Any, layers: Any, kind: Any) -> Any:
        seen.append(block)
        return collect(block, layers, kind)

    made.collect = watched  # type: ignore[method-assign]
    results = dict(made.run(make()))
    assert_same(results, expected)
    # The first block tells that there is text; the second was done, and the third was not.
    assert "model.layers.1" not in seen
    assert made.record is not None
    assert made.record["cached"] is False
    assert [path.suffix for path in folder.iterdir()] == [""]
    again, passes = engine(settings)
    assert_same(dict(again.run(make())), expected)
    assert not passes


class Remembers(Wanda):
    """Scores depend on the blocks before."""

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        number = 0

        def counted() -> Iterator[Block]:
            nonlocal number
            for block in blocks:
                number += 1
                yield block

        for name, result in super().calibrate(counted()):
            yield name, LayerResult(result.mask.roll(number % 2 * 4, 1))


def test_a_strategy_that_may_remember_blocks_begins_again(folder: Path) -> None:
    expected = whole(Remembers(), Calibration(cache=False))
    stop_in(2, Remembers(), Calibration(), RuntimeError("stopped"))
    assert_same(whole(Remembers(), Calibration()), expected)


@pytest.mark.parametrize("damage", ["index", "file", "no index", "unfinished"])
def test_what_a_stopped_run_left_is_checked(
    damage: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = whole(Wanda(), Calibration(cache=False))
    stop_in(2, Wanda(), Calibration(), KeyboardInterrupt())
    [partial] = folder.iterdir()
    if damage == "index":
        text = (partial / INDEX).read_text()
        (partial / INDEX).write_text(text.replace('"seconds": ', '"seconds": 1'))
    elif damage == "file":
        path = sorted(partial.glob("*.safetensors"))[2]
        path.write_bytes(path.read_bytes()[:-4] + b"\x05\x05\x05\x05")
    elif damage == "no index":
        (partial / INDEX).unlink()
    else:  # killed within the third block
        (partial / "99999.safetensors").write_bytes(b"half")
    with caplog.at_level(logging.WARNING, "sparsify"):
        assert_same(whole(Wanda(), Calibration()), expected)
    assert ("is computed again" in caplog.text) == (damage in ("index", "file"))
    [entry] = folder.iterdir()
    assert len(list(entry.iterdir())) == len(expected) + 1


def test_two_runs_at_once_do_not_mix(folder: Path) -> None:
    expected = whole(Wanda(), Calibration(cache=False))
    stop_in(2, Wanda(), Calibration(), KeyboardInterrupt())
    [partial] = folder.iterdir()
    before = {path.name: path.read_bytes() for path in partial.iterdir()}
    handle = os.open(partial / LOCK, os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert_same(whole(Wanda(), Calibration()), expected)
    assert {path.name: path.read_bytes() for path in partial.iterdir()} == before
    os.close(handle)


def test_seconds_of_stopped_runs_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 100_000, 10))
    monkeypatch.setattr("sparsify.calibration.layerwise.time.perf_counter", lambda: next(now))
    stop_in(2, Wanda(), Calibration(), KeyboardInterrupt())
    made, _ = engine(Calibration())
    dict(made.run(Wanda()))
    alone, _ = engine(Calibration(cache=False))
    dict(alone.run(Wanda()))
    assert made.record is not None
    assert alone.record is not None
    assert made.record["seconds"] > alone.record["seconds"]
    assert torch.is_tensor(next(iter(whole(Wanda(), Calibration()).values())).mask)
