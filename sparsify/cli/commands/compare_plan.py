"""Plans the runs of a comparison on a larger model, for its report."""

from collections.abc import Sequence
from pathlib import Path

from sparsify.calibration.prior import SavedMasks
from sparsify.cli.commands.plan import read
from sparsify.common.errors import SparsifyError
from sparsify.models.base import load_skeleton
from sparsify.results.compare.planned import Planned, describe_run, planned_cost
from sparsify.results.compare.rows import Row

# 2.1 billion tokens for every strategy, as in the published run that learned masks of this size.
OPTIONS = (
    "--model.dtype=bfloat16",
    "--model.gradient_checkpointing=true",
    "--data.block_size=4096",
    "--data.batch_size=1",
    "--trainer.accelerator=cuda",
    "--trainer.devices=8",
    "--shard",
    "--trainer.accumulate_grad_batches=32",
    "--trainer.max_steps=2000",
)


def plan_rows(rows: Sequence[Row], model: str) -> Planned:
    """Plan every row that learns, with the strategy and the settings of its first run.

    These are read from the run's checkpoint, which names no class but sparsify's and torch's own;
    its ``config.yaml`` may name any, and results are passed around.

    Args:
        rows: of a comparison.
        model: a name or a folder, of which the configuration is read alone.

    Raises:
        SparsifyError: the model has no configuration that can be read.
    """
    weights = sum(param.numel() for param in load_skeleton(model, "--plan").parameters())
    run, costs, reasons = "", {}, {}
    for row in (row for row in rows if row.record["steps"]):
        if "overrides" in row.settings or SavedMasks.__name__ in row.settings.values():
            reasons[row.label] = (
                "its patterns by layer, or the masks it starts from, fit no other model."
            )
            continue
        place = f"--ckpt_path={row.runs[0].path.parent}"
        try:
            settings = read([place, f"--model.name_or_path={model}", *OPTIONS]).settings
            run = run or describe_run(settings)
            costs[row.label] = planned_cost(settings)
        except SparsifyError as error:
            reasons[row.label] = str(error)
    name = f"{Path(model).name} ({weights / 1e9:.1f} billion parameters)"
    return Planned(name, run, costs, reasons)
