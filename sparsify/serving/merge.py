"""Merges a LoRA adapter into an exported folder under its masks, so that its zeros stay zeros.

The files are copied and changed tensor by tensor: no model is loaded.

Shapes: O out, I in.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.common.file_hashes import file_hashes
from sparsify.common.files import write_json
from sparsify.common.replace import partial_folder
from sparsify.export.card import CARD
from sparsify.export.exchange.layers import LayerShape, stored_shapes
from sparsify.export.manifest import MANIFEST, Manifest, read_manifest, sound_manifest
from sparsify.export.mask_file.file import MaskFile, read_masks, write_masks
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.export.target import check_target, put_export
from sparsify.models.base import load_skeleton
from sparsify.models.hashes import hash_tensor
from sparsify.models.layer_names import family
from sparsify.models.stored_weights import StoredWeights
from sparsify.serving.lora import LoraAdapter
from sparsify.serving.verify import verify

# What the export said of its own model, and is not true of the merged one.
_OF_THE_EXPORT = ("date", "versions", "run", "protocol", "scores")


@dataclass
class Taken:
    """What became of the adapter in the layers of one family.

    Attributes:
        layers: how many there are.
        added: the sum of the squares of all that the adapter would add.
        kept: the same of what it adds where weights are kept.
    """

    layers: int = 0
    added: float = 0.0
    kept: float = 0.0

    @property
    def taken(self) -> float:
        """The share of the squared norm that the masks took away."""
        return 1 - self.kept / self.added if self.added else 0.0


class Merged(dict[str, Taken]):
    """What the masks left of an adapter, by layer family."""

    def add(self, layer: str, product_OI: Tensor, kept_OI: Tensor) -> None:
        """Count what the adapter would add to a layer, and what it adds."""
        row = self.setdefault(family(layer), Taken())
        row.layers += 1
        row.added += float(product_OI.double().square().sum())
        row.kept += float(kept_OI.double().square().sum())

    @property
    def whole(self) -> Taken:
        """All families together."""
        sums = {key: sum(getattr(row, key) for row in self.values()) for key in vars(Taken())}
        return Taken(**sums)

    def describe(self) -> dict[str, Any]:
        """As plain values."""
        rows = {**self, "all": self.whole}
        return {name: asdict(row) | {"taken": row.taken} for name, row in rows.items()}

    def table(self) -> Table:
        """For the console."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("layers", min_width=min(40, max(map(len, self))), overflow="fold")
        for name in ("n", "norm", "kept norm", "taken away"):
            table.add_column(name, justify="right")
        for name, row in {**self, "all": self.whole}.items():
            norms = (f"{square**0.5:.4g}" for square in (row.added, row.kept))
            table.add_row(name, str(row.layers), *norms, f"{row.taken:.1%}")
        return table


