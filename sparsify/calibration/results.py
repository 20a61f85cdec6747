"""Stores the result of a calibration block by block, so that a stopped one can go on.

A folder holds one safetensors file per layer, numbered in the order of computation, and
``files.json`` with their hashes and its own. That index is replaced as a whole whenever a block is
finished. While layers are missing, the folder's name ends in ``.partial``. The process that writes
there holds a lock on the file ``lock``, which the system releases when the process ends.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.common.file_hashes import hash_file
from sparsify.common.folder_lock import locked
from sparsify.common.replace import flush, whole_file
from sparsify.common.seal import KEY, is_altered, sealed
from sparsify.masking.pattern import NMPattern
from sparsify.masking.strategy import LayerResult

log = logging.getLogger("sparsify")

INDEX = "files.json"
LOCK = "lock"
PARTIAL = ".partial"


class ResultWriter:
    """Stores results block by block; until :meth:`finish`, they are a partial result.

    If the disk is full, the run goes on without the cache; blocks stored before stay.

    Args:
        folder: where the whole result will be.
        patterns: the pattern of each layer.
        about: a description for people, in JSON values.
        goes_on: whether to continue what a stopped run left; otherwise that is removed.

    Attributes:
        seconds: how long the stopped runs have computed.
    """

    def __init__(
        self,
        folder: Path,
        patterns: Mapping[str, NMPattern],
        about: Mapping[str, Any] | None = None,
        goes_on: bool = False,
    ) -> None:
        self._folder, self._patterns, self._about = folder, patterns, dict(about or {})
        self._partial: Path | None = None
        self._lock: int | None = None
        self._files: dict[str, str] = {}  # file name by layer, finished blocks included
        self._hashes: dict[str, str] = {}
        self._committed: dict[str, str] = {}
        self._failed = False
        self.seconds = 0.0
        with self._guard():
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._open(folder.with_name(folder.name + PARTIAL), goes_on)

    def _open(self, partial: Path, goes_on: bool) -> None:
        partial.mkdir(exist_ok=True, mode=0o700)
        self._lock = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        if not locked(self._lock):
            os.close(self._lock)
            self._lock = None
            log.info("another run computes this calibration too; this run does not keep its result")
            return
        self._partial = partial
        if goes_on:
            self._take_over(partial)
        for path in partial.iterdir():
            if path.name not in (*self._committed, LOCK, *((INDEX,) if self._committed else ())):
                path.unlink()

    def _take_over(self, partial: Path) -> None:
        """Use what a stopped run has finished, unless a part of it is damaged."""
        try:
            index = read_index(partial)
            files = {name: file for file, name in _layers(partial, index["files"])}
            if odd := [name for name in files if name not in self._patterns]:
                raise SparsifyError(f"it holds {odd[0]}, which is not a layer of the model")
            self.seconds = float(index["seconds"])
        except FileNotFoundError:
            return
        except Exception as error:  # a damaged file may raise anything
            log.warning("%s is damaged (%s); it is computed again", partial, error)
            return
        self._files, self._hashes = files, dict(index["files"])
        self._committed = dict(self._hashes)
        log.info("going on after %d layers of a calibration that was stopped", len(files))

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            log.warning("the calibration's result is not kept for later runs: %s", error)
            self._failed = True

    def holds(self, names: Iterable[str]) -> bool:
        """Whether an earlier run stored the results of all these layers; False for no layers."""
        wanted = list(names)
        return bool(wanted) and all(self._files.get(name) in self._committed for name in wanted)

    def read(self, name: str) -> LayerResult:
        """The stored result of a layer for which :meth:`holds` is true."""
        if self._partial is None:
            raise RuntimeError(f"{name} is not stored any more")
        return _read(self._partial / self._files[name], self._patterns)[1]

    def add(self, name: str, result: LayerResult) -> None:
        """Store one layer's result."""
        if self._partial is None or self._failed or name in self._files:
            return
        rank_OG = self._patterns[name].rank(result.mask)
        tensors = {"rank_OG": rank_OG.cpu().contiguous()}
        if result.weight is not None:
            tensors["weight_OI"] = result.weight.cpu().contiguous()
        if result.inputs is not None:
            tensors["inputs_I"] = result.inputs.cpu().contiguous()
        path = self._partial / f"{len(self._hashes):05}.safetensors"
        with self._guard():
            save_file(tensors, path, {"layer": name})
            flush(path)
            self._files[name], self._hashes[path.name] = path.name, hash_file(path)

    def commit(self, seconds: float) -> None:
        """Note that a block is finished, after so many seconds of this run."""
        if self._partial is not None and not self._failed:
            with self._guard():
                self._write_index(self._partial, seconds, None)
                self._committed = dict(self._hashes)

    def _write_index(self, partial: Path, seconds: float, device: str | None) -> None:
        index = {"seconds": self.seconds + seconds, "device": device, "about": self._about}
        index["files"] = self._hashes
        with whole_file(partial / INDEX) as file:
            file.write(json.dumps(sealed(index)).encode())

    def finish(self, seconds: float, device: str) -> None:
        """Move the complete result to its place, unless another run did so first.

        Args:
            seconds: how long this run has computed.
            device: name of the device that it computed on.
        """
        if self._partial is None or self._failed:
            return
        if self._folder.exists():
            self._committed = {}
            return
        with self._guard():
            self._write_index(self._partial, seconds, device)
            (self._partial / LOCK).unlink()
            self._partial.rename(self._folder)
            self._partial = None
            log.info("kept the calibration's result in %s", self._folder)

    def close(self) -> None:
        """Keep a partial result for a later run if it has finished blocks, else remove it."""
        if self._partial is not None:
            if not self._committed:
                shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read_results(
    folder: Path, patterns: Mapping[str, NMPattern]
) -> Iterator[tuple[str, LayerResult]]:
    """Yield stored results in the order in which they were computed.

    Raises:
        SparsifyError: a file is damaged.
    """
    for file_name, _ in _layers(folder, read_index(folder)["files"]):
        yield _read(folder / file_name, patterns)


