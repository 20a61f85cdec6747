"""Finds the sources of a split: those that the user gave, or the embedded texts."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsify.common.errors import SparsifyError
from sparsify.data.objects import part_of, rows_of
from sparsify.data.sources import Source, source_stem
from sparsify.models.base import EMBEDDED, EMBEDDED_FOLDER
from sparsify.models.perplexity import OVERALL

if TYPE_CHECKING:
    Sources = Any  # Python's own objects too
else:  # what the command line takes
    Sources = str | list[str] | dict[str, str | Source] | None
Split = Literal["train", "validation", "test"]
EMBEDDED_NAMES = ("shakespeare", "bible", "python")


def embedded_sources(split: Split) -> dict[str, Source]:
    return {name: _located(Source(f"{EMBEDDED}:{name}"), split) for name in EMBEDDED_NAMES}


def _located(source: Source, split: Split) -> Source:
    """The source; a path such as ``embedded:python`` is replaced by that of the package's file."""
    if source.in_memory:
        return source
    kind, _, name = source.path.partition(":")
    if kind != EMBEDDED:
        return source
    if name not in EMBEDDED_NAMES:
        raise SparsifyError(
            f"{split}: there is no embedded text {name!r}; there are {', '.join(EMBEDDED_NAMES)}"
        )
    return replace(source, path=str(EMBEDDED_FOLDER / "text" / name / f"{split}.jsonl.gz"))


def _source(split: Split, given: Any) -> Source:
    """Makes a source of a path or of an object with rows; a `Source` stays."""
    source = given if isinstance(given, Source) else Source(part_of(split, given))
    return replace(source, path=rows_of(split, source.path)) if source.in_memory else source


def named_sources(split: Split, sources: Any) -> dict[str, Source]:
    named = _named(split, sources)
    if split != "train" and OVERALL in named:
        raise SparsifyError(
            f"{split}: a text is named {OVERALL!r}, and so is the score over all texts; give it "
            f"another name, as in {{mine: {named[OVERALL].label}}}"
        )
    return named


def _named(split: Split, sources: Any) -> dict[str, Source]:
    if sources is None:
        return {}
    sources = os.fspath(sources) if isinstance(sources, os.PathLike) else part_of(split, sources)
    if isinstance(sources, list | tuple):
        sources = [os.fspath(s) if isinstance(s, os.PathLike) else s for s in sources]
    if isinstance(sources, str | list | Mapping) and not sources:
        raise SparsifyError(
            f"{split} is {sources!r}; a split that is given must have a source: name a file or "
            "folder, or leave it out"
        )
    if isinstance(sources, Mapping):
        return {name: _located(_source(split, s), split) for name, s in sources.items()}
    if isinstance(sources, Source):
        return {split: _located(_source(split, sources), split)}
    paths = [sources] if isinstance(sources, str) else sources
    if not (isinstance(paths, list) and all(isinstance(path, str) for path in paths)):
        return {split: _source(split, paths)}  # rows, as they are not all paths
    names = [source_stem(path.removeprefix(f"{EMBEDDED}:")) for path in paths]
    counts = Counter(names)
    named: dict[str, Source] = {}
    for path, stem in zip(paths, names, strict=True):
        name = base = f"{Path(path).absolute().parent.name}/{stem}" if counts[stem] > 1 else stem
        number = 1
        while name in named:
            number += 1
            name = f"{base}-{number}"
        named[name] = _located(Source(path), split)
    return named


def check_shares(sources: Mapping[str, Source], weights: Sequence[float] | None) -> None:
    """Refuse a blend with a stream whose shares nothing says."""
    endless = [name for name, source in sources.items() if source.endless]
    if endless and weights is None and len(sources) > 1:
        raise SparsifyError(
            f"train source {', '.join(endless)} streams without end, and no source has a weight; "
            "only weights can say the shares of a blend with a stream: give every source a weight, "
            "or the stream a limit of documents"
        )


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a number that is too small."""
    if value < least:
        raise SparsifyError(f"{name} is {value}; it must be at least {least}: raise it")
