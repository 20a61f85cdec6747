"""A run on instruction data, from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sparsify.callbacks.mask_logging import MaskLogging
from sparsify.export.mask_file.file import read_masks
from tests.conftest import Cli


def test_what_is_measured_is_the_responses(
    cli: Cli, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = (text / "train.txt").read_text().split()
    rows = []
    for i in range(0, 1200, 12):
        split = i + 4 + i % 7
        question, answer = " ".join(words[i:split]) + " ", " ".join(words[split : i + 12])
        rows.append({"question": question, "answer": answer})
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "{path: chat.jsonl, prompt_key: question, response_key: answer}"
    Path("data.yaml").write_text(
        f"data:\n  train:\n    chat: {source}\n  validation:\n    chat: {source}\n"
        f"  test:\n    chat: {source}\n  block_size: 16\n  batch_size: 4\n"
    )
    options = ["--config=data.yaml", "--strategy=maskllm", "--trainer.val_check_interval=2"]
    options += ["--model.calibration.samples=16"]
    cli("fit", *options, steps=3, data=False)
    run = cli.runs()[0]
    result = json.loads((run / "result.json").read_text())
    assert result["run"]["tokens"] == 3 * 4 * 16
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    ids: list[int] = []
    targets: list[bool] = []
    for row in rows:
        for text_of, learned in ((row["question"], False), (row["answer"] + " <eos>", True)):
            tokens = [tokenizer.convert_tokens_to_ids(word) for word in text_of.split()]
            ids, targets = ids + tokens, targets + [learned] * len(tokens)
    means = []
    for start in range(0, len(ids) - 1 - 15, 16):
        window = torch.tensor(ids[start : start + 16])
        losses = F.cross_entropy(
            model(input_ids=window[None]).logits[0, :-1], window[1:], reduction="none"
        )
        own = losses[torch.tensor(targets[start + 1 : start + 16])]
        means += [own.mean().item()] if len(own) else []
    assert result["scores"]["chat"]["windows"] == len(means) > 70
    assert result["scores"]["chat"]["loss"] == pytest.approx(sum(means) / len(means), rel=1e-6)
    assert len(read_masks(run / "export")) == 14


def test_the_gap_of_the_masks_is_of_the_responses_at_the_run_s_precision(
    cli: Cli, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (text / "train.txt").read_text().split()
    rows = [{"q": " ".join(words[i : i + 9]) + " ", "a": words[i + 9]} for i in range(0, 1200, 10)]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: list[float] = []

    def look(self: MaskLogging, trainer: Any, module: Any, outputs: Any, batch: Any, at: int):
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16),
            module.masked.scope.use("hard"),
        ):
            logits = module.lm(input_ids=batch.tokens_BT).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), batch.tokens_BT[:, 1:], reduction="none")
        own = losses[batch.targets_BT[:, 1:]].mean()
        found.append((module.task_loss - own).item())
        assert abs(losses.mean() - own) > 1e-3  # the mean of all tokens is another number
        real(self, trainer, module, outputs, batch, at)

    real = MaskLogging.on_train_batch_end
    monkeypatch.setattr(MaskLogging, "on_train_batch_end", look)
    source = "{path: chat.jsonl, prompt_key: q, response_key: a}"
    options = [f"--data.{split}={{chat: {source}}}" for split in ("train", "validation", "test")]
    options += ["--data.block_size=16", "--trainer.precision=bf16-mixed", "--masks.every_n_steps=1"]
    options += ["--model.calibration.samples=16", "--model.distillation.weight=0.5"]
    cli("fit", "--strategy=maskllm", *options, steps=2, data=False)
    result = json.loads((cli.runs()[0] / "result.json").read_text())
    gaps = [look["soft_hard_gap"] for look in result["history"]["masks"]]
    assert gaps == pytest.approx(found, abs=1e-6)
