"""The commands with a Trainer: Lightning's command line, after short forms are rewritten."""

import sys
from collections.abc import Sequence
from typing import Any, cast

import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from sparsify.callbacks.budget import MeasureBudget
from sparsify.callbacks.sensitivity import MeasureSensitivity
from sparsify.cli.parser import Parser
from sparsify.cli.short_forms import RUNS, expand
from sparsify.cli.table import TRAINER_COMMANDS
from sparsify.common.console import Progress
from sparsify.common.errors import SparsifyError
from sparsify.common.files import full_disk
from sparsify.common.quiet import quiet
from sparsify.common.ranks import leave_process_group
from sparsify.common.secrets import holds_redacted, redacted
from sparsify.data import TextDataModule
from sparsify.masking.registry import CALLBACKS, STRATEGIES, plugins
from sparsify.results.budget import PATTERNS, Goal, Unit
from sparsify.training.module import SparseCausalLM
from sparsify.training.optimizers import ADAMW
from sparsify.training.trainer import Trainer

TRAINER_DEFAULTS = {
    "default_root_dir": RUNS,
    "max_steps": 2000,
    "max_epochs": -1,
    "enable_model_summary": False,
    "gradient_clip_val": 1.0,
    "use_distributed_sampler": False,  # the data module gives every rank its own batches
    "num_sanity_val_steps": 0,
    "callbacks": [],
}

# These belong to one command, not to the run that a checkpoint continues.
OWN = ("config", "ckpt_path")

SHORT_FORMS = f"""

--strategy NAME stands for --model.strategy: {", ".join(plugins(STRATEGIES))} in upper or
lower case, or an import path such as my_package.MyStrategy; with --model.strategy.help the
strategy's own settings are shown. --logger NAME (csv, tensorboard or wandb) stands for
--trainer.logger. --devices N stands for --trainer.devices, and --shard for --trainer.strategy fsdp,
which shards weights and masks over the devices.
With no model named, a small embedded one is used. With --ckpt_path the settings of the checkpoint's
run hold wherever the command line says nothing else."""
_HELP = {
    "prog": "sparsify",
    "description": "Learn, evaluate and export N:M sparse masks for Hugging Face language models.",
    **{
        name: {
            "description": about + SHORT_FORMS,
            "usage": (
                f"sparsify {name} --strategy NAME [--devices N] [--shard] [--logger NAME] "
                "[--config FILE] [options]"
            ),
        }
        for name, about in TRAINER_COMMANDS.items()
    },
}


# The arguments of each command's method that are no options.
NOT_OPTIONS = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
    "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
    "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
    "export": {"model", "datamodule"},
    "sensitivity": {"model", "datamodule"},
    "budget": {"model", "datamodule"},
}

# Where an option accepts any value, a class's name is only a text, and nothing is instantiated.
# This setting applies to all parsers of the process.
set_parsing_settings(instantiate_subclass_spec_in_any=False)


