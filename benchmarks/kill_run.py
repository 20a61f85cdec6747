"""Stop runs by signals at random moments, let each go on, and compare what they end with.

    python benchmarks/kill_run.py --folder runs/kill --save benchmarks/results

A run of the embedded model is done once whole for each number of processes, and then again for
every signal and moment. A signal, to the first process, waits for the n-th beginning of a phase and
then a while, both drawn; by the clock alone few would come in the write of a checkpoint, which
takes a hundredth of the time. Stopped runs must end with the signal's status and leave no process.
They are resumed with their folder as --ckpt_path, started again where they had saved nothing, and
exported where nothing was left to learn, as the messages say. Stopped, this goes on where it was.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from kept_runs import save
from lightning.pytorch import Callback

from sparsify.base import hash_parameters
from sparsify.masks.file import read_masks
from sparsify.version import version

STEPS, SAVED_EVERY, VALIDATED_EVERY = 12, 3, 4
# By phase: how often it begins in a whole run, kills in it, and the longest delay of one, seconds.
PHASES = {
    "start": (1, 2, 5.0),
    "calibration": (1, 2, 0.5),
    "training": (STEPS, 6, 0.5),
    "validation": (STEPS // VALIDATED_EVERY, 3, 0.2),
    "checkpoint": (STEPS // SAVED_EVERY, 3, 0.15),
    "end": (1, 2, 1.0),
    "export": (1, 2, 0.2),
}
# By signal: the statuses with which a run ends, less a run's that had ended before.
SIGNALS = {
    "KILL": {-signal.SIGKILL},
    # The former: where it comes before the command takes signals.
    "TERM": {-signal.SIGTERM, 143},
    "USR1": {-signal.SIGUSR1, 143},
    "INT": {-signal.SIGINT, 130},
}
HERE = Path(__file__).resolve().parent
OPTIONS = [
    "--strategy=maskllm",
    "--model.optimizer.init_args.lr=0.05",  # so that masks move within these few steps
    "--data.train=train.txt",
    "--data.validation=validation.txt",
    "--data.test=test.txt",
    "--data.block_size=64",
    "--model.calibration.samples=16",
    f"--trainer.max_steps={STEPS}",
    f"--trainer.val_check_interval={VALIDATED_EVERY}",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--trainer.callbacks=kill_run.Phases",
    f"--checkpoint.every_n_steps={SAVED_EVERY}",
]


class Phases(Callback):
    """Appends a line to the file ``phases`` at the beginning of each phase of a run."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            _note("calibration")  # which comes next

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        _note("training")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        _note("validation")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        _note("training")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        _note("checkpoint")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        _note("end")


