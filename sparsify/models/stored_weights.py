"""Reads the weights of a saved model one tensor at a time."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.common.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class StoredWeights:
    """The tensors of a folder's safetensors files, by name; each is read when it is asked for.

    Args:
        folder: where the files are.
        may_lack: report a folder without safetensors files in ``damaged`` instead of raising.

    Attributes:
        folder: where the files are.
        damaged: what is wrong with the files themselves, one sentence each.
        others: safetensors files that a loader does not read, as they are neither in the index
            nor the single file.

    Raises:
        SparsifyError: the path is not a folder, or it holds no safetensors files.
    """

    def __init__(self, folder: Path, may_lack: bool = False) -> None:
        self.folder = folder
        self.damaged: list[str] = []
        try:
            present = {path.name for path in _weight_files(folder)}
        except SparsifyError as error:
            if not may_lack:
                raise
            present = set()
            self.damaged.append(str(error))
        self._file_of: dict[str, Path] = {}
        listed: dict[str, str] = {}
        if (folder / INDEX).is_file():
            listed = self._index()
            files = set(listed.values()) or present
        elif SINGLE in present or not present:
            files = present & {SINGLE}
        else:
            files = present
            self.damaged.append(f"without {INDEX} a loader reads only {SINGLE}, which is missing")
        self.others = sorted(present - files)
        for file in sorted(files):
            if file in present:
                self._open(folder / file)
            else:
                self.damaged.append(f"{file} is missing, though {INDEX} lists it")
        if listed:
            self._check_listed(listed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            SparsifyError: its file cannot be read any more.
        """
        with self._reading(name) as file:
            return cast(Tensor, file.get_tensor(name))

    def overwrite(self, name: str, values: Tensor) -> None:
        """Write other values of the same shape and type over a tensor, in its file.

        Raises:
            SparsifyError: the file holds it in another shape or type.
        """
        path, content = self._file_of[name], values.detach().cpu().contiguous()
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(length))[name]["data_offsets"]
            same = self.get(name).shape == content.shape and content.nbytes == end - begin
            if not same:
                raise SparsifyError(
                    f"{path.name}: {name} is of another shape or type than the new values, "
                    f"{tuple(content.shape)} of {content.dtype}; nothing was written"
                )
            file.seek(8 + length + begin)
            file.write(content.view(-1).view(torch.uint8).numpy().data)

    def check(self) -> None:
        """Refuse a folder whose files are not whole.

        Raises:
            SparsifyError: they are damaged, or do not agree with the index.
        """
        if self.damaged:
            raise SparsifyError(
                f"the weights in {self.folder} are damaged: {'; '.join(self.damaged)}; export or "
                "fetch the model again"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header; errors as :meth:`get`."""
        with self._reading(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self) -> torch.dtype | None:
        """The type that most bytes of the float tensors have; None if there are none of 16 or 32
        bits.
        """
        sizes: dict[torch.dtype, int] = {}
        for path in set(self._file_of.values()):
            with safe_open(path, framework="pt") as file:
                for tensor in map(file.get_slice, file.keys()):
                    if (dtype := _FLOATS.get(tensor.get_dtype())) is not None:
                        size = math.prod(tensor.get_shape()) * dtype.itemsize
                        sizes[dtype] = sizes.get(dtype, 0) + size
        return max(sizes, key=lambda dtype: sizes[dtype], default=None)

    @contextmanager
    def _reading(self, name: str) -> Iterator[Any]:
        path = self._file_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise SparsifyError(f"{path.name}: {name} is not readable ({error})") from error

    def _open(self, path: Path) -> None:
        if not path.is_file():  # opening a pipe would wait
            self.damaged.append(f"{path.name}: not a regular file")
            return
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            self.damaged.append(f"{path.name}: not a readable safetensors file ({error})")
            return
        for name in names:
            if name in self._file_of:
                self.damaged.append(f"{name} is in both {self._file_of[name].name} and {path.name}")
            self._file_of[name] = path

    def _index(self) -> dict[str, str]:
        """The file of every tensor, from the index; empty if the index cannot be read."""
        try:
            listed = dict(read_json(self.folder / INDEX)["weight_map"])
            return {str(name): str(file) for name, file in listed.items()}
        except (SparsifyError, KeyError, TypeError, ValueError) as error:
            self.damaged.append(f"{INDEX} has no readable weight_map ({error})")
            return {}

    def _check_listed(self, listed: dict[str, str]) -> None:
        """Check that the index names the file of every tensor: a loader finds them through it."""
        for name, path in self._file_of.items():
            if listed.get(name) != path.name:
                self.damaged.append(f"{name} is in {path.name}, but {INDEX} does not say so")
        read = {path.name for path in self._file_of.values()}
        for name, file in listed.items():
            if name not in self and file in read:
                self.damaged.append(f"{name} is not in {file}, though {INDEX} lists it there")


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise SparsifyError(f"{folder} is not a folder; name one that `sparsify export` wrote")
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(folder.glob("*.bin")):
        raise SparsifyError(
            f"{folder} holds its weights as pickle files (.bin), which can run code and are not "
            "read; load the model and save it with save_pretrained, which writes safetensors"
        )
    inner = folder / "export"  # of a run's folder
    hint = f"; name {inner}" if any(inner.glob("*.safetensors")) else ""
    raise SparsifyError(
        f"{folder} holds no safetensors files, so there are no weights to read{hint}"
    )
