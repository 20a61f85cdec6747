"""Lightning's strategy for a model whose tensors are sharded over ranks by FSDP2.

The module shards itself in ``configure_model``; this file saves and loads checkpoints. Lightning's
own strategy gathers all weights for each checkpoint, frozen ones too, and reads them back straight
into the model, so that the module could neither choose what is saved nor check what is loaded.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sparsify.common.files import disk_full
from sparsify.common.ranks import from_rank_zero, together
from sparsify.common.replace import partial_folder, replace_folder
from sparsify.masking.layer import local_rows
from sparsify.masking.sharded_rows import rows_of, sharded, whole
from sparsify.training.checkpoints.files import check_whole, partial_path
from sparsify.training.checkpoints.hooks import saved_keys
from sparsify.training.checkpoints.shards import (
    StoredRows,
    is_sharded,
    read_shards,
    read_whole,
    write_shard,
)


class Sharded(ModelParallelStrategy):
    """Every rank holds some rows of each weight and each masker's tensors, and sees its own data.

    Works on CPU too, with gloo. ``--trainer.strategy fsdp`` means this class.

    Args:
        save_distributed_checkpoint: every rank writes its own shard into a folder, and nothing is
            gathered; otherwise rank 0 gathers and writes one file. A run on any number of ranks,
            sharded or not, can resume from either.
        process_group_backend: the backend of torch.distributed; the default depends on the device.
        timeout: how long a rank waits for the others before it gives up, as ``0:30:00``.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # -- saving ------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state to save; if gathered, only rank 0 has it."""
        module: Any = self.lightning_module
        keys = saved_keys(module)
        return self._out({key: value for key, value in self._state().items() if key in keys})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state to save; if gathered, only rank 0 has it."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        state = optimizer.state_dict()
        state["state"] = {index: self._out(values) for index, values in state["state"].items()}
        return state

    def _out(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values in the form that a checkpoint holds; they are gathered one at a time."""
        if self._save_distributed_checkpoint:
            return dict(values)
        out = {}
        for name, value in values.items():
            value = whole(value).cpu() if isinstance(value, Tensor) else value
            if self.is_global_zero:
                out[name] = value
        return out

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write the whole checkpoint, or keep the former one; if one rank fails, all fail."""
        if not self._save_distributed_checkpoint:
            with together():
                if self.is_global_zero:
                    self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(filepath)
        for folder in from_rank_zero(self._shard_folder(path)):
            with together(), disk_full(path.parent):
                write_shard(folder, checkpoint, self.global_rank, self.world_size)

    def _shard_folder(self, path: Path) -> Any:
        """Yield a hidden folder to write to; it is renamed to ``path`` when all ranks are done."""
        if path == partial_path(path):  # the caller will rename it
            with disk_full(path.parent):
                path.mkdir(parents=True, exist_ok=True)
            yield path
            return
        with disk_full(path.parent), partial_folder(path) as partial:
            yield partial
            partial.chmod(0o755)
            replace_folder(partial, path)

    # -- loading -----------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Read a checkpoint; from a sharded one, only this rank's rows."""
        path = Path(checkpoint_path)
        check_whole(path)
        if not is_sharded(path):
            # Memory-mapped, so that each process reads only what it copies.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        likes: dict[str, Any] = {f"state_dict/{key}": v for key, v in self._state().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, parameter in enumerate(_parameters(optimizer)):
                likes[f"optimizer_{number}/{index}"] = parameter

        def own_part(stored: StoredRows) -> Tensor:
            like = likes.get(stored.name, likes.get(stored.name.rpartition("/")[0]))
            if not isinstance(like, DTensor) or tuple(like.shape) != stored.shape:
                return read_whole(stored)  # the module will refuse or ignore it
            return sharded(stored.read(*rows_of(like)), like)

        return read_shards(path, own_part)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy values into this rank's rows; the module has checked names and shapes before."""
        state = self._state()
        for name, value in checkpoint["state_dict"].items():
            local_rows(state[name]).copy_(local_rows(_like(value, state[name])))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each optimizer the rows of its state that belong to this rank's Parameters."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = _parameters(optimizer)
            own = {
                index: {key: _like(value, parameters[index]) for key, value in values.items()}
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": own})

    def _state(self) -> dict[str, Any]:
        return self.lightning_module.state_dict() if self.lightning_module is not None else {}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's Parameters, in the order in which its state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _like(value: Any, like: Any) -> Any:
    """This rank's rows of a value that has the shape of a sharded Parameter; others unchanged."""
    belongs = isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape
    if not belongs or isinstance(value, DTensor):
        return value
    start, count = rows_of(like)
    return sharded(value[start : start + count].clone(), like)
