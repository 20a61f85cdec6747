"""Kill saves of a checkpoint at every file operation, one by one, and look for a whole one.

kill_save.py FOLDER: prints, as JSON, by kind of checkpoint the operations at which a child was
killed, and which step ``last.ckpt`` then meant.
"""

import gc
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsify.callbacks.checkpoints import Checkpoints
from sparsify.common import replace
from sparsify.training.checkpoints.files import damage, partial_path, step_path
from sparsify.training.checkpoints.newest import newest_whole
from tests.assets import crash_run
from tests.assets.crash_run import Reaper
from tests.callbacks.fake_trainer import FakeTrainer, saved_step


class SaveReaper(Reaper):
    """Kills within the write of a checkpoint too."""

    def watch(self, exchange: bool) -> None:
        """From here on; ``exchange`` is not asked for."""
        write = torch.save

        def halfway(content: Any, file: Any) -> None:
            write(content, file)
            if hasattr(file, "truncate"):
                file.truncate(file.tell() // 2)
                file.flush()
                self.step("half a file")
                file.seek(0)
                write(content, file)
            self.step("a file not flushed")

        torch.save = halfway
        os.fsync = lambda handle: self.step("fsync")
        replace._exchange = self.around("exchange", replace._exchange)
        sys.addaudithook(self.audit)


def save(folder: Path, step: int, callback: Checkpoints, sharded: bool) -> None:
    """One save of a run that goes on in the same process."""
    trainer = FakeTrainer(folder, sharded)
    trainer.global_step = step
    callback.setup(trainer, None, "fit")
    callback.save(trainer)


def run(folder: Path, sharded: bool, again: bool) -> dict[str, Any]:
    """Kill the save of step 3, or that of step 2 again, after those of 1 and 2."""
    operations: list[str] = []
    found: list[int] = []
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        callback = Checkpoints(keep=1)
        for step in (1, 2):
            save(folder, step, callback, sharded)
        if again:
            callback._saved_at = -1
        new = 2 if again else 3
        place = folder / "checkpoints"
        operation = crash_run.killed_at(
            len(operations), True, partial(save, folder, new, callback, sharded)
        )
        newest = newest_whole(place / "last.ckpt")
        step = saved_step(newest)
        assert newest == step_path(place, step).parent / newest.name
        assert damage(place / "last.ckpt") == ""
        assert saved_step(place / "last.ckpt") == step
        if operation is None:
            assert step == new
            return {"operations": operations, "found": found}
        operations.append(operation)
        found.append(step)
        # The next save of this run tidies up.
        partial_path(step_path(place, 9)).mkdir(exist_ok=True)
        save(folder, new + 1, Checkpoints(keep=1), sharded)
        names = sorted(os.listdir(place))
        assert names == ["last.ckpt", step_path(place, new + 1).name], (operation, names)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None
    gc.disable()
    crash_run.WATCHED = (*crash_run.WATCHED, "os.symlink")
    crash_run.Reaper = SaveReaper  # type: ignore[misc]
    results = {
        "file": run(folder / "file", sharded=False, again=False),
        "folder": run(folder / "folder", sharded=True, again=False),
        "folder again": run(folder / "again", sharded=True, again=True),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
