"""Two processes over gloo, sharded by FSDP2, against one that accumulates two micro-batches."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "assets" / "shard_run.py"


def run(strategy: str, text: Path, out: Path, ranks: int) -> list[dict[str, Any]]:
    """What every rank ended with."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    command = [sys.executable, *launcher, SCRIPT, strategy, text / "train.txt", out]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("strategy", ["maskllm", "magnitude", "sr_ste", "proxsparse"])
def test_sharded_ranks_learn_the_masks_of_one_process(
    strategy: str, text: Path, tmp_path: Path
) -> None:
    first, second = run(strategy, text, tmp_path / "two", 2)
    (single,) = run(strategy, text, tmp_path / "one", 1)
    for name, mask in single["masks"].items():
        assert torch.equal(first["masks"][name], mask), name
        assert torch.equal(second["masks"][name], mask), name
    for name, values in single["learned"].items():
        torch.testing.assert_close(
            first["learned"][name].to(values), values, rtol=1e-6, atol=1e-7, msg=name
        )
    if strategy == "maskllm":
        both = torch.stack([first["losses"], second["losses"]], dim=1).flatten()
        torch.testing.assert_close(both, single["losses"], rtol=1e-5, atol=0)
        assert first["losses"].unique().numel() == 5
