"""Applies masks that were made elsewhere: checks them and writes a folder that any library loads.

Shapes: O out, I in.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.export.exchange.layers import (
    BaseHashes,
    LayerShape,
    check_masks,
    find_pattern,
    stored_shapes,
)
from sparsify.export.exchange.npz import read_npz, write_npz
from sparsify.export.exchange.pt import read_pt
from sparsify.export.exchange.zeros import LayerZeros, read_zero_pattern
from sparsify.export.folder import export
from sparsify.export.target import check_target
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.masker import FixedMasker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.select import Selection
from sparsify.masking.strategy import LayerResult, SparsityStrategy
from sparsify.models.base import Dtype, load_base, load_skeleton
from sparsify.models.permutation_file import Permutation

__all__ = [
    "GivenMasks",
    "LayerShape",
    "LayerZeros",
    "apply_masks",
    "check_layers",
    "check_masks",
    "find_pattern",
    "read_npz",
    "read_pt",
    "read_zero_pattern",
    "stored_shapes",
    "write_npz",
]


def check_layers(
    source: str, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, LayerShape]
) -> None:
    """Refuse masks whose layer the model lacks, or has in another shape.

    Args:
        source: where the masks come from, for the message.
        shapes: (O, I) of the masks by layer name.
        known: the model's layers by name.
    """
    for name, shape in shapes.items():
        if name not in known:
            raise SparsifyError(
                f"{source}: {name!r} is no linear layer of the base model, whose layers have names "
                f"like {next(iter(known), None)!r}: give the model that the masks were made for"
            )
        own = (known[name].rows, known[name].columns)
        if shape != own:
            raise SparsifyError(
                f"{source}: the mask of {name} is {shape} and the base model's weight {own}; give "
                "the model that the masks were made for"
            )


class GivenMasks(SparsityStrategy[FixedMasker]):
    """A strategy that only applies masks which were made elsewhere.

    Args:
        masks: bool ``[O, I]`` by qualified layer name; read one by one.
        source: where they come from, for the record.
    """

    def __init__(self, masks: Mapping[str, Tensor], source: str = "") -> None:
        super().__init__()
        self._masks = masks
        self.source = source

    def init_masker(
        self, masker: FixedMasker, weight_OI: Tensor, result: LayerResult | None, row0: int = 0
    ) -> None:
        masker.set_mask(self._masks[masker.name])


def apply_masks(
    base: str,
    masks: Mapping[str, Tensor],
    patterns: Mapping[str, NMPattern],
    folder: Path,
    *,
    base_hash: str = "",
    permutation: Permutation | None = None,
    source: str = "",
    dtype: Dtype = "float32",
    overwrite: bool = False,
) -> None:
    """Write the base model with its masked weights set to zero, like the export of a run.

    Args:
        base: the dense model, as :func:`sparsify.models.base.load_model` takes it.
        masks: bool ``[O, I]`` by qualified layer name, True = kept; other layers stay dense.
        patterns: the pattern of each mask.
        folder: the folder to write.
        base_hash: the hash of the model that the masks were made for; empty if unknown.
        permutation: the orders of channels of that model, into which the base is put first.
        source: where the masks come from, for the manifest.
        dtype: the type in which the weights are loaded; the folder stores them in the type in
            which the base stores them.
        overwrite: replace an earlier export.

    Raises:
        SparsifyError: the folder must not be replaced, or the masks do not fit this model or do not
            have their patterns.
    """
    check_target(folder, overwrite, base)
    if not masks:
        raise SparsifyError("there are no masks to apply; give at least one")
    known = stored_shapes(load_skeleton(base, "--base"))
    check_layers("the masks", {name: tuple(masks[name].shape) for name in masks}, known)
    most = Counter(patterns[name] for name in masks).most_common(1)[0][0]
    selection = Selection.parse(
        str(most),
        include=list(masks),
        overrides={name: str(patterns[name]) for name in masks if patterns[name] != most},
    )
    model = load_base(base, dtype, "--base")
    if permutation is not None:
        permutation.check_base(model.hash, "the masks")
        model.permute(permutation.orders)
    masked = MaskedModel(model, GivenMasks(masks, source), selection)
    masked.check_called()
    BaseHashes(masked.model).check(base_hash, "the masks")
    masked.calibrate()
    export(masked, folder, {}, overwrite)
