"""Runs experts on tensors without values.

Which tokens an expert gets depends on their values. A plan takes it that all experts get equally
many, which is what a router is trained for.

A hundred experts would take minutes, so that they are run in a few groups: a product of the
tokens of one expert with the matrices of all of a group has as many numbers going in, coming out
and multiplied as the products of all its experts have.

Shapes: T tokens, K experts of a token, B tokens of a group's experts, I in and O out of a matrix.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.calibration.placing import forward_replaced
from sparsify.common.errors import SparsifyError, first_line
from sparsify.masking.experts import MaskedExperts
from sparsify.masking.linear import as_rows

GROUPS = 8


@contextmanager
def balanced(model: nn.Module) -> Iterator[None]:
    """Within this context, masked experts of Transformers' kind share the tokens equally."""
    layers = [layer for layer in model.modules() if isinstance(layer, MaskedExperts)]
    owners = dict.fromkeys(layer.stack.owner for layer in layers)
    with ExitStack() as stack:
        for owner in owners:
            if hasattr(owner, "is_transposed"):
                stack.enter_context(forward_replaced(owner, partial(_forward, owner)))
        try:
            yield
        except RuntimeError as error:
            odd = [type(owner).__name__ for owner in owners if not hasattr(owner, "is_transposed")]
            if not odd:
                raise
            raise SparsifyError(
                f"the experts of {odd[0]} cannot be planned: how many tokens each gets depends on "
                f"values, and a plan knows only shapes ({first_line(error)}); plan with "
                "--model.exclude '*experts*' or the like"
            ) from error


def _forward(owner: Any, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Compute as the class's own forward does, with as many tokens for every expert."""
    first = _Products(owner, "gate_up_proj" if owner.has_gate else "up_proj")
    second = _Products(owner, "down_proj")
    chosen_B = torch.arange(max(1, index_TK.numel() // first.groups)) % len(x_TH)
    out_TH = torch.zeros_like(x_TH)
    for group in range(first.groups):
        y_BO = first(group, x_TH[chosen_B])
        y_BI = owner._apply_gate(y_BO) if owner.has_gate else owner.act_fn(y_BO)
        y_BO = second(group, y_BI) * weights_TK[chosen_B, 0, None]
        out_TH.index_add_(0, chosen_B, y_BO.to(out_TH.dtype))
    return out_TH


class _Products:
    """Multiplies by the matrices of a group of experts."""

    def __init__(self, owner: Any, key: str) -> None:
        stack = owner._parameters[key]
        self._layer: MaskedExperts | None = owner._modules.get(key)
        self._experts = stack.shape[0]
        self._bias = getattr(owner, f"{key}_bias")[0] if owner.has_bias else None
        self.groups = GROUPS if self._experts % GROUPS == 0 else self._experts
        whole = [as_rows(stack, owner.is_transposed)]
        self._rows = len(whole[0]) // self._experts
        if self._layer is not None:
            whole += self._layer.masker_parameters().values()
        self._parts = [tensor.chunk(self.groups) for tensor in whole]

    def __call__(self, group: int, x_BI: Tensor) -> Tensor:
        weight_OI, *tensors = (parts[group] for parts in self._parts)
        one = x_BI[: -(-len(x_BI) * self.groups // self._experts)]  # a view, so that all are kept
        if self._layer is None:
            y = nn.functional.linear(one, weight_OI)
        else:
            y = self._layer.masked_product(one, weight_OI, group * len(weight_OI), tensors)
        y_BO = y.reshape(-1, self._rows)[: len(x_BI)]
        return y_BO if self._bias is None else y_BO + self._bias
