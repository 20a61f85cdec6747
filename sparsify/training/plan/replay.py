"""Runs what makes noise and scores of draws once for each shape; later calls replay what it took.

A plan would spend most of its time in these functions, whose work depends on shapes alone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparsify.masking import noise, plackett_luce
from sparsify.training.plan.ledger import Ledger
from sparsify.training.plan.work import Work, WorkCounter


@contextmanager
def replayed(ledger: Ledger, work: WorkCounter, device: str) -> Iterator[None]:
    """Replay the functions that a CPU runs in pieces, so that these stay in its cache.

    On a CPU the temporary tensors of a piece are too small to count; a GPU makes all at once.
    """
    whole = device != "cpu"
    with ExitStack() as stack:
        for module, name in ((noise, "uniform"), (noise, "gumbel"), (plackett_luce, "_score")):
            once = _Once(getattr(module, name), ledger, work, temporary=whole)
            stack.enter_context(patch.object(module, name, once))
        # What is not replayed takes pieces that are few, and still small.
        stack.enter_context(patch.object(noise, "_IN_CACHE", sys.maxsize if whole else 1 << 22))
        if whole:
            stack.enter_context(patch.object(plackett_luce, "_IN_CACHE", sys.maxsize))
        yield


class _Once:
    """In the place of a function that returns a tensor without a graph."""

    def __init__(
        self, make: Callable[..., Tensor], ledger: Ledger, work: WorkCounter, temporary: bool
    ) -> None:
        self._make, self._ledger, self._work = make, ledger, work
        self._temporary = temporary
        self._known: dict[Any, tuple[torch.Size, torch.dtype, int, Work]] = {}

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        given = (*args, *options.items())
        key = tuple(tuple(a.shape) if isinstance(a, Tensor) else a for a in given)
        if key not in self._known:
            self._known[key] = self._run(*args, **options)
        shape, dtype, most, work = self._known[key]
        if self._temporary:
            torch.empty(most, dtype=torch.uint8)
        self._work.add(work)
        return torch.empty(shape, dtype=dtype)

    def _run(self, *args: Any, **options: Any) -> tuple[torch.Size, torch.dtype, int, Work]:
        """The shape and the type of the result, the most bytes on the way to it, and the work."""
        with self._ledger.aside() as events, self._work.aside() as work:
            out = self._make(*args, **options)
            shape, dtype = out.shape, out.dtype
            del out
        most = max(accumulate(event.change for event in events), default=0)
        return shape, dtype, most, sum(work.values(), Work())
