"""The benchmark for a GPU runs on any machine as far as it can, and loses nothing."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def check() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu_check

        yield gpu_check


def run(check: ModuleType, name: str, folder: Path) -> Any:
    """What a part finds in this process."""
    file = folder / "part.json"
    assert check.run_here(name, True, file), file.read_text()
    return json.loads(file.read_text())


def test_the_machine_is_described(check: ModuleType, tmp_path: Path) -> None:
    found = run(check, "machine", tmp_path)
    assert found["backends"] == {"none": True}
    assert {"torch", "transformers", "sparsify", "python"} <= found["versions"].keys()
    assert {"device", "driver", "cuda", "cpu"} <= found.keys()


def test_layers_and_models(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_serving

    asked = []

    def measure(kind: Any, backend: Any, counts: list[int], device: Any) -> Any:
        asked.append((kind.shape, counts))
        if kind.shape == (32, 64) and counts == [8]:
            raise RuntimeError("too many tokens")
        return {counts[0]: (4.0, 2.0)}

    monkeypatch.setattr(gpu_serving, "measure", measure)
    found = run(check, "layers none", tmp_path)
    shapes = ["32 x 32", "64 x 32", "32 x 64", "96 x 32", "128 x 32"]
    kinds = [f"{shape} bfloat16" for shape in shapes]
    assert [key for key in found if key != "part"] == kinds
    assert len(asked) == 10
    assert found[kinds[0]]["seconds"]["1"] == {"dense": 4.0, "sparse": 2.0, "speedup": 2.0}
    assert found[kinds[2]]["seconds"]["8"] == {"failed": "RuntimeError: too many tokens"}
    assert all(0 < e < 0.01 for kind in kinds for e in found[kind]["relative_error"].values())

    for name in ("none", "dense"):
        found = run(check, f"model {name}", tmp_path)
        assert found.get("logits_relative_error", 0) == 0
        for label, parts in (("plain", {"prefill", "decode"}), ("graph", {"decode"})):
            for batch in ("batch 1", "batch 2"):
                assert found[label][batch].keys() == {f"{part}_seconds" for part in parts}
                assert all(seconds > 0 for seconds in found[label][batch].values())


def test_steps_are_extrapolated_on_a_line(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_learning

    found = gpu_learning.extrapolated((1, 3), [{"seconds": 5.0}, {"seconds": 9.0}])
    assert found == {"seconds": 5.0 + 31 * 2.0}
    monkeypatch.setattr(gpu_learning, "TIMED", 1)
    found = run(check, "steps", tmp_path)
    assert {"dense", "maskllm", "selfmask", "maskpro"} <= found.keys()
    for name in ("dense", *gpu_learning.STRATEGIES):
        assert all(part["seconds"] > 0 for part in list(found[name].values())[:2])
        assert "32 blocks, extrapolated" in found[name]


def test_losses_are_compared(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_learning

    monkeypatch.setattr(gpu_learning, "losses", lambda accelerator, count: [4.0] * count)
    found = run(check, "learning", tmp_path)
    assert found["losses"] == found["losses_on_cpu"] == [4.0, 4.0]
    assert found["comparison"]["equal"] is True
    assert gpu_learning.compared([4.0, 3.0], [4.0, 3.01])["equal"] is True
    assert gpu_learning.compared([4.0, 3.0, 3.0], [4.0, 3.0, 3.08])["equal"] is True
    assert gpu_learning.compared([4.0, 3.0, 3.0], [4.0, 3.08, 3.08])["equal"] is False
    assert gpu_learning.compared([4.0, 3.0, 3.0], [4.0, 2.95, 3.2])["equal"] is False
    assert gpu_learning.compared([4.01, 3.0], [4.0, 3.0])["equal"] is False


def test_a_part_that_raises_is_a_result(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tiny: bool, report: Any) -> None:
        report.add("half", float("nan"))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(check, "machine", fail)
    assert not check.run_here("machine", True, tmp_path / "part.json")
    assert json.loads((tmp_path / "part.json").read_text()) == {
        "part": "machine",
        "half": "nan",
        "failed": "RuntimeError: out of memory",
    }


MACHINE = '{"capability": [9, 0], "backends": {"a": true, "b": false}}'
WRITES = "import sys, pathlib, time; p = pathlib.Path(sys.argv[1]); "
SCRIPTS = {
    "machine": f"{WRITES}p.write_text('{MACHINE}')",
    "tests": f"{WRITES}p.write_text('{{\"x\": 1}}'); time.sleep(99)",
    "layers a": "print('noise'); raise SystemExit(3)",
    "model dense": f"{WRITES}p.write_text('{{\"y\": 2}}')",
    "model a": f'{WRITES}p.write_text(\'{{"failed": "own"}}\'); raise SystemExit(1)',
}


@pytest.fixture
def scripts(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Each part is a short script."""

    def command(name: str, tiny: bool, file: Path) -> list[str]:
        return [sys.executable, "-c", SCRIPTS.get(name, "pass"), str(file)]

    limits = {"tests": 1.5}
    original = check.parts

    def parts(backends: dict[str, bool]) -> Iterator[Any]:
        for part in original(backends):
            yield check.Part(part.name, limits.get(part.name, 30))

    monkeypatch.setattr(check, "command", command)
    monkeypatch.setattr(check, "parts", parts)
    monkeypatch.setattr(check, "LEAST_SECONDS", 0.5)
    return check


