"""The cache of calibration results, each in a folder named by a hash of all that it depends on."""

import hashlib
import json
import logging
import math
import os
import pickle
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.calibration.results import INDEX, LOCK, PARTIAL, read_index
from sparsify.common.errors import SparsifyError
from sparsify.common.files import cache_folder
from sparsify.common.folder_lock import locked
from sparsify.masking.strategy import SparsityStrategy

log = logging.getLogger("sparsify")

ENGINE = tuple(sorted(Path(__file__).parents[1].rglob("*.py")))  # all source files of sparsify
# Folders of Python and of installed packages.
LIBRARIES = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
_NO_INPUTS = ("_name_or_path", "transformers_version")  # keys of a config to leave out


def result_folder(strategy: SparsityStrategy, inputs: Mapping[str, Any]) -> Path | None:
    """The folder of a result, named by a hash of what it depends on; None if that cannot be hashed.

    Args:
        strategy: the strategy that makes the result. The hash covers its state, its source code,
            all modules beside it and of its package, or loaded ones below, as it may import them.
        inputs: base model, text, pattern, layers and so on, as JSON values.
    """
    classes = {cls for part in strategy.modules() for cls in type(part).__mro__}
    own = [cls for cls in classes if issubclass(cls, SparsityStrategy)]
    sources = {cls: getattr(sys.modules.get(cls.__module__), "__file__", None) for cls in own}
    if bare := [cls for cls, file in sources.items() if not (file and os.path.isfile(file))]:
        log.warning(
            "the calibration's result is not kept: the source of %s is in no file, so that a "
            "change of it would not be seen",
            bare[0].__name__,
        )
        return None
    try:
        state = pickle.dumps(strategy)
    except Exception as error:  # __reduce__ of an object may raise anything
        log.warning("the calibration's result is not kept: %s", error)
        return None
    digest = hashlib.sha256(state)
    near = {file for cls, source in sources.items() for file in _near(cls, Path(str(source)))}
    for file in sorted({*ENGINE, *near}):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    versions = {name: version(name) for name in ("torch", "transformers")}
    content = {"strategy": strategy.describe(), "versions": versions, **inputs}
    digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return cache_folder() / digest.hexdigest()


def _near(cls: type, source: Path) -> set[Path]:
    """The source files that a class may use: those beside its own, and all of its package; if it is
    in none, the loaded ones below its folder.
    """
    folder = source.parent
    package = sys.modules.get(cls.__module__.partition(".")[0])
    if roots := list(getattr(package, "__path__", ())):
        further = {file for root in roots for file in Path(root).rglob("*.py")}
    else:
        files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        below = {Path(file) for file in files if file and folder in Path(file).parents}
        further = {file for file in below if LIBRARIES.isdisjoint(file.parents)}
    return {*folder.glob("*.py"), *further}


def computation(model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    """What a model's outputs depend on besides weights and text, as JSON values."""
    # A model with equal weights and another configuration computes something else.
    config = model.config.to_dict().items()
    return {
        "config": {key: value for key, value in config if key not in _NO_INPUTS},
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype),
        "device": device.type,
        # Another number of threads rounds sums differently.
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def text_hash(windows_ST: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(windows_ST.numpy().tobytes()).hexdigest()


def cache_limit() -> int:
    """How many bytes the cache may hold: ``$SPARSIFY_CACHE_SIZE`` GiB, by default 20.

    Raises:
        SparsifyError: the variable is not a finite number above zero.
    """
    said = os.environ.get("SPARSIFY_CACHE_SIZE", "20")
    try:
        limit = float(said) * 2**30
        if not 0 < limit < math.inf:
            raise ValueError
    except ValueError as error:
        raise SparsifyError(
            f"SPARSIFY_CACHE_SIZE is {said!r}; it must be a number of GiB above 0, such as 20"
        ) from error
    return int(limit)


@dataclass(frozen=True)
class Entry:
    """A result in the cache, or the finished part of one.

    Attributes:
        folder: its folder.
        size: its size in bytes.
        used: when it was last written or read, in seconds since the epoch.
        about: strategy, model, samples and seconds from its index; empty if that is damaged.
    """

    folder: Path
    size: int
    used: float
    about: dict[str, Any]

    @property
    def partial(self) -> bool:
        """Whether it is only a part, left by a stopped run or being written by a running one."""
        return self.folder.suffix == PARTIAL or self.folder.name.startswith(PARTIAL)

    def remove(self) -> bool:
        """Remove it, unless a run is writing it; return whether it is gone."""
        if self.partial and _in_use(self.folder):
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        return not self.folder.exists()


def entries() -> list[Entry]:
    """All results in the cache, in the order of their last use, oldest first."""
    root = cache_folder()
    folders = [path for path in root.iterdir() if _is_entry(path)] if root.is_dir() else []
    kept = []
    for folder in folders:
        with suppress(FileNotFoundError):  # another run is removing it
            index = folder / INDEX
            used = (index if index.exists() else folder).stat().st_mtime
            size = sum(path.stat().st_size for path in folder.iterdir())
            kept.append(Entry(folder, size, used, _about(folder)))
    return sorted(kept, key=lambda entry: entry.used)


def make_room() -> None:
    """Remove the results that were used longest ago until the rest is within :func:`cache_limit`;
    the newest always stays.
    """
    kept = entries()
    size, limit = sum(entry.size for entry in kept), cache_limit()
    for entry in kept[:-1]:
        if size <= limit:
            return
        if entry.remove():
            size -= entry.size


_ENTRY = re.compile(rf"[0-9a-f]{{64}}({re.escape(PARTIAL)})?|{re.escape(PARTIAL)}-\w{{8}}")


def _is_entry(path: Path) -> bool:
    return bool(_ENTRY.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()


def _about(folder: Path) -> dict[str, Any]:
    try:
        index = read_index(folder)
        return {**index["about"], "seconds": float(index["seconds"])}
    except (OSError, SparsifyError, KeyError, TypeError, ValueError):
        return {}


def _in_use(folder: Path) -> bool:
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        return not locked(handle)
    finally:
        os.close(handle)
