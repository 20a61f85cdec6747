"""Which layers of vLLM's model are sparse, from the manifest in the folder."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from sparsify.common.errors import SparsifyError
from sparsify.export.manifest import MANIFEST, parse_manifest
from sparsify.masking.pattern import NMPattern
from sparsify.serving.vllm_plugin import log
from sparsify.serving.vllm_plugin.loading import Loading, Mode, mode

NAME = "sparsify"


class SparsityConfig(QuantizationConfig):  # type: ignore[misc]
    """What vLLM calls a quantisation: it gives every linear layer the method that runs it.

    vLLM sends it to its worker processes, so it holds nothing of the process that it is in but
    ``loading``, which stays behind.

    Args:
        patterns: the pattern of every masked linear layer, by its name in the files; changed to
            vLLM's name once vLLM knows the model.
        experts: how many layers of experts are masked.
        choose: how the choice between sparse and dense is made.
    """

    def __init__(
        self, patterns: Mapping[str, NMPattern], experts: int = 0, choose: Mode = "measured"
    ) -> None:
        super().__init__()
        self.patterns = dict(patterns)
        self.experts = experts
        self.choose: Mode = choose
        self.loading: Loading | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"loading": None}

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]  # what no backend takes runs dense

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # where no backend runs, all is dense

    @staticmethod
    def get_config_filenames() -> list[str]:
        # Without such a file vLLM stops, and does not say what it looked for.
        log.info(
            "-q %s reads %s, which `sparsify export` writes beside the weights", NAME, MANIFEST
        )
        return [MANIFEST]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SparsityConfig":
        """Take the content of a manifest.

        Raises:
            SparsifyError: it is damaged or of another version.
        """
        manifest = parse_manifest(config)
        if manifest.problems:
            raise SparsifyError(f"-q {NAME}: {manifest.problems[0]}")
        # vLLM maps the names in the files, which are not always those in Transformers.
        patterns = {
            tensor.removesuffix(".weight"): layer.pattern
            for layer in manifest.layers.values()
            if layer.experts is None
            for tensor in layer.tensors
        }
        experts = sum(layer.experts is not None for layer in manifest.layers.values())
        return cls(patterns, experts, mode())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as vLLM does. Its rules are for weights, and may end in a dot."""
        self.patterns = {
            mapped.removesuffix(".weight"): pattern
            for name, pattern in self.patterns.items()
            for mapped in hf_to_vllm_mapper.apply_list([f"{name}.weight"])
        }

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method for a linear layer; None for all others, for which vLLM has its own."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from sparsify.serving.vllm_plugin.linear import SparseLinearMethod

        if not isinstance(layer, LinearBase):
            return None
        if self.loading is None:
            self.loading = Loading(self.choose, self.experts)
        parts = self.parts(prefix)
        if (why_dense := self._why_dense(parts)) is None:
            return SparseLinearMethod(self.loading, parts)
        plain = UnquantizedLinearMethod()
        plain.process_weights_after_loading = self.loading.leave(
            prefix, why_dense, plain.process_weights_after_loading
        )
        return plain

    def parts(self, prefix: str) -> list[str]:
        """The names of the layers that one of vLLM's holds, such as query, key and value."""
        if prefix not in self.patterns:
            for fused, names in self.packed_modules_mapping.items():
                if f".{prefix}".endswith(f".{fused}"):
                    return [prefix.removesuffix(fused) + name for name in names]
        return [prefix]

    def _why_dense(self, parts: list[str]) -> str | None:
        missing = [name for name in parts if name not in self.patterns]
        if len(missing) == len(parts):
            return "not masked"
        if missing:
            return f"its {missing[0].rpartition('.')[2]} is not masked"
        misfits = {str(p) for name in parts if not (p := self.patterns[name]).within_two_four}
        return f"{', '.join(sorted(misfits))} does not fit in 2:4" if misfits else None
