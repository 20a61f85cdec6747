"""All that is to be measured on a GPU, in one command of at most eight minutes, without downloads::

    python benchmarks/gpu_check.py

In order of worth: the tests that need a GPU; each layer of LLaMA-2-7B's shapes, dense and on every
backend that runs here; prefill and decoding of a whole model of that shape; step time and memory of
learning; and whether a GPU learns what a CPU learns.

Every part is a process of its own with a limit of time. The result file is written anew after each
number, whole at every moment: whatever ends a part, or all of it, what was found is there. A part
that fails is recorded with its error, and the next one goes on. ``--tiny`` goes through all parts
on a CPU, on models of no interest, with no limit but that of all; its figures mean nothing.
"""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 8.0
LEAST_SECONDS = 15  # with less no part is begun: the imports alone take longer
LOG_LINES = 15
PACKAGES = ("sparsify", "torch", "transformers", "triton", "lightning")

Content = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One process: its kind with the backend, and its limit of seconds."""

    name: str
    seconds: float


def parts(backends: dict[str, bool]) -> Iterator[Part]:
    """Those that follow the first one, ``machine``, which finds the backends that run here."""
    running = [name for name, runs in backends.items() if runs]
    yield Part("tests", 110)
    for name in running:
        yield Part(f"layers {name}", 45)
    for name in ("dense", *running):
        yield Part(f"model {name}", 60)
    yield Part("steps", 75)
    yield Part("learning", 75)


class Report:
    """What a part has found so far, in a file."""

    def __init__(self, file: Path) -> None:
        self.content: Content = {}
        self._file = file

    def add(self, *path_and_value: Any) -> None:
        """Put a value at a path of keys, and write the file."""
        *path, last, value = path_and_value
        place = self.content
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
        write(self._file, self.content)


def write(file: Path, content: Content) -> None:
    """In one step: a reader sees the old file or the new one."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(plain(content), indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def plain(value: Any) -> Any:
    """The value as JSON can hold it; a number that is not finite becomes text."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read(file: Path) -> Content:
    """What a part has found; nothing yet if there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# -- the parts, each in its own process ------------------------------------------------------------


def machine(tiny: bool, report: Report) -> None:
    """Device, driver, versions, and which backends run here."""
    from gpu_serving import Settings

    from sparsify.common.machine import cpu_name
    from sparsify.common.version import version
    from sparsify.serving.timings import describe_machine

    settings = Settings(tiny)
    report.add("cpu", cpu_name())
    report.add("cores", os.cpu_count())
    report.add("host", platform.machine())
    report.add("versions", "python", platform.python_version())
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            report.add("versions", name, version(name))
    report.add("driver", driver())
    for key, value in describe_machine(settings.device).items():
        report.add(key, value)
    for name, backend in settings.backends.items():
        report.add("backends", name, bool(backend.available(settings.device)))


