"""Sparse where it was faster throughout; a reason for everything else."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsify import NMPattern, SparsifyError
from sparsify.serving.backends import Backend
from sparsify.serving.choose import Choices, Choose, Layer, choose_layers
from sparsify.serving.measure import LayerKind
from tests.serving.fake import FakeBackend, FakeClock

CPU = torch.device("cpu")
TWO_FOUR = NMPattern(2, 4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))


def layers(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> dict[str, Layer]:
    return {
        f"blocks.{i}.up": Layer(LayerKind(shape, dtype, False), TWO_FOUR)
        for i, shape in enumerate(shapes)
    }


def choose(
    some: dict[str, Layer],
    seconds: Callable[[int, int], float] = lambda tokens, rows: 0.5,
    counts: Sequence[int] = (1, 2, 4),
    how: Choose = "measured",
    backends: Sequence[Backend] | None = None,
) -> tuple[Choices, FakeClock]:
    clock = FakeClock(seconds)
    found = choose_layers(some, CPU, how, counts, backends or [FakeBackend()], clock)
    return found, clock


def test_a_layer_is_sparse_only_if_that_is_faster_at_every_count() -> None:
    # 16 rows: faster everywhere; 8: slower at two tokens alone; 4: gains less than noise.
    speed = {16: (0.5, 0.9, 0.5), 8: (0.5, 1.1, 0.5), 4: (0.5, 0.5, 0.985)}
    found, clock = choose(
        layers((16, 8), (8, 8), (4, 8), (16, 8)),
        lambda tokens, rows: speed[rows][tokens.bit_length() - 1],
    )
    assert [c.backend for c in found.values()] == ["fake", "dense", "dense", "fake"]
    assert [c.reason for c in found.values()] == [
        "faster at every measured count",
        "no faster: fake at 2 tokens",
        "no faster: fake at 4 tokens",
        "faster at every measured count",
    ]
    assert found["blocks.1.up"].seconds == {"fake": {1: (1.0, 0.5), 2: (1.0, 1.1), 4: (1.0, 0.5)}}
    assert clock.asked == [(n, rows) for rows in (16, 8, 4) for n in (1, 2, 4)]  # each kind once


def test_times_are_measured_once_for_all_processes() -> None:
    _, first = choose(layers((16, 8)), counts=[1, 4])
    found, second = choose(layers((16, 8)), counts=[1, 2, 4])
    assert (first.asked, second.asked) == ([(1, 16), (4, 16)], [(2, 16)])
    assert list(found["blocks.0.up"].seconds["fake"]) == [1, 2, 4]


def test_the_fastest_backend_wins() -> None:
    speed = iter([0.5, 0.9, 0.3, 0.3, 0.1, 1.2])  # two counts each of a, b and c, which loses one
    backends = [FakeBackend("a"), FakeBackend("b"), FakeBackend("c")]
    found, _ = choose(layers((16, 8)), lambda *_: next(speed), [1, 2], backends=backends)
    assert found["blocks.0.up"].backend == "b"
    assert list(found["blocks.0.up"].seconds) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("how", "layer", "backend", "reason"),
    [
        ("dense", {}, {}, "asked for"),
        ("measured", {"obstacle": "is special"}, {}, "is special"),
        ("sparse", {"obstacle": "is special"}, {}, "is special"),
        ("measured", {}, {"runs": False}, "no backend runs on cpu"),
        (
            "sparse",
            {},
            {"dtypes": (torch.float16,)},
            "no backend takes float32; load with dtype=torch.bfloat16",
        ),
        (
            "measured",
            {"pattern": NMPattern(4, 8)},
            {},
            "no backend takes this shape or type at 4:8",
        ),
    ],
)
def test_what_stays_dense_says_why(how: Choose, layer: dict, backend: dict, reason: str) -> None:  # type: ignore[type-arg]
    dtype = torch.bfloat16 if "pattern" in layer else torch.float32
    one = {"a": Layer(**({"kind": LayerKind((8, 8), dtype, False), "pattern": TWO_FOUR} | layer))}
    found, clock = choose(one, how=how, backends=[FakeBackend(**backend)])
    assert (found["a"].backend, found["a"].reason) == ("dense", reason)
    assert clock.asked == []


def test_sparse_measures_nothing() -> None:
    found, clock = choose(layers((8, 8)), how="sparse")
    assert found["blocks.0.up"].backend == "fake"
    assert clock.asked == []


def test_sparse_where_nothing_runs_is_refused() -> None:
    with pytest.raises(SparsifyError, match="choose='sparse': none of fake runs on cpu; choose"):
        choose(layers((8, 8)), how="sparse", backends=[FakeBackend(runs=False)])


class Refusing(FakeBackend):
    """Its device cannot run the layer after all."""

    def compress(self, weight_OI: Tensor, bias_O: Tensor | None) -> nn.Module:
        raise RuntimeError("no kernel image")


def test_a_layer_that_the_device_refuses_is_dense(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sparsify"):
        found, _ = choose(layers((8, 8)), backends=[Refusing("a")])
    assert (found["blocks.0.up"].backend, found["blocks.0.up"].seconds) == ("dense", {})
    assert "a cannot run 8 x 8 float32 and is not used for it: no kernel image" in caplog.text
    found, _ = choose(layers((8, 8)), backends=[Refusing("a"), FakeBackend("b")])
    assert found["blocks.0.up"].backend == "b"


def test_the_table_names_families_and_times() -> None:
    found, _ = choose(layers((16, 8), (16, 8), (8, 8)), lambda tokens, rows: 12 / rows, [1])
    text = str(found).splitlines()
    assert text[0].split() == ["layers", "number", "weight", "runs", "reason"]
    assert text[1].split()[:6] == ["blocks.*.up", "2", "16", "x", "8", "float32"]
    assert text[1].endswith("fake   faster at every measured count")
    assert text[2].endswith("dense  no faster: fake at 1 tokens")
    assert text[4].split()[-4:] == ["dense", "us", "sparse", "us"]
    assert text[5].split() == ["16", "x", "8", "float32", "fake", "1", "1000000.0", "750000.0"]
    assert len(text) == 7
