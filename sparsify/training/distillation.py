"""Learns from the dense model's predictions besides the text (Hinton et al., 2015, arXiv
1503.02531).

Shapes: B windows, T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.models.perplexity import mean_loss


@dataclass(frozen=True)
class Distillation:
    """How much of the loss is the divergence from the dense model; ``--model.distillation.*``.

    The loss is ``(1 - weight) * cross-entropy + weight * temperature**2 * KL(dense || sparse)``,
    with both distributions at this temperature. The square keeps the size of the gradient.

    Args:
        weight: from 0 (no distillation) to 1 (only the divergence).
        temperature: divides the logits of both models.
    """

    weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or not self.temperature > 0:
            raise SparsifyError(
                f"distillation weight={self.weight}, temperature={self.temperature}; the weight "
                "must lie between 0 and 1, and the temperature above 0: "
                "--model.distillation.weight 0.5 --model.distillation.temperature 1"
            )

    def mix(
        self,
        task_loss: Tensor,
        logits_BTV: Tensor,
        teacher_BTV: Tensor,
        targets_BT: Tensor | None,
    ) -> Tensor:
        """The loss, 0-d, nats.

        Args:
            task_loss: mean cross-entropy over the targets.
            logits_BTV: the sparse model's logits.
            teacher_BTV: the dense model's logits.
            targets_BT: bool, ``[B, T]``, which tokens are targets; None if all are.
        """
        # The token after the last is not known, so its distribution is left out too.
        student = F.log_softmax(logits_BTV[:, :-1].float() / self.temperature, -1)
        teacher = F.log_softmax(teacher_BTV[:, :-1].float() / self.temperature, -1)
        divergence_BT = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        divergence = self.temperature**2 * mean_loss(divergence_BT, targets_BT)
        return (1 - self.weight) * task_loss + self.weight * divergence
