"""Exports of masked experts, which Transformers stores whole or one by one, under several names.

Shapes: E experts, O out, I in.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sparsify import NMPattern, SparseCausalLM, SparsifyError, SparsityStrategy
from sparsify.calibration import Calibration, Layerwise
from sparsify.calibration.prior import make_prior
from sparsify.export.exchange.layers import stored_shapes
from sparsify.export.exchange.npz import read_npz, write_npz
from sparsify.export.exchange.zeros import read_zero_pattern
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST
from sparsify.export.mask_file.file import MaskFile, read_masks, write_masks
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.models.base import load_skeleton
from sparsify.models.hashes import hash_tensor
from sparsify.serving.verify import verify
from tests.architectures import tiny
from tests.conftest import masked_model, word_tokenizer
from tests.export.mask_file.cases import equal
from tests.masking.test_experts import eager, logits, pruned

STACK = "model.layers.1.mlp.experts.gate_up_proj"
PART = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
KINDS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "jetmoe"]
TWO_FOUR = NMPattern(2, 4)


class Random(SparsityStrategy):
    """Any mask but that of the largest weights."""

    def init_masker(self, masker: Any, *_: Any) -> None:
        generator = torch.Generator().manual_seed(masker.shape[0])
        masker.set_mask(TWO_FOUR.top(torch.rand(masker.shape, generator=generator)))


def written(kind: str, folder: Path) -> SparseCausalLM:
    """The base in ``base``, its export in ``out``."""
    model, tokenizer = tiny(kind), word_tokenizer()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    module = SparseCausalLM.from_model(model, tokenizer, Random())
    module.configure_model()
    module.masked.calibrate()
    export(module.masked, folder / "out", {})
    return module


def problems(folder: Path, base: Path | None = None) -> list[str]:
    report = verify(folder, None if base is None else str(base))
    return report.problems + [f"{row.name}: {p}" for row in report.layers for p in row.problems]


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_the_plain_model_with_zeros(kind: str, tmp_path: Path) -> None:
    module = written(kind, tmp_path)
    masks = module.masked.hard_masks()
    stacks = [name for name, layer in module.masked.layers.items() if layer.experts is not None]
    assert len(stacks) == {"deepseek_v3": 2, "jetmoe": 8, "llama4_text": 2}.get(kind, 4)
    assert all(masks[name].shape[0] % 4 == 0 for name in stacks)
    expected = pruned(kind, masks)
    plain = eager(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    with torch.no_grad():
        assert torch.equal(logits(plain), logits(expected))
    wanted = expected.state_dict()
    assert plain.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in plain.state_dict().items())

    for base in (None, tmp_path / "base"):
        report = verify(tmp_path / "out", None if base is None else str(base))
        assert report.ok
        assert problems(tmp_path / "out", base) == []
        assert all(row.nonzero == 0.5 for row in report.layers)
        noted = [row.name for row in report.layers if "experts run dense" in "".join(row.notes)]
        assert sorted(noted) == sorted(stacks)
        assert all(len(row.notes) == 1 for row in report.layers if row.name in stacks)
    against = report.to_dict()["base"]
    assert sorted(against["kept"]) == sorted(masks)
    left = [name for names in against["left"].values() for name in names]
    assert [name for name in left if not name.endswith("correction_bias")] == []  # a buffer

    assert equal(dict(read_masks(tmp_path / "out")), masks)
    shapes = stored_shapes(load_skeleton(str(tmp_path / "base")))
    assert {name for name, shape in shapes.items() if shape.experts} == set(stacks)
    write_npz(tmp_path / "m.npz", masks, shapes)
    assert equal(dict(read_npz(tmp_path / "m.npz", shapes)), masks)
    implied = {found.name: found.mask for found in read_zero_pattern(tmp_path / "out")}
    assert all(torch.equal(implied[name], mask) for name, mask in masks.items())


def test_a_delta_of_experts_is_joined_with_its_prior(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    one = {STACK: TWO_FOUR.top(torch.rand(512, 32, generator=generator))}
    other = {STACK: one[STACK].clone()}
    other[STACK][300:310] = one[STACK][:10]  # of one expert
    write_masks(tmp_path / "one", one, TWO_FOUR, "h")
    write_masks(tmp_path / "whole", other, TWO_FOUR, "h")
    prior = read_masks(tmp_path / "one")
    write_masks(tmp_path / "delta", other, TWO_FOUR, "h", prior=prior)
    assert (tmp_path / "delta").stat().st_size < (tmp_path / "whole").stat().st_size
    assert equal(dict(read_masks(tmp_path / "delta", prior)), other)


# -- as a prior ------------------------------------------------------------------------------------


def from_prior(kind: str, path: Path) -> dict[str, Tensor]:
    prior = make_prior(str(path))
    masked = masked_model(tiny(kind), prior)
    settings = Calibration(cache=False)
    masked.calibrate(Layerwise(masked, lambda: None, settings, torch.device("cpu")).run(prior))
    return masked.hard_masks()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_masks_are_a_prior_and_each_is_read_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = written(kind, tmp_path).masked.hard_masks()
    read: list[str] = []
    ranks = MaskFile.ranks
    monkeypatch.setattr(MaskFile, "ranks", lambda self, n: read.append(n) or ranks(self, n))
    assert equal(from_prior(kind, tmp_path / "out"), masks)
    assert sorted(read) == sorted(masks)


def test_a_prior_of_more_experts_is_refused(tmp_path: Path) -> None:
    mask = {STACK: TWO_FOUR.top(torch.rand(640, 32))}
    write_masks(tmp_path / "m.nmask", mask, TWO_FOUR, "")
    message = rf"{STACK}: the prior's mask is \(640, 32\) but the weight is \(512, 32\); take"
    with pytest.raises(SparsifyError, match=message):
        from_prior("mixtral", tmp_path / "m.nmask")


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    written("mixtral", folder)
    return folder


@pytest.fixture
def out(mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixtral / "out", tmp_path / "out"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object], rehash: bool) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / MANIFEST).read_text())
    del content["files"]
    if rehash:
        content["tensors"] = {name: hash_tensor(tensor) for name, tensor in tensors.items()}
    (folder / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize("rehash", [False, True])
def test_a_changed_kept_value_is_found(rehash: bool, out: Path, mixtral: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        at = tensors[PART][5].nonzero()[0]
        tensors[PART][5, at] *= 1.5

    edit(out, change, rehash)
    hashed = f"{STACK}: its values are not those that the export wrote (SHA-256 differs)"
    assert problems(out) == ([] if rehash else [hashed])
    differs = f"{STACK}: 1 of 1024 kept weights differ from the base's"
    found = problems(out, mixtral / "base")
    assert found == ([differs] if rehash else [hashed, differs])


def test_a_filled_zero_is_found(out: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[PART][5, (tensors[PART][5] == 0).nonzero()[0]] = 1.0

    edit(out, change, rehash=True)
    groups, dropped = problems(out)
    assert groups.startswith(f"{STACK}: 1 of 512 groups hold more than 2 nonzeros of 4; the first")
    assert dropped.startswith(f"{STACK}: 1 nonzeros are where its stored mask drops")


@pytest.mark.parametrize("expert", [0, 3])
def test_a_changed_mask_bit_is_found(expert: int, out: Path) -> None:
    saved = read_masks(out)
    masks, base_hash = dict(saved), saved.base_hash
    row = masks[STACK][expert * 128 + 7]
    row[:4] = ~row[:4]
    write_masks(out / FILE_NAME, masks, TWO_FOUR, base_hash, saved.index.lineage)
    edit(out, lambda tensors: None, rehash=True)
    (found,) = problems(out)
    assert found.startswith(f"{STACK}: 2 nonzeros are where its stored mask drops")


def test_a_removed_part_is_found(out: Path, mixtral: Path) -> None:
    edit(out, lambda tensors: tensors.pop(PART), rehash=False)
    for base in (None, mixtral / "base"):
        found = problems(out, base)
        assert f"{STACK}: its weight, {PART}, is in no readable file" in found
    # Also if the manifest forgets it.
    content = json.loads((out / MANIFEST).read_text())
    assert content["layers"][STACK]["stored_in"].pop(PART) == 3 * 128
    del content["tensors"][PART]
    (out / MANIFEST).write_text(json.dumps(content))
    assert problems(out) == [f"{STACK}: its tensors do not hold each of its rows once"]


def test_experts_that_are_equal_in_several_blocks_are_exported(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny("mixtral")
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data.zero_()
    module = SparseCausalLM.from_model(model, tokenizer, Random())
    module.configure_model()
    module.masked.calibrate()
    export(module.masked, tmp_path / "out", {})
    assert problems(tmp_path / "out") == []
    layers = json.loads((tmp_path / "out" / MANIFEST).read_text())["layers"]
    parts = [part for entry in layers.values() for part in entry.get("stored_in", ())]
    assert len(parts) == len(set(parts)) == 2 * 4 * 3
