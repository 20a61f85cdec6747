"""Finds and loads the dense model that a run starts from, and computes the hash that names it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils.hub import cached_file

from sparsify.common.choices import EMBEDDED as EMBEDDED
from sparsify.common.choices import Dtype as Dtype
from sparsify.common.errors import SparsifyError
from sparsify.models.config_checks import check_causal, dequantising, forget_quantisation
from sparsify.models.hashes import hash_parameters
from sparsify.models.load_checks import check_finite, check_loaded, check_model, correct_tie
from sparsify.models.load_errors import load_errors
from sparsify.models.model_files import check_model_files
from sparsify.models.multimodal import auto_class, processor_files
from sparsify.models.permutation_file import Permutation
from sparsify.models.stored_weights import INDEX, SINGLE, StoredWeights

log = logging.getLogger("sparsify")

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


def _location(name_or_path: str) -> dict[str, Any]:
    """The arguments with which Transformers finds a model, without running code that comes with it
    and without asking whether it may.
    """
    arguments: dict[str, Any] = {
        "pretrained_model_name_or_path": name_or_path,
        "trust_remote_code": False,
    }
    if name_or_path == EMBEDDED:
        arguments["pretrained_model_name_or_path"] = str(EMBEDDED_FOLDER)
    elif _is_gguf(name_or_path):
        folder, _, file = name_or_path.rpartition("/")
        arguments |= {"pretrained_model_name_or_path": folder or ".", "gguf_file": file}
    return arguments


def _check(name_or_path: str) -> None:
    if not _is_gguf(name_or_path):  # Transformers makes the configuration of GGUF files itself
        check_model_files(_location(name_or_path)["pretrained_model_name_or_path"])


def _is_gguf(name_or_path: str) -> bool:
    return name_or_path.lower().endswith(".gguf")


def load_model(
    name_or_path: str, dtype: Dtype = "float32", option: str = "--model.name_or_path"
) -> PreTrainedModel:
    """Load a causal LM in evaluation mode on CPU; a vision-language model whole, with its towers.

    Args:
        name_or_path: ``embedded``, a local folder, a Hugging Face id, or a GGUF file in either of
            the last two, as ``folder/file.gguf``. Quantised weights of GGUF files, and those in
            MXFP4 and FP8, are expanded.
        dtype: the type of the weights; ``auto`` is the type in which they are stored.
        option: with which option of a command the user names it, for messages; empty if it must
            be a folder.

    Raises:
        SparsifyError: there is no model that can be loaded, or its files do not hold the tensors
            that its configuration describes.
    """
    with load_errors("model", name_or_path, option):
        _check(name_or_path)
        location = _location(name_or_path)
        options: dict[str, Any] = {}
        wanted: torch.dtype | None = None
        loader: Any = AutoModelForCausalLM
        if not _is_gguf(name_or_path):
            config = AutoConfig.from_pretrained(**location)
            check_causal(config, repr(name_or_path))
            options, loader = dequantising(config), auto_class(config)
            local = Path(location["pretrained_model_name_or_path"]).is_dir()
            if dtype == "auto" and local and not options:
                wanted = _dtype_in_files(location)  # Transformers trusts the configuration
        loaded: Any = loader.from_pretrained(
            **location,
            dtype=wanted or dtype,
            output_loading_info=True,
            # Not to ignore them: the loading info then names them, and check_loaded refuses them.
            ignore_mismatched_sizes=True,
            **options,
        )
        model, info = loaded
    check_loaded(model, name_or_path, info)
    correct_tie(model)
    if name_or_path == EMBEDDED:  # under the name of its folder it would be somebody else's model
        model.config._name_or_path = EMBEDDED
    if options or _is_gguf(name_or_path):
        # The weights are plain now, but Transformers would refuse to save them with these settings.
        forget_quantisation(model.config)
        model.hf_quantizer = None
    if options:
        # Else save_pretrained would write plain weights under the names of quantised ones.
        vars(model).pop("_weight_conversions", None)
        log.warning("%r is stored quantised: its weights were expanded", name_or_path)
    return model.eval()


def load_skeleton(name_or_path: str, option: str = "--model.name_or_path") -> PreTrainedModel:
    """Load a model without weights, on the meta device; arguments and errors as
    :func:`load_model`.
    """
    with load_errors("model", name_or_path, option), torch.device("meta"):
        _check(name_or_path)
        config = AutoConfig.from_pretrained(**_location(name_or_path))
        check_causal(config, repr(name_or_path))
        forget_quantisation(config)
        model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=False)
        return model


def load_tokenizer(
    name_or_path: str, option: str = "--model.name_or_path"
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; arguments and errors as :func:`load_model`."""
    with load_errors("tokenizer", name_or_path, option):
        return AutoTokenizer.from_pretrained(**_location(name_or_path))


