"""The command line: a thin shell over Lightning's, with short forms that are rewritten before parsing."""

import json
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sparsify.data import TextDataModule
from sparsify.errors import SparsifyError
from sparsify.module import SparseCausalLM
from sparsify.registry import CALLBACKS, find_strategy, plugins
from sparsify.trainer import Trainer

LOGGERS = {
    "csv": "lightning.pytorch.loggers.CSVLogger",
    "tensorboard": "lightning.pytorch.loggers.TensorBoardLogger",
    "wandb": "lightning.pytorch.loggers.WandbLogger",
}
RUNS = "runs"

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


class SparsifyCLI(LightningCLI):
    """LightningCLI with our Trainer, the callbacks of the entry points, and an ``export`` command."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
            "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
            "export": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, point in plugins(CALLBACKS).items():
            parser.add_lightning_class_args(point.load(), name)

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint's settings come before the command line's (see :func:`expand`), not over them."""

    def after_instantiate_classes(self) -> None:
        # Plain values, so that a checkpoint can be read without executing anything.
        dump = yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False))
        self.model.save_hyperparameters({"config": {"model": dump["model"], "data": dump["data"]}})

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(**kwargs)
        return trainer


def expand(args: Sequence[str]) -> list[str]:
    """Rewrite the short forms of a command line.

    ``--strategy NAME`` becomes ``--model.strategy`` with the class's path, in any case; with no config and no model named, the
    packaged config of that name, made for the embedded model, comes first. ``--logger NAME`` becomes ``--trainer.logger``.
    With ``--ckpt_path`` the settings of the checkpoint's run come first, so that what is said on the command line wins.

    Raises:
        SparsifyError: the strategy, the logger or the checkpoint is unknown.
    """
    if not args or args[0].startswith("-"):
        return list(args)
    command, rest = args[0], _split(args[1:])
    before: list[str] = []
    given = {word.partition("=")[0] for word in rest}
    out: list[str] = []
    words = iter(rest)
    run_name = None
    for word in words:
        flag, _, value = word.partition("=")
        if flag in ("--strategy", "--model.strategy") and not value.startswith("{"):
            cls = find_strategy(value)
            out.append(f"--model.strategy={cls.__module__}.{cls.__qualname__}")
            run_name = cls.__name__.lower()
            config = files("sparsify.configs") / f"{value.lower()}.yaml"
            if not given & {"--config", "-c", "--model.name_or_path", "--ckpt_path"} and config.is_file():
                print(f"settings for the embedded model from configs/{value.lower()}.yaml", file=sys.stderr)
                before.append(f"--config={config}")
        elif flag == "--logger":
            out += _logger(value, run_name)
        else:
            out.append(word)
            if flag == "--ckpt_path" and value not in ("", "last", "best", "hpc"):
                before.append(f"--config={_settings(Path(value))}")
    return [command, *before, *out]


def _split(args: Sequence[str]) -> list[str]:
    """Join ``--flag value`` to ``--flag=value`` for the flags that :func:`expand` reads."""
    out: list[str] = []
    words = iter(args)
    for word in words:
        if word in ("--strategy", "--model.strategy", "--logger", "--ckpt_path", "--config", "-c", "--model.name_or_path"):
            value = next(words, None)
            if value is None:
                raise SparsifyError(f"{word} needs a value")
            word = f"{'--config' if word == '-c' else word}={value}"
        out.append(word)
    return out


def _logger(name: str, run_name: str | None) -> list[str]:
    path = LOGGERS.get(name.lower())
    if path is None:
        raise SparsifyError(f"there is no logger {name!r}; there are {', '.join(LOGGERS)}, or --trainer.logger CLASS")
    options = [f"--trainer.logger={path}", f"--trainer.logger.save_dir={RUNS}"]
    if name.lower() == "wandb":
        return [*options, "--trainer.logger.project=sparsify"]
    return [*options, f"--trainer.logger.name={run_name or 'run'}"]


def _settings(path: Path) -> str:
    """The model and data settings of a checkpoint's run, as JSON."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return json.dumps(checkpoint["hyper_parameters"]["config"])
    except Exception as error:
        raise SparsifyError(
            f"--ckpt_path {path}: no checkpoint of a sparsify run could be read there ({type(error).__name__}: {error})"
        ) from error


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit status 2 and one message for input that a user can mend."""
    sys.path.insert(0, os.getcwd())  # a strategy may lie in a file of the current folder
    try:
        sys.argv[1:] = expand(sys.argv[1:] if args is None else list(args))
        SparsifyCLI(
            SparseCausalLM,
            TextDataModule,
            trainer_class=Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
        )
    except SparsifyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
