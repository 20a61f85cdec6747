"""The Python interface, on a model object."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsify
from sparsify.strategies.maskllm import MaskLLM
from tests.conftest import tiny_llama


def test_a_model_object_learns_masks_and_exports(
    model, tokenizer, text: Path, tmp_path: Path
) -> None:
    tokens = torch.randint(0, 64, (2, 16))
    result = sparsify.sparsify(
        model,
        "maskllm",
        sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16),
        tokenizer,
        steps=3,
        trainer={"enable_progress_bar": False, "default_root_dir": tmp_path},
    )
    masks = result.masks()
    assert len(masks) == 14
    result.export(tmp_path / "export")
    before = model(input_ids=tokens).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert torch.equal(loaded(input_ids=tokens).logits, before)
    plain = result.fold()
    assert torch.equal(plain(input_ids=tokens).logits, before)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    for name, mask in masks.items():
        assert torch.equal(plain.get_submodule(name).weight != 0, mask)


def test_a_checkpoint_saved_after_the_run_says_that_it_cannot_be_resumed(
    model, tokenizer, text: Path, tmp_path: Path
) -> None:
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16)
    quiet = {"enable_progress_bar": False, "default_root_dir": tmp_path}
    result = sparsify.sparsify(model, "maskllm", data, tokenizer, steps=2, trainer=quiet)
    result.trainer.save_checkpoint(tmp_path / "late.ckpt")
    assert torch.load(tmp_path / "late.ckpt", weights_only=True)["resumable"] is False


def test_the_seed_decides_where_the_logits_start(model, tokenizer, text: Path) -> None:
    starts = []
    for seed in (0, 0, 1):
        module = sparsify.SparseCausalLM.from_model(
            tiny_llama(), tokenizer, MaskLLM(prior=None), seed=seed
        )
        module.configure_model()
        module._calibrate()
        starts.append(module.lm.model.layers[0].mlp.up_proj.masker.logits_OKG.detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_model_that_was_masked_before_is_refused(model, tokenizer, text: Path, tmp_path) -> None:
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16)
    quiet = {"enable_progress_bar": False, "default_root_dir": tmp_path}
    result = sparsify.sparsify(model, "magnitude", data, tokenizer, trainer=quiet)
    assert "Magnitude 2:4" in repr(result)
    with pytest.raises(sparsify.SparsifyError, match="load it again"):
        sparsify.sparsify(model, "magnitude", data, tokenizer, trainer=quiet)


def test_a_class_or_a_name_in_place_of_an_object_is_refused(model, tokenizer, text: Path) -> None:
    data = text / "train.txt"
    for strategy, given, words, message in (
        (MaskLLM, model, tokenizer, "strategy is .*MaskLLM"),
        ("maskllm", type(model), tokenizer, "model is .*LlamaForCausalLM"),
        ("maskllm", model, "my/tokenizer", "tokenizer is 'my/tokenizer'"),
    ):
        with pytest.raises(sparsify.SparsifyError, match=message):
            sparsify.sparsify(given, strategy, data, words)
