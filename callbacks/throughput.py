"""Reports speed and memory."""

import resource
import time
from typing import Any

import torch
from lightning.pytorch import Callback

from sparsify.batch import TokenBatch
from sparsify.trainer import data_parallel


class Throughput(Callback):
    """Logs tokens per second since the last look, and the peak memory of the process or its GPU.

    Attributes:
        tokens: tokens trained on by all ranks, over all resumes.
        seconds: wall time spent training, over all resumes, without what comes after.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._seen = 0
        self._seen_in = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._since, self._seen, self._seen_in = time.monotonic(), 0, 0.0

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: torch.Tensor | TokenBatch,
        batch_idx: int,
    ) -> None:
        ranks = data_parallel(trainer)[1]
        self.tokens += batch.numel() * ranks
        self._seen += batch.numel() * ranks
        now = time.monotonic()
        elapsed, self._since = now - self._since, now
        self.seconds += elapsed
        self._seen_in += elapsed
        every = trainer.log_every_n_steps
        if pl_module.learns and every and trainer.global_step % every == 0:
            pl_module.log("speed/tokens_per_second", self._seen / self._seen_in)
            pl_module.log("speed/peak_memory_gib", peak_memory(pl_module.device) / 2**30)
            self._seen, self._seen_in = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated by torch on a GPU, resident of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
