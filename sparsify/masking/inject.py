"""Puts masked layers into a model, and takes them out again."""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sparsify.common.errors import SparsifyError
from sparsify.masking.experts import masked
from sparsify.masking.layer import MaskScope, masked_layers
from sparsify.masking.linear import Stack, linear_shape
from sparsify.masking.masker import Masker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.select import Selection
from sparsify.masking.sharded_rows import hard_mask

MakeMasker = Callable[[str, tuple[int, int], NMPattern], Masker]


def inject(
    model: nn.Module,
    layers: dict[str, nn.Module | Stack],
    selection: Selection,
    make_masker: MakeMasker,
) -> MaskScope:
    """Replace the layers by masked ones that hold the same Parameters. Layers that share a weight
    also share a masker.

    Args:
        model: holds the layers; changed in place.
        layers: by qualified name, as :func:`~sparsify.masking.select.select` chose them.
        selection: gives the pattern of each layer.
        make_masker: called with a layer's name, its shape (O, I) and its pattern.

    Raises:
        SparsifyError: a masker's Parameters are not of the type that it declares.
    """
    scope = MaskScope()
    maskers: dict[int, Masker] = {}
    for name, layer in layers.items():
        weight = cast(torch.Tensor, layer.weight)
        if id(weight) not in maskers:
            own = cast(NMPattern, selection.pattern_of(name))
            maskers[id(weight)] = make_masker(name, linear_shape(layer), own).to(weight.device)
            _check_dtype(maskers[id(weight)])
        masker = maskers[id(weight)]
        masked(layer, masker, scope).put(model, name)
    return scope


def _check_dtype(masker: Masker) -> None:
    for key, parameter in masker.named_parameters():
        if parameter.requires_grad and parameter.dtype != masker.learned_dtype:
            kind = type(masker).__name__
            raise SparsifyError(
                f"{masker.name}: {kind} learns {key} in {parameter.dtype} and declares "
                f"{masker.learned_dtype}; make it in self.learned_dtype, or declare its type as "
                f"{kind}.learned_dtype"
            )


def hard_masks(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, bool mask ``[O, I]``) of every masked layer. If the model is sharded, every rank
    gets the whole mask.
    """
    for name, layer in masked_layers(model).items():
        yield name, hard_mask(layer)


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Apply every hard mask to its weight, in place, and put the plain layers back. Biases stay as
    they are.

    Raises:
        SparsifyError: the model is sharded.
    """
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise SparsifyError(
            "the model is sharded over several processes, and each would fold a part; export it, "
            "and load the folder"
        )
    done: set[int] = set()  # harden a shared weight once: a masker may add a term to the weight
    for name, layer in masked_layers(model).items():
        if id(layer.weight) not in done:
            layer.weight_OI.data.copy_(layer.masker.harden(layer.weight_OI))
            done.add(id(layer.weight))
        layer.leave(model, name)
