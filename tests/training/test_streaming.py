"""A run on text that streams, from the command line."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import Cli

STEPS = 6


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_on_a_stream_is_resumed_bit_for_bit(cli: Cli, text: Path) -> None:
    words = (text / "train.txt").read_text().split()
    rows = [{"text": " ".join(words[i : i + 50])} for i in range(0, 2000, 50)]
    Path("web").mkdir()
    for part in range(2):
        lines = [json.dumps(row) + "\n" for row in rows[part::2]]
        Path("web", f"{part}.jsonl").write_text("".join(lines))
    Path("data.yaml").write_text(
        "data:\n  train:\n    web: {path: web, streaming: true, shuffle_buffer: 8, weight: 3}\n"
        f"    file: {{path: {text}/train.txt, weight: 1}}\n"
        f"  test: {text}/test.txt\n  block_size: 16\n  batch_size: 4\n"
    )
    options = ["--config=data.yaml", "--strategy=maskllm", "--trainer.accumulate_grad_batches=2"]
    options += ["--model.optimizer.init_args.lr=0.1"]
    keep = ["ModelCheckpoint", "save_top_k=-1", "every_n_train_steps=1", "filename={step}"]
    callback = "--trainer.callbacks"
    keep = [f"{callback}=lightning.pytorch.callbacks.{keep[0]}"] + [
        f"{callback}.{setting}" for setting in (*keep[1:], "dirpath=kept")
    ]
    cli("fit", *options, *keep, steps=STEPS, data=False)
    whole = cli.runs()[0]
    saved = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    position = saved["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    assert position["block"] == STEPS * 2 * 4
    assert json.loads((whole / "result.json").read_text())["run"]["tokens"] == STEPS * 2 * 4 * 16
    for at in (2, 5):
        again = [f"--ckpt_path=kept/step={at}.ckpt", f"{callback}=[]"]
        cli("fit", *options, *again, steps=STEPS, data=False)
        resumed = torch.load(cli.runs()[-1] / "checkpoints" / "last.ckpt", weights_only=True)
        assert resumed["global_step"] == STEPS
        for name, value in saved["state_dict"].items():
            assert torch.equal(resumed["state_dict"][name], value), name
    kept = torch.load("kept/step=5.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(kept[name], value) for name, value in saved["state_dict"].items())