@dataclass
class BaseModel:
    """A dense model that was checked, with its name and hash.

    Attributes:
        model: in evaluation mode.
        name_or_path: where it came from.
        stored_dtype: the type in which its weights are stored.
        hash: hash of its Parameters, see :func:`~sparsify.models.hashes.hash_parameters`.
        own_tokenizer: its tokenizer; while it is None, :attr:`tokenizer` loads it on first use.
        processor: what makes inputs of its images, or the files of that by name.
        permutation: the orders of its channels, if they are not those in which it was loaded.
    """

    model: PreTrainedModel
    name_or_path: str
    stored_dtype: torch.dtype
    hash: str
    own_tokenizer: PreTrainedTokenizerBase | None = None
    processor: ProcessorMixin | Mapping[str, bytes] = field(default_factory=dict)
    permutation: Permutation | None = None

    @property
    def original_hash(self) -> str:
        """The hash that names the model before its channels were permuted."""
        return self.hash if self.permutation is None else self.permutation.base_hash

    def permute(self, orders: Mapping[str, Tensor]) -> None:
        """Put its channels into other orders, in place: it computes the same as before.

        Args:
            orders: int64 ``[C]`` by part, see :mod:`sparsify.models.permutation`; none at all
                leaves it as it is.

        Raises:
            SparsifyError: they do not fit the model, or it is permuted already.
        """
        if self.permutation is not None:
            raise SparsifyError(
                f"{self.name}: its channels are permuted already; load the model again"
            )
        if not orders:
            return
        before = self.hash
        Permutation(orders, before, "").apply(self.model)
        self.hash = hash_parameters(dict(self.model.named_parameters()))
        self.permutation = Permutation(orders, before, self.hash)

    @property
    def name(self) -> str:
        """Its name for records, which may be published: of a local path only the last part."""
        path = Path(self.name_or_path).expanduser()
        return path.resolve().name if path.exists() else self.name_or_path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to it."""
        if self.own_tokenizer is None:
            self.own_tokenizer = load_tokenizer(self.name_or_path)
        return self.own_tokenizer

    def save_inputs(self, folder: Path) -> None:
        """Write what makes its inputs of text and images: tokenizer and processor."""
        self.tokenizer.save_pretrained(folder)
        if isinstance(self.processor, ProcessorMixin):
            self.processor.save_pretrained(folder)
            return
        for name, content in self.processor.items():
            (folder / name).write_bytes(content)


def load_base(
    name_or_path: str, dtype: Dtype = "float32", option: str = "--model.name_or_path"
) -> BaseModel:
    """Load a model and check that it can be masked; arguments and errors as :func:`load_model`.

    Raises:
        SparsifyError: also if its weights are quantised or not finite.
    """
    model = load_model(name_or_path, dtype, option)
    base = check_base(model, name_or_path, stored_dtype(name_or_path))
    base.processor = processor_files(model.config, name_or_path)
    return base


def check_base(
    model: PreTrainedModel,
    name_or_path: str,
    stored: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> BaseModel:
    """Check that a model object can be masked, and hash it; errors as :func:`load_base`."""
    check_model(model)
    check_finite(model.named_parameters())
    digest = hash_parameters(dict(model.named_parameters()))
    return BaseModel(model, name_or_path, stored, digest, tokenizer)


def stored_dtype(name_or_path: str) -> torch.dtype:
    """The type in which a model's weights are stored: that of most bytes of its safetensors files;
    what the configuration states where weights are quantised or no such files are on this machine.
    It is float32 for GGUF files, which mix types.
    """
    if _is_gguf(name_or_path):
        return torch.float32
    location = _location(name_or_path)
    config = AutoConfig.from_pretrained(**location)
    stated = config.dtype or config.get_text_config().dtype or torch.float32
    return stated if dequantising(config) else _dtype_in_files(location) or stated


def _dtype_in_files(location: Mapping[str, Any]) -> torch.dtype | None:
    """The type of most bytes of floats in a model's safetensors files, if those are here."""
    for name in (SINGLE, INDEX):
        file = cached_file(
            location["pretrained_model_name_or_path"],
            name,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is not None:
            return StoredWeights(Path(file).parent, may_lack=True).dtype()
    return None