def is_whole(folder: Path, patterns: Mapping[str, NMPattern]) -> bool:
    """Whether there is a stored result that can be used. A damaged one is removed with a warning:
    the cache must not stop a run.
    """
    if not folder.exists():
        return False
    try:
        computing_cost(folder)
        names = [name for name, _ in read_results(folder, patterns)]
        if sorted(names) != sorted(patterns):
            raise SparsifyError("its layers are not the model's")
    except Exception as error:  # a damaged file may raise anything
        log.warning(
            "%s, the result of an earlier calibration, is damaged (%s); it is computed again",
            folder,
            error,
        )
        shutil.rmtree(folder, ignore_errors=True)
        return False
    os.utime(folder / INDEX)  # marks it as used: make_room removes by last use
    return True


def computing_cost(folder: Path) -> tuple[float, str]:
    """The seconds that the stored result took to compute, and the name of the device."""
    index = read_index(folder)
    return float(index["seconds"]), str(index["device"])


def read_index(folder: Path) -> dict[str, Any]:
    """Read the folder's index.

    Raises:
        FileNotFoundError: there is no index.
        SparsifyError: the index is damaged.
    """
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if KEY not in index or is_altered(index):
            raise ValueError("its hash is missing or does not fit")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SparsifyError(f"its {INDEX} is damaged ({error})") from error
    return index


def _layers(folder: Path, hashes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (file, layer) for each file, after checking its hash."""
    for file_name, digest in hashes.items():
        if hash_file(folder / file_name) != digest:
            raise SparsifyError(f"{file_name} was changed since it was written")
        with safe_open(folder / file_name, framework="pt") as file:
            yield file_name, file.metadata()["layer"]


def _read(path: Path, patterns: Mapping[str, NMPattern]) -> tuple[str, LayerResult]:
    with safe_open(path, framework="pt") as file:
        name = file.metadata()["layer"]
        mask_OI: Tensor = patterns[name].unrank(file.get_tensor("rank_OG"))
        held = set(file.keys())
        weight_OI, inputs_I = (
            file.get_tensor(part) if part in held else None for part in ("weight_OI", "inputs_I")
        )
        return name, LayerResult(mask_OI, weight_OI, inputs_I)
