"""The dense model that a run starts from: where it is, how it is loaded, and the hash that names
it.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparsify.errors import SparsifyError

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _location(name_or_path: str) -> str:
    return str(EMBEDDED_FOLDER) if name_or_path == EMBEDDED else name_or_path


def load_model(name_or_path: str, dtype: Dtype = "float32") -> PreTrainedModel:
    """Load a causal LM in evaluation mode on CPU.

    Args:
        name_or_path: ``embedded``, a local folder, or a Hugging Face id.
        dtype: the type of the weights; ``auto`` is the type in which they are stored.

    Raises:
        SparsifyError: nothing that can be loaded is there.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(_location(name_or_path), dtype=dtype)
    except (OSError, ValueError) as error:
        raise _not_loaded("model", name_or_path, error) from error
    return model.eval()


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; arguments and errors as :func:`load_model`."""
    try:
        return AutoTokenizer.from_pretrained(_location(name_or_path))
    except (OSError, ValueError) as error:
        raise _not_loaded("tokenizer", name_or_path, error) from error


def _not_loaded(what: str, name_or_path: str, error: Exception) -> SparsifyError:
    is_path = name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).exists()
    reason = "there is no such folder" if is_path else str(error).strip().splitlines()[0]
    return SparsifyError(
        f"no {what} could be loaded from {name_or_path!r} ({reason}); "
        "--model.name_or_path takes 'embedded', a folder that save_pretrained wrote, "
        "or a Hugging Face id"
    )


@torch.no_grad()
def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of the tensor's type, shape and bytes, in hexadecimal."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    digest.update(values.numpy().data)
    return digest.hexdigest()


def hash_parameters(parameters: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over Parameters by name, type, shape and value: the name of a base model."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name} {hash_tensor(parameter)}\n".encode())
    return digest.hexdigest()


def stored_dtype(name_or_path: str) -> torch.dtype:
    """The type in which a model's weights are stored."""
    return AutoConfig.from_pretrained(_location(name_or_path)).dtype or torch.float32
