"""What is written down about a run: its protocol, how sparse its model is."""

import math
from typing import Any

from sparsify.masking.inject import base_parameters, decoder_blocks, masked_layers
from sparsify.training.module import SparseCausalLM

METRIC = (
    "token perplexity: exp of the mean over windows of the mean cross-entropy of the next token"
)


def describe_protocol(module: SparseCausalLM, datamodule: Any, split: str) -> dict[str, Any]:
    """How a score on a split is measured: what must agree for two to be compared."""
    precision = None if module._trainer is None else module.trainer.precision
    return {
        "metric": METRIC,
        "split": split,
        "base": {
            "name": module.base_name,
            "hash": module.base_hash,
            "dtype": module.dtype_name + (f", {precision}" if precision == "bf16-mixed" else ""),
        },
        "data": datamodule.describe(split),
    }


def sparsity(module: SparseCausalLM) -> float:
    """The share of zeros that the masks make, of the blocks' weights: of all their matrices, and
    of stacks of matrices, as which experts may be held; not of depthwise convolutions.
    """
    maskers = [layer.masker for layer in masked_layers(module.lm).values()]
    zeros = sum(math.prod(masker.shape) * (1 - masker.pattern.density) for masker in maskers)
    total = sum(
        parameter.numel()
        for block in decoder_blocks(module.lm).values()
        for parameter in base_parameters(block).values()
        if parameter.ndim == 2 or (parameter.ndim == 3 and min(parameter.shape[1:]) > 1)
    )
    return zeros / total
