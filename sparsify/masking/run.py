"""One micro-batch, as a strategy sees it.

Shapes: B windows, T tokens, V vocabulary, D features of a block's output.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from sparsify.masking.masker import Draw, Masking


class RunResult(NamedTuple):
    """The result of one forward pass over the micro-batch.

    Attributes:
        loss: what a strategy minimises, nats, 0-d: the task loss; with distillation, what that
            makes of it.
        task_loss: mean cross-entropy over the next tokens that are targets, nats, 0-d.
        logits: the model's output, ``[B, T, V]``.
        penalty: the sum of the maskers' penalties, 0-d.
        blocks: if asked for, the outputs of the decoder blocks in order, each ``[B, T, D]``; the
            last one after the final norm.
    """

    loss: Tensor
    task_loss: Tensor
    logits: Tensor
    penalty: Tensor
    blocks: tuple[Tensor, ...] = ()


class Run(Protocol):
    """One micro-batch, ready to be run any number of times, under any draw."""

    def draw(self, k: int = 0, of: int = 1) -> Draw:
        """Draw k of ``of``; no other micro-batch or rank is given the same draws."""
        ...

    def __call__(self, masking: Masking, grad: bool = True, blocks: bool = False) -> RunResult:
        """Run the model forward, with or without a graph; ``run("dense", grad=False)`` runs it
        without masks, with its present weights. ``blocks`` asks for the outputs of the blocks.
        """
        ...
