"""What patterns cost, and what is one unit."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from sparsify import SparsifyError
from sparsify.masking.layer import MaskedLinear, masked_layers
from sparsify.masking.pattern import NMPattern
from sparsify.results.budget.goal import Goal
from sparsify.results.budget.units import make_units, stored_bytes
from sparsify.serving.measure import LayerKind
from sparsify.serving.packed import pack
from sparsify.serving.timings import Timings
from tests.masking.test_inject import mask_by_magnitude

CPU = torch.device("cpu")
PATTERNS = ["dense", "6:8", "2:4", "1:4"]
FIRST = "model.layers.0"


def goal(name: str = "kept", limit: float = 0.5, unit: str = "layer", tokens: int = 1) -> Goal:
    return Goal.parse(PATTERNS, {name: limit}, unit, 4, 0, tokens)  # type: ignore[arg-type]


@pytest.fixture
def layers(model: LlamaForCausalLM) -> dict[str, MaskedLinear]:
    mask_by_magnitude(model)
    return masked_layers(model)


@pytest.mark.parametrize("shape", [(3, 4), (5, 96), (2, 192), (7, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_of_four_takes_what_the_packed_weight_takes(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    pattern = NMPattern(2, 4)
    weight = torch.randn(shape, dtype=dtype)
    packed = pack(weight, pattern.top(weight.abs()))
    held = packed.values_OV.nbytes + packed.metadata_PCE.nbytes
    assert stored_bytes(shape, dtype.itemsize, pattern) == held
    assert stored_bytes(shape, dtype.itemsize, None) == weight.nbytes


@pytest.mark.parametrize(
    ("pattern", "bits"),
    [("1:4", 0.25 * 16 + 2 / 4), ("6:8", 0.75 * 16 + 1), ("4:8", 0.5 * 16 + 1), ("1:16", 1 + 0.25)],
)
def test_bits_a_weight_of_others(pattern: str, bits: float) -> None:
    assert stored_bytes((8, 2048), 2, NMPattern.parse(pattern)) / 2048 == bits


def test_units(layers: dict[str, MaskedLinear]) -> None:
    by_layer = make_units(layers, goal(), 2, CPU)
    assert len(by_layer.layers) == 14
    assert by_layer.layers[f"{FIRST}.mlp.up_proj"] == (f"{FIRST}.mlp.up_proj",)
    by_module = make_units(layers, goal(unit="module"), 2, CPU)
    assert list(by_module.layers)[:2] == [f"{FIRST}.self_attn", f"{FIRST}.mlp"]
    assert len(by_module.layers[f"{FIRST}.self_attn"]) == 4
    by_block = make_units(layers, goal(unit="block"), 2, CPU)
    assert list(by_block.layers) == [FIRST, "model.layers.1"]
    for units in (by_layer, by_module, by_block):
        assert sum(units.weights) == sum(layer.weight.numel() for layer in layers.values())
        assert sorted(n for own in units.layers.values() for n in own) == sorted(layers)
        half = (NMPattern(2, 4),) * len(units.costs)
        assert units.kept(half) == 0.5
        assert units.cost(half) == sum(units.weights) / 2
        assert set(units.patterns(half)) == set(layers)


def test_layers_of_one_weight_are_one_unit_and_count_once(model: LlamaForCausalLM) -> None:
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    mask_by_magnitude(model)
    units = make_units(masked_layers(model), goal(), 2, CPU)
    assert len(units.layers) == 13
    shared = units.layers[f"{FIRST}.mlp.up_proj"]
    assert shared == (f"{FIRST}.mlp.up_proj", "model.layers.1.mlp.up_proj")
    at = list(units.layers).index(f"{FIRST}.mlp.up_proj")
    assert units.weights[at] == first.weight.numel()


def test_a_pattern_that_does_not_divide_is_left_out(layers: dict[str, MaskedLinear]) -> None:
    asked = Goal.parse(["dense", "3:6", "2:4"], {"kept": 0.9}, "layer", 4, 0, 1)
    units = make_units(layers, asked, 2, CPU)  # inputs are 32 or 64
    assert all(set(of) == {None, NMPattern(2, 4)} for of in units.costs)
    asked = Goal.parse(["3:6", "5:6"], {"kept": 0.9}, "layer", 4, 0, 1)
    with pytest.raises(SparsifyError, match=r"q_proj: none of 5:6, 3:6 divides.*--patterns dense"):
        make_units(layers, asked, 2, CPU)


def test_milliseconds_are_those_that_were_measured(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    mask_by_magnitude(model.to(torch.bfloat16))
    layers = masked_layers(model)
    with pytest.raises(SparsifyError, match=r"no times of a layer 32 x 32 bfloat16 for 8 tokens"):
        make_units(layers, goal("milliseconds", 1, tokens=8), 2, CPU)
    timings = Timings(CPU)
    for layer in layers.values():
        kind = LayerKind(layer.masker.shape, torch.bfloat16, False)
        # Wide layers gain, square ones lose.
        pair = (4e-3, 3e-3) if kind.shape == (64, 32) else (2e-3, 5e-3)
        timings.add(kind, "cusparselt", {8: pair})
    assert json.loads(timings.path.read_text())["seconds"]
    units = make_units(layers, goal("milliseconds", 1, tokens=8), 2, CPU)
    costs = dict(zip(units.layers, units.costs, strict=True))
    up, q = costs[f"{FIRST}.mlp.up_proj"], costs[f"{FIRST}.self_attn.q_proj"]
    by_name = {str(p): n for p, n in up.items()}
    # No kernel takes 6:8, so it runs dense.
    assert by_name == {"None": 4000000, "6:8": 4000000, "2:4": 3000000, "1:4": 3000000}
    assert set(q.values()) == {2000000}
    with pytest.raises(SparsifyError, match="for 9 tokens are kept for cpu.*--tokens"):
        make_units(layers, goal("milliseconds", 1, tokens=9), 2, CPU)
