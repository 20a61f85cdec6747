"""Several masks over one set of dense weights, swapped in place.

Shapes: O out, I in.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.common.errors import SparsifyError
from sparsify.export.exchange.layers import BaseHashes, find_pattern, stored_shapes
from sparsify.export.mask_file.file import MaskFile, read_masks
from sparsify.masking.experts import masked
from sparsify.masking.inject import fold
from sparsify.masking.layer import MaskedLinear, MaskScope, masked_layers
from sparsify.masking.linear import Stack, elsewhere, maskable
from sparsify.masking.masker import FixedMasker
from sparsify.models.permutable import permutable
from sparsify.models.permutation import Part, inverse, permute
from sparsify.models.permutation_file import Permutation

FROZEN = "frozen"
MaskSource = Mapping[str, Tensor] | str | Path


class MaskAdapters:
    """Several named masks for one model. At most one is active; without one the model is dense.

    The dense weights are held once and never change until :meth:`fold`. A mask is stored as one
    candidate number per group, for 2:4 a quarter of a byte per weight; swapping allocates no more
    than that. Layers that the active mask does not name stay plain. Do not use it from several
    threads: it changes the model itself.

    Args:
        model: a causal LM with plain linear layers.

    Raises:
        SparsifyError: the model is masked already.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if masked_layers(model):
            raise SparsifyError(
                f"this {type(model).__name__} has masked layers already; fold or detach what masks "
                "it, or load it again"
            )
        self.model = model
        self._hashes = BaseHashes(model)
        self._shapes = stored_shapes(model)
        self._layers = maskable(model)
        self._tied = elsewhere(model, self._layers)
        self._maskers: dict[str, dict[str, FixedMasker]] = {}
        self._masked: dict[str, MaskedLinear] = {}  # the layers that are in use at present
        self._active: str | None = None
        self._orders: dict[str, Permutation] = {}  # those of masks that have any, by name
        self._parts: Mapping[str, Part] | None = None

    @property
    def names(self) -> list[str]:
        """The names of all masks, in the order in which they were added."""
        return list(self._maskers)

    @property
    def active(self) -> str | None:
        """The mask in use; None if the model is dense."""
        return self._active

    def add(self, name: str, masks: MaskSource) -> None:
        """Add a mask without using it yet.

        Args:
            name: the mask's name.
            masks: bool ``[O, I]`` by qualified layer name, a mask file, or an exported folder. If
                they state the hash of their base model, as files do, it must be this model.

        Raises:
            SparsifyError: the name is taken, or the masks do not fit this model as it is.
        """
        if name in self._maskers:
            raise SparsifyError(
                f"{name!r} is there already; remove it first, or choose another name"
            )
        if not isinstance(masks, Mapping | str | Path):
            raise SparsifyError(
                f"{name!r}: {masks!r} are no masks; give bool tensors by layer name, or the path "
                "of a mask file or an exported folder"
            )
        masks, base_hash = _read(masks)
        found = masks
        if not found:
            raise SparsifyError(f"{name!r} masks no layer; give masks of one layer at least")
        maskers = {layer: self._masker(layer, found[layer]) for layer in found}
        permutation = getattr(masks, "permutation", None)
        permuted = self._active in self._orders
        inactive: AbstractContextManager[Any] = self.use(None) if permuted else nullcontext()
        with inactive:  # hashes are of the channels in the model's own order
            if permutation is not None and permutation.base_hash in self._hashes:
                self._orders[name] = permutation
            else:
                self._hashes.check(base_hash, repr(name))
        self._maskers[name] = maskers

    def _masker(self, layer: str, mask_OI: Tensor) -> FixedMasker:
        if layer not in self._shapes:
            raise SparsifyError(
                f"{layer!r} is no linear layer of this {type(self.model).__name__}; they are "
                f"called like {next(iter(self._shapes), None)!r}: give masks of this model"
            )
        if (other := self._tied.get(id(self._layers[layer].weight))) is not None:
            raise SparsifyError(
                f"{layer}: its weight is tied to {other}, which a mask would change too; give "
                "masks that leave it dense"
            )
        shape = (self._shapes[layer].rows, self._shapes[layer].columns)
        if not isinstance(mask_OI, Tensor):
            raise SparsifyError(
                f"{layer}: its mask is a {type(mask_OI).__name__}; give a bool tensor {shape}"
            )
        if tuple(mask_OI.shape) != shape or mask_OI.dtype != torch.bool:
            raise SparsifyError(
                f"{layer}: its mask is {mask_OI.dtype} {tuple(mask_OI.shape)} and the weight is "
                f"{shape}; give bool masks of this model"
            )
        try:
            masker = FixedMasker(layer, shape, find_pattern(mask_OI))
        except SparsifyError as error:
            raise SparsifyError(f"{layer}: {error}") from error
        masker.set_mask(mask_OI)
        return masker

    def use(self, name: str | None) -> "Swapped":
        """Switch to another mask at once; None makes the model dense.

        Returns:
            A context manager that restores the former mask at its end; it need not be used.

        Raises:
            SparsifyError: there is no such mask.
        """
        if name is not None:
            self._check(name)
        former, scope = self._active, MaskScope()
        maskers = {} if name is None else self._maskers[name]
        # The active mask moves along with the model; another mask is moved when it is used. All its
        # tensors move before any layer is swapped, because memory may run out.
        for layer, masker in maskers.items():
            # The plain layer stays behind when a masked one is in its place.
            masker.to(cast(Tensor, self._masked.get(layer, self._layers[layer]).weight).device)
        self._restore()
        self._permute(self._orders.get(name or ""), undo=False)
        for layer, masker in maskers.items():
            plain = self._layers[layer]
            training = (plain.owner if isinstance(plain, Stack) else plain).training
            self._masked[layer] = masked(plain, masker, scope).train(training)
            self._masked[layer].put(self.model, layer)
        self._active = name
        return Swapped(self, former)

    def _restore(self) -> None:
        """Put the plain layers back."""
        for layer, module in self._masked.items():
            plain = self._layers[layer]
            if isinstance(plain, Stack):
                if plain.owner._modules.get(plain.key) is module:  # and not folded
                    module.leave(self.model, layer)
                continue
            # Loading a state or moving to another device may have replaced them.
            for key in ("weight", "bias"):
                plain.register_parameter(key, cast(nn.Parameter | None, getattr(module, key)))
            self.model.set_submodule(layer, plain.train(module.training))
        self._masked.clear()
        self._permute(self._orders.get(self._active or ""), undo=True)
        self._active = None

    def _permute(self, permutation: Permutation | None, undo: bool) -> None:
        if permutation is None:
            return
        if self._parts is None:
            self._parts = permutable(self.model)[0]
        orders = permutation.orders
        permute(self.model, self._parts, inverse(orders) if undo else orders)

    def remove(self, name: str) -> None:
        """Forget a mask; if it is active, the model becomes dense.

        Raises:
            SparsifyError: there is no such mask.
        """
        self._check(name)
        if self._active == name:
            self.use(None)
        del self._maskers[name]
        self._orders.pop(name, None)

    def detach(self) -> None:
        """Remove all masks; the model is dense again and has its original layer objects."""
        self.use(None)
        self._maskers.clear()
        self._orders.clear()

    def fold(self, name: str) -> PreTrainedModel:
        """Apply a mask to the weights, in place, and remove all masks; the dense weights are lost
        then.

        Raises:
            SparsifyError: there is no such mask.
        """
        self.use(name)
        fold(self.model)
        self._orders.clear()  # only in the mask's order of channels are its groups N:M
        self.detach()
        self._hashes = BaseHashes(self.model)
        return self.model

    def _check(self, name: str) -> None:
        if name not in self._maskers:
            there = ", ".join(map(repr, self._maskers)) or "none"
            raise SparsifyError(f"there is no mask {name!r}; there are {there}: add it first")


class Swapped:
    """Restores the former mask at the end of a ``with`` block."""

    def __init__(self, adapters: MaskAdapters, former: str | None) -> None:
        self._adapters, self._former = adapters, former

    def __enter__(self) -> MaskAdapters:
        return self._adapters

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The former mask may have been removed within the block.
        self._adapters.use(self._former if self._former in self._adapters.names else None)


def _read(masks: MaskSource) -> tuple[Mapping[str, Tensor], str]:
    """The masks, and their base model's hash, which is empty if they do not state it."""
    found = masks if isinstance(masks, Mapping) else read_masks(Path(masks))
    if isinstance(found, MaskFile):
        strategy = found.index.lineage.get("strategy")
        kind = strategy.get("weights", FROZEN) if isinstance(strategy, dict) else FROZEN
        if kind not in (FROZEN, "proxy"):
            raise SparsifyError(
                f"{found.path}: its masks belong to weights that their strategy changed ({kind}), "
                "so that over the dense weights they do not make the model that was exported; give "
                "dict(read_masks(...)) for the masks alone"
            )
    return found, getattr(found, "base_hash", "")
