"""Describes a source of text, and counts its unusable rows."""

import importlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning.pytorch.utilities import rank_zero_only

from sparsify.common.errors import SparsifyError

log = logging.getLogger("sparsify")

HUB = "hf://"
TEXT_SUFFIXES = (".txt", ".text", ".md")
JSON_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIX = ".parquet"
TOOLS = "tools"  # the key of the tools that a row's messages may call

BadRowsPolicy = Literal["error", "skip"]


@dataclass
class Source:
    """One named stream of documents.

    Args:
        path: A file, or a folder that is read recursively in sorted order. A plain text file (.txt,
            .text, .md) is one document; JSON lines (.jsonl, .json) and Parquet (.parquet) hold one
            document per row. Text and JSON lines may end in .gz. ``hf://`` and a name is a data set
            of the Hugging Face hub, or a local folder in the hub's layout. In Python also a
            `datasets.Dataset`, or any iterable of rows or texts.
        weight: Share of this source in a training epoch, relative to the other sources' weights.
            None gives every block once per epoch. Has no effect outside training.
        text_key: Key of the text in each row.
        config: Configuration of a data set on the hub.
        split: Split of a data set on the hub.
        streaming: Read a data set on the hub over the network as it is needed. Without a limit of
            `documents`, training then also packs its blocks as they are needed, without end.
        documents: Read at most so many documents.
        shuffle_buffer: Number of documents that a training stream shuffles together; it then
            shuffles the order of the files too. 0 keeps the order of the source.
        prompt_key: Key of a text that is context only; the response follows with nothing between.
        response_key: Key of the text after the prompt, which is learned, as is its end of text.
        messages_key: Key of a list of {role, content}, which the tokenizer's chat template turns
            into text, with the row's ``tools`` if it has some; the assistant's messages are
            learned.
        joined: Join all rows, empty ones too, with blank lines into one document, as papers do to
            measure perplexity.
    """

    path: str
    weight: float | None = None
    text_key: str = "text"
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    documents: int | None = None
    shuffle_buffer: int = 1000
    prompt_key: str | None = None
    response_key: str | None = None
    messages_key: str | None = None
    joined: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.path, os.PathLike):
            self.path = os.fspath(self.path)

    @property
    def hub(self) -> bool:
        """Whether the path names a data set rather than a file or folder."""
        return not self.in_memory and self.path.startswith(HUB)

    @property
    def in_memory(self) -> bool:
        """Whether the source is a Python object."""
        return not isinstance(self.path, str)

    @property
    def label(self) -> str:
        """The path, or the kind of the object, for messages and records."""
        return f"python {type(self.path).__name__}" if self.in_memory else self.path

    @property
    def endless(self) -> bool:
        """Whether training reads the source as a stream without end."""
        return self.streaming and self.documents is None

    @property
    def masked(self) -> bool:
        """Whether some of its tokens are context only."""
        return self.response_key is not None or self.messages_key is not None

    @property
    def keys(self) -> list[str]:
        """The keys that are read from each row."""
        if self.messages_key is not None:
            return [self.messages_key]
        if self.prompt_key is not None and self.response_key is not None:
            return [self.prompt_key, self.response_key]
        return [self.text_key]

    def columns(self, there: Sequence[str]) -> list[str]:
        """The columns that are read from a table that has the columns `there`."""
        tools = self.messages_key is not None and TOOLS in there
        return [*self.keys, TOOLS] if tools else self.keys

    def check(self, name: str) -> None:
        """Checks the settings one by one and together, without reading the source.

        Args:
            name: Name of the source, for messages.

        Raises:
            SparsifyError: A setting is out of range, or two contradict each other.
        """

        def refuse(problem: str, fix: str) -> None:
            raise SparsifyError(f"source {name}: {problem}: {fix}")

        if self.documents is not None and self.documents < 1:
            refuse(f"documents is {self.documents}; it must be at least 1", "raise it")
        if self.shuffle_buffer < 0:
            rule = "it must be at least 0, which means no shuffling"
            refuse(f"shuffle_buffer is {self.shuffle_buffer}; {rule}", "raise it")
        if (self.prompt_key is None) != (self.response_key is None):
            keys = f"prompt_key {self.prompt_key!r} and response_key {self.response_key!r}"
            refuse(f"it has {keys}; they go together", "give both or neither")
        if self.messages_key is not None and self.prompt_key is not None:
            rule = "a row is either messages or a prompt and a response"
            refuse(f"it has messages_key and prompt_key; {rule}", "remove one")
        if self.joined and (self.masked or self.endless):
            other = "messages or responses" if self.masked else "a stream without end"
            rule = "only a limited number of plain rows can be joined"
            refuse(f"it is joined and has {other}; {rule}", "remove one, or give documents")
        if not self.hub and (self.config is not None or self.split != "train"):
            options = f"config {self.config!r} and split {self.split!r}"
            rule = f"files have neither, only a path that begins with {HUB}"
            refuse(f"it has {options} and the path {self.label}; {rule}", "correct the path")

    def describe(self) -> dict[str, Any]:
        """Where the text is from, without absolute paths."""
        if self.in_memory:
            return {"file": self.label}
        if not self.hub:
            return {"file": Path(self.path).name}
        name = self.path.removeprefix(HUB)
        name = Path(name).name if Path(name).is_absolute() else name
        return {"file": HUB + name, "config": self.config, "split": self.split}

    def identity(self) -> dict[str, Any]:
        """All settings that decide what is read, as plain values without absolute paths."""
        return asdict(replace(self, path=self.describe()["file"]))


