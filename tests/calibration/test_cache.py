"""Results of calibration on disk: found again when nothing changed, and only then."""

import errno
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsify import (
    Block,
    LayerResult,
    NMPattern,
    SparseCausalLM,
    SparsityStrategy,
)
from sparsify.calibration import Calibration
from sparsify.common.files import cache_folder
from sparsify.export.mask_file.file import write_masks
from sparsify.masking.layer import base_parameters
from sparsify.masking.overrides import Overrides
from sparsify.masking.registry import STRATEGIES, make_strategy, plugins
from sparsify.models.hashes import hash_parameters
from sparsify.strategies.admm import ADMM
from sparsify.strategies.dsnot import DSnoT
from sparsify.strategies.maskllm import MaskLLM
from sparsify.strategies.selfmask import SelfMask
from sparsify.strategies.sparsegpt import SparseGPT
from sparsify.strategies.swaps import Swaps
from sparsify.strategies.wanda import Wanda
from sparsify.training.build import calibrate
from tests.calibration.engine import TEXT, TWO_FOUR, count_passes, masked
from tests.conftest import tiny_llama

Results = dict[str, LayerResult]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(
    strategy: SparsityStrategy, settings: Calibration = Calibration(), **options: Any
) -> tuple[Results, bool]:
    """The results on a fresh model, and whether they were computed."""
    model = options.pop("model", None) or tiny_llama()
    engine, passes = masked(model, settings, **options), count_passes(model)
    results = dict(engine.run(strategy))
    assert engine.record is not None
    assert engine.record["cached"] == (not passes)
    assert engine.record["seconds"] >= 0
    return results, bool(passes)


def test_a_stored_result_tells_what_computing_it_took(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 40.0, 90.0, 100.0, 100.0, 1000.0, 1001.0])
    monkeypatch.setattr("sparsify.calibration.layerwise.time.perf_counter", lambda: next(clock))
    records = []
    for _ in range(2):
        engine = masked(tiny_llama(), Calibration())
        list(engine.run(Wanda()))
        assert engine.record is not None
        records.append(tuple(engine.record[key] for key in ("cached", "seconds", "device")))
        # As if the one that stored it had run elsewhere.
        monkeypatch.setattr("sparsify.calibration.layerwise.device_name", lambda device: "H100")
    assert records == [(False, 100.0, "cpu"), (True, 100.0, "cpu")]


def assert_same(found: Results, expected: Results) -> None:
    """The same layers in the same order with bit-equal masks and weights."""
    assert list(found) == list(expected)
    for name, result in expected.items():
        assert torch.equal(found[name].mask, result.mask), name
        for part in ("weight", "inputs"):
            values = [getattr(r, part) for r in (found[name], result)]
            assert (values[0] is None) == (values[1] is None), (name, part)
            assert values[0] is None or torch.equal(*values), (name, part)


@pytest.mark.parametrize(
    "make",
    [Wanda, ADMM, lambda: SparseGPT(update_weights=True), DSnoT, lambda: Swaps(refit=True)],
    ids=["wanda", "admm", "sparsegpt", "dsnot", "swaps"],
)
@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_an_equal_run_finds_the_result(
    make: Callable[[], SparsityStrategy], pattern: str, folder: Path
) -> None:
    options: dict[str, Any] = {"pattern": NMPattern.parse(pattern)}
    first, computed = run(make(), **options)
    assert computed
    again, computed = run(make(), **options)
    assert not computed
    assert_same(again, first)
    assert len(first) == 14
    assert len(list(folder.iterdir())) == 1


MIXED = Overrides.parse({"*.mlp.*": "4:8", "*.1.*_proj": "1:4", "*.1.mlp.up_proj": "dense"})


NO_TEXT = ("dense", "magnitude", "proxsparse", "sr_ste")


@pytest.mark.parametrize("name", [n for n in plugins(STRATEGIES) if n not in NO_TEXT])
def test_mixed_patterns_are_those_of_the_layers_and_come_back(name: str) -> None:
    options: dict[str, Any] = {"overrides": MIXED}
    first, _ = run(make_strategy(name), **options)
    assert len(first) == 13
    for layer, result in first.items():
        n, m = (1, 4) if ".1." in layer else (4, 8) if ".mlp." in layer else (2, 4)
        assert result.mask.unflatten(1, (-1, m)).sum(-1).eq(n).all(), layer
    assert_same(run(make_strategy(name), **options)[0], first)


