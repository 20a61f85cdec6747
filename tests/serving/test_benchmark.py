"""The GPU benchmark's script runs on any machine, as far as one can without a GPU."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "runtime_gpu.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("phase", ["layers", "dense", "sparse", "dense graph", "sparse graph"])
def test_every_phase_runs(phase: str, script: dict[str, Any]) -> None:
    found = script["run_phase"](phase, tiny=True)
    assert "failed" not in found
    if phase == "layers":
        assert len(found) == 3
        for layer in found.values():
            assert set(layer["seconds"]) == {1, 8}
            assert all(error < 0.01 for error in layer["relative_error"].values())
        return
    assert found["backend"] == ("none" if phase.startswith("sparse") else "dense")
    assert found.get("logits_relative_error", 0) == 0
    parts = {"decode_seconds"} | ({"prefill_seconds"} if "graph" not in phase else set())
    for batch in ("batch 1", "batch 2"):
        assert set(found[batch]) == parts
        assert all(seconds > 0 for seconds in found[batch].values())


def test_a_failing_phase_is_recorded_and_the_rest_goes_on(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = script["main"]
    phases = {
        "layers": "print('{}')",
        "dense": "raise SystemExit(3)",
        "sparse": "import time; time.sleep(9)",
        "dense graph": """print('noise'); print('{"batch 1": {}}')""",
    }

    def command(name: str, tiny: bool) -> list[str]:
        assert tiny
        return [sys.executable, "-c", phases[name]]

    limits = {"layers": 9, "dense": 9, "sparse": 0.5, "dense graph": 9}
    monkeypatch.setitem(main.__globals__, "SECONDS", limits)
    monkeypatch.setitem(main.__globals__, "command", command)
    main(["--tiny", "--save", str(tmp_path)])
    [file] = tmp_path.iterdir()
    content = json.loads(file.read_text())
    found = content["phases"]
    assert all(result.pop("phase_seconds") >= 0 for result in found.values())
    assert found == {
        "layers": {},
        "dense": {"failed": "the process ended with 3"},
        "sparse": {"failed": "not done after 0.5 s"},
        "dense graph": {"batch 1": {}},
    }
    assert {"date", "hardware", "versions", "model"} <= content.keys()


def test_a_phase_that_raises_is_a_result(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: Any) -> None:
        raise RuntimeError("out of memory")

    run_phase = script["run_phase"]
    monkeypatch.setitem(run_phase.__globals__, "layers", fail)
    assert run_phase("layers", tiny=True) == {"failed": "RuntimeError: out of memory"}


def test_the_limits_keep_the_run_below_nine_minutes(script: dict[str, Any]) -> None:
    assert sum(script["SECONDS"].values()) < 540
