"""Shapes, patterns and base hashes that masks are checked against."""

import pytest
import torch

from sparsify import NMPattern, SparsifyError
from sparsify.export.exchange.layers import (
    BaseHashes,
    LayerShape,
    check_masks,
    find_pattern,
    stored_shapes,
)
from sparsify.masking.layer import base_parameters
from sparsify.models.base import load_skeleton
from sparsify.models.hashes import hash_parameters
from tests.conftest import tiny_llama
from tests.export.mask_file.cases import random_mask
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_the_weights(family: str) -> None:
    model = FAMILIES[family]()
    found = stored_shapes(model)
    assert sum("lm_head" in name for name in found) == 1
    for name, shape in found.items():
        assert tuple(model.get_submodule(name).weight.shape) == shape.stored
        assert shape.transposed == (family == "gpt2" and name != "lm_head")
        assert shape.in_block == (name != "lm_head")
        assert shape.from_stored(model.get_submodule(name).weight).shape == (
            shape.rows,
            shape.columns,
        )


def test_the_embedded_model_has_a_skeleton() -> None:
    skeleton = load_skeleton("embedded")
    assert all(p.is_meta for p in skeleton.parameters())
    assert len(stored_shapes(skeleton)) > 10


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "1:8", "8:16", "5:16", "2:5"])
def test_patterns_are_found(pattern: str) -> None:
    assert str(find_pattern(random_mask(64, 80, pattern))) == pattern


def test_a_pattern_of_smaller_groups_is_found_in_groups_of_four() -> None:
    assert str(find_pattern(random_mask(64, 80, "1:2"))) == "2:4"


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_no_pattern_is_an_error(kept: float) -> None:
    mask = torch.rand(64, 80, generator=torch.Generator().manual_seed(0)) < kept
    with pytest.raises(SparsifyError, match=r"a mask \(64, 80\) with .*% kept is N:M for no M"):
        find_pattern(mask)


def test_a_wrong_group_is_named() -> None:
    masks = {"a": random_mask(4, 8), "b": random_mask(4, 8, "1:4")}
    patterns = {"a": NMPattern(2, 4), "b": NMPattern(1, 4)}
    check_masks(masks, patterns)
    masks["b"][2, 4:] = torch.tensor([True, False, True, True])
    with pytest.raises(SparsifyError, match="b: row 2, group 1 keeps 3 weights; a 1:4 mask keeps"):
        check_masks(masks, patterns)
    with pytest.raises(SparsifyError, match="b: row 0, group 0 keeps 1 weights; a 2:4 mask"):
        check_masks(masks, NMPattern(2, 4))
    with pytest.raises(SparsifyError, match="a: in_features=8 is not a multiple of m=5"):
        check_masks(masks, NMPattern(2, 5))
    with pytest.raises(
        SparsifyError, match=r"a: its mask is torch.uint8 \(4, 8\); it must be bool"
    ):
        check_masks({"a": masks["a"].byte()}, NMPattern(2, 4))


def test_a_base_is_known_by_its_hash_in_any_type(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    in_bf16 = hash_parameters(base_parameters(tiny_llama().bfloat16()))
    own = hash_parameters(base_parameters(model))
    assert in_bf16 != own
    hashes = BaseHashes(model)
    assert own in hashes
    assert in_bf16 in hashes
    assert hash_parameters(base_parameters(tiny_llama(1))) not in hashes
    monkeypatch.setattr(
        "sparsify.export.exchange.layers.hash_parameters", None
    )  # all are known now
    hashes.check(own, "x")
    with pytest.raises(
        SparsifyError, match=f"x: made for .* hash abc..., and .* {own[:12]}...; load"
    ):
        hashes.check("abc", "x")
    BaseHashes(model).check("", "x")  # computes none


def test_layouts() -> None:
    values = torch.arange(6).view(3, 2)
    assert LayerShape(2, 3, transposed=True).from_stored(values).tolist() == [[0, 2, 4], [1, 3, 5]]
    assert LayerShape(3, 2).from_stored(values) is values
