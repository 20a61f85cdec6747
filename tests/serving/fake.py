"""A sparse backend that runs anywhere, and a clock that tells what it is told.

Shapes: O out, I in, G groups, B any leading dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify import NMPattern
from sparsify.masking.pattern import TWO_FOUR


class PackedLinear(nn.Module):
    """Holds two values a group and their places, as buffers."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        groups = weight_OI.unflatten(1, (-1, 4))
        order = (groups == 0).int().sort(dim=-1, stable=True).indices[..., :2]
        self.shape = weight_OI.shape
        self.register_buffer("values", groups.gather(-1, order))
        self.register_buffer("places", order.to(torch.uint8))
        self.register_buffer("bias", bias_O)

    def forward(self, x_BI: Tensor) -> Tensor:
        rows, columns = self.shape
        groups = self.values.new_zeros(rows, columns // 4, 4)
        groups.scatter_(-1, self.places.long(), self.values)
        return F.linear(x_BI, groups.flatten(1), self.bias)


@dataclass
class FakeBackend:
    """Takes 2:4 weights of the given types; ``scale`` other than 1 gives wrong products."""

    name: str = "fake"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    runs: bool = True
    scale: float = 1.0
    packed: list[tuple[int, ...]] = field(default_factory=list)

    def takes(
        self, shape: tuple[int, int], dtype: torch.dtype, pattern: NMPattern = TWO_FOUR
    ) -> bool:
        return dtype in self.dtypes and pattern == TWO_FOUR

    def available(self, device: torch.device) -> bool:
        return self.runs

    def compress(self, weight_OI: Tensor, bias_O: Tensor | None) -> nn.Module:
        self.packed.append(tuple(weight_OI.shape))
        return PackedLinear(weight_OI * self.scale, bias_O)


@dataclass
class FakeClock:
    """Answers from a function of the number of tokens and of the weight's rows, and keeps both.

    The layers are called, as a real clock would.
    """

    sparse_seconds: Callable[[int, int], float]
    asked: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
        dense, sparse = (call() for call in calls)
        assert isinstance(dense, Tensor)
        assert isinstance(sparse, Tensor)
        torch.testing.assert_close(dense, sparse)
        tokens, rows = dense.shape
        self.asked.append((tokens, rows))
        return [1.0, self.sparse_seconds(tokens, rows)]
