"""The Python interface, on a model object."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import sparsify


def test_a_model_object_learns_masks_and_exports(model, tokenizer, text: Path, tmp_path: Path) -> None:
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
