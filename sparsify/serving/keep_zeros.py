"""Keeps the N:M zeros of an exported model while Transformers' Trainer, or TRL's, trains it.

Shapes: O out, I in.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback

from sparsify.common.errors import SparsifyError
from sparsify.export.exchange.zeros import DENSE_ZEROS, pattern_of
from sparsify.export.manifest import MANIFEST, sound_manifest
from sparsify.masking.linear import Stack, as_rows, linear_shape, maskable
from sparsify.masking.mask_bits import pack, unpack
from sparsify.masking.select import decoder_blocks
from sparsify.masking.sharded_rows import whole

log = logging.getLogger("sparsify")

# What PyTorch puts between the names of modules that it wraps.
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


@dataclass(frozen=True)
class _Zeros:
    """The zeros of one Parameter, or of the rows that this process holds of it, one bit each."""

    parameter: nn.Parameter
    bits: Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter) -> "_Zeros":
        own = _local(parameter)
        return cls(parameter, pack((own == 0).reshape(-1, own.shape[-1])))

    def clear(self, values: Tensor) -> None:
        """Set these places to zero in the Parameter's values or gradient, in place."""
        own = _local(values)
        zeros = unpack(self.bits.to(own.device), own.shape[-1])
        own.masked_fill_(zeros.reshape(own.shape), 0)

    def clear_gradient(self, parameter: Tensor) -> None:
        """The hook that PyTorch calls when a gradient was added."""
        if parameter.grad is not None:
            with torch.no_grad():
                self.clear(parameter.grad)


class KeepZeros(TrainerCallback):
    """Give it to a Trainer's ``callbacks`` to fine-tune a sparse model: what is zero when training
    begins stays exactly zero, and all else is trained as usual.

    The gradient of these weights is set to zero before it is clipped, and the weights themselves
    after each step of the optimizer, whatever that makes of momentum and weight decay. A Trainer
    saves after that, so every checkpoint holds the zeros. This takes one bit a weight.

    A kept weight that happens to be exactly zero when training begins or goes on stays zero too.

    Args:
        folder: the export from which the model was loaded: each layer that its manifest lists must
            hold its pattern. None takes the layers of the decoder blocks that are N:M by their
            zeros, with M of 4, 8 or 16.

    Raises:
        SparsifyError: the folder is no export. When training begins: a listed layer is missing or
            does not hold its pattern; without a folder, no layer is N:M, or one has many zeros and
            no pattern.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._manifest = None if folder is None else sound_manifest(Path(folder))
        self._zeros: list[_Zeros] = []
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Find the zeros. A checkpoint that training goes on from was loaded before."""
        self._forget()  # a Trainer may begin again with a smaller batch
        with torch.no_grad():
            self._zeros = list(self._find(model))
        for zeros in self._zeros:
            if zeros.parameter.requires_grad:
                hook = zeros.parameter.register_post_accumulate_grad_hook(zeros.clear_gradient)
                self._hooks.append(hook)
        log.info("KeepZeros keeps the zeros of %d weights", len(self._zeros))

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the zeros back after the optimizer's step; a Trainer saves and evaluates later."""
        for zeros in self._zeros:
            zeros.clear(zeros.parameter.detach())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was before, but trained."""
        self._forget()

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._zeros = [], []

    def _find(self, model: PreTrainedModel) -> Iterator[_Zeros]:
        """The zeros of every Parameter whose layer is sparse; all are checked first."""
        if hasattr(model, "peft_config"):
            raise SparsifyError(
                f"this {type(model).__name__} trains adapters, which leave the weights and their "
                "zeros as they are: train without KeepZeros, and then merge with sparsify merge, "
                "which keeps the zeros too"
            )
        layers = {_WRAPPERS.sub("", name): layer for name, layer in maskable(model).items()}
        found = self._listed(layers) if self._manifest else _sparse(model, layers)
        parameters = {id(p): p for p in found}  # two layers may share one
        if not parameters:
            raise SparsifyError(
                f"no layer of this {type(model).__name__} is N:M sparse, so there are no zeros to "
                "keep; load an exported folder, or leave KeepZeros out"
            )
        return map(_Zeros.of, parameters.values())

    def _listed(self, layers: dict[str, nn.Module | Stack]) -> list[nn.Parameter]:
        """The weights of the layers that the manifest lists."""
        found = []
        for name, listed in cast(Any, self._manifest).layers.items():
            if (layer := layers.get(name)) is None:
                raise SparsifyError(
                    f"{MANIFEST} lists {name}, and the model that is trained has no such linear "
                    "layer; give KeepZeros the folder from which it was loaded"
                )
            weight = cast(nn.Parameter, layer.weight)
            if weight.ndim < 2 or linear_shape(layer) != listed.shape:
                raise SparsifyError(
                    f"{name}: its weight is {tuple(weight.shape)}, and {MANIFEST} says "
                    f"{listed.shape}; give the folder from which the model was loaded. FSDP 1 and "
                    "DeepSpeed's stage 3 flatten weights, so that no zeros are found in them: "
                    "take FSDP 2"
                )
            if not listed.pattern.holds(_as_OI(layer, whole(weight))):
                raise SparsifyError(
                    f"{name}: {MANIFEST} says {listed.pattern}, and its weight has groups with "
                    f"more than {listed.pattern.n} nonzero values of {listed.pattern.m}: it was "
                    "trained without KeepZeros, or is of another model; load the export again"
                )
            found.append(weight)
        return found


def _sparse(model: PreTrainedModel, layers: dict[str, nn.Module | Stack]) -> list[nn.Parameter]:
    """The weights of the decoder blocks that are N:M by their zeros."""
    blocks = tuple(f"{_WRAPPERS.sub('', name)}." for name in decoder_blocks(model))
    found = []
    for name, layer in layers.items():
        weight = cast(nn.Parameter, layer.weight)
        if not name.startswith(blocks) or weight.ndim < 2:
            continue
        nonzero_OI = _as_OI(layer, whole(weight)) != 0
        if pattern_of(nonzero_OI) is not None:
            found.append(weight)
        elif (zeros := 1 - float(nonzero_OI.float().mean())) >= DENSE_ZEROS:
            raise SparsifyError(
                f"{name}: {zeros:.0%} of its weights are zero, but it is N:M for no M of 4, 8 or "
                "16; give KeepZeros the exported folder, whose manifest says what each layer is"
            )
    return found


def _as_OI(layer: nn.Module | Stack, weight: Tensor) -> Tensor:
    transposed = layer.transposed if isinstance(layer, Stack) else not isinstance(layer, nn.Linear)
    return as_rows(weight, transposed)


def _local(values: Tensor) -> Tensor:
    """What this process holds of a tensor, without a copy."""
    own = values.detach()
    return own.to_local() if isinstance(own, DTensor) else own
