"""Statistics of a layer's input over all calibration windows.

Layers with the same input tensor share one object. Shapes: I in, T tokens.
"""

from typing import Protocol

import torch
from torch import Tensor


class Statistic(Protocol):
    """Anything that is made for a number of inputs and then gets them window by window."""

    def __init__(self, inputs: int, device: torch.device) -> None: ...

    def add(self, x_TI: Tensor) -> None:
        """Add the layer's input of one window, in the model's type."""
        ...


class PairedStatistic(Protocol):
    """A statistic of the layer's input beside what it would be if no block had been pruned.

    Attributes:
        paired: True, by which it is told from others.
    """

    paired: bool

    def __init__(self, inputs: int, device: torch.device) -> None: ...

    def add(self, x_TI: Tensor, dense_TI: Tensor) -> None:
        """Add both inputs of one window, in the model's type."""
        ...


class Moments:
    """First and second moments of each input, in fp32.

    Attributes:
        sum_I: sum over all tokens.
        square_I: sum of squares over all tokens.
        tokens: number of tokens.
        windows: number of windows.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum_I = torch.zeros(inputs, dtype=torch.float32, device=device)
        self.square_I = torch.zeros(inputs, dtype=torch.float32, device=device)
        self.tokens = self.windows = 0

    def add(self, x_TI: Tensor) -> None:
        x_TI = x_TI.float()
        self.sum_I += x_TI.sum(0)
        self.square_I += x_TI.square().sum(0)
        self.tokens += len(x_TI)
        self.windows += 1

    @property
    def norm_I(self) -> Tensor:
        """The l2 norm of each input over all tokens."""
        return self.square_I.sqrt()


class Hessian:
    """X^T X over all tokens, in fp32: half the Hessian of the layer's squared output error.

    Attributes:
        matrix_II: the sum.
        tokens: number of tokens.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.matrix_II = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x_TI: Tensor) -> None:
        x_TI = x_TI.float()
        self.matrix_II.addmm_(x_TI.T, x_TI)
        self.tokens += len(x_TI)


class CrossHessian:
    """X_dense^T X over all tokens, in fp32: X is the layer's input, X_dense what it would be in the
    dense model.

    Attributes:
        matrix_II: the sum.
    """

    paired = True

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.matrix_II = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)

    def add(self, x_TI: Tensor, dense_TI: Tensor) -> None:
        self.matrix_II.addmm_(dense_TI.T.float(), x_TI.float())
