"""Kill runs of the command line with SIGKILL at given moments.

kill_fit.py WORDS...: the words of ``sparsify fit``. Three runs, each in a child of this process:
killed in a step of training, in the write of a checkpoint, and in the move of the export.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

import sparsify.export.target
from sparsify.cli.main import main
from sparsify.training.module import SparseCausalLM


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def training() -> None:
    """In step 6, counted from one, after its forward pass."""
    step = SparseCausalLM.training_step

    def dying(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = step(self, batch, batch_idx)
        if self.trainer.global_step == 5:
            _die()
        return loss

    SparseCausalLM.training_step = dying  # type: ignore[method-assign]


def writing() -> None:
    """With half of the second checkpoint on the disk."""
    write, seen = torch.save, [0]

    def dying(content: Any, file: Any) -> None:
        write(content, file)
        seen[0] += 1
        if seen[0] == 2:
            file.truncate(file.tell() // 2)
            _die()

    torch.save = dying


def exporting() -> None:
    """With the export whole beside its place."""
    sparsify.export.target.replace_folder = lambda *_: _die()


def killed(moment: Callable[[], None]) -> None:
    """Run in a child until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            moment()
            main(["fit", *sys.argv[1:]])
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), f"{moment.__name__}: the child came to an end"
    assert os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    torch.set_num_threads(1)
    for moment in (training, writing, exporting):
        killed(moment)
