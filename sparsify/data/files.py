"""Reads the rows of text, JSON-lines and Parquet files."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from sparsify.common.errors import SparsifyError
from sparsify.data.sources import (
    JSON_SUFFIXES,
    PARQUET_SUFFIX,
    TEXT_SUFFIXES,
    Source,
    Unusable,
    check_columns,
    optional,
)

LONGEST = 2**29  # characters in a row; more are not text, or belong in several rows
ROWS_A_READ = 1024  # rows decoded at once; a whole Parquet row group may be larger than memory


class FileShard:
    """One file of a source.

    Args:
        file: The file.
        source: The source, which names the keys to read.
    """

    def __init__(self, file: Path, source: Source) -> None:
        self.name = str(file)
        self.file, self.source = file, source

    def rows(self, position: Any = None) -> "FileRows":
        """The rows after the first `position` ones."""
        return FileRows(self.file, self.source, position or 0)


class FileRows(Iterator[tuple[int, object]]):
    """Rows of one file; a position is the number of rows already read."""

    def __init__(self, file: Path, source: Source, skip: int) -> None:
        self._count = skip
        self._rows = islice(_read(file, source), skip, None)

    def __next__(self) -> tuple[int, object]:
        row = next(self._rows)
        self._count += 1
        return row

    def position(self) -> int:
        """The number of rows read."""
        return self._count


def file_shards(source: Source) -> list[FileShard]:
    """The files of a source, in a fixed order.

    Raises:
        SparsifyError: The path does not exist, or there is no file of a known kind.
    """
    return [FileShard(file, source) for file in _files(source.path)]


def _read(file: Path, source: Source) -> Iterator[tuple[int, object]]:
    try:
        if _kind(file) == PARQUET_SUFFIX:
            yield from _parquet(file, source)
            return
        with _open(file) as lines:
            if _kind(file) in TEXT_SUFFIXES:
                yield 1, {source.text_key: _bounded(lines.read(LONGEST + 1), file, 1)}
            else:
                yield from _json_lines(lines, file)
    except UnicodeDecodeError as error:
        raise SparsifyError(
            f"{file} is not UTF-8 ({error.reason} {error.object[error.start]:#04x}); text must be "
            "UTF-8: convert the file, for instance with iconv"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise SparsifyError(
            f"{file} cannot be read ({error}); every file of a source must be readable, and a file "
            "named .gz a whole gzip file: mend or remove it"
        ) from error


def _bounded(text: str, file: Path, row: int) -> str:
    """The text of a row; SparsifyError if it is too long."""
    if len(text) > LONGEST:
        raise SparsifyError(
            f"{file}:{row} is longer than {LONGEST} characters; a row is held in memory and must "
            "be shorter: split it into several rows or files"
        )
    return text


def _lines(lines: IO[str], file: Path) -> Iterator[str]:
    number = 0
    while line := lines.readline(LONGEST + 1):
        number += 1
        yield _bounded(line, file, number)


def _json_lines(given: IO[str], file: Path) -> Iterator[tuple[int, object]]:
    lines = _lines(given, file)
    first = next(lines, "")
    if first.lstrip().startswith("["):
        whole = first + _bounded(given.read(LONGEST + 1), file, 1)
        try:
            rows = json.loads(whole)
        except (ValueError, RecursionError):
            rows = None
        if isinstance(rows, list):  # one JSON array: its elements are the rows
            yield from enumerate(rows, 1)
            return
        lines, first = iter(io.StringIO(whole)), ""
    lines = chain([first] if first else [], lines)
    blank: int | None = None
    for number, line in enumerate(lines, 1):
        if blank is not None:
            yield blank, Unusable("blank line")
            blank = None
        if not line.strip():
            blank = number  # yielded at the next line, as a blank last line is not a row
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = Unusable("invalid JSON", f" ({error}); each line must be one row")
        yield number, row


def _parquet(file: Path, source: Source) -> Iterator[tuple[int, object]]:
    parquet = optional("pyarrow.parquet", str(file))
    invalid = optional("pyarrow", str(file)).ArrowException
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            check_columns(file, table.schema_arrow.names, source.keys)
            columns = source.columns(table.schema_arrow.names)
            for group in range(table.num_row_groups):
                for part in table.iter_batches(ROWS_A_READ, [group], columns):
                    for row in part.to_pylist():
                        number += 1
                        yield number, row
    except invalid as error:
        raise SparsifyError(
            f"{file} cannot be read ({error}); a file named {PARQUET_SUFFIX} must be a whole "
            "Parquet file: mend or remove it"
        ) from error


def _kind(file: Path) -> str:
    name = file.name.lower()
    plain = name.removesuffix(".gz")
    # A Parquet file is compressed inside, so .parquet.gz is not a known kind.
    return Path(name if plain.endswith(PARQUET_SUFFIX) else plain).suffix


def _files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    zipped = (*TEXT_SUFFIXES, *JSON_SUFFIXES)
    rule = (
        f"the names of text files end in one of {' '.join(zipped)}, each also with .gz, or in "
        f"{PARQUET_SUFFIX}"
    )
    known = (*zipped, PARQUET_SUFFIX)
    if not _exists(root):
        shown = path if len(path) <= 200 else repr(path[:80] + "...")
        raise SparsifyError(
            f"{shown} does not exist; a source must be a file or a folder: correct the path, or "
            "give texts themselves, in Python, under a name as {'mine': ['first text', ...]}"
        )
    if root.is_dir():
        # POSIX form gives the same order, and so the same data, on every system.
        files = sorted(
            (file for file in root.rglob("*") if file.is_file() and _kind(file) in known),
            key=lambda file: file.relative_to(root).as_posix(),
        )
        if not files:
            raise SparsifyError(f"{path} has no text file; {rule}: add one or name another folder")
        return files
    if not root.is_file():
        raise SparsifyError(
            f"{path} is a device, a pipe or a socket; a source is read more than once and must be "
            "a file or a folder: save it to a file"
        )
    if _kind(root) not in known:
        raise SparsifyError(f"{path} is not a known kind of text; {rule}: rename or convert it")
    return [root]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # longer than a path may be, or with a zero byte
        return False


def _open(file: Path) -> IO[str]:
    # utf-8-sig is UTF-8 without the byte order mark that some editors write first.
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")
