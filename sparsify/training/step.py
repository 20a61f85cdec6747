"""Runs one micro-batch; recomputation uses the draw of its own forward pass.

Shapes: B windows, T tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsify.masking.layer import MaskScope
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.masker import Draw, Masking
from sparsify.masking.strategy import RunResult
from sparsify.models.perplexity import mean_loss, token_losses
from sparsify.models.token_batch import TokenBatch, split_batch
from sparsify.training.distillation import Distillation


class BatchRun:
    """Runs a model on one micro-batch as often as a strategy asks.

    Args:
        masked: the model with its masks.
        batch: token ids; with a mask of targets, unless all tokens are targets.
        first: the draw for a strategy that needs one per micro-batch; index = micro-batch x
            data-parallel ranks + rank.
        distillation: mixes the divergence from the dense model into the loss.
        teacher: a copy of the dense model, needed if training changes the base weights.

    Attributes:
        task_loss: the task loss of the last run, 0-d, without a graph.
    """

    def __init__(
        self,
        masked: MaskedModel,
        batch: Tensor | TokenBatch,
        first: Draw,
        distillation: Distillation = Distillation(),
        teacher: PreTrainedModel | None = None,
    ) -> None:
        self._model, self._scope = masked.model, masked.scope
        self._distillation, self._teacher = distillation, teacher
        self._teacher_BTV: Tensor | None = None
        self._tokens_BT, self._targets_BT = split_batch(batch)
        self._first = first
        self.task_loss: Tensor | None = None

    def draw(self, k: int = 0, of: int = 1) -> Draw:
        return Draw(self._first.seed, self._first.step, self._first.index * of + k)

    def __call__(self, masking: Masking, grad: bool = True) -> RunResult:
        with torch.set_grad_enabled(grad), self._scope.use(masking) as penalties:
            logits = self._model(input_ids=self._tokens_BT, use_cache=False).logits
            loss = task_loss = mean_loss(token_losses(logits, self._tokens_BT), self._targets_BT)
            if self._distillation.weight:
                teacher_BTV = self._dense_logits()
                loss = self._distillation.mix(task_loss, logits, teacher_BTV, self._targets_BT)
        self.task_loss = task_loss.detach()
        penalty = torch.stack(penalties).sum() if penalties else loss.new_zeros(())
        return RunResult(loss, task_loss, logits, penalty)

    @torch.no_grad()
    def _dense_logits(self) -> Tensor:
        """The dense model's logits, ``[B, T, V]``, computed once per micro-batch."""
        if self._teacher_BTV is None:
            with self._scope.use("dense"):
                model = self._teacher or self._model
                self._teacher_BTV = model(input_ids=self._tokens_BT, use_cache=False).logits
        return self._teacher_BTV


def checkpoint_activations(model: PreTrainedModel, scope: MaskScope) -> None:
    """Recompute each decoder block in backward, under the draw of its own forward pass."""
    options = {"use_reentrant": False, "context_fn": scope.checkpoint_contexts}
    # Newer versions of Transformers 5 renamed the method, and warn about the old name.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options)
    for module in model.modules():
        # Transformers checkpoints a block only in training mode.
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            block: Any = module
            recompute = block._gradient_checkpointing_func
            block._gradient_checkpointing_func = _without_dropout(module, recompute)


def _without_dropout(module: nn.Module, recompute: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``recompute`` so that the block's forward runs in evaluation mode. Its children already
    are in that mode, but some blocks apply dropout themselves if they are in training mode.
    """

    def checkpointed(forward: Callable[..., Any], *args: Any) -> Any:
        def evaluated(*args: Any) -> Any:
            module.training = False
            try:
                return forward(*args)
            finally:
                module.training = True

        return recompute(evaluated, *args)

    return checkpointed
