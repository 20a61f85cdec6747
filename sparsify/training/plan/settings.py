"""What a run is planned for."""

from dataclasses import dataclass, field
from typing import Any

from sparsify.calibration import Calibration
from sparsify.common.choices import EMBEDDED, Device, Dtype, Precision
from sparsify.common.errors import SparsifyError
from sparsify.training.distillation import Distillation


@dataclass(frozen=True)
class PlanSettings:
    """The settings of ``sparsify fit`` on which its memory depends.

    Args:
        strategy: a short name or import path.
        model: as ``--model.name_or_path``.
        pattern: N:M.
        dtype: of the base weights.
        precision: of the matrix products.
        devices: processes, each with a device of its own.
        shard: divide what is held among the devices (FSDP2), instead of a copy on each (DDP).
        batch_size: windows of a micro-batch on each device.
        block_size: tokens of a window.
        gradient_checkpointing: recompute each block in backward.
        calibration: as ``--model.calibration``.
        distillation: as ``--model.distillation``.
        device: where it runs.
        strategy_args: the strategy's own arguments.
    """

    strategy: str
    model: str = EMBEDDED
    pattern: str = "2:4"
    dtype: Dtype = "float32"
    precision: Precision = "32-true"
    devices: int = 1
    shard: bool = False
    batch_size: int = 8
    block_size: int = 256
    gradient_checkpointing: bool = False
    calibration: Calibration = Calibration()
    distillation: Distillation = Distillation()
    device: Device = "cpu"
    strategy_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("devices", 1), ("batch_size", 1), ("block_size", 2)):
            if (value := getattr(self, name)) < least:
                raise SparsifyError(f"{name}={value}; it must be at least {least}")
        if self.shard and self.devices == 1:
            raise SparsifyError(
                "shard with devices=1: there is nobody to share with; give --devices 2 or more"
            )
