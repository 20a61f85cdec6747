"""Fills the weights of an empty model from an exported folder, one by one.

Each weight is read, checked, moved and compressed before the next one, so host and device never
hold more than the sparse model and one dense layer. One exception: if the files use other names
than the model, as for experts that are stored one by one, the host holds the whole dense model.

Shapes: O out, I in, T tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from sparsify.common.errors import SparsifyError
from sparsify.export.manifest import MANIFEST
from sparsify.masking.linear import as_rows, stacks
from sparsify.masking.pattern import NMPattern
from sparsify.models.stored_weights import StoredWeights
from sparsify.serving.backends import Backend, compressed
from sparsify.serving.converted import ConvertedWeights

FIX = "load with choose='dense', or with other backends"
"""What to do where a backend's products are wrong."""


def names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    """All names of every Parameter, by the Parameter's ``id``."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def fill(
    model: nn.Module,
    folder: Path,
    device: torch.device,
    patterns: Mapping[str, NMPattern],
    backends: Mapping[str, Backend],
) -> None:
    """Load the model's weights, and put its buffers on the device.

    Args:
        model: its Parameters are on the meta device and already have their final type.
        folder: holds the safetensors files.
        device: where weights and buffers go.
        patterns: the pattern of every layer that was made sparse; all are checked.
        backends: the backend that compresses each layer; layers without one stay dense.

    Raises:
        SparsifyError: the files and the model differ in names or shapes, a layer does not hold its
            pattern, or a backend's product differs from the dense one.
    """
    for name, buffer in dict(model.named_buffers()).items():
        _put(model, name, buffer.to(device))
    names = {name: same for same in names_by_parameter(model).values() for name in same}
    expected = dict(model.state_dict(keep_vars=True))
    stored_weights = StoredWeights(folder)
    stored_weights.check()
    same = _same_names(stored_weights, set(expected), names)
    weights = stored_weights if same else ConvertedWeights(folder)
    for name in weights:
        stored, like = weights.get(name), expected[name]
        if stored.shape != like.shape:
            raise SparsifyError(
                f"{name} is stored as {tuple(stored.shape)}, but the configuration says "
                f"{tuple(like.shape)}; export the model again"
            )
        value = stored.to(device, like.dtype)
        if name in names:
            value = nn.Parameter(value, requires_grad=False)
        for alias in names.get(name, [name]):
            check_pattern(model, alias, value, patterns)
            _put(model, alias, value)
        del stored, value  # now only the module holds the tensor, until it is compressed
        compress_whole(model, name.rpartition(".")[0], backends)


def _same_names(
    weights: StoredWeights, expected: set[str], names: Mapping[str, Sequence[str]]
) -> bool:
    found = set(weights)
    missing = any(found.isdisjoint(names.get(name, [name])) for name in expected)
    return not missing and found <= expected


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(owner), own_name, value)


def check_pattern(
    model: nn.Module, name: str, value: Tensor, patterns: Mapping[str, NMPattern]
) -> None:
    """Check a weight by its Parameter's name, if a pattern is known for it: compressing silently
    drops what exceeds it.

    Raises:
        SparsifyError: it does not hold its pattern.
    """
    layer, _, own_name = name.rpartition(".")
    if name in patterns:  # experts
        layer, stack = name, stacks(model.get_submodule(layer))[own_name]
        weight_OI = as_rows(value, stack.transposed)
    elif layer in patterns and own_name == "weight":
        weight_OI = value if isinstance(model.get_submodule(layer), nn.Linear) else value.T
    else:
        return
    if weight_OI.shape[1] % patterns[layer].m or not patterns[layer].holds(weight_OI):
        raise SparsifyError(
            f"{layer}: {MANIFEST} says {patterns[layer]}, but its weight has groups with more than "
            f"{patterns[layer].n} nonzero values of {patterns[layer].m}; it was changed after the "
            "export: export the model again"
        )


def compress_whole(model: nn.Module, name: str, backends: Mapping[str, Backend]) -> None:
    """Compress a layer that has a backend, once its weight and bias are loaded."""
    if name not in backends:
        return
    linear = cast(nn.Linear, model.get_submodule(name))
    if not any(parameter.is_meta for parameter in linear.parameters()):
        layer = compressed(name, linear.weight, linear.bias, backends[name], FIX)
        model.set_submodule(name, layer)
