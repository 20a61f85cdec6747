"""Skips the blocks before the first one whose masks changed.

Their output is that of a run before. Changes of one unit are measured in the model's order, so that
on average half of all blocks are skipped. Each skipped block hands on what the last of them
returned; what else the model computes is its own work. A model in which that gives other losses
runs whole.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.calibration.calls import mapped
from sparsify.calibration.placing import forward_replaced
from sparsify.models.token_batch import TokenBatch
from sparsify.results.budget.bank import Masks

log = logging.getLogger("sparsify")

Batch = Tensor | TokenBatch
TOLERANCE = 1e-5  # nats, within which two ways to compute a loss may differ


class Prefix:
    """Measures the same batches under one choice of masks after the other.

    Args:
        blocks: the model's decoder blocks by qualified name, in order.
        batches: what is measured.
        losses: measures a batch in the model as it is, ``[B]``.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        losses: Callable[[Batch], Tensor],
    ) -> None:
        self._names, self._blocks = list(blocks), list(blocks.values())
        self.batches, self._losses = batches, losses
        self._last: Masks = {}
        self._kept: Masks = {}  # the masks under which outputs were kept
        self._at = 0  # how many blocks these outputs stand for
        self._outputs: list[Any] = []  # of the last of them, by batch
        self._skips = True

    def __call__(self, masks: Masks) -> list[Tensor]:
        """The losses of every batch; the model already has these masks."""
        start = self._at if self._equal(masks, self._kept) >= self._at else 0
        keep = self._equal(masks, self._last) if self._skips else 0
        outputs: list[Any] = []
        found = []
        for number, batch in enumerate(self.batches):
            with self._skipping(start, number), self._keeping(keep if keep > start else 0, outputs):
                found.append(self._losses(batch))
        self._last = masks
        if outputs:
            self._kept, self._at, self._outputs = masks, keep, outputs
            self._check(found[0])
        return found

    def _equal(self, masks: Masks, others: Masks) -> int:
        """How many blocks, from the first on, have the same masks in both."""
        changed = [name for name, masker in masks.items() if others.get(name, self) is not masker]
        owners = (
            next((i for i, b in enumerate(self._names) if name.startswith(f"{b}.")), 0)
            for name in changed
        )
        # After the last block too little is left to be worth it.
        return min(owners, default=max(len(self._blocks) - 1, 0))

    @contextmanager
    def _skipping(self, count: int, number: int) -> Iterator[None]:
        with ExitStack() as stack:
            for block in self._blocks[:count]:
                output = self._outputs[number]
                stack.enter_context(forward_replaced(block, lambda *_, o=output, **__: o))
            yield

    @contextmanager
    def _keeping(self, count: int, outputs: list[Any]) -> Iterator[None]:
        """Keep what the last of so many blocks returns; a copy, as it may be a block's buffer."""
        if not count:
            yield
            return

        def keep(_: Any, __: Any, output: Any) -> None:
            outputs.append(mapped(output, lambda v: v.clone() if isinstance(v, Tensor) else v))

        hook = self._blocks[count - 1].register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def _check(self, losses_B: Tensor) -> None:
        """Never skip again if the first batch then has other losses."""
        try:
            with self._skipping(self._at, 0):
                again_B = self._losses(self.batches[0])
            same = len(self._outputs) == len(self.batches)
            same = same and torch.allclose(again_B, losses_B, rtol=0, atol=TOLERANCE)
        except Exception as error:  # of a model that passes values on in another way
            log.info("every measurement runs all blocks: %r", error)
            same = False
        if not same:
            self._skips, self._at, self._outputs = False, 0, []
