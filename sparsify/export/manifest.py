"""Reads ``sparsity_manifest.json``, in which an exported folder describes itself.

Somebody may have edited it: whatever can be read is used, and each fault becomes a sentence.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from sparsify.common.choices import Dtype
from sparsify.common.errors import SparsifyError
from sparsify.common.file_hashes import parse_hashes
from sparsify.common.files import read_json
from sparsify.common.values import cut, short
from sparsify.masking.linear import weight_name
from sparsify.masking.pattern import NMPattern

MANIFEST = "sparsity_manifest.json"
MANIFEST_SCHEMA = "sparsify.manifest/1"
# The layout of a layer's weight in its file: that of Linear, or that of Conv1D.
OUT_IN, IN_OUT = "out_in", "in_out"

T = TypeVar("T")

# No weight has more rows or columns: a larger number is damage, and must not be computed with.
_MOST = 2**40

# Which exported values of the base each kind of ``Effect.weights`` changes.
_CHANGES = {
    "frozen": "nothing",
    "proxy": "nothing",
    "updated": "masked layers",
    "adapted": "masked layers",
    "trained": "all weights",
}


@dataclass(frozen=True)
class Layer:
    """A layer that should have a pattern.

    Attributes:
        tensors: the names of its weight in the files, each with the first row that it holds: one,
            or several for experts that are stored one by one; none if that is not known.
        shape: (O, I).
        pattern: the N:M pattern along I.
        transposed: whether the file holds it as ``[I, O]``.
        experts: of how many experts it holds the matrices, one below the other; None for a linear
            layer.
        may_be_dense: whether the layer may also be dense, as nothing says that it was masked.
    """

    tensors: Mapping[str, int]
    shape: tuple[int, int]
    pattern: NMPattern
    transposed: bool = False
    experts: int | None = None
    may_be_dense: bool = False


@dataclass
class Manifest:
    """The content of a manifest.

    Attributes:
        problems: what is wrong with the manifest itself.
        layers: the masked layers by qualified name.
        dense: why other modules are not masked, by qualified name.
        tensors: the hash of each tensor in the files.
        files: the hash of each file beside the manifest, by its path in the folder; None if the
            manifest has no such list, like those of version 0.1.0.
        stored_as: the name in the files of each Parameter that is not stored under its own; None if
            it is stored in parts.
        dtype: the type of the stored weights.
        base_hash: the hash of the base model's Parameters.
        permutation: the digest of the orders of channels in the folder; empty if it was made
            without.
        base_dtype: the type in which that hash was computed.
        changes: which weights of the base the strategy changed: ``nothing``, ``masked layers`` or
            ``all weights``.
        weights: the strategy's ``weights``, from which this follows.
    """

    problems: list[str] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] | None = None
    stored_as: dict[str, str | None] = field(default_factory=dict)
    dtype: str = ""
    base_hash: str = ""
    permutation: str = ""
    base_dtype: str = "float32"
    changes: str = "nothing"
    weights: str = "frozen"

    def tensor_of(self, parameter: str) -> str | None:
        """The name of a Parameter in the files."""
        return parameter if parameter in self.tensors else self.stored_as.get(parameter)

    def own_names(self) -> dict[str, str]:
        """The Parameter that each tensor holds whose name in the files is none of the model's. Of a
        tensor that holds a part of a layer, the layer's name and the first row.
        """
        modules = {*self.layers, *self.dense}
        parts = {
            part: f"{name}.{row}"
            for name, layer in self.layers.items()
            for part, row in layer.tensors.items()
            if len(layer.tensors) > 1
        }
        return parts | {
            stored: own
            for own, stored in reversed(self.stored_as.items())
            if stored and modules.isdisjoint(accumulate(stored.split("."), "{}.{}".format))
        }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of an exported folder as plain JSON.

    Raises:
        SparsifyError: there is no manifest, or it is not readable.
    """
    if not (folder / MANIFEST).is_file():
        raise SparsifyError(
            f"{folder} holds no {MANIFEST}: it is not a folder that sparsify exported; "
            "make one with sparsify export"
        )
    content = read_json(folder / MANIFEST)
    if not isinstance(content, dict):
        raise SparsifyError(f"{folder / MANIFEST}: not a JSON object; export the model again")
    return content


