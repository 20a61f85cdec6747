"""Two processes over gloo, by DDP and sharded by FSDP2, against one that accumulates two
micro-batches.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsify.cli.main import main
from sparsify.export.folder import MANIFEST
from sparsify.export.mask_file.file import read_masks
from tests.assets.shard_run import SAVED_AT, STEPS, UNDER, WORDS, case
from tests.conftest import Cli

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "assets" / "shard_run.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
LIMIT = 360  # seconds: what hangs, fails
PAIRS = [(how, name) for how, names in UNDER.items() for name in names]


def launch(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, timeout=LIMIT, check=False
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with what every rank found, and what one process did."""
    root = tmp_path_factory.mktemp("runs")
    words = (text / "train.txt").read_text().split()[:WORDS]
    (root / "train.txt").write_text(" ".join(words))
    torch.save(case("maskllm", root / "single", 1, saved_at=SAVED_AT), root / "single.0")
    done = launch(*TORCHRUN, SCRIPT, root)
    assert done.returncode == 0, done.stderr[-6000:]
    return root


def found(runs: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(runs / f"{name}.{rank}", weights_only=True)


_singles: dict[str, dict[str, Any]] = {}


def single(runs: Path, name: str) -> dict[str, Any]:
    """The case in one process."""
    if name not in _singles:
        _singles[name] = case(name, runs / f"one {name}", 1)
    return _singles[name]


def check_equal(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=rtol, atol=rtol / 10, msg=name)


@pytest.mark.parametrize(("how", "name"), PAIRS)
def test_two_ranks_learn_what_one_process_learns(runs: Path, how: str, name: str) -> None:
    one, (first, second) = single(runs, name), (found(runs, f"{how} {name}", r) for r in (0, 1))
    # The in-place optimizer adds micro-batches to its momentum one by one, and ranks' mean at once.
    rtol = 1e-5 if name == "selfmask" else 0.0 if how == "ddp" else 1e-6
    check_equal(one["masks"], first["masks"])
    check_equal(one["masks"], second["masks"])
    check_equal(one["learned"], first["learned"], rtol)
    check_equal(first["learned"], second["learned"])
    both = [loss for pair in zip(first["losses"], second["losses"], strict=True) for loss in pair]
    assert both == pytest.approx(one["losses"], rel=1e-5, abs=0)
    if both:
        assert len(set(both)) == len(both) >= 2 * STEPS
    metrics = [dict(run["metrics"]) for run in (one, first)]
    for found_there in metrics:
        found_there.pop("masks/soft_hard_gap", None)  # of each rank's own batch
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5, abs=1e-7)
    assert len(metrics[0]) >= 2 or not both
    assert one["calibrated"] is None or first["calibrated"] == second["calibrated"]


@pytest.mark.parametrize(("how", "name"), PAIRS)
def test_two_ranks_export_what_one_process_exports(runs: Path, how: str, name: str) -> None:
    single(runs, name)
    one, two = (runs / f"{kind} {name}" / "export" for kind in ("one", how))
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    learns_weights = name in ("sr_ste", "lora")
    check_equal(a, b, 1e-6 if how == "fsdp" and learns_weights else 0.0)
    assert read_masks(one).digest == read_masks(two).digest
    if not learns_weights:
        assert (one / MANIFEST).read_text() == (two / MANIFEST).read_text()


def test_clipping_acts_on_the_norm_over_all_ranks(runs: Path) -> None:
    # Adam's steps do not depend on the size of gradients, but for its epsilon.
    clipped = single(runs, "clipped")["learned"]
    free = case("free", runs / "free", 1)["learned"]
    assert any(not torch.allclose(value, free[name], rtol=1e-4) for name, value in clipped.items())