class SaveConfig(SaveConfigCallback):
    """Writes the run's config.yaml without its secrets."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **options: Any) -> None:
        super().__init__(parser, redacted(config), **options)


class CommandTrainer(Trainer):
    """The Trainer of the command line; each of its commands is a method."""

    def sensitivity(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | None = None
    ) -> None:
        """Measure on the validation text how much each decoder block loses by its masks.

        Args:
            model: the module; its strategy leaves the base weights as they are.
            datamodule: its data.
            ckpt_path: the checkpoint, usually ``last.ckpt`` of the run; without one, the strategy's
                starting masks are measured, before it learns anything.
        """
        self._validate_for(MeasureSensitivity(), model, datamodule, ckpt_path)

    def budget(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        patterns: Sequence[str] = PATTERNS,
        max_perplexity_ratio: float | None = None,
        kept: float | None = None,
        bytes: str | float | None = None,
        milliseconds: float | None = None,
        unit: Unit = "layer",
        windows: int = Goal.windows,
        rounds: int = Goal.rounds,
        tokens: int = Goal.tokens,
    ) -> None:
        """Choose a pattern for each layer so that the model is the best within a budget.

        Args:
            model: the module; its strategy leaves the base weights as they are.
            datamodule: its data.
            patterns: what a layer may have: N:M, or dense.
            max_perplexity_ratio: find the fewest bytes at which perplexity is at most so many times
                the dense model's.
            kept: find the lowest perplexity at which at most this share of the weights is kept.
            bytes: find the lowest perplexity at which the masked layers take at most so many bytes,
                such as 12MiB.
            milliseconds: the same for the time of one forward pass of these layers, from the times
                that were measured when an export was loaded on this device.
            unit: what gets one pattern: a kind of layer in a block, a module of a block such as its
                attention, or a block.
            windows: of validation text, in which a change of one unit is measured; whole choices
                are measured in up to four times as many.
            rounds: how often changes are measured again around the best choice so far.
            tokens: with --milliseconds, how many tokens the layers are given.
        """
        limits = {
            "max_perplexity_ratio": max_perplexity_ratio,
            "kept": kept,
            "bytes": bytes,
            "milliseconds": milliseconds,
        }
        goal = Goal.parse(patterns, limits, unit, windows, rounds, tokens)
        self.limit_val_batches = 1  # the callback reads the text by itself
        self.validate_loop.inference_mode = False  # a strategy may calibrate by gradients
        # Several budgets share a folder, so it has no config; their records say what was asked.
        trainer = cast(Any, self)
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, SaveConfig)]
        words = sys.argv[1:]
        words.remove("budget")
        self._validate_for(MeasureBudget(goal, words), model, datamodule)

    def _validate_for(
        self,
        callback: Callback,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
    ) -> None:
        self.sensing = True
        cast(Any, self).callbacks.append(callback)
        try:
            self.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        finally:
            self.sensing = False
            cast(Any, self).callbacks.remove(callback)


class SparsifyCLI(LightningCLI):
    """LightningCLI with our Trainer and its commands, and the entry points' callbacks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            SparseCausalLM,
            TextDataModule,
            trainer_class=CommandTrainer,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            **options,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The command that is asked for, or else all: to make the parser of one takes a while."""
        asked = sys.argv[1] if len(sys.argv) > 1 else ""
        return {asked: NOT_OPTIONS[asked]} if asked in NOT_OPTIONS else NOT_OPTIONS

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options first: Lightning's Trainer has more options than all the rest."""
        parser.add_lightning_class_args(SparseCausalLM, "model")
        # Name the module's own default, so that each of its arguments can be set separately.
        parser.set_defaults(
            {"model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": ADAMW}}
        )
        parser.add_lightning_class_args(TextDataModule, "data")
        for name, point in plugins(CALLBACKS).items():
            parser.add_lightning_class_args(point.load(), name)
        parser.add_lightning_class_args(CommandTrainer, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the expanded words. ``sys.argv`` keeps the words as they were given, because
        Lightning starts the other processes of a run with them.
        """
        self.config = parser.parse_args(expand(sys.argv[1:]) if args is None else args)
        if place := holds_redacted(self.config):
            raise SparsifyError(
                f"{place.partition('.')[2]} was a secret and is not in the file that was written; "
                "give it on the command line"
            )

    def _parse_ckpt_path(self) -> None:
        """Do nothing: ``short_forms`` has put the checkpoint's settings first already."""

    def validate(self, **kwargs: Any) -> None:
        """Without Lightning's table beside ours."""
        self.trainer.validate(verbose=False, **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Without Lightning's table beside ours."""
        self.trainer.test(verbose=False, **kwargs)

    def after_instantiate_classes(self) -> None:
        # Plain values, so that a checkpoint can be read without executing anything.
        dump = yaml.safe_load(
            self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        )
        settings = redacted({k: v for k, v in dump.items() if k not in OWN})
        self.model.save_hyperparameters({"config": settings})

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        given = config["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        if config["enable_checkpointing"] is False:
            # Lightning treats having both as a mistake.
            callbacks = [c for c in callbacks if not isinstance(c, Checkpoint)]
        if config["enable_progress_bar"] is not False and not any(
            isinstance(c, ProgressBar) for c in given
        ):
            callbacks = [*callbacks, Progress()]
        return super()._instantiate_trainer(config, callbacks)


def run(words: list[str]) -> None:
    """Run a command that has a Trainer.

    Raises:
        SparsifyError: it cannot be done, or not with these settings.
    """
    sys.argv[1:] = words
    with quiet():
        try:
            SparsifyCLI(parser_kwargs={name: _HELP[name] for name in SparsifyCLI.subcommands()})
        except MisconfigurationException as error:  # Lightning's, of settings
            message = " ".join(str(error).split())
            raise SparsifyError(f"the trainer refuses its settings: {message}") from error
        except OSError as error:
            if full_disk(error) is None:
                raise
            where = error.filename or "a file of the run"
            raise SparsifyError(f"{error.strerror}: {where} was not written; free space") from error
        leave_process_group()
