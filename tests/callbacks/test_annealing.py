"""Scheduled values."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.callbacks.recorder import run


def test_values_follow_the_step_over_the_number_of_steps(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    recorder, _ = run(model, tokenizer, text, tmp_path, [], steps=4, accumulate_grad_batches=2)
    for name, start, end in (("kappa", 100, 500), ("tau", 4, 0.05), ("penalty_weight", 1e-5, 0)):
        expected = {step + 1: start + (end - start) * step / 4 for step in range(4)}
        assert recorder.logged[f"train/{name}"] == pytest.approx(expected), name
