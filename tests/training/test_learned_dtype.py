"""What is learned is in the type that its masker declares: fp32, unless it says otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from sparsify import NMPattern, SparsifyError, TextDataModule
from sparsify.callbacks.annealing import Annealing
from sparsify.masking.in_place import InPlaceMomentum
from sparsify.strategies.maskllm import CandidateMasker, MaskLLM
from sparsify.strategies.sr_ste import SRSTE, MagnitudeMasker
from tests.conftest import quiet_trainer, tiny_llama
from tests.strategies.training import adamw, built


class Half(CandidateMasker):
    """Learns in bf16."""

    learned_dtype = torch.bfloat16


class HalfMaskLLM(MaskLLM):
    def make_masker(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> Half:
        return Half(name, shape, pattern, self.values, self.hard)


class HalfMagnitude(MagnitudeMasker):
    """Its weights learn in bf16, with an update of its own."""

    learned_dtype = torch.bfloat16


class HalfSRSTE(SRSTE):
    def make_masker(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> HalfMagnitude:
        return HalfMagnitude(name, shape, pattern)


class Undeclared(CandidateMasker):
    """Learns in bf16, and does not say so."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.logits_OKG = nn.Parameter(self.logits_OKG.data.bfloat16())


class Save(Callback):
    """Saves after the second step."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "second.ckpt")


@pytest.mark.parametrize("optimizer", [adamw(0.01), InPlaceMomentum])
def test_a_declared_bf16_learns_and_resumes(
    optimizer: Any, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    def fit(ckpt_path: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The logits before, and after four steps."""
        module = built(HalfMaskLLM("magnitude"), tokenizer, optimizer=optimizer)
        first = {n: p.detach().clone() for n, p in module.named_parameters() if ".masker." in n}
        trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[Annealing(), Save()])
        data = TextDataModule(train=str(text / "train.txt"), block_size=16, batch_size=4)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
        return first, {n: p.detach() for n, p in module.named_parameters() if n in first}

    first, last = fit()
    assert len(last) == 14
    assert {value.dtype for value in last.values()} == {torch.bfloat16}
    assert all(bool((last[name] != first[name]).any()) for name in first)
    resumed = fit(tmp_path / "second.ckpt")[1]
    assert all(torch.equal(value, last[name]) for name, value in resumed.items())


def test_another_type_than_is_declared_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    class Strategy(MaskLLM):
        def make_masker(self, *args: Any) -> Undeclared:
            return Undeclared(*args, self.values, self.hard)

    with pytest.raises(SparsifyError, match=r"Undeclared learns logits_OKG in torch.bfloat16 and"):
        built(Strategy(prior=None), tokenizer)


def test_weights_train_in_bf16_where_it_is_declared(tokenizer: PreTrainedTokenizerFast) -> None:
    half = tiny_llama().to(torch.bfloat16)
    with pytest.raises(SparsifyError, match="bfloat16: SRSTE trains weights.*float32"):
        built(SRSTE(), tokenizer, half)
    assert built(HalfSRSTE(), tokenizer, tiny_llama().to(torch.bfloat16)).lm.dtype == torch.bfloat16
    assert built(HalfSRSTE(), tokenizer).lm.dtype == torch.float32
