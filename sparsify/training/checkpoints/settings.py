"""What a run takes from the settings in a checkpoint, which is a stranger's file.

The command line's parser instantiates whatever class a setting names. So settings of a checkpoint
are checked before it sees them: plain values, and a class only where one belongs and only one of
those that are known for that place. Nothing is imported for the check.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import yaml

from sparsify.common.errors import SparsifyError
from sparsify.common.printable import is_printable
from sparsify.common.secrets import REDACTED
from sparsify.masking.registry import CALLBACKS, STRATEGIES, own_plugins

SHARDED = "sparsify.training.parallel.Sharded"
FORMER_SHARDED = "sparsify.distributed.Sharded"  # in checkpoints and configs of version 0.1.0
DEPTH = 20  # of settings in settings; ours have six

# What a resumed run needs of its Trainer; everything else is of the machine, or writes somewhere.
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
# Of the Trainer's other options, those that a user would miss: how they are given again.
AGAIN = {
    "callbacks": "--trainer.callbacks CLASS",
    "logger": "--logger NAME or --trainer.logger CLASS",
    "plugins": "--trainer.plugins CLASS",
    "profiler": "--trainer.profiler NAME",
}

_WORD = re.compile(r"[\w-]+\Z")
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+\Z")
_OPTIMIZER = re.compile(r"torch\.optim\.([A-Z]\w*)\Z")

Tell = Callable[[str], None]


def settings_of(
    config: Any, resumes: bool, named: Collection[str] = (), tell: Tell = lambda line: None
) -> dict[str, Any]:
    """The settings that a command takes from a checkpoint.

    Args:
        config: ``hyper_parameters.config`` of the checkpoint, as it was read.
        resumes: whether its run goes on; otherwise only its model and data are taken.
        named: import paths of the classes that the user named in this command.
        tell: is called with a line for each setting that the run had, that is not taken, and that
            its user may miss.

    Returns:
        Plain values, safe to be parsed.

    Raises:
        SparsifyError: a value is none that a run of ours would have saved there, or a class must be
            named by the user.
    """
    parts = _mapping(config, "the settings")
    taken: dict[str, Any] = {"model": _model(_mapping(parts.get("model"), "model"), resumes, named)}
    data = dict(_mapping(parts.get("data"), "data"))
    if data.pop("tokenizer", None) is not None:
        tell("data.tokenizer of the checkpoint's run is left out: give it with --data.tokenizer")
    taken["data"] = _plain(data, "data")
    if resumes:
        if "seed_everything" in parts:
            taken["seed_everything"] = _scalar(parts["seed_everything"], "seed_everything")
        taken["trainer"] = _trainer(_mapping(parts.get("trainer", {}), "trainer"), tell)
        for name in own_plugins(CALLBACKS):
            if name in parts:
                taken[name] = _callback(_mapping(parts[name], name), name, tell)
    return _without_redacted(taken, "", tell)


def _model(given: Mapping[str, Any], resumes: bool, named: Collection[str]) -> dict[str, Any]:
    taken = {
        key: _plain(value, f"model.{key}")
        for key, value in given.items()
        if key not in ("strategy", "optimizer")
    }
    if "strategy" in given:
        taken["strategy"] = _strategy(given["strategy"], "model.strategy", named)
    optimizer = given.get("optimizer")
    # Only learning needs it, and a run without one named has our default.
    if optimizer is not None and resumes:
        taken["optimizer"] = _optimizer(optimizer, named)
    return taken


def _strategy(given: Any, where: str, named: Collection[str]) -> dict[str, Any]:
    path, options = _spec(given, where)
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
        elif isinstance(value, str) and _IMPORT_PATH.match(value) and value not in own:
            # Where a strategy or a path may stand, the parser would import this. Ours know it as a
            # path only, and what another one knows it as cannot be said from here.
            if path not in own:
                raise SparsifyError(
                    f"the checkpoint's {place} is {value!r}, which can be read as a class to "
                    "import; start the run anew with that option on the command line"
                )
            taken[key] = f"./{_plain(value, place)}"
        else:
            taken[key] = _plain(value, place)
    return {"class_path": path, "init_args": taken}


def _optimizer(given: Any, named: Collection[str]) -> dict[str, Any]:
    where = "model.optimizer"
    path, options = _spec(given, where)
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
        "init_args": {key: _scalars(value, f"{where}.{key}") for key, value in options.items()},
    }


def _trainer(given: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    for key, again in AGAIN.items():
        if names := _classes(given.get(key)):
            tell(f"trainer.{key} of the checkpoint's run is left out ({names}): give {again}")
    taken = {key: _scalars(given[key], f"trainer.{key}") for key in TRAINER if key in given}
    strategy = given.get("strategy")
    if isinstance(strategy, Mapping):
        path, options = _spec(strategy, "trainer.strategy")
        if path in (SHARDED, FORMER_SHARDED):
            args = {key: _scalars(v, f"trainer.strategy.{key}") for key, v in options.items()}
            taken["strategy"] = {"class_path": SHARDED, "init_args": args}
        else:
            tell(
                f"trainer.strategy of the checkpoint's run is left out ({_shown(path)}): give "
                "--trainer.strategy CLASS"
            )
    elif strategy is not None:
        taken["strategy"] = _scalar(strategy, "trainer.strategy")
    return taken


def _callback(given: Mapping[str, Any], name: str, tell: Tell) -> dict[str, Any]:
    if isinstance(given.get("folder"), str):
        tell(
            f"{name}.folder of the checkpoint's run is left out ({_shown(given['folder'])}): give "
            f"--{name}.folder"
        )
    return {
        key: _scalars(value, f"{name}.{key}") for key, value in given.items() if key not in WRITES
    }


def _classes(given: Any) -> str:
    """What a user would miss of an option that names classes; the loggers' default is not."""
    specs = given if isinstance(given, list) else [given]
    paths = [spec.get("class_path") if isinstance(spec, Mapping) else spec for spec in specs]
    names = [_shown(path) for path in paths if isinstance(path, str)]
    return ", ".join(name for name in names if not name.endswith("loggers.CSVLogger"))


