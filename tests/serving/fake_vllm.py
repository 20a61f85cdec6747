"""A small ``vllm`` with the interface of vLLM 0.33.0 that the plugin uses; no code of vLLM.

Linear layers slice and fuse as vLLM's do: column-parallel ones by rows, row-parallel ones by
columns, and fused ones hold a slice of every part. ``benchmarks/vllm_interface.py`` runs the plugin
on the real classes.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import Library, infer_schema

VERSION = "0.33.0"


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        shape = sum(output_partition_sizes), input_size_per_partition
        weight = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """``parts`` are output sizes of what is fused; ``by_rows`` says which side ranks share."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        input_size: int,
        parts: list[int],
        config: Any,
        prefix: str,
        *,
        ranks: tuple[int, int] = (0, 1),
        by_rows: bool = True,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.prefix, self._by_rows = prefix, by_rows
        self.tp_rank, self.tp_size = ranks
        self.quant_method = config.get_quant_method(self, prefix)
        self.output_partition_sizes = [p // self.tp_size if by_rows else p for p in parts]
        columns = input_size if by_rows else input_size // self.tp_size
        self.quant_method.create_weights(
            self,
            columns,
            self.output_partition_sizes,
            input_size,
            sum(parts),
            dtype,
            weight_loader=self.load,
        )
        self.bias = torch.randn(sum(self.output_partition_sizes)).to(dtype) if bias else None

    def load(self, whole_OI: Tensor, part: int = 0) -> None:
        """Copy this rank's slice of one part of the checkpoint."""
        mine_OI = whole_OI.chunk(self.tp_size, 0 if self._by_rows else 1)[self.tp_rank]
        start = sum(self.output_partition_sizes[:part])
        self.weight.data[start : start + len(mine_OI)] = mine_OI

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)


class RoutedExperts(nn.Module):
    pass


class ParallelLMHead(nn.Module):
    pass


class Mapper:
    """Renames by the beginning of a weight's name."""

    def __init__(self, prefixes: dict[str, str]) -> None:
        self._prefixes = prefixes

    def apply_list(self, names: list[str]) -> list[str]:
        for old, new in self._prefixes.items():
            names = [new + n.removeprefix(old) if n.startswith(old) else n for n in names]
        return names


def load_model(*layers: Any) -> None:
    """What vLLM does once all weights are in place."""
    for layer in layers:
        if isinstance(layer, LinearBase):
            layer.quant_method.process_weights_after_loading(layer)


class Vllm:
    """The package's state: what plugins registered, and the configuration of the model."""

    def __init__(self) -> None:
        self.registered: dict[str, type] = {}
        self.weight_loader_v2: list[str] = []
        self.context: dict[str, Any] = {}
        self.config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=8),
            compilation_config=SimpleNamespace(static_forward_context=self.context),
            additional_config={},
        )
        self.envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False)

    def register_quantization_config(self, name: str) -> Callable[[type], type]:
        def register(config: type) -> type:
            assert issubclass(config, QuantizationConfig)
            self.registered[name] = config
            return config

        return register

    def register_v2(self, method: type) -> type:
        self.weight_loader_v2.append(method.__name__)
        return method


def _register_op(name: str, op: Any, fake_impl: Any, target_lib: Library) -> None:
    target_lib.define(name + infer_schema(op, mutates_args=[]))
    target_lib.impl(name, op, dispatch_key="CPU")
    target_lib._register_fake(name, fake_impl)


@contextmanager
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    """Put the package where ``import vllm`` finds it, and import the plugin anew."""
    state = Vllm()
    layers = "vllm.model_executor.layers"
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": VERSION, "envs": state.envs},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: state.config},
        "vllm.forward_context": {
            "get_forward_context": lambda: SimpleNamespace(no_compile_layers=state.context)
        },
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
            "register_weight_loader_v2_supported_method": state.register_v2,
        },
        f"{layers}.quantization": {
            "register_quantization_config": state.register_quantization_config
        },
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        "vllm.utils": {},
        "vllm.utils.torch_utils": {
            "LayerNameType": str,
            "_encode_layer_name": lambda name: name,
            "_resolve_layer_name": lambda name: name,
            "direct_register_custom_op": _register_op,
        },
    }
    own = [name for name in sys.modules if name.startswith("sparsify.serving.vllm_plugin")]
    for name in own:
        monkeypatch.delitem(sys.modules, name)
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    yield state
    linear = sys.modules.pop("sparsify.serving.vllm_plugin.linear", None)
    if linear is not None:
        linear.LIBRARY._destroy()
        # Else, once it is collected, it takes the operator of a later test from torch.ops.
        linear.LIBRARY._op_defs.clear()
    for name in [n for n in sys.modules if n.startswith("sparsify.serving.vllm_plugin")]:
        del sys.modules[name]
