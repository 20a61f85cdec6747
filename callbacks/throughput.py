"""Logs speed and memory, and counts the tokens and seconds of a run."""

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback

from sparsify.callbacks.find import find
from sparsify.common.ranks import data_parallel
from sparsify.models.token_batch import TokenBatch


class Throughput(Callback):
    """Logs tokens per second since the last log, and the peak memory of the process or its GPU.

    Attributes:
        tokens: tokens trained on by all ranks, over all resumes, the present batch included.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._seconds = 0.0  # until the clock last stopped
        self._since: float | None = None  # when the clock was last started; None while it stands
        self._seen = 0
        self._seen_at = 0.0
        self._device = torch.device("cpu")
        self._peak = 0  # peak of the earlier processes, from the checkpoint

    @property
    def seconds(self) -> float:
        """Wall time spent training, over all resumes. It includes the logging of masks and the
        saving of checkpoints, but not validation, nor what comes after training.
        """
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return self._seconds + running

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._device = trainer.strategy.root_device

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._since = time.monotonic()
        self._seen, self._seen_at = 0, self._seconds

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.stop()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.stop()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._since = time.monotonic()

    def stop(self) -> None:
        """Stop the clock after the device has finished its work."""
        if self._since is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds, self._since = self.seconds, None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: torch.Tensor | TokenBatch, batch_idx: int
    ) -> None:
        tokens = batch.numel() * data_parallel(trainer)[1]
        self.tokens += tokens
        self._seen += tokens

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: torch.Tensor | TokenBatch,
        batch_idx: int,
    ) -> None:
        every = trainer.log_every_n_steps
        if pl_module.learns and every and trainer.global_step % every == 0:
            seconds = self.seconds
            pl_module.log("speed/tokens_per_second", self._seen / (seconds - self._seen_at))
            pl_module.log("speed/peak_memory_gib", self.peak_memory() / 2**30)
            self._seen, self._seen_at = 0, seconds

    def peak_memory(self) -> int:
        """Peak memory in bytes, over all resumes."""
        return max(self._peak, peak_memory(self._device))

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds, "peak_memory": self.peak_memory()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self._seconds = state_dict["tokens"], state_dict["seconds"]
        self._peak = state_dict.get("peak_memory", 0)  # older checkpoints lack it


def cost(trainer: Any, pl_module: Any) -> dict[str, float]:
    """The ``tokens`` and ``seconds`` that training has taken so far; 0 if nothing is learned."""
    speed = find(trainer, Throughput)
    if not pl_module.learns:
        return {"tokens": 0, "seconds": 0.0}
    return {"tokens": speed.tokens, "seconds": round(speed.seconds, 2)}


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated by torch on a GPU, otherwise resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB elsewhere
