"""Runs a linear layer of vLLM: on its dense weight, or compressed, as the number of tokens says.

To vLLM a compressed layer is a quantised one: what reads the weights of plain layers leaves it
alone. A layer that turns out dense at every number of tokens becomes a plain one.

Shapes: O out, I in, B any leading dimensions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from sparsify.common.errors import SparsifyError
from sparsify.serving.choose import DENSE, Choice
from sparsify.serving.vllm_plugin.loading import MOST_TOKENS, Loading

SUFFIX = ".sparsify"
"""Ends a layer's name where vLLM keeps layers by name, for attention has entries there too."""


@register_weight_loader_v2_supported_method
class SparseLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Runs one layer; vLLM calls the methods in the order in which they stand here.

    Args:
        loading: decides how the layer runs.
        parts: the names of the layers that it holds, one below the other.
    """

    def __init__(self, loading: Loading, parts: Sequence[str]) -> None:
        self._loading, self._parts = loading, parts
        self._dense = UnquantizedLinearMethod()
        self._vllm = get_current_vllm_config_or_none()
        self._choice: Choice
        self._sparse: dict[str, nn.Module] = {}
        self._out_features = 0

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Make the dense weight, into which vLLM loads."""
        self._dense.create_weights(layer, *args, **kwargs)
        self._loading.expect(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Decide how the layer runs, and keep only the weights that this needs.

        Raises:
            SparsifyError: the weight is not 2:4, or was compressed before.
        """
        if self._sparse:
            raise SparsifyError(
                f"{layer.prefix}: its weight was compressed and cannot be loaded again; start vLLM "
                "anew, or without -q sparsify where weights are updated while it serves"
            )
        weight_OI, most = layer.weight.detach(), MOST_TOKENS
        if self._vllm is not None:
            most = self._vllm.scheduler_config.max_num_batched_tokens
        obstacle = None
        if envs.VLLM_BATCH_INVARIANT:
            obstacle = "VLLM_BATCH_INVARIANT is set, and sparse and dense round differently"
        choice = self._loading.choose(layer.prefix, weight_OI, most, obstacle)
        if choice.used == (DENSE,):
            layer.quant_method = self._dense
        else:
            rows = layer.output_partition_sizes  # those of this process
            parts = dict(zip(self._parts, rows, strict=False))
            parts = parts if len(self._parts) == len(rows) else {}
            self._sparse = self._loading.compress(layer.prefix, weight_OI, parts)
            self._choice, self._out_features = choice, len(weight_OI)
            self._make_known(layer)
        if DENSE in choice.used:
            self._dense.process_weights_after_loading(layer)
        else:  # some code of vLLM asks for the weight's type and device
            layer.weight = nn.Parameter(weight_OI.new_empty(0), requires_grad=False)
        self._loading.done(layer, loud=layer.tp_rank == 0)

    def _make_known(self, layer: Any) -> None:
        if self._vllm is None:
            return
        name = layer.prefix + SUFFIX
        self._vllm.compilation_config.static_forward_context[name] = layer
        # A graph that vLLM compiled earlier is right only if the same layers are sparse: they are
        # named in what it hashes to find one.
        if isinstance(hashed := self._vllm.additional_config, dict):
            hashed.setdefault("sparsify", []).append(layer.prefix)

    def apply(self, layer: Any, x_BI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """The product, through an operator if it is compiled, since the graph is one for all
        numbers of tokens. The bias is added outside, where the compiler can fuse it.
        """
        if torch.compiler.is_compiling():
            name = _encode_layer_name(layer.prefix + SUFFIX)
            y_BO = torch.ops.sparsify.vllm_linear(x_BI, name, self._out_features)
        else:
            y_BO = self.product(layer, x_BI)
        return y_BO if bias_O is None else y_BO + bias_O

    def product(self, layer: nn.Module, x_BI: Tensor) -> Tensor:
        """``F.linear`` without a bias, by what was chosen for so many tokens."""
        name = self._choice.at(x_BI.shape[:-1].numel())
        if name == DENSE:
            return self._dense.apply(layer, x_BI, None)
        return self._sparse[name](x_BI).contiguous()  # as the compiler was told


def _vllm_linear(x: Tensor, layer_name: LayerNameType, out_features: int) -> Tensor:
    layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    return layer.quant_method.product(layer, x)


def _fake(x: Tensor, layer_name: LayerNameType, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


LIBRARY = Library("sparsify", "FRAGMENT")  # the operator lives as long as this
direct_register_custom_op("vllm_linear", _vllm_linear, fake_impl=_fake, target_lib=LIBRARY)
