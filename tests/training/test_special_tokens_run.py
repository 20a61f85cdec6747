"""A run whose tokenizer puts a special token before a text, from its calibration to its test."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify.data.windows import window_start
from tests.conftest import SIZES, Cli
from tests.data.conftest import write_jsonl
from tests.data.tokenizers import TEXT, like

BOS = ["<|begin_of_text|>"]


@pytest.fixture
def bos_folder(tmp_path: Path) -> Path:
    """The tiny model with a tokenizer like Llama 3's."""
    folder = tmp_path / "model"
    config = LlamaConfig(**SIZES | {"vocab_size": 120})
    LlamaForCausalLM(config).save_pretrained(folder)
    like("llama3").save_pretrained(folder)
    return folder


def test_a_run_and_its_continuation(
    cli: Cli, bos_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [TEXT])
    words = [f"--model.name_or_path={bos_folder}", "--model.calibration.samples=4"]
    words += [f"--data.{split}={text}" for split in ("train", "validation", "test")]
    cli("fit", "--strategy=maskllm", "--model.strategy.prior=wanda", *words)
    [run] = cli.runs()
    result = json.loads((run / "result.json").read_text())
    assert result["protocol"]["data"]["bos"] == BOS
    assert result["run"]["calibration"]["bos"] == BOS
    exported = PreTrainedTokenizerFast.from_pretrained(run / "export")
    assert window_start(exported) == [exported.bos_token_id]
    last = f"--ckpt_path={run}/checkpoints/last.ckpt"
    cli("fit", last, *words, steps=4)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli("fit", last, *words, "--data.bos=false", steps=5)
    assert "both must be the same to resume" in capsys.readouterr().err
    cli("test", last, *words, "--data.bos=false")
    assert "bos" not in json.loads((cli.runs()[-1] / "result.json").read_text())["protocol"]["data"]