def test_whatever_ends_a_part_what_it_found_is_kept_and_the_rest_goes_on(
    scripts: ModuleType, tmp_path: Path
) -> None:
    path = scripts.run_all(False, 8, tmp_path)
    found = json.loads(path.read_text())["parts"]
    assert list(found) == [
        *("machine", "tests", "layers a", "model dense", "model a", "steps", "learning")
    ]
    assert (found["tests"]["x"], found["tests"]["failed"]) == (1, "not done after 2 s")
    assert found["layers a"]["failed"] == "the process ended with 3"
    assert found["layers a"]["log"] == ["noise"]
    assert found["model dense"].keys() == {"y", "part_seconds"}
    assert found["model a"]["failed"] == "own"
    assert "failed" not in found["learning"]
    again = scripts.free_file(tmp_path, path.stem)
    assert again.name == f"{path.stem}-2.json"


def test_what_is_cut_from_outside_has_written_what_it_found(
    scripts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    def sleep(seconds: float) -> None:
        real(seconds)
        for path in tmp_path.glob("gpu_check-*.json"):
            if json.loads(path.read_text())["parts"].get("tests", {}).get("x") == 1:
                ended.append(path)
                raise KeyboardInterrupt

    real = time.sleep
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        scripts.run_all(False, 8, tmp_path)
    assert len(ended) == 1


def test_no_part_begins_without_time(scripts: ModuleType, tmp_path: Path) -> None:
    path = scripts.run_all(False, 1 / 6000, tmp_path)
    found = json.loads(path.read_text())["parts"]
    assert set(found) == {"machine", "tests", "model dense", "steps", "learning"}
    assert all(part == {"failed": "no time was left for it"} for part in found.values())


def test_without_a_gpu_nothing_is_left(
    scripts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = SCRIPTS["machine"].replace("[9, 0]", "null")
    monkeypatch.setitem(SCRIPTS, "machine", script)
    with pytest.raises(SystemExit, match="no CUDA device; --tiny"):
        scripts.run_all(False, 8, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_limits_are_eight_minutes_in_all(check: ModuleType) -> None:
    backends = {"cusparselt": True, "cutlass": False, "decode": True}
    assert 30 + sum(part.seconds for part in check.parts(backends)) <= 600
    assert check.MINUTES == 8


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(check: ModuleType, tmp_path: Path) -> None:
    path = check.run_all(True, 30, tmp_path)
    found = json.loads(path.read_text())["parts"]
    assert len(found) == 7
    assert [name for name, part in found.items() if "failed" in part] == []
    assert found["learning"]["comparison"]["largest_difference"] == 0
