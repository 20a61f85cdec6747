"""Rewrites short forms of the command line into the options that the parser knows."""

import os
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from sparsify.cli.named_classes import STRATEGY_FLAGS, named_classes, names_code
from sparsify.common import yaml_text
from sparsify.common.errors import SparsifyError
from sparsify.common.printable import printable
from sparsify.common.seal import content_hash
from sparsify.masking.registry import (
    STRATEGIES,
    allow_current_folder,
    find_strategy,
    import_path,
    plugins,
    strategy_name,
)
from sparsify.training.checkpoints.files import METADATA
from sparsify.training.checkpoints.newest import newest_whole
from sparsify.training.checkpoints.settings import SHARDED, settings_of

LOGGERS = {
    "csv": "lightning.pytorch.loggers.CSVLogger",
    "tensorboard": "lightning.pytorch.loggers.TensorBoardLogger",
    "wandb": "lightning.pytorch.loggers.WandbLogger",
}
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # one of them
STRATEGY_HELP = "--model.strategy.help"
RUNS = "runs"
BUDGET = "budget"  # the command, and the name of its folder
LEARNS = ("fit", "plan")  # commands of a run that learns, and resumes if given a checkpoint


def expand(args: Sequence[str]) -> list[str]:
    """Rewrite the short forms of a command line.

    ``--strategy NAME``, in upper or lower case, becomes ``--model.strategy`` with the class's path.
    If neither a config nor a model is named, the strategy's packaged config, made for the embedded
    model, comes first; a strategy named by its import path gets it too. ``--logger NAME`` becomes
    ``--trainer.logger``; the default is ``csv``. ``--devices N`` becomes ``--trainer.devices``, and
    ``--shard`` ``--trainer.strategy fsdp``. ``--model.strategy.help`` takes a short name too, and
    without one that of ``--strategy``. With ``--ckpt_path`` the settings of the checkpoint's
    run come first, so that the command line overrides them. If the command line names a class or a
    config, modules in the current folder can be imported.

    Raises:
        SparsifyError: the strategy, the logger or the checkpoint is unknown.
    """
    if not args or args[0].startswith("-"):
        return list(args)
    command, rest = args[0], _split(args[1:])
    given = {word.partition("=")[0] for word in rest if not _only_overrides(word)}
    asks = any(word.endswith(("-h", "help")) or "print_config" in word for word in given)
    if not asks and not given & {*STRATEGY_FLAGS, "--config", "--ckpt_path"}:
        first = rest[0] if rest and not rest[0].startswith("-") else ""
        flag = "--strategy" if first.lower() in plugins(STRATEGIES) else "--ckpt_path"
        hint = f"; did you mean {flag} {first}?" if first else ""
        raise SparsifyError(
            f"sparsify {command} needs --strategy NAME ({', '.join(plugins(STRATEGIES))}, or an "
            f"import path) or --ckpt_path FILE{hint}"
        )
    if names_code(rest):
        allow_current_folder()
    rest = _helped(rest)
    configs = _contents(rest)
    run_name, logger, root = _run_name(configs, command), "csv", _root(configs)
    before: list[str] = []
    after: list[str] = []
    for word in rest:
        flag, _, value = word.partition("=")
        if flag == "--logger":
            logger = value
        elif flag == "--trainer.default_root_dir":
            root = str(Path(value).expanduser())  # results lie under it
            after.append(f"{flag}={root}")
        elif flag == "--devices":
            after.append(f"--trainer.devices={value}")
        elif word in ("--shard", "--trainer.strategy=fsdp"):
            after.append(f"--trainer.strategy={SHARDED}")  # named by its class, it can have options
        elif flag in STRATEGY_FLAGS and not value.startswith("{"):
            cls = find_strategy(value)
            run_name = cls.__name__
            after.append(f"--model.strategy={import_path(cls)}")
            if not given & {"--config", "--model.name_or_path", "--ckpt_path"}:
                before += _packaged_config(strategy_name(cls))
        else:
            if flag == "--ckpt_path":
                path = newest_whole(Path(value))
                word = f"{flag}={path}"
                settings = _settings(path, command in LEARNS, named_classes(rest))
                if command == run_name == "fit" and not given & {*STRATEGY_FLAGS}:
                    run_name = _class_name(settings["model"]["strategy"]["class_path"])
                before.append(f"--config={yaml_text.dumps(settings)}")
            after.append(word)
    if command in ("fit", BUDGET) and not asks:
        _check_root(Path(root))
    if command == BUDGET:  # a second start goes on in the folder of the first
        folder = Path(root) / run_name.lower() / BUDGET
        return [
            command,
            *before,
            *after,
            "--trainer.logger=false",
            f"--trainer.default_root_dir={folder}",
        ]
    return [command, *_logger(logger, run_name.lower(), root), *before, *after]


def _contents(words: Sequence[str]) -> list[Any]:
    """What the words' configs hold. Those that cannot be read are left out; the parser refuses
    them.
    """
    found = []
    for word in words:
        flag, _, path = word.partition("=")
        if flag == "--config":
            with suppress(OSError, ValueError, yaml.YAMLError):
                found.append(yaml_text.load(Path(path).read_text(encoding="utf-8")))
    return found


