"""What could be masked in a folder that does not say."""

import re
from pathlib import Path

from sparsify.common.errors import SparsifyError
from sparsify.common.files import read_json
from sparsify.export.manifest import Layer
from sparsify.masking.pattern import NMPattern
from sparsify.models.stored_weights import StoredWeights

# Families whose files hold weights as [I, O]; without a manifest nothing else tells.
_CONV1D_MODELS = ("gpt2", "openai-gpt")


def matrices_of_blocks(
    folder: Path, weights: StoredWeights, pattern: NMPattern
) -> dict[str, Layer]:
    """What could be masked in a folder without a manifest, by the names and shapes in its files:
    matrices with a number in their name that are no embedding and no output head, and whose inputs
    divide into groups.
    """
    try:
        model_type = dict(read_json(folder / "config.json")).get("model_type")
    except (SparsifyError, TypeError, ValueError):
        model_type = None
    transposed = model_type in _CONV1D_MODELS
    layers = {}
    for tensor in weights:
        name, _, kind = tensor.rpartition(".")
        shape = weights.shape(tensor)
        if kind != "weight" or len(shape) != 2 or not re.search(r"(^|\.)\d+\.", name):
            continue
        rows, columns = reversed(shape) if transposed else shape
        if columns % pattern.m == 0 and not re.search("embed|lm_head", name):
            layers[name] = Layer(
                {tensor: 0}, (rows, columns), pattern, transposed, may_be_dense=True
            )
    return layers
