"""The backends that run N:M sparse products, and which layers each of them takes.

Shapes: O out, I in, B any leading dimensions.
"""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.common.errors import SparsifyError
from sparsify.masking.pattern import TWO_FOUR, NMPattern
from sparsify.serving.decode import DECODE

log = logging.getLogger("sparsify")

TOLERANCE = 0.02
"""Of a compressed layer's product, relative to the dense one: bf16 rounds to 0.004."""
_HALVES = (torch.float16, torch.bfloat16)


class Backend(Protocol):
    """One implementation of sparse products; a new one must have these four members."""

    @property
    def name(self) -> str:
        """The name shown in tables."""

    def takes(
        self, shape: tuple[int, int], dtype: torch.dtype, pattern: NMPattern = TWO_FOUR
    ) -> bool:
        """Whether it can run a layer with such a weight ``(O, I)``, if the device supports it."""

    def available(self, device: torch.device) -> bool:
        """Whether it runs on this device."""

    def compress(self, weight_OI: Tensor, bias_O: Tensor | None) -> nn.Module:
        """Make the layer that replaces a linear one.

        Args:
            weight_OI: the weight, contiguous and on the device; the caller has checked its pattern.
            bias_O: the bias in the weight's dtype, on the device; or None.

        Returns:
            A module that maps ``[B, I]`` to ``[B, O]`` and holds no dense weight.
        """


class SparseLinear(nn.Module):
    """A linear layer over a compressed weight, for inference.

    Args:
        weight_OI: a tensor that ``F.linear`` takes as the weight of a two-dimensional input.
        bias_O: or None.
    """

    bias: nn.Parameter | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x_BI: Tensor) -> Tensor:
        # Make the input two-dimensional, whatever its strides: with more dimensions F.linear may
        # choose a batched product, which compressed weights do not support.
        y = F.linear(x_BI.reshape(-1, self.in_features), self.weight, self.bias)
        return y.view(*x_BI.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@dataclass(frozen=True)
class SemiStructured:
    """One of PyTorch's two kernels behind ``torch.sparse.to_sparse_semi_structured``.

    Attributes:
        name: the name shown in tables.
        tiles: by the weight's type, the numbers of which O and I must be multiples.
        subclass: its tensor class in ``torch.sparse``, used directly because PyTorch chooses
            between the two by a global switch.
        major: the only major compute capability that supports it; None for any.
    """

    name: str
    tiles: Mapping[torch.dtype, tuple[int, int]]
    subclass: str
    major: int | None = None

    def takes(
        self, shape: tuple[int, int], dtype: torch.dtype, pattern: NMPattern = TWO_FOUR
    ) -> bool:
        """Patterns that keep at most 2 of every aligned 4, such as 1:4 and 2:8, count as 2:4."""
        if (tile := self.tiles.get(dtype)) is None or not pattern.within_two_four:
            return False
        return not (shape[0] % tile[0] or shape[1] % tile[1])

    def available(self, device: torch.device) -> bool:
        """Try a small product and check its result, since the library supports only some GPUs."""
        if device.type != "cuda":
            return False
        if self.major not in (None, torch.cuda.get_device_capability(device)[0]):
            return False
        weight_OI = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
        weight_OI[:, 1::2] = 0
        x_BI = torch.eye(64, dtype=torch.bfloat16, device=device)
        try:
            right = torch.equal(self.compress(weight_OI, None)(x_BI), weight_OI.T)
        except (RuntimeError, AttributeError) as error:  # not compiled in, or not for this GPU
            log.info("%s does not run on %s: %s", self.name, device, error)
            return False
        if not right:
            log.warning("%s gives wrong products on %s and is not used", self.name, device)
        return right

    def compress(self, weight_OI: Tensor, bias_O: Tensor | None) -> SparseLinear:
        """Compress a weight. Check first that it is 2:4: otherwise values are lost silently."""
        kind = getattr(torch.sparse, self.subclass)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*prototype stage.*", UserWarning)
            compressed = cast(Tensor, kind.from_dense(weight_OI))
        return SparseLinear(compressed, bias_O)


CUSPARSELT = SemiStructured(
    "cusparselt",
    {
        **dict.fromkeys(_HALVES, (16, 16)),
        **dict.fromkeys((torch.int8, torch.float8_e4m3fn), (32, 32)),
    },
    "SparseSemiStructuredTensorCUSPARSELT",
)
CUTLASS = SemiStructured(
    "cutlass",
    {**dict.fromkeys(_HALVES, (32, 64)), torch.int8: (16, 128)},
    "SparseSemiStructuredTensorCUTLASS",
    major=8,
)
BACKENDS: tuple[Backend, ...] = (CUSPARSELT, CUTLASS, DECODE)


def eligible(
    shape: tuple[int, int], dtype: torch.dtype, pattern: NMPattern = TWO_FOUR
) -> list[str]:
    """The names of the backends that take such a layer."""
    return [backend.name for backend in BACKENDS if backend.takes(shape, dtype, pattern)]


def compressed(
    name: str, weight_OI: Tensor, bias_O: Tensor | None, backend: Backend, fix: str
) -> nn.Module:
    """The layer over the compressed weight; its product is compared with the dense one first.

    Args:
        name: the layer's name, for the message.
        weight_OI: the weight, already checked to be 2:4.
        bias_O: or None.
        backend: what compresses it.
        fix: what to do if the product is wrong.

    Raises:
        SparsifyError: the products differ by more than rounding.
    """
    weight_OI, bias_O = weight_OI.detach(), None if bias_O is None else bias_O.detach()
    sparse = backend.compress(weight_OI, bias_O)
    dtype, device = weight_OI.dtype, weight_OI.device
    generator = torch.Generator(device).manual_seed(0)
    x_TI = torch.randn(8, weight_OI.shape[1], generator=generator, dtype=dtype, device=device)
    dense_TO = F.linear(x_TI, weight_OI, bias_O).float()
    error = float((sparse(x_TI).float() - dense_TO).norm() / dense_TO.norm().clamp(min=1e-30))
    if not error <= TOLERANCE:
        raise SparsifyError(
            f"{name}: {backend.name} gives a product that is off by {error:.2g} (at most "
            f"{TOLERANCE} is rounding); {fix}"
        )
    return sparse
