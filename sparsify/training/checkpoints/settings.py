"""Checks the settings in a checkpoint, which is an untrusted file, and selects those a run takes.

The command line's parser instantiates any class that a setting names. So a checkpoint's settings
are checked before the parser sees them. They must be plain values; a class may stand only where one
belongs, and must be one that is known for that place. The check imports nothing.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from sparsify.calibration.permuting import is_kinds
from sparsify.common.errors import SparsifyError
from sparsify.common.secrets import REDACTED
from sparsify.masking.registry import CALLBACKS, STRATEGIES, own_plugins
from sparsify.training.checkpoints.plain_values import (
    IMPORT_PATH,
    mapping,
    plain,
    scalar,
    scalars,
    shown,
    spec,
)

SHARDED = "sparsify.training.parallel.Sharded"
FORMER_SHARDED = "sparsify.distributed.Sharded"  # in checkpoints and configs of version 0.1.0

# Trainer options that a resumed run takes; the others depend on the machine, or write files.
TRAINER = (
    "accelerator",
    "accumulate_grad_batches",
    "benchmark",
    "check_val_every_n_epoch",
    "detect_anomaly",
    "deterministic",
    "devices",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "fast_dev_run",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "inference_mode",
    "limit_predict_batches",
    "limit_test_batches",
    "limit_train_batches",
    "limit_val_batches",
    "log_every_n_steps",
    "max_epochs",
    "max_steps",
    "min_epochs",
    "min_steps",
    "num_nodes",
    "num_sanity_val_steps",
    "overfit_batches",
    "precision",
    "reload_dataloaders_every_n_epochs",
    "sync_batchnorm",
    "use_distributed_sampler",
    "val_check_interval",
)
# Options of our callbacks that say where to write.
WRITES = ("folder", "overwrite")
# Other Trainer options that a user would miss, and how to give them again.
AGAIN = {
    "callbacks": "--trainer.callbacks CLASS",
    "logger": "--logger NAME or --trainer.logger CLASS",
    "plugins": "--trainer.plugins CLASS",
    "profiler": "--trainer.profiler NAME",
}

_OPTIMIZER = re.compile(r"torch\.optim\.([A-Z]\w*)\Z")

Tell = Callable[[str], None]


def settings_of(
    config: Any, resumes: bool, named: Collection[str] = (), tell: Tell = lambda line: None
) -> dict[str, Any]:
    """The settings that a command takes from a checkpoint.

    Args:
        config: ``hyper_parameters.config`` of the checkpoint, as it was read.
        resumes: whether training continues; if not, only settings of model and data are taken.
        named: import paths of the classes that the user named in this command.
        tell: called with a line for each of the run's settings that is not taken and that the user
            may miss.

    Returns:
        Plain values, safe to be parsed.

    Raises:
        SparsifyError: a run of this package would not have saved such a value there, or the user
            must name a class.
    """
    parts = mapping(config, "the settings")
    taken: dict[str, Any] = {"model": _model(mapping(parts.get("model"), "model"), resumes, named)}
    data = dict(mapping(parts.get("data"), "data"))
    if data.pop("tokenizer", None) is not None:
        tell("data.tokenizer of the checkpoint's run is left out: give it with --data.tokenizer")
    taken["data"] = plain(data, "data")
    if resumes:
        if "seed_everything" in parts:
            taken["seed_everything"] = scalar(parts["seed_everything"], "seed_everything")
        taken["trainer"] = _trainer(mapping(parts.get("trainer", {}), "trainer"), tell)
        for name in own_plugins(CALLBACKS):
            if name in parts:
                taken[name] = _callback(mapping(parts[name], name), name, tell)
    return _without_redacted(taken, "", tell)


def _model(given: Mapping[str, Any], resumes: bool, named: Collection[str]) -> dict[str, Any]:
    taken = {
        key: plain(value, f"model.{key}")
        for key, value in given.items()
        if key not in ("strategy", "optimizer")
    }
    if isinstance(permute := taken.get("permute"), str) and not is_kinds(permute):
        taken["permute"] = os.path.join(".", permute)  # still a path where nothing has its name
    if "strategy" in given:
        taken["strategy"] = _strategy(given["strategy"], "model.strategy", named)
    optimizer = given.get("optimizer")
    # Only training needs the optimizer; a run that names none has our default.
    if optimizer is not None and resumes:
        taken["optimizer"] = _optimizer(optimizer, named)
    return taken


def _strategy(given: Any, where: str, named: Collection[str]) -> dict[str, Any]:
    path, options = spec(given, where)
    own = own_plugins(STRATEGIES).values()
    if path not in own and path not in named:
        raise SparsifyError(
            f"the checkpoint's {where} is {path}, which is not one of sparsify's own: files never "
            f"choose code to run; if you trust it, name it in this command: --strategy {path}"
        )
    taken: dict[str, Any] = {}
    for key, value in options.items():
        place = f"{where}.{key}"
        if isinstance(value, Mapping) and "class_path" in value:
            taken[key] = _strategy(value, place, named)
        elif isinstance(value, str) and IMPORT_PATH.match(value) and value not in own:
            # If the argument may be a strategy or a path, the parser would import this. In our own
            # strategies it is only a path; for other packages' strategies we cannot know.
            if path not in own:
                raise SparsifyError(
                    f"the checkpoint's {place} is {value!r}, which can be read as a class to "
                    "import; start the run anew with that option on the command line"
                )
            taken[key] = f"./{plain(value, place)}"
        else:
            taken[key] = plain(value, place)
    return {"class_path": path, "init_args": taken}


def _optimizer(given: Any, named: Collection[str]) -> dict[str, Any]:
    where = "model.optimizer"
    path, options = spec(given, where)
    found = _OPTIMIZER.match(path)
    cls = vars(torch.optim).get(found[1]) if found else None
    known = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    if not known and path not in named:
        raise SparsifyError(
            f"the checkpoint's {where} is {path}, which is no optimizer of torch.optim: files "
            f"never choose code to run; if you trust it, name it in this command: --{where} {path}"
        )
    return {
        "class_path": path,
        "init_args": {key: scalars(value, f"{where}.{key}") for key, value in options.items()},
    }


def _trainer(given: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    for key, again in AGAIN.items():
        if names := _classes(given.get(key)):
            tell(f"trainer.{key} of the checkpoint's run is left out ({names}): give {again}")
    taken = {key: scalars(given[key], f"trainer.{key}") for key in TRAINER if key in given}
    strategy = given.get("strategy")
    if isinstance(strategy, Mapping):
        path, options = spec(strategy, "trainer.strategy")
        if path in (SHARDED, FORMER_SHARDED):
            args = {key: scalars(v, f"trainer.strategy.{key}") for key, v in options.items()}
            taken["strategy"] = {"class_path": SHARDED, "init_args": args}
        else:
            tell(
                f"trainer.strategy of the checkpoint's run is left out ({shown(path)}): give "
                "--trainer.strategy CLASS"
            )
    elif strategy is not None:
        taken["strategy"] = scalar(strategy, "trainer.strategy")
    return taken


def _callback(given: Mapping[str, Any], name: str, tell: Tell) -> dict[str, Any]:
    if isinstance(given.get("folder"), str):
        tell(
            f"{name}.folder of the checkpoint's run is left out ({shown(given['folder'])}): give "
            f"--{name}.folder"
        )
    return {
        key: scalars(value, f"{name}.{key}") for key, value in given.items() if key not in WRITES
    }


def _classes(given: Any) -> str:
    """The classes that an option named, for the user to give again; not the default logger."""
    specs = given if isinstance(given, list) else [given]
    paths = [spec.get("class_path") if isinstance(spec, Mapping) else spec for spec in specs]
    names = [shown(path) for path in paths if isinstance(path, str)]
    return ", ".join(name for name in names if not name.endswith("loggers.CSVLogger"))


def _without_redacted(value: Any, where: str, tell: Tell) -> Any:
    """The value without secrets: a checkpoint holds only a placeholder for each, no secret."""
    if isinstance(value, dict):
        taken = {}
        for key, part in value.items():
            place = f"{where}.{key}" if where else key
            if isinstance(part, str) and REDACTED in part:
                tell(f"{place} of the checkpoint's run was a secret and not saved: give it again")
            else:
                taken[key] = _without_redacted(part, place, tell)
        return taken
    if isinstance(value, list):
        return [
            _without_redacted(part, where, tell)
            for part in value
            if not (isinstance(part, str) and REDACTED in part)
        ]
    return value
