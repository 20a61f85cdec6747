"""One calibration's result on disk, written block by block, so that a stopped one goes on.

A folder holds one safetensors file a layer, in the order of computation, and ``files.json`` with
their hashes and its own, which is replaced as a whole whenever a block is finished. As long as
layers are missing the folder's name ends in ``.partial``; who writes there holds the lock of its
file ``lock``, which is gone with its process.
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
    """Stores results, block by block; without :meth:`finish` they are those of a part.

    A disk that is full costs the cache, not the run; what was stored before stays.

    Args:
        folder: where the whole result will be.
        patterns: of each layer.
        about: what to tell of it, for people: anything that JSON takes.
        goes_on: whether to use what a run that was stopped left; otherwise it is removed.

    Attributes:
        seconds: that computing took the runs that were stopped.
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
        self._files: dict[str, str] = {}  # file name by layer, of blocks that are finished too
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
            log.info("another run computes this calibration too; this one's is not kept")
            return
        self._partial = partial
        if goes_on:
            self._take_over(partial)
        for path in partial.iterdir():
            if path.name not in (*self._committed, LOCK, *((INDEX,) if self._committed else ())):
                path.unlink()

    def _take_over(self, partial: Path) -> None:
        """What a stopped run has finished, unless a part of it is damaged."""
        try:
            index = read_index(partial)
            files = {name: file for file, name in _layers(partial, index["files"])}
            if odd := [name for name in files if name not in self._patterns]:
                raise SparsifyError(f"it holds {odd[0]}, which is no layer of the model")
            self.seconds = float(index["seconds"])
        except FileNotFoundError:
            return
        except Exception as error:  # a damaged file ends in many kinds
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
        """Whether the results of these layers, one at least, were stored by a run before."""
        wanted = list(names)
        return bool(wanted) and all(self._files.get(name) in self._committed for name in wanted)

    def read(self, name: str) -> LayerResult:
        """The stored result of a layer that :meth:`holds`."""
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
        path = self._partial / f"{len(self._hashes):05}.safetensors"
        with self._guard():
            save_file(tensors, path, {"layer": name})
            flush(path)
            self._files[name], self._hashes[path.name] = path.name, hash_file(path)

    def commit(self, seconds: float) -> None:
        """A block is finished, after so many seconds of this run."""
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
        """Put the result, which took so long to compute on a device of this name, in its place,
        unless another run was faster.
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
        """Keep the finished blocks of what was not finished, and remove the rest."""
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
        log.warning(
            "%s, the result of an earlier calibration, is damaged (%s); it is computed again",
            folder,
            error,
        )
        shutil.rmtree(folder, ignore_errors=True)
        return False
    os.utime(folder / INDEX)  # that it was used: what was not goes first
    return True


def computing_cost(folder: Path) -> tuple[float, str]:
    """How many seconds the stored result took to compute, and on what device."""
    index = read_index(folder)
    return float(index["seconds"]), str(index["device"])


def read_index(folder: Path) -> dict[str, Any]:
    """What the folder's index says.

    Raises:
        FileNotFoundError: there is none.
        SparsifyError: it is damaged.
    """
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if KEY not in index or is_altered(index):
            raise ValueError("its hash is another, or missing")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SparsifyError(f"its {INDEX} is damaged ({error})") from error
    return index


def _layers(folder: Path, hashes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(file, layer) of files that are as their hashes say."""
    for file_name, digest in hashes.items():
        if hash_file(folder / file_name) != digest:
            raise SparsifyError(f"{file_name} is not what was written")
        with safe_open(folder / file_name, framework="pt") as file:
            yield file_name, file.metadata()["layer"]


def _read(path: Path, patterns: Mapping[str, NMPattern]) -> tuple[str, LayerResult]:
    with safe_open(path, framework="pt") as file:
        name = file.metadata()["layer"]
        mask_OI: Tensor = patterns[name].unrank(file.get_tensor("rank_OG"))
        updated = "weight_OI" in file.keys()  # noqa: SIM118  # no mapping
        return name, LayerResult(mask_OI, file.get_tensor("weight_OI") if updated else None)
