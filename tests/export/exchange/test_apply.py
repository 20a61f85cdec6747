"""Masks of others applied to a base: the folder is the one that an export of our own writes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsify import NMPattern, SparsifyError
from sparsify.export.exchange.apply import apply_masks, find_pattern
from sparsify.export.folder import export
from sparsify.export.manifest import read_manifest
from sparsify.export.mask_file.file import read_masks
from sparsify.masking.inject import hard_masks
from sparsify.models.hashes import hash_parameters
from tests.conftest import tiny_llama, word_tokenizer
from tests.export.mask_file.cases import EXPORTS, equal, exported, random_mask
from tests.export.test_folder import MIXED, masked_module

Q = "model.layers.0.self_attn.q_proj"


def patterns_of(masks: dict[str, Tensor]) -> dict[str, NMPattern]:
    return {name: find_pattern(mask) for name, mask in masks.items()}


def same_weights(a: Path, b: Path) -> bool:
    """Bit for bit, signs of zeros too."""
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    return one.keys() == other.keys() and all(
        torch.equal(w.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        for name, w in one.items()
    )


@pytest.mark.parametrize(("family", "pattern"), EXPORTS)
def test_the_folder_is_that_of_an_export(family: str, pattern: str, tmp_path: Path) -> None:
    masks = exported(family, pattern, tmp_path)
    own = read_masks(tmp_path / "out")
    apply_masks(
        str(tmp_path / "base"),
        masks,
        patterns_of(masks),
        tmp_path / "applied",
        base_hash=own.base_hash,
        source="a colleague",
    )
    assert same_weights(tmp_path / "applied", tmp_path / "out")
    found = read_masks(tmp_path / "applied")
    assert equal(dict(found), masks)
    assert found.base_hash == own.base_hash
    manifest, wanted = (read_manifest(tmp_path / name) for name in ("applied", "out"))
    for key in ("schema", "pattern", "dtype", "layers"):
        assert manifest[key] == wanted[key]
    assert manifest["base"] == {"name": "base", "hash": own.base_hash, "dtype": "float32"}
    assert manifest["strategy"]["settings"]["source"] == "a colleague"
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("applied", "base")]
    assert tokenizers[0]("w1 w2") == tokenizers[1]("w1 w2")
    AutoModelForCausalLM.from_pretrained(tmp_path / "applied")


def test_each_layer_keeps_its_pattern_and_others_stay_dense(tmp_path: Path) -> None:
    module = masked_module(tiny_llama(), word_tokenizer(), overrides=MIXED)
    export(module.masked, tmp_path / "out", {})
    masks = dict(hard_masks(module.lm))
    exported("llama", "2:4", tmp_path / "x")
    apply_masks(str(tmp_path / "x/base"), masks, patterns_of(masks), tmp_path / "applied")
    assert same_weights(tmp_path / "applied", tmp_path / "out")
    manifest = read_manifest(tmp_path / "applied")
    assert manifest["layers"] == read_manifest(tmp_path / "out")["layers"]
    assert "model.layers.1.mlp.down_proj" in manifest["dense"]


def test_the_base_keeps_its_type_and_is_known_in_another(tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    in_bf16 = hash_parameters(dict(model.named_parameters()))
    masks = {Q: random_mask(32, 32)}
    for dtype in ("float32", "bfloat16"):
        apply_masks(
            str(tmp_path / "base"),
            masks,
            patterns_of(masks),
            tmp_path / dtype,
            base_hash=in_bf16,
            dtype=dtype,  # type: ignore[arg-type]
        )
        weights = load_file(tmp_path / dtype / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        dense = model.get_submodule(Q).weight.detach()
        assert torch.equal(weights[f"{Q}.weight"], torch.where(masks[Q], dense, 0))
    assert same_weights(tmp_path / "float32", tmp_path / "bfloat16")


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        ({}, {}, "there are no masks to apply"),
        ({"model.q": random_mask(32, 32)}, {}, "'model.q' is no linear layer of"),
        (
            {Q: random_mask(32, 64)},
            {},
            rf"{Q} is \(32, 64\) and the base model's weight \(32, 32\)",
        ),
        ({Q: random_mask(32, 32, "1:4")}, {}, f"{Q}: row 0, group 0 keeps 1 weights"),
        ({Q: random_mask(32, 32)}, {"base_hash": "abc"}, "the masks: made for a base model with"),
        ({Q: random_mask(32, 32)}, {"base": "./none"}, "there is no such path"),
    ],
)
def test_what_does_not_fit_writes_nothing(
    masks: dict[str, Tensor],
    options: dict[str, str],
    message: str,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    base = options.pop("base", str(model_folder))
    with pytest.raises(SparsifyError, match=message):
        apply_masks(
            base,
            masks,
            dict.fromkeys(masks, NMPattern(2, 4)),
            tmp_path / "out",
            **options,  # type: ignore[arg-type]
        )
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_stays(model_folder: Path, tmp_path: Path) -> None:
    masks = {Q: random_mask(32, 32)}
    arguments = (str(model_folder), masks, patterns_of(masks), tmp_path / "out")
    apply_masks(*arguments)
    with pytest.raises(SparsifyError, match="replace it with overwrite"):
        apply_masks(*arguments)
    apply_masks(*arguments, overwrite=True)
