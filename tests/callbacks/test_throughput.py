"""Tokens and time."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify.callbacks.throughput import Throughput
from tests.callbacks.recorder import run
from tests.conftest import tiny_llama


class Clock(Callback):
    """One second a micro-batch, and a hundred a validation."""

    def __init__(self) -> None:
        self.now = 0.0
        self.validations = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.now += 1

    def on_validation_epoch_start(self, *args: Any) -> None:
        self.now += 100
        self.validations += 1


def test_tokens_are_counted_over_micro_batches_and_resumes(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr("sparsify.callbacks.throughput.time.monotonic", lambda: clock.now)
    first, settings = Throughput(), {"limit_val_batches": 1, "val_check_interval": 2}
    callbacks = [clock, first]
    recorder, _ = run(
        model, tokenizer, text, tmp_path, callbacks, accumulate_grad_batches=2, steps=3, **settings
    )
    assert clock.validations > 0
    assert first.tokens == 3 * 2 * 4 * 16
    assert first.seconds == 6, "one tick a micro-batch"
    assert set(recorder.logged["speed/tokens_per_second"].values()) == {4 * 16}
    assert recorder.logged["speed/peak_memory_gib"][3] > 0.05
    second = Throughput()
    second.load_state_dict(first.state_dict())
    run(tiny_llama(), tokenizer, text, tmp_path, [clock, second], steps=1)
    clock.now += 1000
    assert second.tokens == (3 * 2 + 1) * 4 * 16
    assert second.seconds == 7


def test_nothing_is_logged_where_nothing_is_learned(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    recorder, _ = run(model, tokenizer, text, tmp_path, [Throughput()], "dense", steps=1)
    assert not [name for name in recorder.logged if name.startswith("speed/")]
