"""Every architecture of the table: pruned, learned for two steps, exported, reloaded, verified."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from docs.make_models import PAGE, answer, permuted, permuted_row, row_of
from sparsify import SparseCausalLM, TextDataModule
from sparsify.export.folder import export
from sparsify.serving.verify import verify
from sparsify.strategies.selfmask import SelfMask
from sparsify.strategies.wanda import Wanda
from sparsify.training.build import calibrate
from tests.architectures import ARCHITECTURES, tiny
from tests.conftest import WORDS, quiet_trainer

TOKENS = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(0))
# Why more than 5 % of an architecture's block weights may be dense: how the reasons begin. Real
# models have a far smaller share of what is not experts.
_SCAN = ("Mamba's time steps", "MambaMixer", "FalconMambaMixer")
DENSE: dict[str, tuple[str, ...]] = {
    "dbrx": ("experts: ",),
    "deepseek_v32": ("indexer: ",),
    "falcon_mamba": _SCAN,
    "mamba": _SCAN,
    "recurrent_gemma": ("RecurrentGemmaRglru is not a plain linear layer",),
    "zamba": ("ZambaMambaMixer is not a plain linear layer",),
    "zaya": ("router: ", "Conv1d"),
}
# Transformers stores several of their layers as one tensor, and verify looks for each by its name.
JOINED = {"hrm_text"}


def excuses(kind: str) -> tuple[str, ...]:
    """How the reasons begin for which an architecture's weights may be dense."""
    return DENSE.get(kind, ())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_is_pruned_learned_exported_reloaded_and_verified(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny(kind)
    with torch.no_grad():
        dense = model(input_ids=TOKENS, use_cache=False).logits
    page, architecture = PAGE.read_text(encoding="utf-8"), type(model).__name__
    assert permuted(model) == permuted_row(architecture, page)
    module = SparseCausalLM.from_model(model, tokenizer, SelfMask(Wanda()))
    module.configure_model()
    calibrate(module, windows=lambda: TOKENS)
    masked = module.masked
    assert answer(masked) == row_of(architecture, page)
    started = [masker.scores_OI.detach().clone() for masker in masked.maskers]
    _learn(module, tmp_path)
    for masker, before in zip(masked.maskers, started, strict=True):
        assert not torch.equal(masker.scores_OI, before), masker.name

    export(masked, tmp_path / "out", {})
    with masked.hard():
        expected = model(input_ids=TOKENS, use_cache=False).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = plain(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(found, expected)
    assert float((found - dense).norm()) > 0.05 * float(dense.norm())

    share, inside = masked.coverage(), sum(weight.numel() for weight in masked.maskers.values())
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    assert sum(int((p == 0).sum()) for p in matrices) == inside / 2
    assert inside == round(share.model * sum(p.numel() for p in plain.parameters()))
    assert masked.sparsity() == pytest.approx(share.blocks / 2)
    excused = sum(k.weights for k in share.dense if k.reason.startswith(excuses(kind)))
    assert share.blocks + excused * share.blocks / inside >= 0.95
    assert bool(excuses(kind)) == (share.blocks < 0.95)

    report = verify(tmp_path / "out")
    assert report.ok == (kind not in JOINED), report.problems
    if report.ok:
        assert report.coverage is not None
        assert report.coverage.blocks == pytest.approx(share.blocks)


def _learn(module: SparseCausalLM, folder: Path) -> None:
    (folder / "text.txt").write_text(" ".join(WORDS), encoding="utf-8")
    data: Any = TextDataModule(train=str(folder / "text.txt"), block_size=12, batch_size=2)
    data.tokenizer = module.tokenizer
    trainer = quiet_trainer(folder, max_steps=2)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2


def test_the_page_names_every_architecture_and_no_other() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    assert sum(row.split(" | ")[0].count("`, `") + 1 for row in rows) == len(ARCHITECTURES) >= 60
