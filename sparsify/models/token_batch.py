"""A batch whose tokens are not all predicted.

Shapes: B windows, T tokens.
"""

from typing import Any, NamedTuple

from torch import Tensor


class TokenBatch(NamedTuple):
    """Tokens, some of which are context only. Where all are predicted, a batch is a plain Tensor.

    Attributes:
        tokens_BT: token ids, int64.
        targets_BT: bool, True where the token is a target of the loss.
    """

    tokens_BT: Tensor
    targets_BT: Tensor

    def to(self, *args: Any, **kwargs: Any) -> "TokenBatch":
        """Moves both, as a Tensor's ``to``."""
        return TokenBatch(self.tokens_BT.to(*args, **kwargs), self.targets_BT.to(*args, **kwargs))

    def numel(self) -> int:
        """Number of tokens, context included."""
        return self.tokens_BT.numel()


def split_batch(batch: Tensor | TokenBatch) -> tuple[Tensor, Tensor | None]:
    """The tokens of a batch, and where they are targets; None where all are."""
    return batch if isinstance(batch, TokenBatch) else (batch, None)
