"""Runs one micro-batch; recomputation uses the draw of its own forward pass.

Shapes: B windows, T tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsify.common.errors import SparsifyError
from sparsify.masking.distillation import Distillation
from sparsify.masking.layer import MaskScope
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.masker import Draw, Masking
from sparsify.masking.run import RunResult
from sparsify.models.perplexity import mean_loss, token_losses
from sparsify.models.token_batch import TokenBatch, split_batch


class BatchRun:
    """Runs a model on one micro-batch as often as a strategy asks.

    Args:
        masked: the model with its masks.
        batch: token ids; with a mask of targets, unless all tokens are targets.
        first: the draw for a strategy that needs one per micro-batch; index = micro-batch x
            data-parallel ranks + rank.
        distillation: how the loss compares with the dense model.
        teacher: a copy of the dense model, needed if training changes the base weights.

    Attributes:
        task_loss: that of the last run with masks, 0-d, without a graph; if there was none, of a
            dense one.
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
        self._dense: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._tokens_BT, self._targets_BT = split_batch(batch)
        self._first = first
        self.task_loss: Tensor | None = None

    def draw(self, k: int = 0, of: int = 1) -> Draw:
        return Draw(self._first.seed, self._first.step, self._first.index * of + k)

    def __call__(self, masking: Masking, grad: bool = True, blocks: bool = False) -> RunResult:
        distils = self._distillation.needs_dense and masking != "dense"
        dense_BTV, dense_blocks = self._run_dense() if distils else (None, ())
        with torch.set_grad_enabled(grad), self._scope.use(masking) as penalties:
            wanted = blocks or bool(distils and self._distillation.hidden)
            logits_BTV, outputs = self._forward(self._model, wanted)
            # If the divergence is all that counts, the task loss is only looked at.
            with torch.set_grad_enabled(grad and not (distils and self._distillation.weight == 1)):
                losses_BT = token_losses(logits_BTV, self._tokens_BT)
                loss = task_loss = mean_loss(losses_BT, self._targets_BT)
            if dense_BTV is not None:
                loss = self._distillation.mix(
                    task_loss, logits_BTV, dense_BTV, self._targets_BT, outputs, dense_blocks
                )
        if masking != "dense" or self.task_loss is None:
            self.task_loss = task_loss.detach()
        penalty = torch.stack(penalties).sum() if penalties else loss.new_zeros(())
        return RunResult(loss, task_loss, logits_BTV, penalty, outputs)

    @torch.no_grad()
    def _run_dense(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The dense model's logits and block outputs, computed once per micro-batch."""
        if self._dense is None:
            with self._scope.use("dense"):
                model = self._teacher or self._model
                self._dense = self._forward(model, bool(self._distillation.hidden))
        return self._dense

    def _forward(self, model: PreTrainedModel, blocks: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The logits, and if they are asked for the outputs of the blocks."""
        out = model(input_ids=self._tokens_BT, use_cache=False, output_hidden_states=blocks)
        if blocks and not out.hidden_states:
            raise SparsifyError(
                f"{type(model).__name__} does not give the outputs of its blocks; give "
                "--model.distillation.hidden 0"
            )
        return out.logits, (out.hidden_states or ())[1:]  # the first is the blocks' input


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
