"""Lets Transformers' ``from_pretrained`` load an exported folder, its layers sparse where that is
faster.

Importing this module registers it with Transformers. It decides, checks and compresses as
:func:`sparsify.serving.load` does, but Transformers reads the files: so it also takes what else
``from_pretrained`` takes, such as an id on the Hub.

Shapes: O out, I in.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsify.common.errors import SparsifyError
from sparsify.export.manifest import MANIFEST, manifest_patterns
from sparsify.masking.pattern import NMPattern
from sparsify.serving.backends import BACKENDS, Backend, compressed
from sparsify.serving.choose import Choices, Choose
from sparsify.serving.filling import FIX, check_pattern, compress_whole
from sparsify.serving.loading import check_wishes, choose_for, compressing, take_kept_types

NAME = "sparsify"
_MAJOR = "5"
_HOOKS = (
    "_process_model_before_weight_loading",
    "_process_model_after_weight_loading",
    "get_quantize_ops",
    "param_needs_quantization",
    "update_device_map",
)
_ABSTRACT = {"is_serializable", "is_trainable"}


def check_interface(version: str, quantizer: type) -> None:
    """Refuse a version of Transformers that would not call what is written here.

    Raises:
        SparsifyError: it is of another major version, or its quantizers have other methods.
    """
    lacks = [name for name in _HOOKS if not hasattr(quantizer, name)]
    asks = sorted(getattr(quantizer, "__abstractmethods__", set()) - _ABSTRACT)
    why = [f"it is not version {_MAJOR}"] * (version.split(".")[0] != _MAJOR)
    why += [f"its HfQuantizer lacks {', '.join(lacks)}"] * bool(lacks)
    why += [f"its HfQuantizer asks for {', '.join(asks)}"] * bool(asks)
    if why:
        raise SparsifyError(
            f"SparsifyConfig does not know the quantizers of Transformers {version}: "
            f"{'; '.join(why)}; use sparsify.serving.load, which needs none of them"
        )


check_interface(transformers_version, HfQuantizer)  # before anything is registered


@register_quantization_config(NAME)
class SparsifyConfig(QuantizationConfigMixin):
    """As the ``quantization_config`` of ``from_pretrained``, it makes the layers of an exported
    folder run sparse where that is faster.

    Args:
        tokens: how many rows a layer's input will have, or the smallest and the largest such
            number, as for :func:`sparsify.serving.load`.
        choose: ``measured``, ``sparse`` or ``dense``, as there.
        backends: what may run sparse layers, as there.

    Raises:
        SparsifyError: an argument is out of its range.
    """

    def __init__(
        self,
        tokens: int | tuple[int, int] = (1, 2048),
        choose: Choose = "measured",
        backends: Sequence[Backend] = BACKENDS,
    ) -> None:
        check_wishes(tokens, choose)
        self.quant_method = cast(Any, NAME)
        self.tokens, self.choose, self.backends = tokens, choose, tuple(backends)

    def to_dict(self) -> dict[str, Any]:
        names = [backend.name for backend in self.backends]
        return {**vars(self), "backends": names}  # plain values: a configuration is shown as JSON

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise SparsifyError(
            f"config.json holds a quantization_config of {NAME}, which no export has: remove it, "
            "so that every tool loads the folder, and give from_pretrained "
            "quantization_config=SparsifyConfig()"
        )


@register_quantizer(NAME)
class SparsifyQuantizer(HfQuantizer):
    """What Transformers calls while it loads a model with a :class:`SparsifyConfig`.

    Transformers hands over weights one by one. Those of layers that run sparse are compressed at
    once, so that device and host never hold the whole dense model.
    """

    quantization_config: SparsifyConfig

    def __init__(self, quantization_config: SparsifyConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._patterns: Mapping[str, NMPattern] = {}
        self._choices = Choices()
        self._backends: Mapping[str, Backend] = {}
        self._compressed: dict[str, nn.Module] = {}
        self._error: SparsifyError | None = None

    def update_device_map(self, device_map: Any) -> dict[str, Any]:
        """One device; the GPU, if there is one and nothing is said."""
        places = {*device_map.values()} if isinstance(device_map, dict) else set()
        count = torch.cuda.device_count()
        if len(places) > 1 or places & {"disk"} or (isinstance(device_map, str) and count > 1):
            raise SparsifyError(
                f"device_map={device_map!r}: layers are timed and run on one device; "
                "give 'cuda:0' or 'cpu'"
            )
        return {"": places.pop() if places else torch.device("cuda:0" if count else "cpu")}

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        device_map: Mapping[str, Any] | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Read the manifest, and decide how each layer will run."""
        if getattr(model.config, "distributed_config", None) is not None:
            raise SparsifyError(
                "SparsifyConfig loads whole layers, and a distributed_config or tp_plan divides "
                "them; leave it out"
            )
        if not checkpoint_files or device_map is None:
            raise SparsifyError(
                f"SparsifyConfig needs the exported folder, for its {MANIFEST}; give "
                "from_pretrained that folder and no state_dict"
            )
        wishes, [place] = self.quantization_config, device_map.values()
        device = torch.device(place)
        self._patterns = manifest_patterns(_folder(model, checkpoint_files))
        take_kept_types(model)  # Transformers does so later: a backend is chosen for the type
        forked = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=forked), torch.device(device):
            self._choices = choose_for(
                model, self._patterns, device, wishes.tokens, wishes.choose, wishes.backends
            )
        self._backends = compressing(self._choices, wishes.backends)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether it is the weight of a layer that will run sparse."""
        layer, _, own_name = param_name.rpartition(".")
        return own_name == "weight" and layer in self._backends

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes a weight, for which Transformers reserves memory of the GPU beforehand."""
        # 2:4 keeps half of the values, and two bits of each to say where it was: 9 of 16 bits.
        share = 9 / 16 if self.param_needs_quantization(model, param_name) else 1
        return share * param.element_size()

    def get_quantize_ops(self) -> "_Compress":
        return _Compress(self)

    def take(self, model: PreTrainedModel, name: str, weight_OI: Tensor) -> bool:
        """Check a weight that was read, and compress it if its layer's bias was read too.

        Args:
            model: what is being loaded.
            name: the Parameter's name.
            weight_OI: the weight, on its device and in its type.

        Returns:
            Whether it was compressed; if not, Transformers must keep it.
        """
        layer = name.rpartition(".")[0]
        linear = cast(nn.Linear, model.get_submodule(layer))
        try:
            if weight_OI.shape != linear.weight.shape:
                raise SparsifyError(
                    f"{name} is stored as {tuple(weight_OI.shape)}, but the configuration says "
                    f"{tuple(linear.weight.shape)}; export the model again"
                )
            check_pattern(model, name, weight_OI, self._patterns)
            if linear.bias is not None and linear.bias.is_meta:
                return False  # it is compressed when all is read
            sparse = compressed(layer, weight_OI, linear.bias, self._backends[layer], FIX)
        except SparsifyError as error:
            # Transformers would go on, and show it as a line of a report: it is raised at the end.
            self._error = self._error or error
            return False
        # The model gets it at the end: until then Transformers may move or fill what it finds.
        self._compressed[layer] = sparse
        linear._is_hf_initialized = True  # type: ignore[assignment]
        return True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Put the compressed layers in their places; check, and compress, what is left."""
        if self._error is not None:
            raise self._error
        for name, layer in self._compressed.items():
            model.set_submodule(name, layer)
        for name, parameter in dict(model.named_parameters(remove_duplicate=False)).items():
            check_pattern(model, name, parameter, self._patterns)
        for name in self._backends.keys() - self._compressed.keys():
            compress_whole(model, name, self._backends)
        self._compressed.clear()
        model.sparsify_choices = self._choices  # type: ignore[assignment]
        model.requires_grad_(False)

    def is_serializable(self, **kwargs: Any) -> NoReturn:
        """Transformers asks before it saves a model."""
        raise SparsifyError(
            "this model's weights may be compressed for the device that they are on, so it is not "
            "saved: copy the exported folder, or load it without a SparsifyConfig and save that"
        )

    @property
    def is_trainable(self) -> bool:
        return False


class _Compress:
    """The step in Transformers' loading of one weight that compresses it."""

    def __init__(self, quantizer: SparsifyQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        tensors: dict[str, Any],
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Take the weight of a Parameter.

        Args:
            tensors: what was read for it, by name, each perhaps in a list.
            full_layer_name: the Parameter's name.
            model: what is being loaded.
            missing_keys: the Parameters that were not read so far.

        Returns:
            What Transformers puts into the model: nothing of a layer that was compressed.
        """
        if len(tensors) != 1:  # one of several that come out of one tensor of the file
            return tensors
        [value] = tensors.values()
        weight_OI = value[0] if isinstance(value, list) else value
        if not self._quantizer.take(model, full_layer_name, weight_OI):
            return tensors
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def _folder(model: PreTrainedModel, files: Sequence[str]) -> Path:
    """Where the manifest is: beside the model's files, or fetched from the Hub."""
    folder, config = Path(files[0]).parent, model.config
    if (folder / MANIFEST).is_file() or Path(config._name_or_path).exists():
        return folder
    found = cached_file(
        config._name_or_path,
        MANIFEST,
        revision=extract_commit_hash(files[0], None),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return folder if found is None else Path(found).parent
