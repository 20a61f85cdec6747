"""The command line: a thin shell over Lightning's, with short forms rewritten before parsing."""

import json
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sparsify.data import TextDataModule
from sparsify.errors import SparsifyError
from sparsify.module import ADAMW, SparseCausalLM
from sparsify.progress import Progress
from sparsify.quiet import quiet
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

_SHORT_FORMS = """

--strategy NAME stands for --model.strategy: a built-in name in any case, or an import path such as
my_package.MyStrategy. --logger NAME (csv, tensorboard or wandb) stands for --trainer.logger.
With no model named, a small embedded one is used. With --ckpt_path the settings of the checkpoint's
run hold wherever the command line says nothing else."""
_ABOUT = {
    "fit": "Learn or compute the masks, then test and export the sparse model.",
    "validate": "Measure perplexity on the validation text.",
    "test": "Measure perplexity on the test text.",
    "export": "Test a checkpoint and write its model as a Hugging Face folder.",
}
_HELP = {
    "prog": "sparsify",
    "description": "Learn, evaluate and export N:M sparse masks for Hugging Face language models.",
    **{
        name: {
            "description": about + _SHORT_FORMS,
            "usage": f"sparsify {name} --strategy NAME [--logger NAME] [--config FILE] [options]",
        }
        for name, about in _ABOUT.items()
    },
}


class Parser(LightningArgumentParser):
    """Takes the path of a text or mask file as a path; Lightning's would read it as settings."""

    def add_lightning_class_args(
        self,
        lightning_class: Any,
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        if issubclass(lightning_class, Callback):
            self.callback_keys.append(nested_key)
        names: list[str] = self.add_class_arguments(
            lightning_class,
            nested_key,
            fail_untyped=False,
            instantiate=not issubclass(lightning_class, LightningTrainer),
        )
        return names


class SparsifyCLI(LightningCLI):
    """LightningCLI with our Trainer, the entry points' callbacks, and an ``export`` command."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
            "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
            "export": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The module's own default, said so that each of its arguments can be set by itself.
        parser.set_defaults(
            {"model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": ADAMW}}
        )
        for name, point in plugins(CALLBACKS).items():
            parser.add_lightning_class_args(point.load(), name)

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint's settings come before the command line's (:func:`expand`)."""

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
        self.model.save_hyperparameters({"config": {"model": dump["model"], "data": dump["data"]}})

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        given = config["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        if config["enable_checkpointing"] is False:
            # Lightning takes the two together for a mistake.
            callbacks = [c for c in callbacks if not isinstance(c, Checkpoint)]
        if config["enable_progress_bar"] is not False and not any(
            isinstance(c, ProgressBar) for c in given
        ):
            callbacks = [*callbacks, Progress()]
        return super()._instantiate_trainer(config, callbacks)


def expand(args: Sequence[str]) -> list[str]:
    """Rewrite the short forms of a command line.

    ``--strategy NAME`` becomes ``--model.strategy`` with the class's path, in any case; with no
    config and no model named, the packaged config of that name, made for the embedded model, comes
    first. ``--logger NAME`` becomes ``--trainer.logger``; the default is ``csv``. With
    ``--ckpt_path`` the settings of the checkpoint's run come first, so that what is said on the
    command line wins.

    Raises:
        SparsifyError: the strategy, the logger or the checkpoint is unknown.
    """
    if not args or args[0].startswith("-"):
        return list(args)
    command, rest = args[0], _split(args[1:])
    given = {word.partition("=")[0] for word in rest}
    run_name, logger = command, "csv"
    before: list[str] = []
    after: list[str] = []
    for word in rest:
        flag, _, value = word.partition("=")
        if flag == "--logger":
            logger = value
        elif flag in ("--strategy", "--model.strategy") and not value.startswith("{"):
            cls = find_strategy(value)
            run_name = cls.__name__.lower()
            after.append(f"--model.strategy={cls.__module__}.{cls.__qualname__}")
            if not given & {"--config", "--model.name_or_path", "--ckpt_path"}:
                before += _packaged_config(value.lower())
        else:
            after.append(word)
            if flag == "--ckpt_path":
                before.append(f"--config={_settings(Path(value))}")
    return [command, *_logger(logger, run_name), *before, *after]


def _packaged_config(name: str) -> list[str]:
    path = files("sparsify.configs") / f"{name}.yaml"
    if not path.is_file():
        return []
    print(f"settings for the embedded model from configs/{name}.yaml", file=sys.stderr)
    return [f"--config={path}"]


def _split(args: Sequence[str]) -> list[str]:
    """Join ``--flag value`` to ``--flag=value`` for the flags that :func:`expand` reads."""
    out: list[str] = []
    words = iter(args)
    for word in words:
        if word in (
            "--strategy",
            "--model.strategy",
            "--logger",
            "--ckpt_path",
            "--config",
            "-c",
            "--model.name_or_path",
        ):
            value = next(words, None)
            if value is None:
                raise SparsifyError(f"{word} needs a value")
            word = f"{'--config' if word == '-c' else word}={value}"
        out.append(word)
    return out


def _logger(name: str, run_name: str) -> list[str]:
    path = LOGGERS.get(name.lower())
    if path is None:
        raise SparsifyError(
            f"there is no logger {name!r}; there are {', '.join(LOGGERS)}, "
            "or --trainer.logger CLASS"
        )
    options = [f"--trainer.logger={path}", f"--trainer.logger.save_dir={RUNS}"]
    if name.lower() == "wandb":
        return [*options, "--trainer.logger.project=sparsify"]
    return [*options, f"--trainer.logger.name={run_name}"]


def _settings(path: Path) -> str:
    """The model and data settings of a checkpoint's run, as JSON."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return json.dumps(checkpoint["hyper_parameters"]["config"])
    except Exception as error:
        raise SparsifyError(
            f"--ckpt_path {path}: no checkpoint of a sparsify run could be read there "
            f"({type(error).__name__}: {error})"
        ) from error


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exit status 2 and one message for input that a user can mend; 130, as of any interrupted
    command, after Ctrl-C.
    """
    quiet()
    sys.path.insert(0, os.getcwd())  # a strategy may lie in a file of the current folder
    try:
        sys.argv[1:] = expand(sys.argv[1:] if args is None else list(args))
        cli = SparsifyCLI(
            SparseCausalLM,
            TextDataModule,
            trainer_class=Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs=_HELP,
        )
    except SparsifyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    callbacks = cast(Any, cli.trainer).callbacks
    if any(getattr(callback, "stopped", False) for callback in callbacks):
        sys.exit(130)


if __name__ == "__main__":
    main()
