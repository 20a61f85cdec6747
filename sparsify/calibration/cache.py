"""Results of calibration on disk, under the hash of all that they depend on.

One folder a result, one safetensors file a layer in the order of computation, and their hashes; the
folder gets its name when it is whole.
"""

import hashlib
import json
import logging
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.pattern import NMPattern
from sparsify.strategy import LayerResult, SparsityStrategy

log = logging.getLogger("sparsify")

INDEX = "files.json"
ENGINE = tuple(sorted(Path(__file__).parents[1].rglob("*.py")))  # all of the core


def cache_folder() -> Path:
    """``$SPARSIFY_CACHE``, or ``sparsify`` in the user's cache folder."""
    if own := os.environ.get("SPARSIFY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sparsify"


def result_folder(strategy: SparsityStrategy, inputs: Mapping[str, Any]) -> Path | None:
    """Where a result is kept: under the hash of what it depends on. None if that cannot be told.

    Args:
        strategy: whose results they are; all that it holds counts, its source code, and whatever
            modules lie beside that, as it may import them.
        inputs: base model, text, pattern, layers: anything that JSON takes.
    """
    classes = {cls for part in strategy.modules() for cls in type(part).__mro__}
    sources = {
        sys.modules[cls.__module__].__file__ for cls in classes if issubclass(cls, SparsityStrategy)
    }
    try:
        state = pickle.dumps(strategy)
    except Exception as error:  # an object's own __reduce__ may raise anything
        log.warning("the calibration's result is not kept: %s", error)
        return None
    digest = hashlib.sha256(state)
    beside = {file for source in sources if source for file in Path(source).parent.glob("*.py")}
    for file in [*ENGINE, *sorted(beside)]:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    versions = {name: version(name) for name in ("torch", "transformers")}
    content = {"strategy": strategy.describe(), "versions": versions, **inputs}
    digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return cache_folder() / digest.hexdigest()


def text_hash(windows_ST: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(windows_ST.numpy().tobytes()).hexdigest()


class ResultWriter:
    """Stores results layer by layer; without :meth:`finish` nothing is kept.

    A disk that is full costs the cache, not the run.

    Args:
        folder: where the whole result will be.
        patterns: of each layer.
    """

    def __init__(self, folder: Path, patterns: Mapping[str, NMPattern]) -> None:
        self._folder, self._patterns = folder, patterns
        self._partial: Path | None = None
        self._hashes: dict[str, str] = {}  # by file name
        with self._guard():
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            log.warning("the calibration's result is not kept for later runs: %s", error)
            self.close()

    def add(self, name: str, result: LayerResult) -> None:
        """Store one layer's result."""
        if self._partial is None:
            return
        rank_OG = self._patterns[name].rank(result.mask)
        tensors = {"rank_OG": rank_OG.cpu().contiguous()}
        if result.weight is not None:
            tensors["weight_OI"] = result.weight.cpu().contiguous()
        path = self._partial / f"{len(self._hashes):05}.safetensors"
        with self._guard():
            save_file(tensors, path, {"layer": name})
            self._hashes[path.name] = _hash(path)

    def finish(self, seconds: float, device: str) -> None:
        """Put the result, which took so long to compute on a device of this name, in its place,
        unless another run was faster.
        """
        if self._partial is not None and not self._folder.exists():
            with self._guard():
                index = {"seconds": seconds, "device": device, "files": self._hashes}
                (self._partial / INDEX).write_text(json.dumps(index), encoding="utf-8")
                self._partial.rename(self._folder)
                log.info("kept the calibration's result in %s", self._folder)

    def close(self) -> None:
        """Remove what was not finished."""
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None


def read_results(
    folder: Path, patterns: Mapping[str, NMPattern]
) -> Iterator[tuple[str, LayerResult]]:
    """Yield stored results in the order in which they were computed.

    Raises:
        SparsifyError: a file is damaged.
    """
    try:
        hashes = _read_index(folder)["files"]
        damaged = [name for name, digest in hashes.items() if _hash(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError) as error:
        damaged = [str(error)]
    if damaged:
        raise SparsifyError(
            f"{folder}, the result of an earlier calibration, is damaged ({', '.join(damaged)})"
        )
    for file_name in hashes:
        with safe_open(folder / file_name, framework="pt") as file:
            name = file.metadata()["layer"]
            mask_OI = patterns[name].unrank(file.get_tensor("rank_OG"))
            updated = "weight_OI" in file.keys()  # noqa: SIM118  # no mapping
            weight_OI = file.get_tensor("weight_OI") if updated else None
        yield name, LayerResult(mask_OI, weight_OI)


def is_whole(folder: Path, patterns: Mapping[str, NMPattern]) -> bool:
    """Whether a stored result can be used; one that is damaged is removed, with a warning: a cache
    costs no run.
    """
    if not folder.exists():
        return False
    try:
        computing_cost(folder)
        names = [name for name, _ in read_results(folder, patterns)]
        if sorted(names) != sorted(patterns):
            raise SparsifyError("its layers are not the model's")
    except Exception as error:  # a damaged file ends in many kinds
        log.warning("%s; it is computed again", error)
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def computing_cost(folder: Path) -> tuple[float, str]:
    """How many seconds the stored result took to compute, and on what device."""
    index = _read_index(folder)
    return float(index["seconds"]), str(index["device"])


def _read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
