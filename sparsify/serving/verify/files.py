"""Whether a folder holds the files that the export wrote, and no others that a loader would take.

The files of the weights are checked elsewhere, tensor by tensor: they may be stored anew, in other
parts.
"""

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from sparsify.common.file_hashes import hash_file
from sparsify.common.values import first_few
from sparsify.export.manifest import MANIFEST
from sparsify.models.stored_weights import INDEX

# What no export holds, and some loader runs, unpickles or takes for the weights.
_NEVER = (
    *("*.py", "*.pyc", "*.so", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5"),
    *("*.msgpack", "*.gguf", "*.onnx", "*.tflite", "adapter_config.json", "adapter_model.*"),
)
# What loaders read beside the weights: configuration, tokenizer, templates, masks.
_READ = (
    *("*config*.json", "*token*.json", "*template*.json", "*.index.json", "params.json"),
    *("vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*.nmask", "*/*.safetensors"),
)
_ABOUT = ("readme*", "license*", "notice*", ".gitattributes", ".gitignore", ".git/", ".cache/")
_NAMED = 5


def check_files(folder: Path, listed: Mapping[str, str] | None) -> tuple[list[str], list[str]]:
    """Compare a folder's files with those that its manifest lists.

    Args:
        folder: the folder.
        listed: SHA-256 by path; None where nothing lists them, so that only what no export holds
            can be found.

    Returns:
        Problems and notes, one sentence each.
    """
    known = listed or {}
    problems = [
        f"{name} {fault}"
        for name, digest in known.items()
        if not _of_weights(name) and (fault := _fault(folder, name, digest))
    ]
    others = []
    for name in _names(folder):
        if name in known or name == MANIFEST or _of_weights(name):
            continue
        shown = name if name.isprintable() else repr(name)
        if (folder / name).is_symlink() and (folder / name).is_dir():
            problems.append(f"{shown} is a link to a folder, which is not looked into: remove it")
        elif _like(name, _NEVER) or (listed is not None and _like(name, _READ)):
            problems.append(f"{shown} is not of the export, and some loaders take it: remove it")
        elif not _like(name, _ABOUT):
            others.append(shown)
    if listed is None or not others:
        return problems, []
    return problems, [f"not of the export, and not checked: {first_few(others, _NAMED)}"]


def _of_weights(name: str) -> bool:
    """Whether the check of the tensors reads this file, or names it as one too many."""
    return name == INDEX or ("/" not in name and name.endswith(".safetensors"))


def _fault(folder: Path, name: str, digest: str) -> str | None:
    """What is wrong with a listed file, if anything is."""
    path = folder / name
    try:
        if not path.is_file():
            return f"is missing or no regular file, and {MANIFEST} lists it"
        if not _within(folder, path):
            return "is a link out of the folder: put the file itself there"
        return None if hash_file(path) == digest else "is not as it was exported (SHA-256 differs)"
    except OSError as error:
        return f"is not readable ({error.strerror})"


def _within(folder: Path, path: Path) -> bool:
    """Whether a path stays in the folder, or goes where the Hugging Face cache keeps the files of
    its snapshots.
    """
    folder, path = folder.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs"
    return folder in path.parents or (folder.parent.name == "snapshots" and blobs in path.parents)


def _names(folder: Path) -> Iterator[str]:
    """The paths of all files, sorted; of hidden folders, which no loader looks into, their own name
    and a slash; of links to folders their name.
    """
    for place, folders, files in os.walk(folder):
        folders.sort()
        where = Path(place).relative_to(folder)
        hidden = [name for name in folders if name.startswith(".")]
        links = [name for name in folders if Path(place, name).is_symlink()]
        folders[:] = [name for name in folders if name not in hidden]
        yield from ((where / name).as_posix() for name in sorted([*files, *links]))
        yield from (f"{(where / name).as_posix()}/" for name in hidden if name not in links)


def _like(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the path, or the name at its end, is like one of the patterns, in any case."""
    path = name.lower()
    ends = {path, path if path.endswith("/") else path.rpartition("/")[2]}
    return any(fnmatchcase(end, pattern) for end in ends for pattern in patterns)
