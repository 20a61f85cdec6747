"""The backend ``decode``: products over packed 2:4 weights, for the few tokens of generation.

Shapes: T tokens, O out, I in, B any leading dimensions; those of packed weights as in
:mod:`sparsify.serving.packed`.
"""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.common.errors import SparsifyError
from sparsify.masking.pattern import TWO_FOUR, NMPattern
from sparsify.serving.packed import PackedWeight, pack, product

log = logging.getLogger("sparsify")

MOST_TOKENS = 16
"""With more rows of input the weight is unpacked, and the product is the dense one."""
_HALVES = (torch.float16, torch.bfloat16)
_LEAST_CAPABILITY = (8, 0)  # matrix instructions in bfloat16

# An operation of its own, so that torch.compile and CUDA graphs take it whole.
_LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor values, Tensor metadata, Tensor? bias) -> Tensor")


@torch.library.impl(_LIBRARY, "packed_linear", "CUDA")
def _on_gpu(x_TI: Tensor, values_OV: Tensor, metadata_PCE: Tensor, bias_O: Tensor | None) -> Tensor:
    from sparsify.serving import decode_kernels

    _check_type(x_TI, values_OV)
    rows, (tokens, inputs) = len(values_OV), x_TI.shape
    if not 1 <= tokens <= MOST_TOKENS:
        weight_OI = decode_kernels.unpack(values_OV, metadata_PCE, rows, inputs)
        return F.linear(x_TI, weight_OI, bias_O)
    x_TI = x_TI.contiguous()
    if x_TI.data_ptr() % 16:  # a part of a tensor; the kernels load 16 bytes at once
        x_TI = x_TI.clone()
    return decode_kernels.multiply(x_TI, values_OV, metadata_PCE, bias_O, rows)


@torch.library.impl(_LIBRARY, "packed_linear", "CPU")
def _on_cpu(x_TI: Tensor, values_OV: Tensor, metadata_PCE: Tensor, bias_O: Tensor | None) -> Tensor:
    _check_type(x_TI, values_OV)
    return product(x_TI, PackedWeight(values_OV, metadata_PCE, x_TI.shape[1]), bias_O)


def _fake(x_TI: Tensor, values_OV: Tensor, metadata_PCE: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], values_OV.shape[0])


torch.library.register_fake("sparsify::packed_linear", _fake, lib=_LIBRARY)


def _check_type(x_TI: Tensor, values_OV: Tensor) -> None:
    if x_TI.dtype != values_OV.dtype:
        raise SparsifyError(
            f"the input is {x_TI.dtype} and the packed weight {values_OV.dtype}; convert the "
            "input, or load the model with its dtype"
        )


class PackedLinear(nn.Module):
    """A linear layer that holds a packed weight and nothing dense, for inference.

    Args:
        packed: the weight; on a GPU its type is fp16 or bf16.
        bias_O: in the weight's type; or None.
    """

    metadata: Tensor
    bias: nn.Parameter | None

    def __init__(self, packed: PackedWeight, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.values = nn.Parameter(packed.values_OV, requires_grad=False)
        self.register_buffer("metadata", packed.metadata_PCE)
        bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x_BI: Tensor) -> Tensor:
        x_TI = x_BI.reshape(-1, self.in_features)
        y_TO = torch.ops.sparsify.packed_linear(x_TI, self.values, self.metadata, self.bias)
        return y_TO.view(*x_BI.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@dataclass(frozen=True)
class Decode:
    """The backend over our own kernels; ``docs/decode.md`` describes them.

    Attributes:
        name: the name shown in tables.
    """

    name: str = "decode"

    def takes(
        self, shape: tuple[int, int], dtype: torch.dtype, pattern: NMPattern = TWO_FOUR
    ) -> bool:
        """Any number of outputs, and whole groups of four inputs."""
        return dtype in _HALVES and pattern.within_two_four and shape[1] % TWO_FOUR.m == 0

    def available(self, device: torch.device) -> bool:
        """Try small products through every kernel, and check them."""
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
            return False
        numbers = torch.arange(64 * 64, device=device).view(64, 64) * 37 % 101 - 50
        weight_OI = (numbers * TWO_FOUR.top(numbers.abs())).to(torch.bfloat16)
        x_TI = torch.eye(64, dtype=torch.bfloat16, device=device)
        try:
            layer = self.compress(weight_OI, None)
            right = all(torch.equal(layer(x_TI[:n]), weight_OI.T[:n]) for n in (1, MOST_TOKENS, 64))
        except Exception as error:  # no Triton; no compiler; a driver that knows no such code
            log.info("%s does not run on %s: %s", self.name, device, error)
            return False
        if not right:
            log.warning("%s gives wrong products on %s and is not used", self.name, device)
        return right

    def compress(self, weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
        """Pack a weight; one that is not 2:4 is refused."""
        return PackedLinear(pack(weight_OI), bias_O)


DECODE = Decode()
