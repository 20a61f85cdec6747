"""Runs experts on tensors without values.

Which tokens an expert gets depends on their values. A plan takes it that all experts get equally
many, which is what a router is trained for.

Shapes: T tokens, K experts of a token, E experts, H hidden size, F inner size of an expert.
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


@contextmanager
def balanced(model: nn.Module) -> Iterator[None]:
    """Within this context, masked experts of Transformers' kind share the tokens equally."""
    owners = {
        layer.stack.owner: None
        for layer in model.modules()
        if isinstance(layer, MaskedExperts) and hasattr(layer.stack.owner, "is_transposed")
    }
    with ExitStack() as stack:
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
    """Compute as the class's own forward does, with the first tokens for every expert."""
    tokens = -(-index_TK.numel() // owner.num_experts)
    chosen = torch.arange(min(tokens, len(x_TH)))
    first = "gate_up_proj" if owner.has_gate else "up_proj"
    out_TH = torch.zeros_like(x_TH)
    for expert in range(owner.num_experts):
        y_TF = _product(owner, first, expert, x_TH[chosen])
        y_TF = owner._apply_gate(y_TF) if owner.has_gate else owner.act_fn(y_TF)
        y_TH = _product(owner, "down_proj", expert, y_TF) * weights_TK[chosen, 0, None]
        out_TH.index_add_(0, chosen, y_TH.to(out_TH.dtype))
    return out_TH


def _product(owner: Any, key: str, expert: int, x_TI: Tensor) -> Tensor:
    matrix = getattr(owner, key)[expert]
    y_TO = x_TI @ matrix if owner.is_transposed else nn.functional.linear(x_TI, matrix)
    return y_TO + getattr(owner, f"{key}_bias")[expert] if owner.has_bias else y_TO
