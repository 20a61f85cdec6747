"""Reads masks from PyTorch files: one file per layer, or a dictionary of all.

In a folder, each file is named after its layer, as ``model.layers.0.self_attn.q_proj.pt``, and
holds one tensor in the layout of the stored weight. A single file holds a dictionary of such
tensors; its keys are layer names, or weight names with ``.mask`` appended. A tensor is a mask if
all its values are 0 or 1.

Shapes: O out, I in.
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.export.exchange.layers import LayerShape, check_known, layer_name

SEPARATORS = ("", ".", "_", "-")  # what may stand between a prefix and the layer's name


def read_pt(path: Path, shapes: Mapping[str, LayerShape]) -> Iterator[tuple[str, Tensor]]:
    """Read masks one by one, without running code that a file may hold.

    Args:
        path: one file with a dictionary, or a folder of ``.pt`` files, in subfolders or not, whose
            paths end with the layer's name.
        shapes: the shapes of the base model's layers, by qualified name.

    Yields:
        A layer's qualified name and its mask, bool ``[O, I]``, True = kept.

    Raises:
        SparsifyError: a file is damaged, holds something other than masks, or was made for another
            model.
    """
    if path.is_dir():
        for name, file in _files(path, shapes).items():
            yield name, _mask(file, name, _load(file), shapes[name])
        return
    masks = _load(path)
    if not isinstance(masks, dict) or not masks:
        raise SparsifyError(
            f"{path}: it holds a {type(masks).__name__}; a single file holds a dictionary from "
            "layer names to masks: name the folder instead if there is one file per layer"
        )
    seen: set[str] = set()
    for key, values in masks.items():
        name = layer_name(str(key), shapes)
        check_known(path, str(key), name, shapes)
        if name in seen:
            raise SparsifyError(f"{path}: {key!r} is a second mask of {name}; a layer has only one")
        seen.add(name)
        yield name, _mask(path, name, values, shapes[name])


def _files(folder: Path, shapes: Mapping[str, LayerShape]) -> dict[str, Path]:
    """The folder's files by layer name."""
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.pt")):
        key = layer_name(".".join(file.relative_to(folder).with_suffix("").parts))
        name = max((n for n in shapes if _ends_with(key, n)), key=len, default=key)
        check_known(file, key, name, shapes)
        if name in files:
            raise SparsifyError(
                f"{file}: a second mask of {name}, beside {files[name]}; a layer has only one"
            )
        files[name] = file
    if not files:
        raise SparsifyError(f"{folder}: there is no .pt file in it; name a folder of masks")
    return files


def _ends_with(key: str, name: str) -> bool:
    return key.endswith(name) and key[: -len(name)][-1:] in SEPARATORS


def _load(file: Path) -> Any:
    try:
        is_zip = zipfile.is_zipfile(file)
        if is_zip:
            _check_stored(file)
        # mmap: the tensors of a large dictionary are then read only when they are used.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except SparsifyError:
        raise
    except Exception as error:  # a damaged or malicious pickle can raise anything
        raise SparsifyError(
            f"{file}: not a readable file of tensors ({type(error).__name__}); write one with "
            "torch.save: files that hold other objects are not opened"
        ) from error


def _check_stored(file: Path) -> None:
    """Refuse a compressed file: it may take far more memory than disk space."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise SparsifyError(f"{file}: a part of it is compressed, which torch.save never does")


def _mask(file: Path, name: str, values: Any, shape: LayerShape) -> Tensor:
    if not _is_dense(values) or tuple(values.shape) != shape.stored:
        kind = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise SparsifyError(
            f"{file}: the mask of {name} is {kind}, but the weight is stored as {shape.stored}; "
            "give the base model that the masks were made for"
        )
    # In a damaged file, the byte of a bool may be neither 0 nor 1.
    numbers = values.view(torch.uint8) if values.dtype == torch.bool else values
    mask = numbers == 1
    if not bool((mask | (numbers == 0)).all()):
        raise SparsifyError(
            f"{file}: the mask of {name} holds other values than 0 and 1; give masks, not weights "
            "or logits"
        )
    return shape.from_stored(mask)


def _is_dense(values: Any) -> bool:
    return (
        isinstance(values, Tensor)
        and values.layout == torch.strided
        and values.device.type == "cpu"
        and not values.is_quantized
    )
