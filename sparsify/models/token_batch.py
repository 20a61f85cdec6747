"""A batch in which only some tokens are targets of the loss.

Shapes: B windows, T tokens.
"""

from typing import Any, NamedTuple

from torch import Tensor


class TokenBatch(NamedTuple):
    """Tokens, some of which are context only. If all are targets, a batch is a plain Tensor.

    Attributes:
        tokens_BT: token ids, int64.
        targets_BT: bool, True where the token is a target of the loss.
    """

    tokens_BT: Tensor
    targets_BT: Tensor

    def to(self, *args: Any, **kwargs: Any) -> "TokenBatch":
        """Move both tensors, as ``Tensor.to`` does."""
        return TokenBatch(self.tokens_BT.to(*args, **kwargs), self.targets_BT.to(*args, **kwargs))

    def numel(self) -> int:
        """Number of tokens, context included."""
        return self.tokens_BT.numel()


def split_batch(batch: Tensor | TokenBatch) -> tuple[Tensor, Tensor | None]:
    """The tokens of a batch, and which of them are targets; None if all are."""
    return batch if isinstance(batch, TokenBatch) else (batch, None)
