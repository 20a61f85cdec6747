"""Whether the files beside the weights are there: configuration and tokenizer."""

from collections.abc import Container
from pathlib import Path

from sparsify.common.errors import SparsifyError
from sparsify.common.files import read_json

_REQUIRED = ("config.json", "tokenizer_config.json")
_OPTIONAL = ("generation_config.json", "tokenizer.json", "vocab.json", "special_tokens_map.json")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def check_text_files(folder: Path, listed: Container[str] = ()) -> list[str]:
    """What is wrong with the configuration and the tokenizer, one sentence each.

    Args:
        folder: the folder.
        listed: files that are compared with their hashes, which tells more.
    """
    problems = []
    for name in (*_REQUIRED, *_OPTIONAL):
        if name in listed or (name in _OPTIONAL and not (folder / name).exists()):
            continue
        try:
            content = read_json(folder / name)
        except SparsifyError as error:
            problems.append(str(error))
            continue
        if name == "config.json" and not (isinstance(content, dict) and "model_type" in content):
            problems.append("config.json: it names no model_type, so nothing can load the model")
    if not any(name in listed or (folder / name).is_file() for name in _VOCABULARIES):
        problems.append(
            f"the tokenizer's vocabulary is missing: none of {', '.join(_VOCABULARIES)}"
        )
    return problems
