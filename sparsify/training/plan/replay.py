"""Runs what is marked ``by_shape`` once for each shape; later calls replay what it took.

A plan would spend most of its time in these functions.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sparsify.masking import noise, plackett_luce
from sparsify.masking.by_shape import replaying
from sparsify.training.plan.ledger import Ledger
from sparsify.training.plan.work import Work, WorkCounter


@contextmanager
def replayed(ledger: Ledger, work: WorkCounter, device: str) -> Iterator[None]:
    """Replay marked functions.

    On a CPU the temporary tensors of a piece are too small to count; a GPU makes all at once.
    """
    whole = device != "cpu"
    with ExitStack() as stack:
        # What is not replayed takes pieces that are few, and still small.
        stack.enter_context(patch.object(noise, "_IN_CACHE", sys.maxsize if whole else 1 << 22))
        if whole:
            stack.enter_context(patch.object(plackett_luce, "_IN_CACHE", sys.maxsize))
        stack.enter_context(replaying(_Replay(ledger, work, temporary=whole)))
        yield


class _Replay:
    """Knows what the calls of functions took, by function and shapes.

    Args:
        ledger, work: keep account of tensors and of work.
        temporary: whether the memory that a function takes on its way is counted.
    """

    def __init__(self, ledger: Ledger, work: WorkCounter, temporary: bool) -> None:
        self._ledger, self._work, self._temporary = ledger, work, temporary
        self._known: dict[Any, tuple[Any, int, Work]] = {}

    def __call__(
        self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        key = function, *(_shape(value) for value in (*args, *options.items()))
        if key not in self._known:
            self._known[key] = self._run(function, args, options)
        shapes, most, work = self._known[key]
        if self._temporary:
            torch.empty(most, dtype=torch.uint8)
        self._work.add(work)
        return tree_map(_made, shapes)

    def _run(
        self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, int, Work]:
        """What is returned, without tensors; the most bytes on the way to it, and the work."""
        with self._ledger.aside() as events, self._work.aside() as work:
            shapes = tree_map(_shape, function(*args, **options))
        most = max(accumulate(event.change for event in events), default=0)
        return shapes, most, sum(work.values(), Work())


class _Tensor(tuple[Any, ...]):
    """The shape and the type of a tensor."""


def _shape(value: Any) -> Any:
    return _Tensor((value.shape, value.dtype)) if isinstance(value, Tensor) else value


def _made(value: Any) -> Any:
    return torch.empty(value[0], dtype=value[1]) if isinstance(value, _Tensor) else value