class Listed(Wanda):
    """A strategy with a setting of any type."""

    def __init__(self, items: Any) -> None:
        super().__init__()
        self.items = items


CHANGES: dict[str, tuple[SparsityStrategy, dict[str, Any]]] = {
    "text": (Wanda(), {"text": TEXT.flip(0)}),
    "number of windows": (Wanda(), {"text": TEXT[:5]}),
    "seed": (Wanda(), {"settings": Calibration(seed=1)}),
    "activations": (Wanda(), {"settings": Calibration(activations="dense")}),
    "base": (Wanda(), {"base_hash": "another"}),
    "base weights": (Wanda(), {"model": tiny_llama(seed=1)}),
    "pattern": (Wanda(), {"pattern": NMPattern(1, 4)}),
    "one pattern": (Wanda(), {"overrides": Overrides.parse({"*.1.mlp.up_proj": "1:4"})}),
    "layers": (Wanda(), {"exclude": ["*.0.*"]}),
    "strategy": (SparseGPT(), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_results_depend_on_makes_another_entry(change: str) -> None:
    strategy, options = CHANGES[change]
    options = {"base_hash": "base"} | options
    if change == "base weights":
        del options["base_hash"]
    first = run(Wanda(), base_hash=None if change == "base weights" else "base")
    assert first[1]
    assert run(strategy, **options)[1]
    assert not run(Wanda(), base_hash=None if change == "base weights" else "base")[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SparseGPT(damping=0.01), SparseGPT(damping=0.1)),
        (SparseGPT(), SparseGPT(update_weights=True)),
        (DSnoT(skip=["*mlp*"]), DSnoT(skip=["*q_proj"])),
        (DSnoT(skip=[]), DSnoT(skip=["*q_proj"])),
        (DSnoT(initial=SparseGPT(damping=0.01)), DSnoT(initial=SparseGPT(damping=0.1))),
        (Listed([1, 2]), Listed([2, 1])),
        (Listed({"a": 1}), Listed({"a": 2})),
        (Listed((1,)), Listed((2,))),
        (Listed(Path("a")), Listed(Path("b"))),
        (Listed(None), Listed("None")),
    ],
    ids=lambda strategy: str(vars(strategy).get("items", type(strategy).__name__)),
)
def test_every_setting_counts(one: SparsityStrategy, other: SparsityStrategy) -> None:
    assert run(one)[1]
    assert run(other)[1]
    assert not run(one)[1]
    assert not run(other)[1]


def test_where_activations_are_kept_does_not_count() -> None:
    first, _ = run(Wanda())
    again, computed = run(Wanda(), settings=Calibration(offload=True))
    assert not computed
    assert_same(again, first)


def test_without_the_cache_nothing_is_read_or_written(folder: Path) -> None:
    off = Calibration(cache=False)
    assert run(Wanda(), settings=off)[1]
    assert not folder.exists()
    run(Wanda())
    assert run(Wanda(), settings=off)[1]


OWN_STRATEGY = """
from sparsify.strategies.wanda import Wanda


class Own(Wanda):
    pass
"""


def test_the_strategys_source_code_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own_strategy.py"

    def own(code: str) -> SparsityStrategy:
        file.write_text(code)
        spec = importlib.util.spec_from_file_location("own_strategy", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "own_strategy", module)
        spec.loader.exec_module(module)
        return module.Own()

    assert run(own(OWN_STRATEGY))[1]
    assert not run(own(OWN_STRATEGY))[1]
    assert run(own(OWN_STRATEGY + "\n# another score\n"))[1]


