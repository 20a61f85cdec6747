"""What the checkpoint callback needs of a trainer, on any number of pretended ranks."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


class FakeTrainer:
    """Saves a small checkpoint that holds its step, as a file or as a sharded run's folder.

    Attributes:
        full: while true, saving fails for want of space, halfway.
    """

    fast_dev_run = True  # so that it locks no folder

    def __init__(self, folder: Path, sharded: bool = False) -> None:
        self.loggers: list[Any] = []
        self.default_root_dir = str(folder)
        self.global_step = 0
        self.is_global_zero = True
        self.ckpt_path: Any = None
        self.sharded = sharded
        self.full = False
        self.barriers = 0
        self.strategy = SimpleNamespace(
            checkpoint_io=TorchCheckpointIO(),
            barrier=self._barrier,
            reduce_boolean_decision=lambda decision, all: decision,
        )

    def _barrier(self, name: str | None = None) -> None:
        self.barriers += 1

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        """As Lightning's, whose sharded strategy writes a file a rank and then ``meta.pt``."""
        assert weights_only is False
        content = {"global_step": self.global_step, "x": torch.full((3000,), self.global_step)}
        if self.sharded:
            path.mkdir(parents=True)
            (path / "__0_0.distcp").write_bytes(bytes(1000) + str(self.global_step).encode())
            self._check_space()
            torch.save({"global_step": self.global_step}, path / "meta.pt")
        else:
            self._check_space()
            self.strategy.checkpoint_io.save_checkpoint(content, path)
        self._barrier()

    def _check_space(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def saved_step(path: Path) -> int:
    """The step that a checkpoint holds, in all of its parts."""
    file = path / "meta.pt" if path.is_dir() else path
    step = int(torch.load(file, weights_only=True)["global_step"])
    if path.is_dir():
        assert (path / "__0_0.distcp").read_bytes() == bytes(1000) + str(step).encode()
    return step
