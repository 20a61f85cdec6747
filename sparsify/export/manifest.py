"""``sparsity_manifest.json``: what an exported folder says of itself.

It is read as somebody may have left it: what can be read is used, and what cannot is a problem in
words.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from sparsify.common.errors import SparsifyError
from sparsify.common.file_hashes import parse_hashes
from sparsify.common.files import read_json
from sparsify.common.values import cut, short
from sparsify.masking.pattern import NMPattern
from sparsify.models.base import Dtype

MANIFEST = "sparsity_manifest.json"
MANIFEST_SCHEMA = "sparsify.manifest/1"
# How a layer's weight lies in its file: Linear's, or Conv1D's.
OUT_IN, IN_OUT = "out_in", "in_out"

T = TypeVar("T")

# Rows or columns of a weight; what is larger is damage, and nothing to compute with.
_MOST = 2**40

# What each kind of ``Effect.weights`` does to the base's values that ship.
_CHANGES = {
    "frozen": "nothing",
    "proxy": "nothing",
    "updated": "masked layers",
    "adapted": "masked layers",
    "trained": "all weights",
}


@dataclass(frozen=True)
class Layer:
    """A layer that should hold a pattern.

    Attributes:
        tensor: the name of its weight in the files; None where it is not stored as one tensor.
        shape: (O, I).
        pattern: the N:M pattern along I.
        transposed: whether the file holds it as ``[I, O]``.
        may_be_dense: whether the pattern is only a question, as nothing says that it was masked.
    """

    tensor: str | None
    shape: tuple[int, int]
    pattern: NMPattern
    transposed: bool = False
    may_be_dense: bool = False


@dataclass
class Manifest:
    """What a manifest says.

    Attributes:
        problems: what is wrong with the manifest itself.
        layers: the masked layers by qualified name.
        tensors: the hash of each tensor in the files.
        files: the hash of each file beside the manifest, by its path in the folder; None where the
            manifest tells none, as those of version 0.1.0.
        stored_as: Parameters that the files hold under another name, or in parts (None).
        dtype: the type of the stored weights.
        base_hash: the hash of the base model's Parameters.
        base_dtype: the type in which it was computed.
        changes: which of the base's weights the strategy changed: ``nothing``, ``masked layers`` or
            ``all weights``.
        weights: the strategy's own word for that.
    """

    problems: list[str] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] | None = None
    stored_as: dict[str, str | None] = field(default_factory=dict)
    dtype: str = ""
    base_hash: str = ""
    base_dtype: str = "float32"
    changes: str = "nothing"
    weights: str = "frozen"

    def tensor_of(self, parameter: str) -> str | None:
        """The name in the files of a Parameter."""
        return parameter if parameter in self.tensors else self.stored_as.get(parameter)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder as it stands.

    Raises:
        SparsifyError: there is none, or it is not readable.
    """
    if not (folder / MANIFEST).is_file():
        raise SparsifyError(
            f"{folder} holds no {MANIFEST}: it is not a folder that sparsify exported; "
            "make one with sparsify export"
        )
    content = read_json(folder / MANIFEST)
    if not isinstance(content, dict):
        raise SparsifyError(f"{folder / MANIFEST}: it is no JSON object; export the model again")
    return content


def manifest_patterns(folder: Path) -> dict[str, NMPattern]:
    """The pattern of every masked layer of an exported folder.

    Raises:
        SparsifyError: there is no manifest, or it is damaged.
    """
    manifest = parse_manifest(read_manifest(folder))
    if manifest.problems:
        raise SparsifyError(f"{folder}: {manifest.problems[0]}; export the model again")
    return {name: layer.pattern for name, layer in manifest.layers.items()}


