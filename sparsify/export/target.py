"""Checks where an export may be written, and keeps the user's own files in a former export.

A place is checked as far as possible before the work: nobody wants to hear after hours of training
that a folder cannot be written.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from sparsify.common.errors import SparsifyError
from sparsify.common.file_hashes import hash_file
from sparsify.common.files import read_json
from sparsify.common.replace import NO_LINKS, replace_folder
from sparsify.export.card import add_card
from sparsify.export.manifest import MANIFEST
from sparsify.export.mask_file.index import FILE_NAME

# The files of exports whose manifest does not list them.
_KNOWN = {
    MANIFEST,
    FILE_NAME,
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
}


def check_target(folder: Path, overwrite: bool, base: str | None = None) -> None:
    """Refuse a place that an export must not replace or cannot be written to.

    Args:
        folder: where the export will go.
        overwrite: whether an earlier export may be replaced.
        base: the run's own base model, if that is a folder.

    Raises:
        SparsifyError: there is something other than an earlier export; there is one, but it was
            changed since or ``overwrite`` is False; the base model is there; or the place cannot be
            written.
    """
    check_writable(folder)
    place = folder.resolve()
    if base is not None and (source := Path(base).expanduser()).is_dir():
        source = source.resolve()
        if place == source or place in source.parents:
            raise SparsifyError(
                f"{folder} is or holds the run's base model {base}, which an export must not "
                "replace; name another folder"
            )
    outer = next((p for p in place.parents if (p / MANIFEST).is_file()), None)
    if outer is not None:
        raise SparsifyError(
            f"{folder} lies inside {outer}, which is an export itself; name a folder outside it"
        )
    if not place.exists():
        return
    if not (place / MANIFEST).is_file():
        raise SparsifyError(
            f"{folder} exists and holds no {MANIFEST}, so it is not an export and is not replaced; "
            "name another folder"
        )
    if not overwrite:
        raise SparsifyError(
            f"{folder} holds an earlier export; replace it with overwrite "
            "(--output.overwrite true), or name another folder"
        )
    edited = [
        name
        for name, digest in _written(place).items()
        if digest is not None and (place / name).is_file() and hash_file(place / name) != digest
    ]
    if edited:
        raise SparsifyError(
            f"{folder}: {', '.join(edited)} was changed since the export that wrote it, and "
            "overwriting would lose the change; move it elsewhere, or name another folder"
        )


def check_writable(path: Path) -> None:
    """Refuse a path where the system already says that nothing can be made.

    Args:
        path: path of a file or folder that may exist or not.

    Raises:
        SparsifyError: the path lies below a file, is a loop of symbolic links or too long, or the
            nearest existing folder above it cannot be written.
    """
    try:
        place = path.resolve(strict=False)
        above = place.parent
        while not _exists(above) and above != above.parent:
            above = above.parent
        _exists(place)  # raises if something is wrong with the last part of the path
        longest = os.pathconf(above, "PC_NAME_MAX") if above.is_dir() else None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
        reason = getattr(error, "strerror", None) or "it is a loop of symbolic links"
        raise SparsifyError(f"{path} cannot be written: {reason}; name another place") from error
    if not above.is_dir():
        raise SparsifyError(
            f"{path} cannot be written: {above} is a file, not a folder; name another place"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise SparsifyError(
            f"{path} cannot be written: you have no right to write in {above}; "
            "name another place, or change its rights"
        )
    # It is first written under a longer name: .NAME.partial-XXXXXXXX.former
    room = len(os.fsencode(place.name)) + len(".") + len(".partial-XXXXXXXX.former")
    if longest is not None and room > longest:
        raise SparsifyError(
            f"{path} cannot be written: the name has {len(place.name)} characters, and its file "
            f"system takes {longest}, with the ending of unfinished files; take a shorter name"
        )


def put_export(new: Path, folder: Path, overwrite: bool, base: str) -> None:
    """Put a complete export in its place, with a card and the user's own files of a former one.

    Args:
        new: the export, under its hidden name.

    Raises:
        SparsifyError: as :func:`check_target`, whose other arguments these are: writing takes
            minutes, in which others may have written there.
    """
    check_target(folder, overwrite, base)
    keep_others(folder, new)
    add_card(new)
    try:
        replace_folder(new, folder, overwrite)
    except OSError:
        check_target(folder, overwrite, base)  # they may have done so since
        raise


def keep_others(former: Path, new: Path) -> None:
    """Bring files that the user added to a former export into the new one, with their times and
    rights: as hard links if the file system can, otherwise as copies.

    Args:
        former: a folder that :func:`check_target` found to be an export; it may be missing.
        new: the folder that will take its place.

    Raises:
        SparsifyError: the new export has a file of the same name as one of the user's.
    """
    if not former.is_dir():
        return
    former = former.resolve()
    written = _written(former)
    for root, folders, files in os.walk(former):
        inside = Path(root).relative_to(former)
        links = [name for name in folders if Path(root, name).is_symlink()]
        for name in [*files, *links]:
            if str(inside / name) not in written:
                _keep(former / inside / name, new / inside / name)
        for name in set(folders) - set(links):
            empty = not any(Path(root, name).iterdir())
            if empty:
                (new / inside / name).mkdir(parents=True, exist_ok=True)
    # From the inside out, as a new file changes the time of its folder.
    for root, _, _ in os.walk(former, topdown=False):
        inside = Path(root).relative_to(former)
        if inside.parts and (new / inside).is_dir():
            shutil.copystat(root, new / inside)


def _keep(source: Path, place: Path) -> None:
    if os.path.lexists(place):
        raise SparsifyError(
            f"{source} was not written by the export that is to be replaced, but the new one has a "
            "file of this name; move it elsewhere, or name another folder"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copy2(source, place, follow_symlinks=False)


def _written(folder: Path) -> dict[str, str | None]:
    """The files that the export in a folder wrote, by relative name, with their hash if known."""
    files = _read(folder / MANIFEST).get("files")
    if isinstance(files, dict):
        return {str(name): str(digest) for name, digest in files.items()} | {MANIFEST: None}
    shards = _read(folder / "model.safetensors.index.json").get("weight_map")
    names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
    return dict.fromkeys(sorted(_KNOWN | names))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except SparsifyError:
        return {}
    return content if isinstance(content, dict) else {}


def _exists(path: Path) -> bool:
    """Like ``Path.exists``, but raises if the system cannot tell."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return False  # the file above it is found next
    return True