def sound_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder.

    Raises:
        SparsifyError: there is no manifest, or it is damaged.
    """
    manifest = parse_manifest(read_manifest(folder))
    if manifest.problems:
        raise SparsifyError(f"{folder}: {manifest.problems[0]}; export the model again")
    return manifest


def manifest_patterns(folder: Path) -> dict[str, NMPattern]:
    """The pattern of every masked layer of an exported folder; errors as :func:`sound_manifest`."""
    return {name: layer.pattern for name, layer in sound_manifest(folder).layers.items()}


def parse_manifest(content: Any) -> Manifest:
    """Turn the JSON of a manifest into a :class:`Manifest`; never fails."""
    manifest = Manifest()
    if not isinstance(content, dict):
        manifest.problems.append(f"{MANIFEST}: it is a {type(content).__name__}, not an object")
        return manifest
    if content.get("schema") != MANIFEST_SCHEMA:
        manifest.problems.append(
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
        manifest.problems.append(
            f"{MANIFEST}: {'.'.join(path)} {stated}; it must be a {_NAMES[kind]}"
        )
        return None

    manifest.tensors = _of_strings(read(dict, "tensors") or {}, "tensors", manifest.problems)
    if "files" in content:
        manifest.files, wrong = parse_hashes(read(dict, "files") or {})
        manifest.problems += [f"{MANIFEST}: files of {problem}" for problem in wrong]
    manifest.stored_as = {
        str(name): None if other is None else str(other)
        for name, other in (read(dict, "stored_as") or {}).items()
    }
    manifest.dtype = _dtype(read(str, "dtype"), manifest.problems)
    manifest.base_hash = read(str, "base", "hash") or ""
    if "permutation" in content:
        manifest.permutation = read(str, "permutation", "sha256") or "unknown"
    manifest.base_dtype = _base_dtype(read(str, "base", "dtype"), manifest.problems)
    _read_changes(manifest, read(str, "strategy", "weights"))
    for name, entry in (read(dict, "layers") or {}).items():
        try:
            manifest.layers[name] = _layer(manifest, name, entry)
        except (SparsifyError, KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else cut(str(error), 200)
            manifest.problems.append(f"{MANIFEST}: the entry of {name} is damaged ({reason})")
    _check_dense(manifest, read(dict, "dense") or {})
    run = content.get("run")
    if isinstance(run, dict) and "sparsity" in run:
        _check_sparsity(manifest, run["sparsity"])
    return manifest


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
            f"{MANIFEST}: dtype {short(name)} is not a type of PyTorch, such as 'bfloat16'"
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


def _read_changes(manifest: Manifest, weights: str | None) -> None:
    if weights is None:
        return
    if weights not in _CHANGES:
        manifest.problems.append(
            f"{MANIFEST}: strategy.weights is {short(weights)}; it must be one of "
            f"{', '.join(_CHANGES)}"
        )
        return
    manifest.weights, manifest.changes = weights, _CHANGES[weights]


def _layer(manifest: Manifest, name: str, entry: Any) -> Layer:
    rows, columns = entry["shape"]
    if not all(type(size) is int and 0 < size <= _MOST for size in (rows, columns)):
        raise ValueError(f"shape {short(entry['shape'])} is not [out_features, in_features]")
    if entry["layout"] not in (OUT_IN, IN_OUT):
        raise ValueError(f"layout {short(entry['layout'])} is neither {OUT_IN!r} nor {IN_OUT!r}")
    pattern = NMPattern.parse(str(entry["pattern"]))
    if columns % pattern.m:
        raise ValueError(f"in_features={columns} is not a multiple of m={pattern.m}")
    experts = entry.get("experts")
    if experts is not None and (type(experts) is not int or experts < 1 or rows % experts):
        raise ValueError(f"experts {short(experts)} do not share {rows} rows equally")
    if (tensor := manifest.tensor_of(weight_name(name, experts))) is not None:
        tensors = {tensor: 0}
    else:
        tensors = {str(part): int(row) for part, row in entry.get("stored_in", {}).items()}
    return Layer(tensors, (rows, columns), pattern, entry["layout"] == IN_OUT, experts)


def _check_dense(manifest: Manifest, dense: dict[str, Any]) -> None:
    manifest.dense = {name: cut(str(why), 200) for name, why in dense.items()}
    known = [*manifest.tensors, *manifest.stored_as]
    for name in dense:
        if not any(other == name or other.startswith(f"{name}.") for other in known):
            manifest.problems.append(
                f"{name}: {MANIFEST} lists it as dense, but none of its tensors is stored"
            )
        if name in manifest.layers:
            manifest.problems.append(f"{name}: {MANIFEST} lists it as masked and as dense")


def _check_sparsity(manifest: Manifest, stated: Any) -> None:
    """Check the stated sparsity: as it counts all matrices of the decoder blocks, it cannot exceed
    the share of zeros in the masked ones.
    """
    layers = manifest.layers
    tensors = {tensor for layer in layers.values() for tensor in layer.tensors}
    if len(tensors) < len(layers) or not all(re.search(r"\.\d+\.", name) for name in layers):
        return  # the share counts weights that are shared or outside the blocks differently
    sizes = {name: math.prod(layer.shape) for name, layer in layers.items()}
    zeros = sum(sizes[name] * (1 - layer.pattern.density) for name, layer in layers.items())
    most = zeros / sum(sizes.values()) if sizes else 0.0
    if not isinstance(stated, int | float) or not (0 < stated <= most + 1e-9 or stated == most):
        manifest.problems.append(
            f"{MANIFEST}: run.sparsity is {short(stated)}; it must not exceed {most:.4f}, "
            "the share of zeros in the masked layers by their patterns, nor be 0 unless that is"
        )