@torch.no_grad()
def merge(
    folder: Path, adapter: Path, out: Path, base: str | None = None, overwrite: bool = False
) -> Merged:
    """Write ``W + mask * scale B A`` for each layer of an adapter; a layer without a mask gets all.

    Args:
        folder: what ``sparsify export`` wrote, on which the adapter was trained.
        adapter: the folder that PEFT saved.
        out: the folder to write; ``sparsify verify`` finds no problem in it.
        base: the name by which the adapter knows ``folder``, if that is another one now.
        overwrite: replace an earlier export at ``out``.

    Returns:
        How much of the adapter the masks took away.

    Raises:
        SparsifyError: the adapter is of another base or of a kind that cannot be merged, one of the
            folders is damaged, or ``out`` must not be replaced.
    """
    manifest, lora = sound_manifest(folder), LoraAdapter(adapter)
    _check_base(lora, folder, manifest, base)
    check_target(out, overwrite, str(folder))
    StoredWeights(folder).check()
    shapes = stored_shapes(load_skeleton(str(folder), ""))
    tensors = {name: _tensor(name, lora, shapes, manifest) for name in lora}
    masks: Mapping[str, Tensor] = read_masks(folder) if manifest.layers else {}
    with partial_folder(out) as partial:
        _copy(folder, partial, manifest)
        content, stored, report = read_manifest(folder), StoredWeights(partial), Merged()
        for name, tensor in tensors.items():
            values = stored.get(tensor)
            if hash_tensor(values) != manifest.tensors[tensor]:
                raise SparsifyError(
                    f"{folder}: {tensor} was changed since the export; sparsify verify says what "
                    "else was: export or fetch the model again"
                )
            product_OI = lora[name].product_OI()
            kept_OI = torch.where(masks[name], product_OI, 0) if name in masks else product_OI
            merged = (values.float() + shapes[name].to_stored(kept_OI)).to(values.dtype)
            stored.overwrite(tensor, merged)
            content["tensors"][tensor] = hash_tensor(merged)
            report.add(name, product_OI, kept_OI)
        changed = "adapted" if lora.keys() <= manifest.layers.keys() else "trained"
        weights = manifest.weights if manifest.weights == "trained" else changed
        content["strategy"]["weights"] = weights
        former = {key: content.pop(key) for key in _OF_THE_EXPORT if key in content}
        own = {"adapter": adapter.resolve().name, "left": report.describe(), "export": former}
        content["merged"] = [*content.get("merged", []), own]
        if isinstance(masks, MaskFile):
            _write_masks(partial / FILE_NAME, masks, weights)
        content["files"] = file_hashes(partial, but=MANIFEST)
        write_json(partial / MANIFEST, content)
        found = verify(partial)
        if not found.ok:
            layers = [f"{row.name}: {text}" for row in found.layers for text in row.problems]
            raise SparsifyError(
                f"{out} was not written: sparsify verify would find {found.count} problems in it; "
                f"the first is: {[*found.problems, *layers][0]}. Verify {folder} itself"
            )
        for path in (partial, *partial.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        put_export(partial, out, overwrite, str(folder))
    return report


def _check_base(lora: LoraAdapter, folder: Path, manifest: Manifest, base: str | None) -> None:
    """Refuse an adapter that may be of another base than the folder."""
    known = lora.base_name
    if base is not None:
        if base != known:
            raise SparsifyError(
                f"--base {base!r}: the adapter says that it was trained on {known!r}; give the "
                "folder of that model, or its adapter"
            )
        return
    place = Path(known).expanduser()
    if known and place.is_dir():
        if place.samefile(folder):
            return
        if (place / MANIFEST).is_file() and sound_manifest(place).tensors == manifest.tensors:
            return
    raise SparsifyError(
        f"the adapter says that it was trained on {known!r}, which is not {folder}; name the "
        f"folder that it was trained on. If that is this one under another name, add --base "
        f"{known!r}"
    )


def _tensor(
    name: str, lora: LoraAdapter, shapes: Mapping[str, LayerShape], manifest: Manifest
) -> str:
    """The tensor in the files to which a layer's part of the adapter is added."""
    if (shape := shapes.get(name)) is None or shape.experts is not None:
        raise SparsifyError(
            f"the adapter changes {name}, which is no linear layer of this model; they have names "
            f"like {next(iter(shapes), None)!r}: give the model that it was trained on"
        )
    if lora[name].shape != (shape.rows, shape.columns):
        raise SparsifyError(
            f"{name}: the adapter adds {lora[name].shape} to a weight of "
            f"{(shape.rows, shape.columns)}; give the model that it was trained on"
        )
    parameter = shape.weight_name(name)
    tensor = manifest.tensor_of(parameter)
    if tensor is None:
        raise SparsifyError(f"{name}: {MANIFEST} does not say where its weight is stored")
    shared = list(manifest.stored_as.values()).count(tensor) > (tensor != parameter)
    renamed = manifest.own_names().get(tensor) == parameter
    if shared or (tensor != parameter and not renamed):
        raise SparsifyError(
            f"{name}: its weight, {tensor}, is that of another layer too, which the adapter would "
            "change with it; train an adapter without this layer"
        )
    return tensor


def _copy(folder: Path, place: Path, manifest: Manifest) -> None:
    """Copy what the export wrote, but for what is written anew, and a card about its scores."""
    written = manifest.files or [path.name for path in folder.iterdir() if path.is_file()]
    for name in {*written} - {MANIFEST, FILE_NAME, CARD}:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, place / name)


def _write_masks(path: Path, masks: MaskFile, weights: str) -> None:
    """The same masks, with the word for what became of the weights."""
    lineage = dict(masks.index.lineage)
    if isinstance(strategy := lineage.get("strategy"), dict):
        lineage["strategy"] = strategy | {"weights": weights}
    write_masks(
        path, masks, masks.patterns, masks.base_hash, lineage, permutation=masks.permutation
    )