@pytest.mark.parametrize("name", ["own_package.methods.own", "own_module"])
def test_the_source_code_of_what_a_strategy_imports_counts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all of its package; and without a package, of modules below its folder."""
    parts = name.split(".")
    file = tmp_path.joinpath(*parts).with_suffix(".py")
    helper = tmp_path / parts[0] / "scores" / "helper.py"
    if len(parts) == 1:
        helper = tmp_path / "own_scores" / "helper.py"
    for path in (file, helper):
        path.parent.mkdir(parents=True, exist_ok=True)
    imported = ".".join(helper.relative_to(tmp_path).with_suffix("").parts)
    file.write_text(f"import {imported}\n{OWN_STRATEGY}")
    monkeypatch.syspath_prepend(tmp_path)
    for number in range(2):
        helper.write_text(f"number = {number}\n")
        computed = [run(importlib.import_module(name).Own())[1] for _ in range(2)]
        assert computed == [True, False]
    for module in [m for m in sys.modules if m.split(".")[0] in (parts[0], "own_scores")]:
        monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize("file", [None, "<stdin>"])
def test_a_class_without_a_source_file_is_not_kept(
    file: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = ModuleType("prompt")
    if file is not None:
        module.__file__ = file
    monkeypatch.setitem(sys.modules, "prompt", module)
    exec(OWN_STRATEGY, module.__dict__)  # noqa: S102
    assert run(module.Own())[1]
    assert run(module.Own())[1]
    assert "is not kept: the source of Own is in no file" in caplog.text


@pytest.mark.parametrize("strategy", [Wanda, SparseGPT, DSnoT, Swaps, ADMM])
def test_another_default_type_makes_the_same_masks(
    strategy: type[SparsityStrategy],
) -> None:
    settings, model = Calibration(cache=False), tiny_llama()
    expected = masked(tiny_llama(), settings).run(strategy())
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = dict(masked(model, settings).run(strategy()))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name].mask, result.mask) for name, result in expected)


def test_the_code_that_a_strategy_builds_on_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    run(Wanda())
    read = Path.read_bytes
    for name in ("strategy.py", "wanda.py", "layerwise.py", "statistics.py"):

        def edited(path: Path, name: str = name) -> bytes:
            return read(path) + (b"#" if path.name == name else b"")

        monkeypatch.setattr(Path, "read_bytes", edited)
        assert run(Wanda())[1], name
        monkeypatch.setattr(Path, "read_bytes", read)
    assert not run(Wanda())[1]


def test_a_prior_is_found_whatever_is_learned_from_it() -> None:
    updating = SparseGPT(update_weights=True)
    for first, others in (
        (SparseGPT(), (MaskLLM(prior=SparseGPT()),)),
        (MaskLLM(), (MaskLLM(alpha=5.0), MaskLLM(prior=updating, hard=True))),
        (SelfMask(), (SelfMask(lr=0.1), SelfMask(prior=updating))),  # its inputs are measured too
    ):
        expected, _ = run(first)
        for strategy in others:
            found, computed = run(strategy)
            assert not computed
            assert_same(found, expected)
    assert run(MaskLLM(prior=SparseGPT(damping=0.1)))[1]
    assert run(MaskLLM(prior="wanda"))[1]
    assert not run(Wanda())[1]


class OtherSide(MaskLLM):
    """Keeps what its prior drops."""

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for name, result in super().calibrate(blocks):
            yield name, LayerResult(~result.mask)


def test_a_learner_that_changes_its_priors_masks_has_a_result_of_its_own() -> None:
    changed, _ = run(OtherSide(prior="wanda"))
    plain, computed = run(MaskLLM(prior="wanda"))
    assert computed
    first = [name for name in plain if name.startswith("model.layers.0.")]  # nothing pruned before
    assert all(torch.equal(plain[name].mask, ~changed[name].mask) for name in first)


def test_a_prior_that_updates_weights_never_changes_those_of_the_learner(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    run(SparseGPT(update_weights=True))
    module = SparseCausalLM.from_model(
        tiny_llama(), tokenizer, MaskLLM(prior=SparseGPT(update_weights=True))
    )
    module.configure_model()
    calibrate(module, windows=lambda: TEXT)
    assert hash_parameters(base_parameters(module.lm)) == module.masked.base.hash


def test_a_strategy_that_updates_weights_has_them_though_it_was_a_prior_before() -> None:
    run(MaskLLM(prior=SparseGPT(update_weights=True)))
    results, _ = run(SparseGPT(update_weights=True))
    assert all(result.weight is not None for result in results.values())
    expected, _ = run(SparseGPT(update_weights=True), settings=Calibration(cache=False))
    assert_same(results, expected)


def test_the_content_of_a_mask_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "masks.nmask"

    def write(column: int) -> None:
        kept = torch.zeros(4, dtype=torch.bool)
        kept[[0, column]] = True
        masks = {
            name: kept.repeat(layer.weight.shape[0], layer.weight.shape[1] // 4)
            for name, layer in tiny_llama().named_modules()
            if name.endswith("_proj")
        }
        write_masks(path, masks, TWO_FOUR, "h")

    write(1)
    content = path.read_bytes()
    first, computed = run(DSnoT(initial=str(path)))
    assert computed
    write(2)
    second, computed = run(DSnoT(initial=str(path)))
    assert computed
    name = "model.layers.0.mlp.up_proj"  # which it leaves as it was
    assert not torch.equal(first[name].mask, second[name].mask)
    path.write_bytes(content)
    again, computed = run(DSnoT(initial=str(path)))
    assert not computed
    assert_same(again, first)


@pytest.mark.parametrize("damage", ["truncated", "empty", "not one", "other values", "missing"])
def test_a_damaged_result_is_computed_again(
    damage: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = run(Wanda())
    [entry] = folder.iterdir()
    path = sorted(entry.iterdir())[3]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        damaged = {
            "truncated": content[:-5],
            "empty": b"",
            "not one": b"these are no tensors",
            "other values": content[:-5] + b"\xff" * 5,
        }
        path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING, "sparsify"):
        results, computed = run(Wanda())
    assert computed
    assert_same(results, expected)
    assert str(entry) in caplog.text
    assert "it is computed again" in caplog.text
    assert not run(Wanda())[1]  # and kept


class Swallowing(Wanda):
    """Catches whatever its calibration raises."""

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        try:
            yield from super().calibrate(blocks)
        except Exception:
            return


def test_a_strategy_that_catches_exceptions_finds_its_result() -> None:
    first, computed = run(Swallowing())
    assert computed
    again, computed = run(Swallowing())
    assert not computed
    assert_same(again, first)


def test_another_configuration_of_equal_weights_is_another_model() -> None:
    run(Wanda())
    model = tiny_llama()
    model.config.rms_norm_eps = 0.5
    assert run(Wanda(), model=model)[1]


class Interrupted(Wanda):
    """Stops in the second block."""

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for count, (name, result) in enumerate(super().calibrate(blocks)):
            if count == 9:
                raise KeyboardInterrupt
            yield name, result


def test_an_interrupted_run_leaves_nothing_of_another_class(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted())
    assert [path.suffix for path in folder.iterdir()] == [".partial"]  # its first block
    assert run(Wanda())[1]
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted())  # which does not say that its blocks are independent


@pytest.mark.parametrize("fails_at", [0, 5])
def test_a_full_disk_costs_the_cache_and_not_the_run(
    fails_at: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from sparsify.calibration import results as cache

    expected, _ = run(Wanda(), settings=Calibration(cache=False))
    save, count = cache.save_file, 0

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if count > fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(cache, "save_file", full)
    with caplog.at_level(logging.WARNING, "sparsify"):
        results, computed = run(Wanda())
    assert computed
    assert_same(results, expected)
    [record] = caplog.records
    assert "is not kept for later runs" in record.getMessage()
    assert "No space left" in record.getMessage()
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(cache, "save_file", save)
    assert run(Wanda())[1]


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_run(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file where the cache should be")
    with caplog.at_level(logging.WARNING, "sparsify"):
        results, computed = run(Wanda())
    assert computed
    assert len(results) == 14
    assert "is not kept for later runs" in caplog.text


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSIFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    run(Wanda())
    assert len(list((tmp_path / "xdg" / "sparsify").iterdir())) == 1
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPARSIFY_CACHE", "~/own")
    assert cache_folder() == tmp_path / "home" / "own"
