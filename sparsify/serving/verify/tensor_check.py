"""Check every stored tensor by all that is known of it: hash, pattern, mask, base, backends.

Shapes: O out, I in.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.common.values import first_few
from sparsify.export.manifest import MANIFEST, Layer, Manifest
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.masking.linear import as_rows, as_stored
from sparsify.masking.pattern import TWO_FOUR, NMPattern
from sparsify.models.hashes import hash_tensor
from sparsify.models.stored_weights import StoredWeights
from sparsify.serving.backends import eligible
from sparsify.serving.device_check import DeviceCheck
from sparsify.serving.verify.base_check import BaseCheck
from sparsify.serving.verify.layer_check import (
    check_mask,
    check_pattern,
    check_signs,
    nonzero_share,
    not_finite,
    plainly_dense,
)
from sparsify.serving.verify.report import BaseReport, LayerReport, Report, unchecked


class TensorCheck:
    """Checks a folder's tensors.

    Args:
        manifest: what it says; an empty one where there is none.
        asked: a pattern that every masked layer must hold besides its own.
        masks: those stored, None where there are none.
        base: compares with the base model, if it is at hand.
        device: runs sparse products, if that is wanted.

    Attributes:
        sizes: the shapes of the tensors that could be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        asked: NMPattern | None,
        masks: Mapping[str, Tensor] | None,
        base: BaseCheck | None,
        device: DeviceCheck | None,
    ) -> None:
        self._manifest, self._asked, self._masks = manifest, asked, masks
        self._base, self._device = base, device
        self._against: BaseReport | None = None
        self._read: tuple[str, Tensor | None] = "", None  # the mask that was read last
        self._rows: dict[str, list[tuple[int, int]]] = {}  # those that a layer's parts hold
        self.sizes: dict[str, tuple[int, ...]] = {}

    def run(self, weights: StoredWeights, layers: Mapping[str, Layer], report: Report) -> None:
        """Check every tensor, whatever the others were like."""
        self._against = report.base
        rows = {
            name: LayerReport(name, layer.shape, str(layer.pattern))
            for name, layer in layers.items()
        }
        report.layers += rows.values()
        owners: dict[str, list[str]] = {}
        for name, layer in layers.items():
            for tensor in layer.tensors:
                owners.setdefault(tensor, []).append(name)
            missing = [tensor for tensor in layer.tensors if tensor not in weights]
            if missing or not layer.tensors:
                what = first_few(missing) if missing else f"{name}.weight"
                rows[name].problems.append(f"its weight, {what}, is in no readable file")
        for tensor in self._manifest.tensors:
            if tensor not in weights and tensor not in owners:
                report.problems.append(f"{tensor} is in no readable file, and {MANIFEST} lists it")
        parts: dict[str, list[str]] = {}  # those of a layer together: its mask is read once
        for tensor in weights:
            parts.setdefault(owners.get(tensor, [tensor])[0], []).append(tensor)
        for tensor in chain.from_iterable(parts.values()):
            mine = [(rows[name], layers[name]) for name in owners.get(tensor, [])]
            try:
                values = weights.get(tensor)
                self.sizes[tensor] = tuple(values.shape)
                self._check_tensor(tensor, values, mine, report)
            except Exception as error:  # of a type or a size that nobody foresaw
                report.problems.append(unchecked(tensor, error))
        for name, parts_rows in self._rows.items():
            begin, end = zip(*sorted(parts_rows), strict=True)
            whole = (*begin, layers[name].shape[0]) == (0, *end)
            if not whole and all(part in weights for part in layers[name].tensors):
                rows[name].problems.append("its tensors do not hold each of its rows once")

    def _check_tensor(
        self,
        tensor: str,
        values: Tensor,
        owners: Sequence[tuple[LayerReport, Layer]],
        report: Report,
    ) -> None:
        found = self._check_stored(tensor, values)
        for row, layer in owners:
            row.problems += found
            self._check_layer(row, layer, tensor, values)
        if not owners:
            found += self._check_dense(tensor, values)
            report.problems += [f"{tensor}: {problem}" for problem in found]

    def _check_stored(self, tensor: str, values: Tensor) -> list[str]:
        problems = [problem] if (problem := not_finite(values)) else []
        if not self._manifest.tensors:
            return problems
        if tensor not in self._manifest.tensors:
            problems.append(f"{MANIFEST} does not list it")
        elif hash_tensor(values) != self._manifest.tensors[tensor]:
            problems.append("its values are not those that the export wrote (SHA-256 differs)")
        return problems

    def _check_dense(self, tensor: str, values: Tensor) -> list[str]:
        if not self._compares(tensor, self._manifest.changes == "all weights", layer=None):
            return []
        problem = cast(BaseCheck, self._base).compare(tensor, values)
        return [problem] if problem else []

    def _compares(self, tensor: str, changed: bool, layer: str | None) -> bool:
        """Whether a tensor is to be compared with the base's, for the report.

        Args:
            tensor: its name in the files.
            changed: whether the manifest says that the strategy changed what would be compared.
            layer: the layer whose kept weights would be; None for all values of the tensor.
        """
        if self._base is None or self._against is None:
            return False
        if changed:
            reason = f"{MANIFEST} says that the strategy changed them: {self._manifest.weights}"
        elif not self._base.knows(tensor):
            reason = "the base has no Parameter of their name"
        else:
            names = self._against.whole if layer is None else self._against.kept
            if not names or names[-1] != (layer or tensor):  # a layer may lie in several tensors
                names.append(layer or tensor)
            return True
        self._against.left.setdefault(reason, []).append(tensor)
        return False

    def _check_layer(self, row: LayerReport, layer: Layer, tensor: str, values: Tensor) -> None:
        """Check a tensor that holds the layer's weight, or some rows of it."""
        weight_OI = as_rows(values, layer.transposed) if values.ndim in (2, 3) else values
        own = slice(layer.tensors[tensor], layer.tensors[tensor] + len(weight_OI))
        whole = len(layer.tensors) == 1
        fits = weight_OI.shape[1:] == layer.shape[1:] and own.stop <= layer.shape[0]
        if not fits or (whole and tuple(weight_OI.shape) != layer.shape):
            row.problems.append(
                f"its weight is {tuple(weight_OI.shape)} as (out, in), and {MANIFEST} says "
                f"{layer.shape}"
            )
            return
        self._rows.setdefault(row.name, []).append((own.start, own.stop))
        row.nonzero = (row.nonzero or 0) + nonzero_share(weight_OI) * len(weight_OI) / layer.shape[
            0
        ]
        if layer.may_be_dense and plainly_dense(weight_OI, layer.pattern):
            row.pattern = None
            row.notes.append(f"dense: most of its groups hold more than {layer.pattern} keeps")
            row.problems += self._check_dense(tensor, values)
            return
        self._check_dtype(row, values.dtype)
        mask_OI = self._mask(row, layer)
        mask_OI = None if mask_OI is None else mask_OI[own]
        self._check_rules(row, layer, weight_OI, mask_OI)
        if self._compares(tensor, self._manifest.changes != "nothing", row.name):
            kept = None
            if mask_OI is not None:
                kept = as_stored(mask_OI, layer.transposed, layer.experts if whole else None)
            problem = cast(BaseCheck, self._base).compare(tensor, values, kept, sparse=True)
            row.problems += [problem] if problem else []
        self._check_backends(row, layer, weight_OI)

    def _check_dtype(self, row: LayerReport, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        if self._manifest.dtype and name != self._manifest.dtype:
            row.problems.append(
                f"it is stored in {name}, and {MANIFEST} says {self._manifest.dtype}"
            )

    def _mask(self, row: LayerReport, layer: Layer) -> Tensor | None:
        if self._masks is None:
            return None
        if self._read[0] == row.name:  # the parts of a layer follow each other
            return self._read[1]
        self._read = row.name, None
        if row.name not in self._masks:
            row.problems.append(f"{FILE_NAME} holds no mask of it")
            return None
        try:
            mask_OI = self._masks[row.name]
        except SparsifyError as error:
            row.problems.append(str(error))
            return None
        if tuple(mask_OI.shape) != layer.shape:
            row.problems.append(
                f"its stored mask is {tuple(mask_OI.shape)}, and its weight {layer.shape}"
            )
            return None
        self._read = row.name, mask_OI
        return mask_OI

    def _check_rules(
        self, row: LayerReport, layer: Layer, weight_OI: Tensor, mask_OI: Tensor | None
    ) -> None:
        patterns = [layer.pattern]
        if self._asked is not None and self._asked != layer.pattern:
            patterns.append(self._asked)
        row.problems += [p for pattern in patterns if (p := check_pattern(weight_OI, pattern))]
        if mask_OI is not None:
            row.problems += check_mask(weight_OI, mask_OI, layer.pattern)
        problem, note = check_signs(weight_OI, mask_OI, layer.pattern)
        row.problems += [problem] if problem else []
        row.notes += [note] if note and note not in row.notes else []

    def _check_backends(self, row: LayerReport, layer: Layer, weight_OI: Tensor) -> None:
        if layer.experts is not None:
            note = "experts run dense: no backend here multiplies a stack of sparse matrices"
            row.notes += [note] if note not in row.notes else []
            return
        # No backend packs 2:4 in types that are this wide.
        cast = weight_OI.dtype in (torch.float32, torch.float64)
        dtype = torch.bfloat16 if cast else weight_OI.dtype
        name = str(dtype).removeprefix("torch.")
        row.cast = name if cast else None
        row.backends = eligible(layer.shape, dtype, layer.pattern)
        if not row.backends:
            size = f"{layer.shape[0]} x {layer.shape[1]}"
            row.notes.append(f"no backend runs {layer.pattern} at {size} in {name}: it runs dense")
        if self._device is None or self._device.report.backend not in row.backends:
            return
        # Compressing drops what is too much in silence. And types of eight bits compress, but have
        # no plain product.
        if dtype.itemsize == 2 and check_pattern(weight_OI, TWO_FOUR) is None:
            row.product = self._device.run(weight_OI.to(dtype))
            row.problems += [row.product.problem] if row.product.problem else []
