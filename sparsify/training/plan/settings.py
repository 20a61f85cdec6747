"""What a run is planned for."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric.connector import _convert_precision_to_unified_args
from lightning.pytorch.strategies import DDPStrategy, Strategy

from sparsify.common.choices import Device
from sparsify.common.errors import SparsifyError
from sparsify.training.guards import check_precision
from sparsify.training.module import SparseCausalLM
from sparsify.training.parallel import Sharded
from sparsify.training.trainer import own_strategy


@dataclass(frozen=True)
class PlanSettings:
    """The module of a run, and what its data and its Trainer are told, as far as memory and
    time depend on it.

    Args:
        module: holds the settings of the model; it is not built, and stays so.
        batch_size: windows of a micro-batch on each device.
        block_size: tokens of a window.
        eval_batch_size: windows of an evaluation batch; None takes as many as a run would.
        precision: of the matrix products, as the Trainer takes it.
        device: whose rules are applied.
        devices: of one node, each with a process of its own.
        nodes: how many there are.
        shard: divide what is held among all devices (FSDP2), instead of a copy on each (DDP).
        accumulate: micro-batches of an optimizer step on each device.
        steps: optimizer steps of the run; None if it has no number of them.
        utilisation: the share of a GPU's peak at which it multiplies.

    Raises:
        SparsifyError: there is no device, or none to share with, or a number is out of range.
    """

    module: SparseCausalLM
    batch_size: int = 8
    block_size: int = 256
    eval_batch_size: int | None = None
    precision: str = "32-true"
    device: Device = "cpu"
    devices: int = 1
    nodes: int = 1
    shard: bool = False
    accumulate: int = 1
    steps: int | None = None
    utilisation: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise SparsifyError(
                f"utilisation={self.utilisation}; it must be above 0 and at most 1, a share of a "
                "GPU's peak: give --utilisation 0.4"
            )
        for name, count in (
            ("devices", self.devices),
            ("num_nodes", self.nodes),
            ("accumulate_grad_batches", self.accumulate),
        ):
            if count < 1:
                raise SparsifyError(
                    f"{name}={count}; it must be at least 1: give --trainer.{name} 1 or more"
                )
        if self.shard and self.ranks == 1:
            raise SparsifyError(
                "shard with devices=1: there is nobody to share with; give --devices 2 or more"
            )

    @property
    def ranks(self) -> int:
        """The devices of all nodes."""
        return self.devices * self.nodes

    @property
    def tokens(self) -> int:
        """Those of an optimizer step, on all devices."""
        return self.batch_size * self.block_size * self.accumulate * self.ranks

    def with_model(self, **attributes: Any) -> "PlanSettings":
        """The same with other attributes of the module; the given module keeps its own."""
        module = copy.copy(self.module)
        for name, value in attributes.items():
            setattr(module, name, value)
        return replace(self, module=module)


def of_trainer(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the Trainer's options say of the settings of a plan.

    Args:
        options: the arguments with which the Trainer of the run would be made.

    Raises:
        SparsifyError: they ask for something of which the plan knows no rules.
    """
    device = _device(options["accelerator"])
    precision = _convert_precision_to_unified_args(options["precision"]) or "32-true"
    check_precision(precision)
    return {
        "precision": precision,
        "device": device,
        "devices": _count(options["devices"], device),
        "nodes": options["num_nodes"],
        "shard": _shards(options["strategy"]),
        "accumulate": options["accumulate_grad_batches"],
        "steps": options["max_steps"] if options["max_steps"] >= 0 else None,
    }


def _device(accelerator: Any) -> Device:
    if accelerator in ("auto", None):
        return "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator in ("cuda", "gpu"):
        return "cuda"
    if accelerator == "cpu":
        return "cpu"
    raise SparsifyError(
        f"accelerator {accelerator}: a plan knows the rules of two; give --trainer.accelerator "
        "cuda or cpu"
    )


def _count(devices: Any, device: Device) -> int:
    """Of the devices that the Trainer would take on this machine, or of those that are named."""
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if device == "cuda" else 1
    if isinstance(devices, str) and "," in devices:
        devices = [number for number in devices.split(",") if number.strip()]
    try:
        return len(devices) if isinstance(devices, list) else int(devices)
    except ValueError:
        raise SparsifyError(
            f"devices={devices}: it is no number; give --devices 1 or more"
        ) from None


def _shards(strategy: Strategy | str) -> bool:
    own = own_strategy(strategy)
    if isinstance(own, Sharded):
        return True
    if isinstance(own, DDPStrategy) or (
        isinstance(own, str) and (own == "auto" or own.startswith("ddp"))
    ):
        return False
    raise SparsifyError(
        f"strategy {own if isinstance(own, str) else type(own).__name__}: a plan knows copies on "
        "all devices, and shards of one; give --trainer.strategy ddp or fsdp"
    )