def _shown(value: str) -> str:
    return value if is_printable(value) and len(value) < 200 else ascii(value[:200])


def _spec(given: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    """The class that a setting names, and its options."""
    if isinstance(given, str):
        given = {"class_path": given}
    given = _mapping(given, where)
    path, options = given.get("class_path"), given.get("init_args") or {}
    if not isinstance(path, str) or not _IMPORT_PATH.match(path) or not path.isascii():
        raise _refused(where, f"class_path {path!r}", "the import path of a class")
    if odd := set(given) - {"class_path", "init_args"}:
        raise _refused(where, f"it has {min(odd)!r}", "a class has class_path and init_args")
    options = _mapping(options, f"{where}.init_args")
    if odd := {key for key in options if not key.isidentifier()}:
        raise _refused(where, f"it has {min(odd)!r}", "an option is named by one word")
    return path, options


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise _refused(where, f"it is of type {type(value).__name__}", "it maps names to values")
    return value


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A value without classes to instantiate, in its texts neither: the parser reads these too."""
    if depth > DEPTH:
        raise _refused(where, f"more than {DEPTH} levels", "settings have few")
    if type(value) is dict:
        for key in _mapping(value, where):
            _printable(key, where)
            if {"class_path", "init_args"} & set(key.split(".")):
                raise _refused(where, f"it names a class ({key})", "no class belongs there")
        return {key: _plain(part, f"{where}.{key}", depth + 1) for key, part in value.items()}
    if type(value) is list:
        return [_plain(part, where, depth + 1) for part in value]
    if type(value) is str:
        _printable(value, where)
        _plain_text(value, where, depth)
    elif value is not None and type(value) not in (bool, int, float):
        raise _refused(where, f"it is of type {type(value).__name__}", "settings are plain values")
    return value


def _printable(text: str, where: str) -> None:
    if not is_printable(text):
        raise _refused(where, f"{text!r}", "names and texts have no control characters")


def _plain_text(text: str, where: str, depth: int) -> None:
    try:
        read = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return  # the parser cannot read it either, and keeps it as a text
    if isinstance(read, dict | list):
        # Keys may be numbers here ("{1: 2}"): only what would be taken for a class matters.
        _plain(_with_text_keys(read), where, depth + 1)


def _with_text_keys(value: Any, depth: int = 0) -> Any:
    if depth > DEPTH:
        return None
    if isinstance(value, dict):
        return {str(key): _with_text_keys(part, depth + 1) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_text_keys(part, depth + 1) for part in value]
    return value if isinstance(value, str) else None


def _scalars(value: Any, where: str) -> Any:
    """A scalar, or a list of them."""
    return (
        [_scalar(part, where) for part in value] if type(value) is list else _scalar(value, where)
    )


def _scalar(value: Any, where: str) -> Any:
    """A number, a truth value, None, or a word without a dot: nothing that can be imported."""
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str and (_WORD.match(value) or value == REDACTED):
        return value
    if type(value) is str and re.fullmatch(r"[\d,. ]+", value):
        return value  # devices as "0,1"
    raise _refused(where, repr(value)[:80], "a number or a word belongs there")


def _without_redacted(value: Any, where: str, tell: Tell) -> Any:
    """Without secrets, which were not saved: what stands in their place is none."""
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


def _refused(where: str, found: str, rule: str) -> SparsifyError:
    return SparsifyError(
        f"the checkpoint's settings cannot be used: {_shown(where)}: {found}; {rule}. Take a "
        "checkpoint that sparsify wrote and nobody changed"
    )
