"""A killed run goes on from a whole checkpoint and ends with the masks of one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsify.cli.main import main
from sparsify.export.mask_file.file import read_masks
from tests.conftest import Cli

ASSETS = Path(__file__).parent / "assets"
STEPS = 8


def run_script(name: str, *words: str) -> str:
    """What a script of ``assets`` printed."""
    done = subprocess.run(
        [sys.executable, str(ASSETS / name), *words],
        env={**os.environ, "PYTHONPATH": str(ASSETS.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_saves_killed_at_every_file_operation(tmp_path: Path) -> None:
    """The script finds a whole checkpoint after each; here, that the kills were where they should
    be, and that the step moves on once: with the link, the second rename.
    """
    file, folder, again = json.loads(run_script("kill_save.py", str(tmp_path))).values()
    for kind, flushed in ((file, 4), (folder, 8)):
        operations = kind["operations"]
        assert {"os.symlink", "os.rename", "os.remove"} <= set(operations)
        moved = kind["found"].index(3)
        assert operations[moved - 1] == "os.rename"
        assert operations[:moved].count("fsync") == flushed
        assert kind["found"] == [2] * moved + [3] * (len(operations) - moved)
    assert "half a file" in file["operations"]
    assert {"open .complete.json.partial", "shutil.rmtree"} <= set(folder["operations"])
    assert {"before exchange", "after exchange"} <= set(again["operations"])
    assert set(again["found"]) == {2}


@pytest.mark.slow
def test_killed_runs_end_with_the_same_masks(cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    options = [
        "--strategy=maskllm",
        "--model.optimizer.init_args.lr=0.1",
        "--checkpoint.every_n_steps=2",
        "--trainer.val_check_interval=3",
    ]
    cli("fit", *options, steps=STEPS)
    [whole] = cli.runs()
    everything = [*cli.model, *cli.trainer, f"--trainer.max_steps={STEPS}", *cli.data, *options]
    run_script("kill_fit.py", *everything)
    folders = [Path("runs/maskllm") / f"version_{number}" for number in (1, 2, 3)]
    newest = [os.readlink(run / "checkpoints" / "last.ckpt") for run in folders]
    assert newest == [f"step-0000000{step}.ckpt" for step in (4, 2, 8)]
    assert (folders[1] / "checkpoints" / ".step-00000004.ckpt.partial").stat().st_size > 0
    assert not any((run / "export").exists() for run in folders)
    capfd.readouterr()
    for run in folders:
        if run == folders[2]:
            with pytest.raises(SystemExit, match="^2$"):
                main(["fit", "--ckpt_path", str(run)])
            message = capfd.readouterr().err.splitlines()[-1]
            command = f"sparsify export --ckpt_path {run}/checkpoints/step-00000008.ckpt"
            assert command in message
            main(command.split()[1:])
        else:
            main(["fit", "--ckpt_path", str(run)])
        ended = cli.runs()[-1]
        assert ended not in (whole, *map(Path.resolve, folders))
        assert read_masks(ended / "export").digest == read_masks(whole / "export").digest
        scores = [json.loads((r / "result.json").read_text())["scores"] for r in (ended, whole)]
        assert scores[0] == scores[1]
    start = torch.load(folders[1] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    end = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not all(torch.equal(start[name].argmax(1), end[name].argmax(1)) for name in start)
