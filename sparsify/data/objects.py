"""Reads rows from Python objects: Hugging Face data sets, lists of texts, and other iterables."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from sparsify.common.errors import SparsifyError
from sparsify.data.sources import Source, check_columns

TAKEN = (
    "a path, a list of paths, a datasets.Dataset, rows such as [{'text': ...}, ...], texts by a "
    "name such as {'mine': ['first text', ...]}, or a mapping of names to any of these"
)


class ObjectShard:
    """The rows of one object.

    Args:
        source: The source; its ``path`` is the object.
    """

    def __init__(self, source: Source) -> None:
        self.name, self.source = source.label, source

    def rows(self, position: Any = None) -> "ObjectRows":
        """The rows after the first `position` ones."""
        return ObjectRows(self.source, position or 0)


class ObjectRows(Iterator[tuple[int, object]]):
    """Rows of one object; a position is the number of rows already read."""

    def __init__(self, source: Source, skip: int) -> None:
        rows: Any = source.path
        if is_dataset(rows) and rows.column_names is not None:
            check_columns(source.label, rows.column_names, source.keys)
            rows = rows.select_columns(source.columns(rows.column_names))
        self._count, self._key = skip, source.text_key
        self._rows = islice(rows, skip, None)

    def __next__(self) -> tuple[int, object]:
        row = next(self._rows)
        self._count += 1
        return self._count, {self._key: row} if isinstance(row, str) else row

    def position(self) -> int:
        """The number of rows read."""
        return self._count


def is_dataset(value: object) -> bool:
    """Whether a value is an object of the package ``datasets``, told without importing that."""
    return type(value).__module__.partition(".")[0] == "datasets"


def part_of(split: str, value: Any) -> Any:
    """The value given for a split; if it is a `datasets.DatasetDict`, its part of that name.

    Raises:
        SparsifyError: The `DatasetDict` has no such part.
    """
    if not (is_dataset(value) and isinstance(value, Mapping)):
        return value
    if split not in value:
        raise SparsifyError(
            f"{split}: the {type(value).__name__} has no part {split!r}, only {', '.join(value)}; "
            "each split is one data set: give one part, as data['NAME']"
        )
    return value[split]


def rows_of(split: str, value: Any) -> Any:
    """The value as an object whose rows can be read more than once.

    Raises:
        SparsifyError: Its type cannot hold rows of text.
    """
    if is_dataset(value) and not isinstance(value, Mapping) and hasattr(value, "column_names"):
        return value
    usable = isinstance(value, Iterable) and not isinstance(value, bytes | Mapping | type)
    if not usable or type(value).__module__.partition(".")[0] in ("torch", "torchdata", "numpy"):
        kind = value.__name__ if isinstance(value, type) else type(value).__name__
        raise SparsifyError(
            f"{split} is a {kind}; text is made into tokens and batches here, and comes from "
            f"{TAKEN}: give one of these"
        )
    return list(value) if isinstance(value, Iterator) else value
