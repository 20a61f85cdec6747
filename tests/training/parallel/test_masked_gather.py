"""Gathering masked weights: what the plain way learns under the same draws, with fewer bytes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify import SparsifyError
from sparsify.masking.inject import inject
from sparsify.masking.layer import masked_layers
from sparsify.masking.masker import FixedMasker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.select import Selection, select
from sparsify.strategies.maskllm import MaskLLM
from sparsify.strategies.maskpro import MaskPro
from sparsify.strategies.sr_ste import SRSTE
from sparsify.training.parallel.masked_gather import check_gather, check_gatherable
from tests.assets.gather_run import CASES, STEPS
from tests.conftest import tiny_llama
from tests.tiny_models import tiny_gpt2

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests" / "assets" / "gather_run.py"
WEIGHTS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, text: Path) -> list[dict[str, Any]]:
    """What both ranks found, by case."""
    folder = tmp_path_factory.mktemp("gather")
    (folder / "train.txt").write_text((text / "train.txt").read_text())
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder)]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"rank.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_learns_what_the_plain_way_learns(name: str, ranks: list[dict[str, Any]]) -> None:
    plain, masked = (ranks[0][f"{gather} {name}"] for gather in ("plain", "masked"))
    # Sums in another order; optimizers divide by gradients that are close to zero.
    share = 3e-2 if name == "bf16" else 5e-5
    for key, value in plain["learned"].items():
        error = (masked["learned"][key] - value).abs().max() / value.abs().max()
        assert error < share, key
        assert torch.equal(ranks[1][f"masked {name}"]["learned"][key], masked["learned"][key])
    if name != "bf16":
        assert all(torch.equal(masked["masks"][key], mask) for key, mask in plain["masks"].items())
    assert masked["loss"] == pytest.approx(plain["loss"], rel=1e-2 if name == "bf16" else 1e-5)
    assert masked["left"] == []  # no base weight keeps a gradient


@pytest.mark.slow
def test_six_bytes_a_weight_and_step_instead_of_22(ranks: list[dict[str, Any]]) -> None:
    plain, masked = (ranks[0][f"{gather} bf16"]["moved"] for gather in ("plain", "masked"))
    assert masked["reduce"] == 2 * WEIGHTS * STEPS
    assert plain["reduce"] == 6 * WEIGHTS * STEPS
    rest = masked["gather"] - 4 * WEIGHTS * STEPS  # embeddings, head and norms
    assert 0 < rest < 0.6 * WEIGHTS * STEPS
    assert plain["gather"] - rest == 16 * WEIGHTS * STEPS


def test_what_cannot_gather_masked_weights_is_refused() -> None:
    check_gather(MaskLLM())
    check_gather(MaskPro(estimator="mean_gradient"))
    for estimator in ("residual", "leave_one_out", "control_variate"):
        with pytest.raises(SparsifyError, match="MaskPro needs other draws on each rank"):
            check_gather(MaskPro(estimator=estimator))  # type: ignore[arg-type]
    with pytest.raises(SparsifyError, match="SRSTE changes weights.*--model.gather plain"):
        check_gather(SRSTE())
    pattern = NMPattern(2, 4)
    for model, ranks_, message in (
        (tiny_gpt2(), 2, r"stored as \[in, out\]"),
        (tiny_llama(), 20, "some of 20 ranks would hold none of its"),
    ):
        inject(model, select(model, Selection(pattern))[0], Selection(pattern), FixedMasker)
        with pytest.raises(SparsifyError, match=message):  # noqa: PT012
            for name, layer in masked_layers(model).items():
                check_gatherable(name, layer, ranks_)
