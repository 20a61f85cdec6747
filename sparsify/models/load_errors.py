"""Explains in one sentence why a model or tokenizer could not be loaded."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparsify.common.errors import SparsifyError, first_line

_ADAPTER = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@contextmanager
def load_errors(
    what: str, name_or_path: str, option: str = "--model.name_or_path"
) -> Iterator[None]:
    """Turn the errors that Transformers raises for models it cannot load into one sentence.

    Args:
        what: ``model`` or ``tokenizer``.
        name_or_path: as the user gave it.
        option: with which option, for the message; empty if it must be a folder.

    Raises:
        SparsifyError: the block raised one of them.
    """
    try:
        yield
    except SparsifyError:
        raise
    except ImportError as error:
        gguf = name_or_path.lower().endswith(".gguf")
        fix = "; for GGUF files: pip install 'sparsify-llm[gguf]'" if gguf else ""
        raise SparsifyError(
            f"{name_or_path!r} needs a package that is not installed ({first_line(error)}){fix}"
        ) from error
    except pickle.UnpicklingError as error:
        raise SparsifyError(
            f"{name_or_path!r}: its weights are a pickle that holds other things than tensors, and "
            "reading it would run code; take the model's safetensors file"
        ) from error
    # Transformers raises KeyError and NotImplementedError for GGUF files of a type that it does not
    # know, and RuntimeError and TypeError if weights and configuration do not fit each other.
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise SparsifyError(
            f"no {what} could be loaded from {name_or_path!r} ({_reason(what, name_or_path, error)}"
            f"); {_takes(option)}"
        ) from error


def _takes(option: str) -> str:
    if not option:
        return "name a folder that save_pretrained or sparsify export wrote"
    return (
        f"{option} takes 'embedded', a folder that save_pretrained wrote, "
        "a Hugging Face id, or a GGUF file"
    )


def _reason(what: str, name_or_path: str, error: Exception) -> str:
    path = Path(name_or_path).expanduser()
    if name_or_path.startswith((".", "/", "~")) and not path.exists():
        return "there is no such path"
    if path.is_dir():
        if not any(path.iterdir()):
            return "the folder is empty"
        if (path / _ADAPTER).is_file() and not (path / "config.json").is_file():
            return (
                f"it is an adapter: it holds {_ADAPTER} and no model; merge the adapter into its "
                "base model with PEFT's merge_and_unload, save that, and name its folder"
            )
        if what == "tokenizer" and not any((path / name).is_file() for name in _TOKENIZER_FILES):
            return (
                f"the folder holds no tokenizer: none of {', '.join(_TOKENIZER_FILES)}; save the "
                "model's tokenizer there with save_pretrained"
            )
        if not (path / "config.json").is_file():
            return "the folder holds no config.json"
    if isinstance(error, SafetensorError):
        return (
            f"a safetensors file is damaged or cut off: {first_line(error)}; fetch or copy it again"
        )
    line = first_line(error)
    if "for this kind of AutoModel" in line:
        kind = line.partition("configuration class ")[2].partition(" for")[0]
        name = kind.rpartition(".")[2].strip("'>")
        return f"{name} is not the configuration of a causal language model"
    if "instantiate the backend tokenizer" in line:
        return (
            "it has no tokenizer that the tokenizers package can read; save one as tokenizer.json "
            "with the fast tokenizer's save_pretrained"
        )
    if "couldn't connect to" in line.lower():
        return (
            "it is not a local folder and not in the cache of downloads, and the Hugging Face Hub "
            "cannot be reached; check its spelling and the network"
        )
    return line