class Rows(Protocol):
    """Rows of one part of a source, in a fixed order."""

    def __iter__(self) -> Iterator[tuple[int, object]]: ...

    def __next__(self) -> tuple[int, object]:
        """The number of the next row, from 1, and its value or an `Unusable`."""
        ...

    def position(self) -> Any:
        """The position of the next row, in plain values."""
        ...


class Shard(Protocol):
    """One part of a source that is read from end to end.

    Attributes:
        name: Name of the part, for messages.
    """

    name: str

    def rows(self, position: Any = None) -> Rows:
        """The rows from a position that `Rows.position` returned; None starts at the first."""
        ...


@dataclass(frozen=True)
class Unusable:
    """A row that could not be read.

    Args:
        reason: Why the row is unusable; rows are counted by reason.
        detail: What a message about this row alone adds.
    """

    reason: str
    detail: str = ""


@dataclass
class BadRows:
    """Counts of rows that were left out.

    Args:
        counts: Number of rows by reason.
        first: ``file:line`` of the first such row.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: str | None = None

    def add(self, reason: str, where: str) -> None:
        """Counts one row.

        Args:
            reason: Why the row is unusable.
            where: ``file:line`` of the row.
        """
        self.counts[reason] += 1
        self.first = self.first or where

    @rank_zero_only
    def warn(self) -> None:
        """Logs the counts as one warning, on rank zero, if rows were left out."""
        if self.counts:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
            log.warning(
                "left out %d bad rows: %s; first at %s", self.counts.total(), reasons, self.first
            )


def optional(package: str, path: str) -> Any:
    """Imports a package that not every installation has.

    Args:
        package: Its import name.
        path: The source that needs it, for messages.

    Raises:
        SparsifyError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise SparsifyError(
            f"{path} needs the package {package.partition('.')[0]}, which is not installed: "
            "pip install 'sparsify-llm[datasets]'"
        ) from error


def check_columns(path: object, columns: list[str], keys: list[str]) -> None:
    """Checks that a table has the columns that are read.

    Args:
        path: Path of the table, for messages.
        columns: The columns of the table.
        keys: The columns that will be read.

    Raises:
        SparsifyError: A column is missing.
    """
    missing = [key for key in keys if key not in columns]
    if missing:
        raise SparsifyError(
            f"{path} has no column {missing[0]!r}; its columns are {', '.join(columns)}: name the "
            "right one by text_key, prompt_key and response_key, or messages_key"
        )


def source_stem(path: str) -> str:
    """The name of a source's file or folder without the suffixes that this module knows.

    Args:
        path: Path of the source.

    Returns:
        ``corpus`` for ``data/corpus.jsonl.gz``.
    """
    name = Path(path).name or Path(path).absolute().name
    lower = name.lower()
    for suffix in (*TEXT_SUFFIXES, *JSON_SUFFIXES, PARQUET_SUFFIX):
        for ending in (suffix + ".gz", suffix):
            if lower.endswith(ending) and len(name) > len(ending):
                return name[: -len(ending)]
    return name
