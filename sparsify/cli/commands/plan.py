"""``sparsify plan``."""

import os
import sys
from typing import Any

from sparsify.calibration import Calibration
from sparsify.cli.commands.output import Format, say, say_json
from sparsify.common.choices import EMBEDDED, Device, Dtype, Precision
from sparsify.common.errors import SparsifyError
from sparsify.masking.registry import STRATEGIES, plugins
from sparsify.training.distillation import Distillation
from sparsify.training.plan import PlanSettings, make_plan, to_dict, to_table


def plan_run(
    strategy: str | None = None,
    model: str = EMBEDDED,
    pattern: str = "2:4",
    dtype: Dtype = "float32",
    precision: Precision = "32-true",
    devices: int = 1,
    shard: bool = False,
    batch_size: int = 8,
    block_size: int = 256,
    gradient_checkpointing: bool = False,
    calibration: Calibration = Calibration(),
    distillation: Distillation = Distillation(),
    device: Device = "cpu",
    strategy_args: dict[str, Any] | None = None,
    memory: float | None = None,
    format: Format = "table",
) -> int:
    """Predict the peak memory of sparsify fit, by part, without loading the model; exit status 1
    if nothing fits.

    Args:
        strategy: a short name or import path.
        model: embedded, a local folder, a Hugging Face id, or a GGUF file.
        pattern: N:M.
        dtype: of the base weights.
        precision: of the matrix products.
        devices: how many.
        shard: divide what is held among them, instead of a copy on each.
        batch_size: windows of a micro-batch on each.
        block_size: tokens of a window.
        gradient_checkpointing: recompute each block in backward.
        calibration: how much text calibration reads.
        distillation: whether to learn from the dense model too.
        device: where it runs.
        strategy_args: the strategy's own settings, as JSON.
        memory: GiB of a device; if the settings do not fit, others are tried.
        format: table or json.
    """
    sys.path.append(os.getcwd())  # a strategy may lie in a file of the current folder
    if strategy is None:
        names = ", ".join(plugins(STRATEGIES))
        raise SparsifyError(f"sparsify plan needs --strategy NAME; there are {names}")
    settings = PlanSettings(
        strategy,
        model,
        pattern,
        dtype,
        precision,
        devices,
        shard,
        batch_size,
        block_size,
        gradient_checkpointing,
        calibration,
        distillation,
        device,
        strategy_args or {},
    )
    found = make_plan(settings, None if memory is None else int(memory * 2**30))
    if format == "json":
        say_json(to_dict(found))
    else:
        say(to_table(found))
    return 0 if found.fits else 1
