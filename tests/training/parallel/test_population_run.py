"""Two processes over gloo that draw different masks, against one that goes through both ranks'
micro-batches.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.assets import population_run
from tests.assets.population_run import CASES, Case, learn

ROOT = Path(__file__).parents[3]
Found = dict[str, Any]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    """What each rank found, by case."""
    out = tmp_path_factory.mktemp("two") / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [population_run.__file__, str(text / "train.txt"), str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ranks_learn_what_one_process_learns(
    case: Case, two: list[dict[str, Found]], text: Path, tmp_path: Path
) -> None:
    first, second = (found[str(case)] for found in two)
    single = learn(case, str(text / "train.txt"), tmp_path)
    # Gradients of four micro-batches are summed in another order.
    exactly = case.accumulate == 1 or case.estimator == "leave_one_out"
    for name, logits in single["logits"].items():
        assert torch.equal(first["logits"][name], second["logits"][name]), name
        if exactly:
            assert torch.equal(first["logits"][name], logits), name
        torch.testing.assert_close(first["logits"][name], logits, rtol=1e-6, atol=1e-5, msg=name)
        assert torch.equal(first["masks"][name], single["masks"][name]), name
        assert bool((logits.remainder(2) != 0).any()), name  # they start at 0 and 2
    for key in ("average", "logged"):
        assert first[key] == second[key], key
        assert first[key] == pytest.approx(single[key], rel=1e-5, abs=1e-6), key


def test_a_step_exchanges_eight_bytes_a_draw(two: list[dict[str, Found]]) -> None:
    # What leaves a rank, and what comes of both; the second accumulates two micro-batches.
    traffic = {str(case): two[0][str(case)]["traffic"] for case in CASES[:2]}
    assert traffic == {"ddp residual llama": [24, 24], "ddp leave_one_out llama": [0, 4 * 24]}
    logits = two[0]["ddp residual llama"]["logits"].values()
    assert sum(values.nbytes for values in logits) > 60_000
    with_gradients = two[0]["ddp mean_gradient llama"]["traffic"]
    assert min(with_gradients) > 60_000
