"""A killed export leaves the former folder or the new one, and the next one tidies up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "assets" / "crash_run.py"


@pytest.mark.slow
def test_exports_killed_at_every_file_operation(tmp_path: Path) -> None:
    """The script checks what each kill leaves; here, that the kills were where they should be."""
    root = str(SCRIPT.parents[2])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    over, first, without = json.loads(done.stdout).values()
    for scenario in (over, first):
        operations = scenario["operations"]
        assert len(operations) > 30
        assert sum(scenario["found"].values()) == len(operations)
        assert {"tempfile.mkdtemp", "os.rename", "os.chmod", "shutil.rmtree", "os.remove"} <= set(
            operations
        )
        assert {"half of model.safetensors", "after a mask"} <= set(operations)
        assert operations.count("fsync") >= 9  # seven files, their folder and its parent
    swap = over["operations"].index("before exchange")
    assert over["operations"][swap + 1] == "after exchange"
    assert over["found"] == {
        "version 1": swap + 1,
        "version 2": len(over["operations"]) - swap - 1,
    }
    assert set(first["found"]) == {"nothing", "version 2"}
    # Two renames have one point between them.
    operations = without["operations"]
    assert operations[:3] == ["before exchange", "os.rename", "os.rename"]
    assert without["found"] == {"version 1": 2, "nothing": 1, "version 2": len(operations) - 3}
