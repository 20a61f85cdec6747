"""Writes a masked model as a plain Hugging Face folder that loads anywhere.

The folder holds the model with exact zeros, its tokenizer, the packed masks, a model card and
``sparsity_manifest.json``. It is written under a hidden name and moved to its place when complete.
"""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sparsify.common.errors import SparsifyError
from sparsify.common.file_hashes import file_hashes
from sparsify.common.files import full_disk, write_json
from sparsify.common.ranks import rank_zero, together
from sparsify.common.replace import partial_folder
from sparsify.export.manifest import IN_OUT, MANIFEST, MANIFEST_SCHEMA, OUT_IN
from sparsify.export.mask_file.file import write_masks
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.export.read_back import Measured, Measuring, check_read_back, measure
from sparsify.export.target import check_target, put_export
from sparsify.masking.layer import MaskedLinear, base_parameters, layer_patterns
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.sharded_rows import hard_mask, shipped, whole
from sparsify.models.hashes import hash_parameters, hash_tensor
from sparsify.models.licence import licence_of
from sparsify.models.stored_weights import StoredWeights


@torch.no_grad()
def export(
    masked: MaskedModel,
    folder: Path,
    record: Mapping[str, Any],
    overwrite: bool = False,
    tokens_BT: Tensor | None = None,
    measuring: Measuring | None = None,
) -> None:
    """Write the folder whole, or leave everything as it was.

    In a run of several processes every rank must call this. Only rank 0 writes; if it fails, the
    call fails on all.

    Args:
        masked: the model with its masks; it is not changed.
        folder: the folder to write.
        record: lineage, protocol and results, for the manifest.
        overwrite: replace an earlier export.
        tokens_BT: windows of text, int64, on which the written model is compared with the masked
            one; None takes random token ids.
        measuring: a context that sets the masks and the precision under which scores were measured;
            None sets the hard masks only.

    Raises:
        SparsifyError: the folder must not be replaced, the disk is full, weights changed that must
            not, or the written model, loaded with plain Transformers, computes something else than
            the masked model.
    """
    with together():
        if rank_zero():
            check_target(folder, overwrite, masked.base.name_or_path)
    whole_model = _gather(masked)
    measured = measure(masked, tokens_BT, measuring or masked.hard)
    with together():
        if rank_zero():
            _write(masked, folder, whole_model, measured, record, overwrite)


class _Whole(NamedTuple):
    """The gathered model: base weights by Parameter name, masks and shipped weights by layer."""

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    shipped: dict[str, Tensor]


def _gather(masked: MaskedModel) -> _Whole:
    """Gather all that rank 0 writes, one tensor at a time; the other ranks keep nothing."""
    model = _Whole({}, {}, {})
    for name, parameter in base_parameters(masked.model).items():
        weight = whole(parameter)
        if rank_zero():
            model.weights[name] = weight.cpu() if isinstance(parameter, DTensor) else weight
    for name, layer in masked.layers.items():
        mask_OI, weight_OI = hard_mask(layer), shipped(layer)
        if rank_zero():
            model.masks[name] = mask_OI.cpu()
            if weight_OI is not None:
                model.shipped[name] = weight_OI
    return model


