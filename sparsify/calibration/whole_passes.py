"""Runs the whole model over all windows of calibration text for each block: slow, and always right.

For models whose blocks cannot run one by one: each block then costs forward passes of all blocks.

Shapes: B batch, S windows, T tokens, H hidden size.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.calibration.placing import Values, moved, replaced
from sparsify.common.errors import SparsifyError


class _Stop(Exception):
    """Ends a forward pass of the model from inside."""


class WholePasses:
    """Does what :class:`~sparsify.calibration.activations.Activations` does, by other means.

    The pruned weights of all blocks that were left are kept.

    Args:
        model: the model, on CPU or on ``device``.
        windows_ST: token ids, int64.
        device: where to compute; the model is moved there while it runs.
    """

    def __init__(self, model: PreTrainedModel, windows_ST: Tensor, device: torch.device) -> None:
        self._model, self._windows_ST, self._device = model, windows_ST, device
        self._weights: dict[str, Values] = {}

    def run(self, block: str, weights: Mapping[str, Values]) -> Iterator[None]:
        """Run all blocks over all windows, those that were left with their pruned weights.

        Args:
            block: any block.
            weights: values to use instead of the block's Parameters, by name within the block.

        Raises:
            SparsifyError: what the blocks compute is not finite.
        """
        own = {f"{block}.{name}": weight for name, weight in weights.items()}
        with moved([self._model], self._device), replaced(self._model, self._weights | own):
            for tokens_T in self._windows_ST:
                hidden_BTH = run_to_head(self._model, tokens_T[None].to(self._device))
                if hidden_BTH is not None:
                    check_finite("the output of the decoder blocks", hidden_BTH)
                yield

    def advance(self, block: str, weights: Mapping[str, Values]) -> None:
        """Leave a block: keep the values to use instead of its Parameters."""
        self._weights |= {f"{block}.{name}": weight for name, weight in weights.items()}


def run_to_head(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor | None:
    """Run the model up to its output head, whose logits would take much memory.

    Returns:
        What enters the head, ``[B, T, H]``; None if the model has none.
    """
    entered: list[Tensor] = []

    def stop(_: Any, args: Any) -> None:
        entered.append(args[0])
        raise _Stop

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(stop) if head is not None else None
    try:
        model(input_ids=tokens_BT, use_cache=False)
    except _Stop:
        return entered[0]
    finally:
        if hook is not None:
            hook.remove()
    return None


def check_finite(what: str, hidden: Tensor) -> None:
    """Refuse activations that are not finite, as no statistic can be made of them."""
    if not bool(hidden.isfinite().all()):
        raise not_finite(what, hidden.dtype)


def not_finite(what: str, dtype: torch.dtype) -> SparsifyError:
    """The error for activations that are not finite."""
    fix = (
        "float16 holds nothing above 65504: give --model.dtype bfloat16 or float32"
        if dtype == torch.float16
        else "give a model whose activations are finite, or --model.dtype float32"
    )
    name = str(dtype).removeprefix("torch.")
    return SparsifyError(f"{what} is not finite in {name} on calibration text; {fix}")