def _note(phase: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    with Path("phases").open("a") as file:
        file.write(f"{phase}\n")


def _phases(root: Path) -> list[str]:
    path = root / "phases"
    return path.read_text().split() if path.exists() else []


def _texts(folder: Path) -> None:
    """Short texts, so that a run takes seconds."""
    source = HERE.parent / "sparsify" / "embedded" / "text" / "shakespeare"
    for split, size in (("train", 200_000), ("validation", 10_000), ("test", 10_000)):
        with gzip.open(source / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            text = "\n".join(json.loads(line)["text"] for line in lines)
        (folder / f"{split}.txt").write_text(text[:size], encoding="utf-8")


def _start(root: Path, command: str, *options: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    env["SPARSIFY_CACHE"] = str(root / "cache")
    return subprocess.Popen(
        [sys.executable, "-m", "sparsify", command, *options],
        cwd=root,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _left(group: int) -> bool:
    """Whether any process of a group lives on a second after its first has ended."""
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        if not any(_lives_in(group, stat) for stat in Path("/proc").glob("[0-9]*/stat")):
            return False
        time.sleep(0.05)
    return True


def _lives_in(group: int, stat: Path) -> bool:
    try:
        state, _, own = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:  # it has ended meanwhile
        return False
    return own == str(group) and state != "Z"  # the dead may wait for a parent that takes no notice


def _finish(process: subprocess.Popen[str]) -> str:
    """Wait; the message of a run that failed, which must be for the user."""
    err = process.communicate(timeout=900)[1]
    if process.returncode not in (0, 2):
        raise SystemExit(err)
    # Two ranks that print the same message at once may leave an empty line at the end.
    return [line for line in err.splitlines() if line.strip()][-1] if process.returncode else ""


def _runs(root: Path) -> list[Path]:
    return sorted(root.glob("runs/*/version_*"), key=lambda path: path.stat().st_ctime_ns)


def _ended(root: Path) -> Path | None:
    """The run in which the export came to its place, if any."""
    return next((run for run in _runs(root) if (run / "export" / "masks.nmask").exists()), None)


def _digests(root: Path) -> dict[str, str]:
    run = _ended(root)
    assert run is not None
    scores = json.loads((run / "result.json").read_text())["scores"]
    last = max(root.glob("runs/*/*/checkpoints/step-*.ckpt"), key=lambda path: path.name)
    return {
        "masks": read_masks(run / "export").digest,
        "scores": json.dumps(scores),
        "logits": hash_parameters(torch.load(last, weights_only=True)["state_dict"]),
    }


def _check_moves(root: Path) -> None:
    """Stop if the masks did not move between the last two checkpoints: equal masks would then show
    nothing.
    """
    states = [
        torch.load(path, weights_only=True)["state_dict"]
        for path in root.glob("runs/*/*/checkpoints/step-*.ckpt")
    ]
    one, other = states
    if all(torch.equal(one[name].argmax(1), other[name].argmax(1)) for name in one):
        raise SystemExit("the masks of the whole run did not move; give it a higher learning rate")


def _stop(root: Path, moment: dict[str, Any], name: str, options: list[str]) -> dict[str, Any]:
    """Start the run and send it a signal at its moment; where it was, and how it ended.

    Stops this program if the run ended as it must not.
    """
    process = _start(root, "fit", *options)
    while process.poll() is None and not _begun(root, moment["phase"], moment["count"]):
        time.sleep(0.001)
    time.sleep(moment["delay"])
    process.send_signal(getattr(signal, f"SIG{name}"))
    err = process.communicate(timeout=120)[1]
    status = process.returncode
    if _left(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
        raise SystemExit(f"{root}: SIG{name} left a process of the run\n{err}")
    if status == 0 and not _ended(root):
        raise SystemExit(f"{root}: status 0 of a run that had not ended\n{err}")
    if status and status not in SIGNALS[name]:
        raise SystemExit(f"{root}: status {status} after SIG{name}\n{err}")
    return {"status": status, "stopped_in": _phase(root) if status else "it had ended"}


def _begun(root: Path, phase: str, count: int) -> bool:
    """Whether the phase has begun so many times."""
    if phase == "start":
        return True
    if phase == "export":
        return any(root.glob("runs/*/*/.export.partial-*"))
    return _phases(root).count(phase) >= count


def _phase(root: Path) -> str:
    """In which phase a dead run was."""
    noted = _phases(root)
    if not noted:
        return "start"
    if _ended(root):
        return "after the export"
    if any(root.glob("runs/*/*/checkpoints/.step-*.partial")):
        return "write of a checkpoint"
    if any(root.glob("runs/*/*/.export.partial-*")):
        return "write of the export"
    return "just before or after a checkpoint" if noted[-1] == "checkpoint" else noted[-1]


def _go_on(root: Path, options: list[str]) -> list[str]:
    """Do what the messages say until the run has ended; what was done, command by command."""
    if _ended(root):
        return []
    found = _runs(root)
    resume = [f"--ckpt_path={found[0].relative_to(root)}"] if found else options
    done = ["fit --ckpt_path" if found else "fit"]
    message = _finish(_start(root, "fit", *resume))
    if "nothing is left to learn" in message:
        done.append("export --ckpt_path")
        message = _finish(_start(root, "export", *resume))
    elif "there is no checkpoint in it" in message:
        done.append("fit")
        message = _finish(_start(root, "fit", *options))
    if message:
        raise SystemExit(message)
    return done


def _moments(seed: int, most: int) -> list[dict[str, Any]]:
    """When to kill: a delay, seconds, after the n-th beginning of a phase."""
    draw = random.Random(seed)
    moments = []
    for phase, (begins, kills, longest) in PHASES.items():
        for _ in range(kills):
            count, delay = draw.randint(1, begins), round(draw.uniform(0, longest), 3)
            moments.append({"phase": phase, "count": count, "delay": delay})
    # Every phase early on, should the rest never come.
    order = sorted(range(len(moments)), key=lambda n: 7 * (n + 1) % len(moments), reverse=True)
    return [moments[n] for n in order[:most]]


class Series:
    """The runs of so many processes, whole and stopped, in a folder that outlives this program."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder / f"{processes}", processes
        self.options = [*OPTIONS, f"--devices={processes}", f"--data.batch_size={4 // processes}"]
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / "whole.json"
        if not kept.exists():
            root = self._root("whole")
            started = time.monotonic()
            if message := _finish(_start(root, "fit", *self.options)):
                raise SystemExit(message)
            seconds = time.monotonic() - started
            _check_moves(root)
            kept.write_text(json.dumps({"seconds": round(seconds, 1), "digests": _digests(root)}))
        self.whole = json.loads(kept.read_text())
        print(f"whole run of {processes}: {self.whole['seconds']} s", flush=True)

    def _root(self, name: str) -> Path:
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        _texts(root)
        return root

    def stop(self, name: str, number: int, moment: dict[str, Any]) -> dict[str, Any]:
        """One signal and what came of it; kept in a file."""
        kept = self.folder / f"{name}-{number}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        root = self._root(f"{name}-{number}")
        result = {"processes": self.processes, "signal": name, "moment": moment}
        result |= _stop(root, moment, name, self.options)
        found = list(root.glob("runs/*/*/checkpoints/step-*.ckpt"))
        result["newest_step"] = max((int(path.stem[5:]) for path in found), default=None)
        result["went_on_with"] = _go_on(root, self.options)
        digests, whole = _digests(root), self.whole["digests"]
        result |= {f"{name}_equal": digests[name] == whole[name] for name in whole}
        kept.write_text(json.dumps(result))
        shutil.rmtree(root)
        print(json.dumps(result), flush=True)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/kill"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=["KILL", "TERM", "USR1"])
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--moments", type=int, default=20, help="of each signal, at most 20")
    args = parser.parse_args()
    series = [Series(args.folder.resolve(), processes) for processes in args.processes]
    stops: list[dict[str, Any]] = []
    for one in series:
        work = [
            (name, number, moment)
            for place, name in enumerate(args.signals)
            for number, moment in enumerate(_moments(args.seed + place, args.moments))
        ]
        # Two cores: two runs of one process, or one of two.
        with ThreadPoolExecutor(2 // one.processes) as pool:
            stops += pool.map(lambda item, one=one: one.stop(*item), work)
    names = series[0].whole["digests"]
    equal = sum(all(stop[f"{name}_equal"] for name in names) for stop in stops)
    print(f"{equal} of {len(stops)} stopped runs ended as the whole run")
    versions = {name: version(name) for name in ("sparsify", "torch", "lightning", "transformers")}
    save(
        {
            "options": OPTIONS,
            "seed": args.seed,
            "device": "cpu",
            "threads": 1,
            "versions": versions,
            "whole_run_seconds": {one.processes: one.whole["seconds"] for one in series},
            "masks_digest": {one.processes: one.whole["digests"]["masks"] for one in series},
            "equal": equal,
            "stops": stops,
        },
        args.save,
        "kill_run",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
