"""Runs experts on tensors without values.

Which tokens an expert gets depends on their values. A plan takes it that all experts get equally
many, which is what a router is trained for.

A hundred experts take minutes, so that those of a step are run in a few groups: a product of the
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

GROUPS = 8


@contextmanager
def balanced(model: nn.Module, grouped: bool) -> Iterator[None]:
    """Within this context, masked experts of Transformers' kind share the tokens equally.

    Args:
        model: the masked model.
        grouped: whether they are run in a few groups.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, MaskedExperts) and hasattr(layer.stack.owner, "is_transposed")
    ]
    owners = dict.fromkeys(layer.stack.owner for layer in layers)
    with ExitStack() as stack:
        for layer in layers:
            if grouped and layer.experts % GROUPS == 0:
                stack.callback(setattr, layer, "experts", layer.experts)
                layer.experts = GROUPS
        for owner in owners:
            stack.enter_context(forward_replaced(owner, partial(_forward, owner)))
        try:
            yield
        except RuntimeError as error:
            others = [m.stack.owner for m in model.modules() if isinstance(m, MaskedExperts)]
            if odd := [type(owner).__name__ for owner in others if owner not in owners]:
                raise SparsifyError(
                    f"the experts of {odd[0]} cannot be planned: how many tokens each gets depends "
                    f"on values, and a plan knows only shapes ({first_line(error)}); plan with "
                    "their layers excluded"
                ) from error
            raise


def _forward(owner: Any, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Compute as the class's own forward does, with as many tokens for every expert."""
    first = "gate_up_proj" if owner.has_gate else "up_proj"
    groups = next(m.experts for m in owner.children() if isinstance(m, MaskedExperts))
    chosen_B = torch.arange(max(1, index_TK.numel() // groups)) % len(x_TH)
    out_TH = torch.zeros_like(x_TH)
    for group in range(groups):
        y_BO = _product(owner, first, group, x_TH[chosen_B])
        y_BI = owner._apply_gate(y_BO) if owner.has_gate else owner.act_fn(y_BO)
        y_BO = _product(owner, "down_proj", group, y_BI) * weights_TK[chosen_B, 0, None]
        out_TH.index_add_(0, chosen_B, y_BO.to(out_TH.dtype))
    return out_TH


def _product(owner: Any, key: str, group: int, x_BI: Tensor) -> Tensor:
    """The products of a group's tokens, with as many numbers as there are."""
    stack: Any = owner._parameters[key]
    rows = stack.shape[-1] if owner.is_transposed else stack.shape[-2]
    matrix = getattr(owner, key)[group]
    one = x_BI[: -(-len(x_BI) // _experts(owner, key))]  # a view, so that all are kept
    y = one @ matrix if owner.is_transposed else nn.functional.linear(one, matrix)
    y_BO = y.reshape(-1, rows)[: len(x_BI)]
    return y_BO + getattr(owner, f"{key}_bias")[0] if owner.has_bias else y_BO


def _experts(owner: Any, key: str) -> int:
    """How many experts a group has."""
    layer = owner._modules.get(key)
    return owner.num_experts // layer.experts if isinstance(layer, MaskedExperts) else 1