def _write(
    masked: MaskedModel,
    folder: Path,
    whole_model: _Whole,
    measured: Measured,
    record: Mapping[str, Any],
    overwrite: bool,
) -> None:
    weights, masks, _ = whole_model
    if not masked.strategy.effect.changes_base and hash_parameters(weights) != masked.base.hash:
        raise SparsifyError(
            "the base weights changed during the run, though the strategy declares them frozen"
        )
    # A weight that several layers share is listed once, perhaps by the name of one without a mask.
    listed = {id(p): name for name, p in base_parameters(masked.model).items()}
    for name, layer in masked.layers.items():
        if (key := listed.pop(id(layer.weight), None)) is not None:
            weights[key] = _masked(layer, weights[key], masks[name], whole_model.shipped.get(name))
    # Transformers keeps some in float32 whatever the model's type: these are stored as they are.
    types, run = {n: p.dtype for n, p in base_parameters(masked.model).items()}, masked.model.dtype
    dtype = _storage_dtype(masked, (w for name, w in weights.items() if types[name] == run))
    weights = {n: w.to(dtype if types[n] == run else types[n]) for n, w in weights.items()}
    try:
        with partial_folder(folder) as partial:
            plain = _plain_model(masked.model, weights, dtype)
            plain.save_pretrained(partial)
            masked.base.save_inputs(partial)
            if masks:
                write_masks(
                    partial / FILE_NAME,
                    masks,
                    layer_patterns(masked.model),
                    masked.base.hash,
                    mask_lineage(masked),
                    permutation=masked.base.permutation,
                )
            if masked.base.permutation is not None:
                masked.base.permutation.write(partial)
            content = _manifest(masked, masks, dtype) | _stored_tensors(partial, plain)
            _add_parts(content, partial, weights)
            content["files"] = file_hashes(partial, but=MANIFEST)
            write_json(partial / MANIFEST, content | dict(record))
            check_read_back(partial, masked.model, type(plain), weights, measured)
            # Another user may serve the model, and some of these files were made private.
            for path in (partial, *partial.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            put_export(partial, folder, overwrite, masked.base.name_or_path)
    except Exception as error:
        if full_disk(error) is None:
            raise
        raise SparsifyError(
            f"the disk is full: {folder} was not written; nothing else was lost. "
            "Free space, then run sparsify export --ckpt_path with the run's last checkpoint"
        ) from error


def _masked(
    layer: MaskedLinear, stored: Tensor, mask_OI: Tensor, shipped_OI: Tensor | None
) -> Tensor:
    """A layer's weight as it is exported, in the layout of the stored one."""
    if shipped_OI is None:
        weight_OI = layer.as_rows(stored)
        shipped_OI = torch.where(mask_OI, weight_OI, weight_OI.new_zeros(()))
    return layer.as_stored(shipped_OI).contiguous()


def mask_lineage(masked: MaskedModel) -> dict[str, Any]:
    """Which base model and strategy the masks come from, for a mask file."""
    return {"base": masked.base.name, "strategy": masked.strategy.describe()}


def _storage_dtype(masked: MaskedModel, weights: Any) -> torch.dtype:
    """The type in which the base is stored, if it can hold these values exactly; otherwise the type
    in which the run used them.
    """
    stored = masked.base.stored_dtype
    exact = all(torch.equal(w.to(stored).to(w.dtype), w) for w in weights)
    return stored if exact else masked.model.dtype


def _plain_model(
    model: PreTrainedModel, weights: dict[str, Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    plain_class: Any = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):
        plain = plain_class(config)
    buffers = {name: b for name, b in model.named_buffers() if name in plain.state_dict()}
    plain.load_state_dict(weights | buffers, assign=True, strict=False)
    plain.tie_weights()
    if left := [name for name, p in plain.named_parameters() if p.is_meta]:
        raise RuntimeError(
            f"the export lacks {left}: the model shares weights in a way "
            "that its class does not declare"
        )
    if model.generation_config is not None:
        plain.generation_config = model.generation_config
    return plain


def _manifest(
    masked: MaskedModel, masks: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Any]:
    layers, base = masked.layers, masked.base
    return {
        "schema": MANIFEST_SCHEMA,
        "pattern": str(masked.selection.pattern),
        "base": {
            "name": base.name,
            "hash": base.original_hash,
            "dtype": _dtype_name(masked.model.dtype),
            **({"license": licence} if (licence := licence_of(base.name_or_path)) else {}),
        },
        **({} if (p := base.permutation) is None else {"permutation": p.describe()}),
        "strategy": masked.strategy.describe(),
        "dtype": _dtype_name(dtype),
        "layers": {
            name: {
                "shape": list(mask.shape),
                "layout": IN_OUT if layers[name].transposed else OUT_IN,
                "pattern": str(layers[name].masker.pattern),
            }
            | ({} if (experts := layers[name].experts) is None else {"experts": experts})
            for name, mask in masks.items()
        },
        "dense": masked.dense,
        "coverage": masked.coverage().describe(),
    }


def _stored_tensors(folder: Path, plain: PreTrainedModel) -> dict[str, Any]:
    """Describe the tensors in the files.

    Returns:
        ``tensors``: the hash of each tensor's values, by its name in the files; hashed from memory
        if the model has a tensor of that name, otherwise from the file.
        ``stored_as``: for each Parameter that is not stored under its own name, the name that it
        has in the files (of the Parameter that it shares, or a new one), or None if Transformers
        stores it in parts.
    """
    values, stored = plain.state_dict(), StoredWeights(folder)
    tensors = {
        name: hash_tensor(values[name] if name in values else stored.get(name)) for name in stored
    }
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    shared = {id(p): name for name, p in parameters.items() if name in tensors}
    renamed: dict[str, list[str]] = {}
    for name in tensors.keys() - values.keys():
        renamed.setdefault(tensors[name], []).append(name)
    stored_as = {
        name: shared.get(id(p)) or _most_alike(name, renamed.get(hash_tensor(p), []))
        for name, p in parameters.items()
        if name not in tensors
    }
    return {"tensors": tensors, "stored_as": stored_as}


def _add_parts(content: dict[str, Any], folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Say of experts that Transformers stores one by one which tensors of the files they are, and
    with which row of all each begins. They are found by their values.
    """
    split = {
        name: entry
        for name, entry in content["layers"].items()
        if "experts" in entry and content["stored_as"].get(name, name) is None
    }
    if not split:
        return
    stored = StoredWeights(folder)
    parts = [name for name in stored if name not in weights and len(stored.shape(name)) == 2]
    for name, entry in split.items():
        rows_OI, found = weights[name].flatten(0, 1), dict[str, list[int]]()
        of_expert, inputs = len(rows_OI) // entry["experts"], rows_OI.shape[1]
        shapes = map(stored.shape, parts)
        counts = {rows for rows, columns in shapes if columns == inputs and not of_expert % rows}
        for count in counts:
            for row in range(0, len(rows_OI) - count + 1, count):
                found.setdefault(hash_tensor(rows_OI[row : row + count]), []).append(row)
        entry["stored_in"] = {
            part: rows.pop(0) for part in parts if (rows := found.get(content["tensors"][part]))
        }
        parts = [part for part in parts if part not in entry["stored_in"]]


def _most_alike(name: str, others: Iterable[str]) -> str | None:
    """The name with the longest end in common: tensors of equal values, such as norms that are all
    ones, differ by name only.
    """
    ends = {other: os.path.commonprefix([name[::-1], other[::-1]]) for other in sorted(others)}
    return max(ends, key=lambda other: len(ends[other]), default=None)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