def driver() -> str | None:
    """Of the GPU, None without one."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip()


def tests(tiny: bool, report: Report) -> None:
    """Each test that needs a GPU, recorded when it ends."""
    import pytest

    class Recorder:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                found = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
                if report.failed:
                    found["error"] = report.longreprtext[-600:]
                outer.add("tests", report.nodeid, found)

    outer = report
    files = [
        str(file)
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in file.read_text(encoding="utf-8")
    ]
    os.chdir(ROOT)
    status = pytest.main(["-m", "gpu", "-q", "-p", "no:cacheprovider", *files], [Recorder()])
    report.add("status", int(status))
    outcomes = [found["outcome"] for found in report.content.get("tests", {}).values()]
    report.add("counts", {kind: outcomes.count(kind) for kind in sorted(set(outcomes))})


def run_here(name: str, tiny: bool, file: Path) -> bool:
    """One part in this process; a failure is a result. Whether it did not fail."""
    report = Report(file)
    report.add("part", name)
    kind, _, backend = name.partition(" ")
    if tiny:
        import torch

        torch.set_num_threads(1)  # the tensors are tiny
    try:
        if kind in ("layers", "model"):
            import gpu_serving

            run = gpu_serving.layers if kind == "layers" else gpu_serving.whole
            run(gpu_serving.Settings(tiny), report, backend)
        elif kind in ("steps", "learning"):
            import gpu_learning

            (gpu_learning.steps if kind == "steps" else gpu_learning.learning)(tiny, report)
        else:
            (machine if kind == "machine" else tests)(tiny, report)
    except Exception as error:  # whatever it is, the other parts are wanted
        traceback.print_exc()
        report.add("failed", f"{type(error).__name__}: {error}"[:1000])
        return False
    return True


# -- all of them -----------------------------------------------------------------------------------


def command(name: str, tiny: bool, file: Path) -> list[str]:
    """What runs one part."""
    tail = ["--tiny"] if tiny else []
    return [sys.executable, __file__, "--part", name, "--file", str(file), *tail]


def run_apart(
    part: Part, tiny: bool, seconds: float, found_so_far: Callable[[Content], None]
) -> Content:
    """One part in a process of its own, as a failure on a GPU may spoil what comes after.

    Args:
        part: the part.
        tiny: on the CPU.
        seconds: the limit.
        found_so_far: is given what was found, several times a second while it changes.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "part.json"), Path(folder, "log")
        with log.open("w") as out:
            child = subprocess.Popen(
                command(part.name, tiny, file),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                seen: Content = {}
                while (code := child.poll()) is None and time.monotonic() - begin < seconds:
                    time.sleep(0.2)
                    if (now := read(file)) != seen:
                        found_so_far(seen := now)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)  # with what it has started
                    child.wait()
        found = read(file)
        if code is None:
            found["failed"] = f"not done after {seconds:.0f} s"
        elif code:
            found.setdefault("failed", f"the process ended with {code}")
        if "failed" in found:
            found["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    found["part_seconds"] = round(time.monotonic() - begin, 1)
    return found


def free_file(folder: Path, name: str) -> Path:
    """A file that is not there: an earlier result stays."""
    files = (folder / f"{name}{end}.json" for end in ("", *(f"-{n}" for n in range(2, 99))))
    return next(file for file in files if not file.exists())


def run_all(tiny: bool, minutes: float, save: Path) -> Path:
    """Run all parts, as far as the time goes."""
    end = time.monotonic() + 60 * minutes
    now = datetime.now(timezone.utc)
    save.mkdir(parents=True, exist_ok=True)
    path = free_file(save, f"gpu_check{'_tiny' * tiny}-{now.date()}")
    result: Content = {
        "benchmark": "gpu_check",
        "date": now.isoformat(timespec="seconds"),
        "tiny": tiny,
        "minutes": minutes,
        "parts": {},
    }

    def run(part: Part) -> Content:
        left = end - time.monotonic()
        seconds = left if tiny else min(part.seconds, left)
        if seconds < LEAST_SECONDS:
            found: Content = {"failed": "no time was left for it"}
        else:

            def keep(found: Content) -> None:
                result["parts"][part.name] = found
                write(path, result)

            found = run_apart(part, tiny, seconds, keep)
        result["parts"][part.name] = found
        write(path, result)
        print(f"{part.name}: {found.get('failed', 'done')} ({found.get('part_seconds', 0)} s)")
        return found

    first = run(Part("machine", 60))
    if not tiny and "failed" not in first and first["capability"] is None:
        path.unlink()
        raise SystemExit("PyTorch finds no CUDA device; --tiny goes through all parts on the CPU")
    for part in parts(first.get("backends", {})):
        run(part)
    return path


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, default=RESULTS, help="the folder of the result")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the most for all parts")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.part:
        return 0 if run_here(options.part, options.tiny, options.file) else 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part ends too
    print(run_all(options.tiny, options.minutes, options.save))
    return 0


if __name__ == "__main__":
    sys.exit(main())
