"""Reads and writes mask files, which hold a model's masks in close to the fewest bits.

``docs/mask_file.md`` defines the format. Each layer is encoded by itself. The codes come first and
the index last, so that a file is written in one pass, layer by layer. A delta file stores of some
layers only the groups that differ from those in another file, its prior.

Shapes: O out, I in.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.common.replace import whole_file
from sparsify.export.mask_file.codes import decode, encode
from sparsify.export.mask_file.delta import decode_delta, encode_delta
from sparsify.export.mask_file.index import (
    MAGIC,
    Index,
    LayerEntry,
    find_file,
    open_index,
    unreadable,
)
from sparsify.masking.pattern import NMPattern
from sparsify.models.permutation_file import Permutation


class MaskFile(Mapping[str, Tensor]):
    """Masks by layer name, bool ``[O, I]``, True = kept; each is read when it is asked for.

    Args:
        path: a mask file, or the exported folder that holds one.
        prior: the prior of a delta file.

    Attributes:
        path: the file.
        index: its index: lineage, and the shape, pattern and hash of every layer.

    Raises:
        SparsifyError: the file is missing, not a mask file, of another version or damaged, or it is
            a delta file and ``prior`` is not its prior.
    """

    def __init__(self, path: Path, prior: "MaskFile | None" = None) -> None:
        self.path = find_file(path)
        self.index = open_index(self.path)
        self._offsets = self.index.offsets()
        self._prior = self._check_prior(prior)

    @property
    def patterns(self) -> dict[str, NMPattern]:
        """The pattern of every layer."""
        return {name: entry.pattern for name, entry in self.index.layers.items()}

    @property
    def base_hash(self) -> str:
        """The hash of the model that the masks were made for; empty if it is not known."""
        return self.index.base_hash

    @property
    def permutation(self) -> Permutation | None:
        """The orders of channels of the model that the masks were made for; None for none."""
        return self.index.permutation

    @property
    def digest(self) -> str:
        """SHA-256 of the masks; the same for a whole file and for a delta file."""
        return self.index.digest

    def __getitem__(self, name: str) -> Tensor:
        entry = self.index.layers[name]
        return entry.pattern.unrank(self.ranks(name).view(entry.shape[0], -1))

    def __contains__(self, name: object) -> bool:
        return name in self.index.layers  # the method of Mapping would decode the mask

    def __iter__(self) -> Iterator[str]:
        return iter(self.index.layers)

    def __len__(self) -> int:
        return len(self.index.layers)

    def ranks(self, name: str) -> Tensor:
        """The candidate of every group of a layer, row by row, flat.

        Raises:
            SparsifyError: the stored code is damaged.
        """
        entry = self.index.layers[name]
        candidates = entry.pattern.candidates
        try:
            code = self._stored(name)
            if entry.changed is None:
                _check_hash(code, entry)
                return decode(code, entry.groups, candidates)
            former = cast(MaskFile, self._prior).ranks(name)
            ranks = decode_delta(code, entry.changed, former, candidates)
            _check_hash(encode(ranks, candidates), entry)
            return ranks
        except (OSError, ValueError) as error:
            raise SparsifyError(
                f"{self.path}: the mask of {name} is damaged ({error}) and was not read: "
                "fetch or export the file again"
            ) from error

    def _stored(self, name: str) -> Tensor:
        code = bytearray(self.index.layers[name].stored_bytes)
        with self.path.open("rb") as file:
            file.seek(self._offsets[name])
            if file.readinto(code) != len(code):
                raise ValueError("the file ends within it")
        return torch.frombuffer(code, dtype=torch.uint8) if code else torch.empty(0).byte()

    def _check_prior(self, prior: "MaskFile | None") -> "MaskFile | None":
        wanted = self.index.prior
        if wanted is None:
            return None
        if prior is None or prior.digest != wanted:
            given = "none was given" if prior is None else f"{prior.path} is {prior.digest[:12]}"
            raise SparsifyError(
                f"{self.path} holds changes to the masks {str(wanted)[:12]}, but {given}; join it "
                "with the file that it was made against: sparsify mask join PRIOR DELTA FILE"
            )
        for name, entry in self.index.layers.items():
            if entry.changed is not None and not entry.same_layer(prior.index.layers.get(name)):
                raise unreadable(self.path, f"{name} changes a layer that its prior lacks")
        return prior


class MaskWriter:
    """Writes a mask file layer by layer; the file appears complete at the end of ``with``.

    Args:
        path: the file.
        base_hash: the hash of the model that the masks were made for; empty if it is not known.
        lineage: where the masks come from, in plain JSON values.
        prior: if given, write a delta file against these masks.
        permutation: the orders of channels of that model, if its channels were permuted.
        overwrite: replace a file that is there at the end.
    """

    def __init__(
        self,
        path: Path,
        base_hash: str,
        lineage: Mapping[str, Any] | None = None,
        prior: MaskFile | None = None,
        permutation: Permutation | None = None,
        overwrite: bool = True,
    ) -> None:
        self._path, self._prior, self._overwrite = path, prior, overwrite
        self._layers: dict[str, LayerEntry] = {}
        digest = None if prior is None else prior.digest
        self._index = Index(base_hash, dict(lineage or {}), digest, self._layers, permutation)

    def __enter__(self) -> "MaskWriter":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._whole = whole_file(self._path, self._overwrite)
        self._file = self._whole.__enter__()
        self._file.write(MAGIC)
        return self

    def add(self, name: str, mask_OI: Tensor, pattern: NMPattern) -> None:
        """Write the mask of one layer.

        Raises:
            SparsifyError: a group does not keep exactly N weights, the layer was written before, or
                its name holds control characters.
        """
        if not name.isprintable():
            raise SparsifyError(f"{name!r} holds control characters; give the layer another name")
        if name in self._layers:
            raise SparsifyError(f"{name}: its mask is in the file already; give each layer once")
        try:
            ranks = pattern.rank(mask_OI.cpu()).flatten()
        except SparsifyError as error:
            raise SparsifyError(f"{name}: {error}") from error
        rows, columns = mask_OI.shape
        code = encode(ranks, pattern.candidates)
        entry = LayerEntry((rows, columns), pattern, _hash_code(code))
        if self._prior is not None and entry.same_layer(self._prior.index.layers.get(name)):
            changed, delta = encode_delta(self._prior.ranks(name), ranks, pattern.candidates)
            if len(delta) < len(code):
                code, entry = delta, replace(entry, changed=changed)
        self._file.write(code.numpy().data)
        self._layers[name] = entry

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._whole.__exit__(kind, error, trace)
            return
        with ExitStack() as stack:
            stack.push(self._whole)
            self._file.write(self._index.to_bytes())


def write_masks(
    path: Path,
    masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    patterns: NMPattern | Mapping[str, NMPattern],
    base_hash: str,
    lineage: Mapping[str, Any] | None = None,
    prior: MaskFile | None = None,
    permutation: Permutation | None = None,
    overwrite: bool = True,
) -> None:
    """Write masks, bool ``[O, I]`` by layer name, with one pattern for each or for all.

    The other arguments are those of :class:`MaskWriter`.
    """
    with MaskWriter(path, base_hash, lineage, prior, permutation, overwrite) as file:
        for name, mask_OI in masks.items() if isinstance(masks, Mapping) else masks:
            file.add(name, mask_OI, patterns if isinstance(patterns, NMPattern) else patterns[name])


def read_masks(path: Path, prior: MaskFile | None = None) -> MaskFile:
    """Open a mask file, or the one in an exported folder; arguments as for :class:`MaskFile`."""
    return MaskFile(path, prior)


def _hash_code(code: Tensor) -> str:
    return hashlib.sha256(code.numpy().data).hexdigest()


def _check_hash(code: Tensor, entry: LayerEntry) -> None:
    if _hash_code(code) != entry.sha256:
        raise ValueError("its bytes have changed")
