"""Refuses models whose files would make Transformers run code from elsewhere."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from sparsify.common.errors import SparsifyError
from sparsify.models.config_checks import why_quantised

# The implementations that come with PyTorch and Transformers. Any other name makes Transformers
# import a package or, where the package "kernels" is installed, download code and run it.
BUILT_IN = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
KERNELS = ("kernel_config", "use_kernels")


def check_model_files(name_or_path: str) -> None:
    """Refuse a model whose configuration names code to download or packages to import.

    Custom model code (``auto_map``) is not checked here, as Transformers never runs it without
    ``trust_remote_code``.

    Args:
        name_or_path: a folder, or a Hugging Face id.

    Raises:
        SparsifyError: it names a kernel or another model, or is quantised in a way that needs a
            package.
        OSError: it has no configuration.
    """
    if (Path(name_or_path) / ADAPTER_CONFIG_NAME).is_file() or (
        is_peft_available() and find_adapter_config_file(name_or_path) is not None
    ):
        raise SparsifyError(
            f"{name_or_path!r} holds {ADAPTER_CONFIG_NAME}, which names another model to load: an "
            "adapter is not a model; merge it into its base model, and name the merged folder"
        )
    config, _ = PreTrainedConfig.get_config_dict(name_or_path, trust_remote_code=False)
    for key, value in _entries(config):
        for option, built_in in BUILT_IN.items():
            if key.strip("_").removesuffix("_internal") != option or value is None:
                continue
            names = list(value.values()) if isinstance(value, Mapping) else [value]
            if odd := [name for name in names if name is not None and name not in built_in]:
                raise _refused(name_or_path, key, odd[0], f"it may be {', '.join(built_in)}")
        if key in KERNELS and value:
            raise _refused(name_or_path, key, value, "kernels are not taken from elsewhere")
        if key == "quantization_config" and value and (why := why_quantised(value)) is not None:
            method = value.get("quant_method") if isinstance(value, Mapping) else value
            raise _refused(name_or_path, key, method, why)


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every entry, those of nested mappings included."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _entries(value)


def _refused(name: str, key: str, value: object, rule: str) -> SparsifyError:
    return SparsifyError(f"{name!r}: its config.json has {key} {value!r}; {rule}")