def _last(configs: Sequence[Any], *keys: str) -> Any:
    """The value at these nested keys in the last config that sets it, or None."""
    for value in reversed(configs):
        with suppress(KeyError, TypeError):
            for key in keys:
                value = value[key]
            return value
    return None


def _root(configs: Sequence[Any]) -> str:
    """Where results go, as far as configs say."""
    root = _last(configs, "trainer", "default_root_dir")
    return str(Path(root).expanduser()) if isinstance(root, str) else RUNS


def _run_name(configs: Sequence[Any], command: str) -> str:
    """The strategy of a run that a config names; other commands have their own name."""
    strategy = _last(configs, "model", "strategy") if command in ("fit", BUDGET) else None
    path = strategy.get("class_path") if isinstance(strategy, dict) else strategy
    return _class_name(path) if isinstance(path, str) else command


def _class_name(path: str) -> str:
    return path.rpartition(".")[2]


def _only_overrides(word: str) -> bool:
    """Whether a word names a config that sets nothing but patterns, as ``budget`` writes it. Beside
    it a strategy keeps its packaged config.
    """
    flag, _, path = word.partition("=")
    try:
        said = yaml_text.load(Path(path).read_text(encoding="utf-8")) if flag == "--config" else {}
        return list(said) == ["model"] and list(said["model"]) == ["overrides"]
    except (OSError, ValueError, yaml.YAMLError, TypeError):
        return False


def _check_root(root: Path) -> None:
    """Refuse a folder that results cannot be written to, before any work is done."""
    place = root.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise SparsifyError(
            f"results go to {root}, and {place} is no folder that can be written to; give another "
            "one as --trainer.default_root_dir"
        )


def _packaged_config(name: str) -> list[str]:
    path = files("sparsify.configs") / f"{name}.yaml"
    if not path.is_file():
        return []
    print(f"settings for the embedded model from configs/{name}.yaml", file=sys.stderr)
    return [f"--config={path}"]


def _split(args: Sequence[str]) -> list[str]:
    """Join ``--flag value`` to ``--flag=value`` for the flags that :func:`expand` reads."""
    out: list[str] = []
    words = iter(_listed(args))
    for word in words:
        if word in (
            *STRATEGY_FLAGS,
            "--trainer.strategy",
            "--trainer.default_root_dir",
            "--devices",
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


def _helped(words: list[str]) -> list[str]:
    """Give ``--model.strategy.help [NAME]`` the class's path; the default is ``--strategy``'s."""
    start = next((i for i, word in enumerate(words) if word.startswith(STRATEGY_HELP)), None)
    if start is None:
        return words
    name, after = words[start].partition("=")[2], words[start + 1 :]
    if not name and after and not after[0].startswith("-"):
        name, after = after[0], after[1:]
    if not name:
        given = dict(word.partition("=")[::2] for word in words)
        name = next((given[flag] for flag in STRATEGY_FLAGS if flag in given), "")
    asked = f"{STRATEGY_HELP}={import_path(find_strategy(name))}" if name else STRATEGY_HELP
    return [*words[:start], asked, *after]


def _listed(args: Sequence[str]) -> list[str]:
    """Make one word of ``--patterns A B``, which is ``--patterns=["A", "B"]``."""
    out = list(args)
    if "--patterns" in out:
        start = out.index("--patterns")
        end = next((i for i in range(start + 1, len(out)) if out[i].startswith("-")), len(out))
        given = out[start + 1 : end]
        if not given or not given[0].startswith("["):
            out[start:end] = [f"--patterns={yaml_text.dumps(given)}"]
    return out


def _logger(name: str, run_name: str, root: str) -> list[str]:
    path = LOGGERS.get(name.lower())
    if path is None:
        raise SparsifyError(
            f"there is no logger {name!r}; there are {', '.join(LOGGERS)}, "
            "or --trainer.logger CLASS"
        )
    packages = PACKAGES.get(name.lower(), ())
    if packages and not any(map(find_spec, packages)):
        raise SparsifyError(
            f"--logger {name} needs the package {packages[0]}, which is not installed: "
            f"pip install 'sparsify-llm[{name.lower()}]'"
        )
    options = [f"--trainer.logger={path}", f"--trainer.logger.save_dir={root}"]
    if name.lower() == "wandb":
        return [*options, "--trainer.logger.project=sparsify"]
    return [*options, f"--trainer.logger.name={run_name}"]


def _settings(path: Path, resumes: bool, named: Collection[str]) -> dict[str, Any]:
    """The settings that a command takes from a checkpoint's run."""
    file = path / METADATA if path.is_dir() else path
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        config = checkpoint["hyper_parameters"]["config"]
        written = checkpoint.get("settings_sha256", content_hash(config))  # older ones have no hash
        altered = written != content_hash(config)
    except Exception as error:
        raise SparsifyError(
            f"--ckpt_path {path}: this is not a checkpoint that sparsify wrote; "
            "give the checkpoints/last.ckpt of a run"
        ) from error
    if altered:
        raise SparsifyError(
            f"--ckpt_path {path}: the settings in it are not those that were written; resume from "
            "another checkpoint of the run"
        )

    def tell(line: str) -> None:
        print(printable(line), file=sys.stderr)

    return settings_of(config, resumes, named, tell)
