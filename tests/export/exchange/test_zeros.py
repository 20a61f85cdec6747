"""Masks that zeros imply: our own folders come back, others are judged layer by layer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify import NMPattern, SparsifyError
from sparsify.export.exchange.zeros import read_zero_pattern
from sparsify.export.folder import export
from sparsify.masking.inject import fold, hard_masks
from sparsify.masking.layer import layer_patterns
from tests.conftest import tiny_llama, word_tokenizer
from tests.export.mask_file.cases import EXPORTS, equal, exported
from tests.export.test_folder import MIXED, masked_module

Q = "model.layers.0.self_attn.q_proj"


def masks_of(folder: Path, pattern: str | None = None) -> dict[str, Tensor]:
    found = read_zero_pattern(folder, None if pattern is None else NMPattern.parse(pattern))
    return {layer.name: layer.mask for layer in found if layer.mask is not None}


def changed(folder: Path, **weights: Tensor | None) -> Path:
    """Overwrite some weights of the folder; None removes one."""
    file = folder / "model.safetensors"
    state = load_file(file) | {f"{name}.weight": weight for name, weight in weights.items()}
    save_file(
        {k: v.contiguous() for k, v in state.items() if v is not None}, file, {"format": "pt"}
    )
    return folder


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("family", "pattern"), EXPORTS)
def test_exports_come_back(family: str, pattern: str, given: bool, tmp_path: Path) -> None:
    masks = exported(family, pattern, tmp_path)
    found = list(read_zero_pattern(tmp_path / "out", NMPattern.parse(pattern) if given else None))
    assert equal({layer.name: layer.mask for layer in found if layer.mask is not None}, masks)
    assert {str(layer.pattern) for layer in found} == {pattern}
    assert {layer.completed for layer in found} == {0}


def test_shards_come_back(tmp_path: Path) -> None:
    masks = exported("llama", "2:4", tmp_path)
    model = masked_module(tiny_llama(), word_tokenizer()).lm
    fold(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert equal(masks_of(tmp_path / "shards"), masks)
    next((tmp_path / "shards").glob("*00002*.safetensors")).unlink()
    with pytest.raises(SparsifyError, match="damaged: .*00002.* is missing, though"):
        masks_of(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(SparsifyError, match="index.json has no readable weight_map"):
        masks_of(tmp_path / "shards")


def test_every_layer_has_its_own_pattern(tmp_path: Path) -> None:
    module = masked_module(tiny_llama(), word_tokenizer(), overrides=MIXED)
    export(module.masked, tmp_path / "out", {})
    found = {layer.name: layer for layer in read_zero_pattern(tmp_path / "out")}
    masks = dict(hard_masks(module.lm))
    assert equal({n: layer.mask for n, layer in found.items() if layer.mask is not None}, masks)
    patterns = {name: layer.pattern for name, layer in found.items() if layer.pattern is not None}
    assert patterns == layer_patterns(module.lm)
    dense = {name for name, layer in found.items() if layer.mask is None}
    assert dense == {f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "down")}


def test_groups_with_too_few_nonzeros_are_completed_lowest_first(tmp_path: Path) -> None:
    masks = exported("llama", "2:4", tmp_path)
    weight = load_file(tmp_path / "out" / "model.safetensors")[f"{Q}.weight"]
    weight[0, :4] = torch.tensor([0.0, 0.0, 0.0, 5.0])
    weight[0, 4:8] = torch.tensor([-0.0, 0.0, 0.0, 0.0])
    weight[0, 8:12] = torch.tensor([torch.nan, 0.0, 0.0, torch.inf])
    changed(tmp_path / "out", **{Q: weight})
    found = {layer.name: layer for layer in read_zero_pattern(tmp_path / "out")}
    assert found[Q].completed == 2
    mask = found[Q].mask
    assert mask is not None
    assert mask[0, :12].int().tolist() == [1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1]
    assert torch.equal(mask[1:], masks[Q][1:])
    assert sum(layer.completed for layer in found.values()) == 2


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_dense_layers_are_told(pattern: str | None, tmp_path: Path) -> None:
    masks = exported("llama", "2:4", tmp_path)
    dense = torch.randn(32, 32)
    dense[:3, :4] = 0  # a few zeros do not make a layer sparse
    changed(tmp_path / "out", **{Q: dense})
    assert equal(masks_of(tmp_path / "out", pattern), {n: m for n, m in masks.items() if n != Q})


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("2:4", f"{Q}: 50% of its weights are zero, but row 3, group 1 has 3 nonzero .* 2 of 2:4"),
        ("1:4", f"{Q}: 50% .* row 0, group 0 has 2 nonzero weights, more than the 1 of 1:4"),
        ("2:5", f"{Q}: 50% .* in_features=32 is not a multiple of m=5"),
    ],
)
def test_a_sparse_layer_of_another_pattern_is_an_error(
    pattern: str, message: str, tmp_path: Path
) -> None:
    exported("llama", "2:4", tmp_path)
    weight = load_file(tmp_path / "out" / "model.safetensors")[f"{Q}.weight"]
    weight[3, 4:8] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    with pytest.raises(SparsifyError, match=message):
        masks_of(changed(tmp_path / "out", **{Q: weight}), pattern)


def test_strewn_zeros_are_no_pattern(tmp_path: Path) -> None:
    exported("llama", "2:4", tmp_path)
    strewn = torch.randn(32, 32) * (
        torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    )
    with pytest.raises(SparsifyError, match=f"{Q}: .*% of its .* keep equally many weights"):
        masks_of(changed(tmp_path / "out", **{Q: strewn}))
    with pytest.raises(SparsifyError, match=f"{Q}: 100% of its weights are zero"):
        masks_of(changed(tmp_path / "out", **{Q: torch.zeros(32, 32)}))


def test_names_without_the_models_first_part_are_found(tmp_path: Path) -> None:
    masks = exported("gpt2", "2:4", tmp_path)
    file = tmp_path / "out" / "model.safetensors"
    state = {name.removeprefix("transformer."): w for name, w in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    assert equal(masks_of(tmp_path / "out"), masks)


def test_folders_that_are_no_sparse_model_are_refused(tmp_path: Path) -> None:
    exported("llama", "2:4", tmp_path)
    with pytest.raises(SparsifyError, match="so none is masked; name a folder of a sparse model"):
        masks_of(tmp_path / "base")
    with pytest.raises(SparsifyError, match="there is no such path"):
        masks_of(tmp_path / "nothing")
    with pytest.raises(
        SparsifyError, match=r"stored as \(8, 32\), but config.json says \(32, 32\)"
    ):
        masks_of(changed(tmp_path / "out", **{Q: torch.zeros(8, 32)}))
    with pytest.raises(SparsifyError, match=f"its files hold no '{Q}.weight'"):
        masks_of(changed(tmp_path / "out", **{Q: None}))
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SparsifyError, match="not a readable safetensors file"):
        masks_of(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"model_type": "none"}))
    with pytest.raises(SparsifyError, match="no model could be loaded"):
        masks_of(tmp_path / "out")