def parse_manifest(content: Any) -> Manifest:
    """Understand a manifest's parsed JSON; never fails."""
    found = Manifest()
    if not isinstance(content, dict):
        found.problems.append(f"{MANIFEST}: it is a {type(content).__name__}, not an object")
        return found
    if content.get("schema") != MANIFEST_SCHEMA:
        found.problems.append(
            f"{MANIFEST}: its schema is {short(content.get('schema'))}, and this version reads "
            f"{MANIFEST_SCHEMA!r}; export again"
        )

    def read(kind: type[T], *path: str) -> T | None:
        value: Any = content
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, kind):
            return value
        stated = "is missing" if value is None else f"is {short(value)}"
        found.problems.append(f"{MANIFEST}: {'.'.join(path)} {stated}; it must be a {_NAMES[kind]}")
        return None

    found.tensors = _of_strings(read(dict, "tensors") or {}, "tensors", found.problems)
    if "files" in content:
        found.files, wrong = parse_hashes(read(dict, "files") or {})
        found.problems += [f"{MANIFEST}: files of {problem}" for problem in wrong]
    found.stored_as = {
        str(name): None if other is None else str(other)
        for name, other in (read(dict, "stored_as") or {}).items()
    }
    found.dtype = _dtype(read(str, "dtype"), found.problems)
    found.base_hash = read(str, "base", "hash") or ""
    found.base_dtype = _base_dtype(read(str, "base", "dtype"), found.problems)
    _read_changes(found, read(str, "strategy", "weights"))
    for name, entry in (read(dict, "layers") or {}).items():
        try:
            found.layers[name] = _layer(found, name, entry)
        except (SparsifyError, KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else cut(str(error), 200)
            found.problems.append(f"{MANIFEST}: the entry of {name} is damaged ({reason})")
    _check_dense(found, read(dict, "dense") or {})
    run = content.get("run")
    if isinstance(run, dict) and "sparsity" in run:
        _check_sparsity(found, run["sparsity"])
    return found


_NAMES: dict[type, str] = {dict: "JSON object", str: "string"}


def _of_strings(entries: dict[str, Any], what: str, problems: list[str]) -> dict[str, str]:
    problems += [
        f"{MANIFEST}: {what} of {name} is {short(value)}; it must be a SHA-256 in hexadecimal"
        for name, value in entries.items()
        if not isinstance(value, str)
    ]
    return {name: str(value) for name, value in entries.items()}


def _dtype(name: str | None, problems: list[str]) -> str:
    if name is not None and not isinstance(getattr(torch, name, None), torch.dtype):
        problems.append(
            f"{MANIFEST}: dtype {short(name)} is no type of PyTorch, such as 'bfloat16'"
        )
        return ""
    return name or ""


def _base_dtype(name: str | None, problems: list[str]) -> str:
    known = [dtype for dtype in get_args(Dtype) if dtype != "auto"]
    if name in known:
        return str(name)
    if name is not None:
        problems.append(
            f"{MANIFEST}: base.dtype is {short(name)}; it must be one of {', '.join(known)}"
        )
    return "float32"


def _read_changes(found: Manifest, weights: str | None) -> None:
    if weights is None:
        return
    if weights not in _CHANGES:
        found.problems.append(
            f"{MANIFEST}: strategy.weights is {short(weights)}; it must be one of "
            f"{', '.join(_CHANGES)}"
        )
        return
    found.weights, found.changes = weights, _CHANGES[weights]


def _layer(found: Manifest, name: str, entry: Any) -> Layer:
    rows, columns = entry["shape"]
    if not all(type(size) is int and 0 < size <= _MOST for size in (rows, columns)):
        raise ValueError(f"shape {short(entry['shape'])} is not [out_features, in_features]")
    if entry["layout"] not in (OUT_IN, IN_OUT):
        raise ValueError(f"layout {short(entry['layout'])} is neither {OUT_IN!r} nor {IN_OUT!r}")
    pattern = NMPattern.parse(str(entry["pattern"]))
    if columns % pattern.m:
        raise ValueError(f"in_features={columns} is not a multiple of m={pattern.m}")
    tensor = found.tensor_of(f"{name}.weight")
    return Layer(tensor, (rows, columns), pattern, entry["layout"] == IN_OUT)


def _check_dense(found: Manifest, dense: dict[str, Any]) -> None:
    known = [*found.tensors, *found.stored_as]
    for name in dense:
        if not any(other == name or other.startswith(f"{name}.") for other in known):
            found.problems.append(
                f"{name}: {MANIFEST} lists it as dense, and none of its tensors is stored"
            )
        if name in found.layers:
            found.problems.append(f"{name}: {MANIFEST} lists it as masked and as dense")


def _check_sparsity(found: Manifest, stated: Any) -> None:
    """The share of zeros is of all matrices of the decoder blocks, so that the masked ones' own is
    the most that it can be.
    """
    layers = found.layers
    tensors = {layer.tensor for layer in layers.values()}
    if len(tensors) < len(layers) or not all(re.search(r"\.\d+\.", name) for name in layers):
        return  # weights that are shared, or outside the blocks, count otherwise
    sizes = [math.prod(layer.shape) for layer in layers.values()]
    zeros = sum(
        size * (1 - layer.pattern.density)
        for size, layer in zip(sizes, layers.values(), strict=True)
    )
    most = zeros / sum(sizes) if sizes else 0.0
    if not isinstance(stated, int | float) or not (0 < stated <= most + 1e-9 or stated == most):
        found.problems.append(
            f"{MANIFEST}: run.sparsity is {short(stated)}; the layers' patterns make {most:.4f} of "
            "the masked weights zero, and of all of the blocks' weights no more"
        )