def test_checkpoints_hold_what_is_learned_alone(runs: Path) -> None:
    one = torch.load(runs / "single" / "2.ckpt", weights_only=True)
    full = torch.load(runs / "full" / "2.ckpt", weights_only=True)
    assert one["state_dict"].keys() == full["state_dict"].keys()
    assert all(name.endswith("logits_OKG") for name in full["state_dict"])
    folder = runs / "folder" / "2.ckpt"
    shards = [load_file(folder / f"shard-{rank:05}-of-00002.safetensors") for rank in (0, 1)]
    for name, value in full["state_dict"].items():
        rows = [shard[f"state_dict/{name}"] for shard in shards]
        assert [len(part) for part in rows] == [len(value) // 2] * 2
        assert torch.equal(torch.cat(rows), value)
    assert len(shards[0]) == 3 * len(full["state_dict"])  # with Adam's two moments
    assert not any(
        isinstance(v, torch.Tensor) for v in torch.load(folder / "meta.pt")["state_dict"].values()
    )


@pytest.mark.parametrize("at", SAVED_AT)
@pytest.mark.parametrize("kind", ["ddp", "full", "folder"])
def test_two_ranks_resume_bit_for_bit(runs: Path, kind: str, at: int) -> None:
    for rank in (0, 1):
        whole = found(runs, kind, rank)
        resumed = found(runs, f"{kind} from {kind} at {at}", rank)
        assert resumed["losses"] == whole["losses"][at:]
        check_equal(whole["learned"], resumed["learned"])


@pytest.mark.parametrize("at", SAVED_AT)
@pytest.mark.parametrize("kind", ["ddp", "full", "folder"])
def test_a_checkpoint_of_one_process_resumes_on_two(runs: Path, kind: str, at: int) -> None:
    whole = found(runs, "single")
    ranks = [found(runs, f"{kind} from single at {at}", rank) for rank in (0, 1)]
    losses = [
        loss for pair in zip(*(rank["losses"] for rank in ranks), strict=True) for loss in pair
    ]
    assert losses == pytest.approx(
        whole["losses"][2 * at :], rel=0 if kind == "ddp" else 1e-5, abs=0
    )
    check_equal(whole["learned"], ranks[0]["learned"], 0.0 if kind == "ddp" else 1e-6)


@pytest.mark.parametrize("at", SAVED_AT)
@pytest.mark.parametrize("kind", ["ddp", "full", "folder"])
def test_a_checkpoint_of_two_ranks_resumes_on_one(runs: Path, kind: str, at: int) -> None:
    whole = found(runs, "single")
    out = runs / f"one from {kind} at {at}"
    resumed = case("maskllm", out, 1, resume=runs / kind / f"{at}.ckpt")
    assert resumed["losses"] == pytest.approx(
        whole["losses"][2 * at :], rel=0 if kind == "ddp" else 1e-5, abs=0
    )
    check_equal(whole["learned"], resumed["learned"], 0.0 if kind == "ddp" else 1e-6)


def test_rank_zero_alone_calibrates_and_its_failure_ends_all(runs: Path) -> None:
    first, second = (json.loads((runs / f"notes.{rank}.json").read_text()) for rank in (0, 1))
    # Blocks computed, and whether it was read from the cache: off, on, on again.
    assert first["calibration"]["counts"] == [[2, False], [2, False], [0, True]]
    assert second["calibration"]["counts"] == [[0, False], [0, False], [0, True]]
    assert first["calibration"]["failures"] == [
        "SparsifyError: no luck with this block",
        "RuntimeError: no luck with this block",
    ]
    assert second["calibration"]["failures"] == [
        "SparsifyError: rank 0: no luck with this block",
        "SparsifyError: rank 0: RuntimeError: no luck with this block",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_cannot_be_done_is_said_on_every_rank(runs: Path, rank: int) -> None:
    said = json.loads((runs / f"notes.{rank}.json").read_text())["refusals"]
    assert "tensor_parallel_size=2: layers are sharded by rows" in said["tensor parallel"]
    assert "its weight is stored as [in, out], so that 2 ranks" in said["gpt2 weights"]
    assert (
        "steps are of 1 ranks x 2 accumulated micro-batches, and this run's of 2 x 2; a run goes "
        "on with the same 2 in all: give --trainer.accumulate_grad_batches 1" in said["other steps"]
    )
    division = "ZeroDivisionError: integer division or modulo by zero"
    assert said["one"] == (
        "OSError: disk full" if rank else "SparsifyError: rank 1: OSError: disk full"
    )
    assert said["first"] == (f"SparsifyError: rank 0: {division}" if rank else division)
    assert "the model is sharded over several processes" in said["fold"]


@pytest.fixture(scope="module")
def short_text(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder to run the command line in, with the texts."""
    folder = tmp_path_factory.mktemp("cli")
    for split in ("train", "test"):
        words = (text / f"{split}.txt").read_text().split()[:WORDS]
        (folder / f"{split}.txt").write_text(" ".join(words))
    return folder


def test_the_command_line_runs_two_processes(
    cli: Cli, model_folder: Path, short_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short_text)
    options = [f"--model.name_or_path={model_folder}", "--data.train=train.txt"]
    options += ["--data.test=test.txt", "--data.block_size=16", "--data.batch_size=2"]
    options += ["--model.calibration.samples=16", "--trainer.accelerator=cpu"]
    options += ["--trainer.max_steps=3", "--masks.every_n_steps=1"]
    options += ["--trainer.enable_progress_bar=false", "--output.folder"]
    shards = ["--shard", "--trainer.strategy.save_distributed_checkpoint=true"]
    # Lightning starts the second process itself; then torchrun starts both.
    for name, launcher, flags in (("sharded", (), shards), ("ddp", TORCHRUN, [])):
        words = ["-m", "sparsify", "fit", "--strategy", "maskllm", "--devices", 2, *flags]
        done = launch(*launcher, *words, *options, name, cwd=short_text)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("exported to") == 0  # no bar, so quiet
    main(["fit", "--strategy=maskllm", "--trainer.accumulate_grad_batches=2", *options, "one"])
    masks = [read_masks(short_text / name).digest for name in ("one", "sharded", "ddp")]
    assert masks == masks[:1] * 3
    last = sorted(short_text.glob("runs/*/version_0/checkpoints/last.ckpt"))
    assert len(last) == 1
    assert last[0].is_dir()
    on_one = ["--devices=1", "--trainer.strategy=auto", "--output.folder=exported"]
    main(["export", f"--ckpt_path={last[0]}", *on_one, "--trainer.accelerator=cpu"])
    assert read_masks(short_text / "exported").digest == masks[0]
