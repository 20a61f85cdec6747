"""Computes norms of the loss's gradient over calibration windows.

Shapes: S windows, T tokens, O out, I in.
"""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.masking.layer import MaskedLinear
from sparsify.models.perplexity import token_losses


def gradient_norms(
    model: PreTrainedModel,
    layers: Mapping[str, MaskedLinear],
    windows_ST: Tensor,
    keep_on: torch.device,
) -> dict[str, Tensor]:
    """The l2 norm over windows of each weight's gradient, in the dense model.

    This takes one backward pass per window. A gradient is freed as soon as its square is added, so
    only one fp32 number per weight is kept.

    Args:
        model: the model, on the device to compute on, its scope set to dense.
        layers: the layers whose weights are measured, by name.
        windows_ST: token ids.
        keep_on: the device of the sums.

    Returns:
        fp32 ``[O, I]`` by layer name.
    """
    stored: dict[nn.Parameter, Tensor] = {}

    def take(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            stored[parameter] += parameter.grad.float().square().to(keep_on)
            parameter.grad = None

    with ExitStack() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.requires_grad_(False).grad = None
        for layer in layers.values():
            weight: nn.Parameter = layer.weight  # type: ignore[assignment]
            if weight not in stored:
                stored[weight] = torch.zeros_like(weight, dtype=torch.float32, device=keep_on)
                weight.requires_grad_(True)
                hook = weight.register_post_accumulate_grad_hook(take)
                stack.callback(hook.remove)
        for tokens_T in windows_ST:
            tokens_BT = tokens_T[None].to(model.device)
            with torch.enable_grad():
                logits = model(input_ids=tokens_BT, use_cache=False).logits
                token_losses(logits, tokens_BT).mean().backward()
    return {
        name: layer.as_rows(stored[layer.weight].sqrt())  # type: ignore[index]
        for name, layer in layers.items()
    }
