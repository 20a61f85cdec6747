"""Tokens and time."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify.callbacks.throughput import Throughput
from tests.callbacks.recorder import run
from tests.conftest import tiny_llama


def test_tokens_are_counted_over_micro_batches_and_resumes(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("sparsify.callbacks.throughput.time.monotonic", lambda: float(next(clock)))
    first = Throughput()
    recorder, _ = run(model, tokenizer, text, tmp_path, [first], steps=3, accumulate_grad_batches=2)
    assert first.tokens == 3 * 2 * 4 * 16
    assert first.seconds == 6, "one tick a micro-batch"
    assert set(recorder.logged["speed/tokens_per_second"].values()) == {4 * 16}
    assert recorder.logged["speed/peak_memory_gib"][3] > 0.05
    second = Throughput()
    second.load_state_dict(first.state_dict())
    run(tiny_llama(), tokenizer, text, tmp_path, [second], steps=1)
    assert second.tokens == (3 * 2 + 1) * 4 * 16
    assert second.seconds == 7


def test_nothing_is_logged_where_nothing_is_learned(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    recorder, _ = run(model, tokenizer, text, tmp_path, [Throughput()], "dense", steps=1)
    assert not [name for name in recorder.logged if name.startswith("speed/")]
