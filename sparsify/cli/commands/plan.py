"""``sparsify plan``: reads the options of ``sparsify fit`` with its parser, and starts no run."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from sparsify.cli.commands.output import Format, say, say_json
from sparsify.cli.short_forms import expand
from sparsify.cli.table import TOOLS
from sparsify.cli.trainer_cli import SHORT_FORMS, SparsifyCLI
from sparsify.common.errors import SparsifyError
from sparsify.training.plan import PlanSettings, make_plan, of_trainer, to_dict, to_table

_HELP = {
    "prog": "sparsify plan",
    "description": f"{TOOLS['plan'].about} It takes the options of sparsify fit "
    "and predicts the peak memory of that run, by part, and its GPU-hours, without loading the "
    "model, reading text or writing anything; exit status 1 if nothing fits. --trainer.accelerator "
    "says whose rules are applied: cuda or cpu; auto is what this machine has." + SHORT_FORMS,
    "usage": (
        "sparsify plan --strategy NAME [--memory GIB] [--utilisation SHARE] "
        "[--format table|json] [--devices N] [--shard] [--config FILE] [options]"
    ),
}
# Options of version 0.1.0, and the options of fit that replace them.
FORMER = {
    "--model": "--model.name_or_path",
    "--pattern": "--model.pattern",
    "--dtype": "--model.dtype",
    "--precision": "--trainer.precision",
    "--batch_size": "--data.batch_size",
    "--block_size": "--data.block_size",
    "--gradient_checkpointing": "--model.gradient_checkpointing",
    "--calibration": "--model.calibration",
    "--distillation": "--model.distillation",
    "--device": "--trainer.accelerator",
    "--strategy_args": "--model.strategy.NAME VALUE for each",
}
# If its value is such a file, --model means all settings of the model.
SETTINGS = (".yaml", ".yml", ".json")


class PlanCLI(SparsifyCLI):
    """Reads the options of fit, and makes the module and the data module, but no Trainer.

    Args:
        words: the expanded words that follow the command.
    """

    def __init__(self, words: list[str]) -> None:
        super().__init__(args=words, run=False, parser_kwargs=_HELP)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--memory",
            type=float | None,
            help="GiB of a device; if the settings do not fit, others are tried",
        )
        parser.add_argument(
            "--utilisation",
            type=float,
            default=PlanSettings.utilisation,
            help="the share of a GPU's peak at which matrix products run, above 0 and at most 1",
        )
        parser.add_argument("--format", type=Format, default="table", help="of what is printed")
        # A run's config.yaml holds ckpt_path; short forms replace a value by the run's settings.
        parser.add_argument(
            "--ckpt_path", type=str | None, help="a checkpoint, to plan a run with its settings"
        )

    def _set_seed(self) -> None:
        """Do nothing: planning draws no random numbers."""

    def before_instantiate_classes(self) -> None:
        """Make no callbacks or loggers."""
        self.asked = asked = self.config
        made: Any = Namespace
        trainer = made(strategy=asked.trainer.strategy)
        self.config = made(model=asked.model, data=asked.data, trainer=trainer)

    def instantiate_trainer(self, **options: Any) -> Any:
        """Make no Trainer: this machine may not have its device."""
        return None

    def after_instantiate_classes(self) -> None:
        """Do nothing: no checkpoint will hold the settings."""

    @property
    def settings(self) -> PlanSettings:
        """The settings that the user asked for."""
        trainer = {**vars(self.asked.trainer), "strategy": self.config_init.trainer.strategy}
        data, found = self.datamodule, of_trainer(trainer) | {"utilisation": self.asked.utilisation}
        sizes = data.batch_size, data.block_size, data.eval_batch_size
        return PlanSettings(self.model, *sizes, **found)


def read(words: list[str]) -> PlanCLI:
    """The command line that follows ``sparsify plan``, parsed.

    Raises:
        SparsifyError: plan no longer has an option, or an option asks for what does not exist.
    """
    check_former(words)
    return PlanCLI(expand(["plan", *words])[1:])


def plan_run(words: list[str]) -> int:
    """Plan a run, print what was found, and say by the exit status whether it fits.

    Args:
        words: what follows ``sparsify plan``.
    """
    cli = read(words)
    memory = cli.asked.memory
    found = make_plan(cli.settings, None if memory is None else int(memory * 2**30))
    if cli.asked.format == "json":
        say_json(to_dict(found))
    else:
        say(to_table(found))
    return 0 if found.fits else 1


def check_former(words: Sequence[str]) -> None:
    """Refuse the options that plan alone had.

    Raises:
        SparsifyError: there are some; for each the message names the option of fit.
    """
    found = {}
    for word, value in zip(words, [*words, ""][1:], strict=True):
        flag, equals, own = word.partition("=")
        name, dot, rest = flag.partition(".")
        if name == "--model" and (dot or (own if equals else value).endswith(SETTINGS)):
            continue
        if name in FORMER:
            found[flag] = f"{FORMER[name]}{dot}{rest}"
    if found:
        now = ", ".join(f"{new} in place of {old}" for old, new in found.items())
        raise SparsifyError(f"sparsify plan takes the options of sparsify fit: give {now}")
