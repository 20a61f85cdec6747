"""Writes the model card of an exported folder: ``README.md``, which the Hub shows and indexes.

Its last line holds the hash of what is above, so that a card which somebody edited is known as
theirs and stays.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.common.errors import SparsifyError
from sparsify.common.files import read_json
from sparsify.common.printable import printable
from sparsify.common.replace import whole_file
from sparsify.export.card_facts import Facts
from sparsify.export.card_text import body
from sparsify.export.manifest import read_manifest

CARD = "README.md"
_MARK = re.compile(rb"\n<!-- sparsify card ([0-9a-f]{64}) -->\n")

log = logging.getLogger("sparsify")


def make_card(
    folder: Path,
    record: Mapping[str, Any] | None = None,
    dense: Mapping[str, Any] | None = None,
    tasks: Mapping[str, Any] | None = None,
) -> str:
    """The card's text. Only what can be read is said; nothing in it names a path of this machine.

    Args:
        folder: an export.
        record: a result (``run``, ``protocol`` and ``scores``) to use in place of the manifest's.
        dense: the scores of the dense model under the same protocol, by text.
        tasks: the report of ``sparsify eval`` on this export.

    Raises:
        SparsifyError: there is no manifest, or it is not readable.
    """
    manifest = read_manifest(folder)
    try:
        config: Any = read_json(folder / "config.json")
    except SparsifyError:
        config = {}
    facts = Facts(manifest, config, record or manifest, dense or {}, tasks or {})
    text = f"---\n{_metadata(facts).strip()}\n---\n\n{printable(body(facts))}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- sparsify card {digest} -->\n"


def write_card(file: Path, text: str) -> None:
    """Write a card in one step, over one that nobody edited.

    Raises:
        SparsifyError: somebody wrote or edited the file that is there.
    """
    if is_of_others(file):
        raise SparsifyError(
            f"{file} was written or edited by somebody else, and stays; write the card to another "
            "file with --output FILE, or move this one away"
        )
    with whole_file(file) as out:
        out.write(text.encode())


def add_card(folder: Path) -> None:
    """Put a card into a new export, unless the user's own is there."""
    if is_of_others(folder / CARD):
        log.warning(
            "%s is your own and was kept; 'sparsify card FOLDER --output FILE' writes the card of "
            "the new export",
            CARD,
        )
        return
    write_card(folder / CARD, make_card(folder))


def is_of_others(file: Path) -> bool:
    """Whether something is there other than a card of ours that nobody edited."""
    if file.is_symlink() or not file.is_file():
        return file.is_symlink() or file.exists()
    content = file.read_bytes()
    marks = list(_MARK.finditer(content))
    if not marks or marks[-1].end() != len(content):
        return True
    return hashlib.sha256(content[: marks[-1].start()]).hexdigest() != marks[-1][1].decode()


def _metadata(facts: Facts) -> str:
    """The YAML that the Hub reads, made and checked by the Hub's own library."""
    from huggingface_hub import EvalResult, ModelCardData

    base = facts.base_id
    results = [EvalResult(**result) for result in facts.eval_results()]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=facts.task,
        base_model=base,
        # Of the Hub's four relations (finetune, adapter, merge, quantized) none is pruning.
        base_model_relation=None if base is None else "finetune",
        tags=facts.tags(),
        model_name=facts.title if results else None,
        eval_results=results or None,
        **facts.licence,
    )
    return data.to_yaml()
