"""Reads and writes masks in the NumPy archive in which learned masks are published,
``mask_compressed.npz``.

It has one entry per layer. The key is the weight's name with ``.mask`` appended. The value is
``np.packbits`` of the mask, row by row in the layout of the stored weight, with zeros at the end of
the last byte. The file holds no shapes: they come from the base model.

Shapes: O out, I in.
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.common.replace import whole_file
from sparsify.export.exchange.layers import LayerShape, check_known, layer_name

MAX_HEADER = 1024  # bytes; NumPy writes 128
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(path: Path, shapes: Mapping[str, LayerShape]) -> Iterator[tuple[str, Tensor]]:
    """Read masks one by one, without unpickling anything or unpacking more than the shapes require.

    Args:
        path: the archive.
        shapes: the shapes of the base model's layers, by qualified name.

    Yields:
        A layer's qualified name and its mask, bool ``[O, I]``, True = kept.

    Raises:
        SparsifyError: the file is damaged or not such an archive, or was made for another model.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a damaged archive can raise anything
        raise SparsifyError(
            f"{path}: not a readable npz archive ({error}); name a mask_compressed.npz"
        ) from error
    with archive:
        for name, entry in _entries(path, archive, shapes).items():
            yield name, _read(path, archive, entry, shapes[name])


def _entries(
    path: Path, archive: zipfile.ZipFile, shapes: Mapping[str, LayerShape]
) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries by layer name; their names and sizes are checked."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        key = entry.filename.removesuffix(".npy")
        name = layer_name(key, shapes)
        if not key.endswith(".mask"):
            raise SparsifyError(
                f"{path}: {key!r} does not name a mask; every key must be a weight's name and "
                "'.mask': give an archive that holds only masks"
            )
        check_known(path, key, name, shapes)
        if name in entries:
            raise SparsifyError(f"{path}: {key!r} is a second mask of {name}; a layer has only one")
        if entry.file_size > _bytes(shapes[name]) + MAX_HEADER:
            raise _wrong(
                path, key, shapes[name], f"it unpacks to {entry.file_size} bytes with its header"
            )
        # Other methods may unpack to any size in one step.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SparsifyError(
                f"{path}: {key!r} is compressed by method {entry.compress_type}; NumPy's archives "
                "are stored or deflated: write it with np.savez_compressed"
            )
        entries[name] = entry
    if not entries:
        raise SparsifyError(f"{path}: the archive holds no masks")
    return entries


def _read(
    path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, shape: LayerShape
) -> Tensor:
    key = entry.filename.removesuffix(".npy")
    try:
        with archive.open(entry) as stream:
            _check_header(path, key, stream, shape)
            data = stream.read(_bytes(shape))
            if len(data) < _bytes(shape) or stream.read(1):  # reading on checks the CRC too
                raise _wrong(path, key, shape, f"its array holds {len(data)} bytes")
    except SparsifyError:
        raise
    except Exception as error:  # NumPy may raise anything for a damaged header
        raise SparsifyError(
            f"{path}: {key!r} is damaged ({error}); fetch the file again"
        ) from error
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    count = shape.rows * shape.columns
    if bits[count:].any():
        raise _wrong(path, key, shape, "the bits behind the last weight are not zero")
    mask = torch.from_numpy(bits[:count]).view(torch.bool)
    return shape.from_stored(mask.view(shape.stored))


def _check_header(path: Path, key: str, stream: IO[bytes], shape: LayerShape) -> None:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"npy version {version}")
    array_shape, _, dtype = _HEADERS[version](stream, max_header_size=MAX_HEADER)
    if dtype != np.uint8 or array_shape != (_bytes(shape),):
        raise _wrong(path, key, shape, f"it is an array {array_shape} of {dtype}")


def _bytes(shape: LayerShape) -> int:
    return -(-shape.rows * shape.columns // 8)


def _wrong(path: Path, key: str, shape: LayerShape, problem: str) -> SparsifyError:
    return SparsifyError(
        f"{path}: {key!r}: {problem}; the bits of a mask {shape.rows} x {shape.columns} are "
        f"{_bytes(shape)} uint8: give the base model that the masks were made for"
    )


def write_npz(
    path: Path,
    masks: Mapping[str, Tensor],
    shapes: Mapping[str, LayerShape] | None = None,
    overwrite: bool = True,
) -> None:
    """Write masks in the same format, whole or not at all.

    Args:
        path: the archive.
        masks: bool ``[O, I]`` by qualified layer name; read one by one.
        shapes: how their weights are stored, by layer name; a layer without an entry is a linear
            layer, stored as ``[O, I]``.
        overwrite: replace a file that is there at the end.
    """
    with whole_file(path, overwrite) as file, zipfile.ZipFile(file, "w") as archive:
        for name in masks:
            shape = (shapes or {}).get(name) or LayerShape(*masks[name].shape)
            # ZipInfo leaves out the time of writing, so that equal masks make equal files.
            entry = zipfile.ZipInfo(f"{shape.weight_name(name)}.mask.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as stream:
                bits = np.packbits(shape.to_stored(masks[name]).cpu().numpy())
                np.lib.format.write_array(stream, bits, allow_pickle=False)
