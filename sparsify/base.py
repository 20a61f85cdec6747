"""The dense model that a run starts from: where it is, how it is loaded, and the hash that names
it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparsify.choices import EMBEDDED as EMBEDDED
from sparsify.choices import Dtype as Dtype
from sparsify.errors import SparsifyError

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


def _location(name_or_path: str) -> dict[str, Any]:
    """The arguments by which Transformers finds a model; it runs no code that comes with one, and
    does not ask whether it may.
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


def _is_gguf(name_or_path: str) -> bool:
    return name_or_path.lower().endswith(".gguf")


def load_model(name_or_path: str, dtype: Dtype = "float32") -> PreTrainedModel:
    """Load a causal LM in evaluation mode on CPU.

    Args:
        name_or_path: ``embedded``, a local folder, a Hugging Face id, or a GGUF file in either of
            the last two, as ``folder/file.gguf``; its quantised weights are expanded.
        dtype: the type of the weights; ``auto`` is the type in which they are stored.

    Raises:
        SparsifyError: nothing that can be loaded is there.
    """
    with _load_errors("model", name_or_path):
        model: Any = AutoModelForCausalLM.from_pretrained(**_location(name_or_path), dtype=dtype)
    if _is_gguf(name_or_path):
        # The weights are plain now; what is left of the quantisation would forbid to save them.
        del model.config.quantization_config
        model.hf_quantizer = None
    return model.eval()


def load_skeleton(name_or_path: str) -> PreTrainedModel:
    """The model without its weights, on the meta device; arguments and errors as
    :func:`load_model`.
    """
    with _load_errors("model", name_or_path), torch.device("meta"):
        config = AutoConfig.from_pretrained(**_location(name_or_path))
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; arguments and errors as :func:`load_model`."""
    with _load_errors("tokenizer", name_or_path):
        return AutoTokenizer.from_pretrained(**_location(name_or_path))


@contextmanager
def _load_errors(what: str, name_or_path: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise SparsifyError(
            f"{name_or_path!r} needs a package that is not installed ({_first_line(error)}); for "
            "GGUF files: pip install 'sparsify-llm[gguf]'"
        ) from error
    # Transformers raises KeyError and NotImplementedError for types of a GGUF file that it does not
    # know.
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise _not_loaded(what, name_or_path, error) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _not_loaded(what: str, name_or_path: str, error: Exception) -> SparsifyError:
    is_path = name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).exists()
    reason = "there is no such path" if is_path else _first_line(error)
    return SparsifyError(
        f"no {what} could be loaded from {name_or_path!r} ({reason}); "
        "--model.name_or_path takes 'embedded', a folder that save_pretrained wrote, "
        "a Hugging Face id, or a GGUF file"
    )


@torch.no_grad()
def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of the tensor's type, shape and bytes, in hexadecimal."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    digest.update(values.numpy().data)
    return digest.hexdigest()


def hash_parameters(
    parameters: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> str:
    """SHA-256 over Parameters by name, type, shape and value: the name of a base model; with
    ``dtype`` the one that they would have in this type.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name} {hash_tensor(parameter.to(dtype or parameter.dtype))}\n".encode())
    return digest.hexdigest()


def stored_dtype(name_or_path: str) -> torch.dtype:
    """The type in which a model's weights are stored; of a GGUF file's, the one that holds them
    all.
    """
    if _is_gguf(name_or_path):
        return torch.float32
    return AutoConfig.from_pretrained(**_location(name_or_path)).dtype or torch.float32
