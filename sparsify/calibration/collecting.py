"""Collects statistics of layer inputs while the calibration windows run through a block.

Shapes: B any leading dimensions, I in.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from sparsify.calibration.statistics import Statistic
from sparsify.common.errors import SparsifyError
from sparsify.masking.layer import MaskedLinear


def collect_inputs(
    layers: Mapping[str, MaskedLinear],
    kind: Callable[[int, torch.device], Any],
    windows: Iterable[object],
) -> dict[str, Any]:
    """Collect one statistic for every layer.

    Args:
        layers: the layers by qualified name.
        kind: makes a statistic, given the number of inputs and a device.
        windows: an iterable that runs the layers over one window at each step.

    Returns:
        The statistics by layer name; layers with the same input tensor share one object.

    Raises:
        SparsifyError: a layer got no token.
    """
    statistics: dict[str, Statistic] = {}
    owners: set[str] = set()  # the first layer with each input
    window: list[tuple[Tensor, Statistic]] = []  # inputs of this window, to find shared ones

    def see(name: str, x_BI: Tensor) -> None:
        if name not in statistics:
            shared = next((stat for x, stat in window if x.is_set_to(x_BI)), None)
            if shared is None:
                owners.add(name)
                shared = kind(x_BI.shape[-1], x_BI.device)
            statistics[name] = shared
        if name in owners:
            statistics[name].add(x_BI.flatten(0, -2))
            if len(statistics) < len(layers):
                window.append((x_BI, statistics[name]))

    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            stack.callback(hook.remove)
        for _ in windows:
            window.clear()
    if missing := [name for name in layers if name not in statistics]:
        raise SparsifyError(
            f"no calibration token reached {', '.join(missing)}; every masked layer must be "
            "used: raise --model.calibration.samples, or leave it dense with --model.exclude"
        )
    return statistics
