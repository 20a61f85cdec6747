"""Reads documents from text and JSON-lines files, and accounts for rows that are not usable."""

import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from lightning.pytorch.utilities import rank_zero_only

from sparsify.errors import SparsifyError

log = logging.getLogger("sparsify")

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSON_SUFFIXES = (".jsonl", ".json")

BadRowsPolicy = Literal["error", "skip"]


@dataclass
class Source:
    """One named stream of documents.

    Args:
        path: A file, or a folder that is read recursively in sorted order. Plain text (.txt, .text,
            .md) is one document a file; JSON lines (.jsonl, .json) is one document a line. Each may
            end in .gz.
        weight: Share of this source in a training epoch, relative to the other sources' weights.
            None gives every block once an epoch. Has no effect outside training.
        text_key: Key of the text in each JSON row.
    """

    path: str
    weight: float | None = None
    text_key: str = "text"


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
            reason: Why the row is not usable; rows are counted by it.
            where: ``file:line`` of the row.
        """
        self.counts[reason] += 1
        self.first = self.first or where

    @rank_zero_only
    def warn(self) -> None:
        """Logs one warning line with the counts, on rank zero, if there are any."""
        if self.counts:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
            log.warning(
                "left out %d bad rows: %s; first at %s", self.counts.total(), reasons, self.first
            )


def read_documents(source: Source, bad_rows: BadRowsPolicy, report: BadRows) -> Iterator[str]:
    """Yields the documents of a source in a fixed order.

    Args:
        source: What to read.
        bad_rows: "error" raises at the first row that is not usable; "skip" counts it in `report`.
        report: Receives the rows that "skip" leaves out.

    Yields:
        The text of one document, never empty.

    Raises:
        SparsifyError: The path is missing, has no readable text file, cannot be read or decoded,
            or a row is bad and `bad_rows` is "error".
    """

    def bad(file: Path, line: int, reason: str, detail: str = "") -> None:
        where = f"{file}:{line}"
        if bad_rows == "error":
            raise SparsifyError(
                f"{where}: {reason}{detail}; every document must be a text that is not empty: mend "
                "it, or use --data.bad_rows skip, which counts such rows and leaves them out"
            )
        report.add(reason, where)

    for file in _files(source.path):
        try:
            with _open(file) as lines:
                if _kind(file) in TEXT_SUFFIXES:
                    text = lines.read()
                    if text.strip():
                        yield text
                    else:
                        bad(file, 1, "empty text")
                    continue
                blank: int | None = None
                for number, line in enumerate(lines, 1):
                    if blank is not None:
                        bad(file, blank, "blank line")
                        blank = None
                    if not line.strip():
                        blank = number  # judged at the next line: a blank last line is no row
                        continue
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        bad(file, number, "invalid JSON", f" ({error}); each line must be one row")
                        continue
                    if (reason := _why_bad(row, source.text_key)) is not None:
                        bad(file, number, reason)
                    else:
                        yield row[source.text_key]
        except UnicodeDecodeError as error:
            raise SparsifyError(
                f"{file} is not UTF-8 ({error.reason} at byte {error.start} of a chunk); text must "
                "be UTF-8: convert the file"
            ) from error
        except (OSError, EOFError, zlib.error) as error:
            raise SparsifyError(
                f"{file} cannot be read ({error}); every file of a source must be a readable file, "
                "and one named .gz a whole gzip file: mend or remove it"
            ) from error


def source_stem(path: str) -> str:
    """The name of a source's file or folder without the suffixes that this module knows.

    Args:
        path: Path of the source.

    Returns:
        ``corpus`` for ``data/corpus.jsonl.gz``.
    """
    name = Path(path).name or Path(path).absolute().name
    lower = name.lower()
    for suffix in (*TEXT_SUFFIXES, *JSON_SUFFIXES):
        for ending in (suffix + ".gz", suffix):
            if lower.endswith(ending) and len(name) > len(ending):
                return name[: -len(ending)]
    return name


def _kind(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    known = (*TEXT_SUFFIXES, *JSON_SUFFIXES)
    rule = f"the names of text files end in one of {' '.join(known)}, each also with .gz"
    if root.is_dir():
        # posix form: the same order, and so the same data, on every system
        files = sorted(
            (file for file in root.rglob("*") if file.is_file() and _kind(file) in known),
            key=lambda file: file.relative_to(root).as_posix(),
        )
        if not files:
            raise SparsifyError(f"{path} has no text file; {rule}: add one or name another folder")
        return files
    if not root.exists():
        raise SparsifyError(
            f"{path} does not exist; a source must be a file or a folder: correct the path"
        )
    if _kind(root) not in known:
        raise SparsifyError(f"{path} is not a known kind of text; {rule}: rename or convert it")
    return [root]


def _open(file: Path) -> IO[str]:
    # utf-8-sig: as UTF-8, less the byte order mark that some editors put first
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _why_bad(row: object, key: str) -> str | None:
    if not isinstance(row, dict):
        return "row is not an object"
    if key not in row:
        return f"no key {key!r}"
    text = row[key]
    if not isinstance(text, str):
        return f"value of {key!r} is not a string"
    if not text.strip():
        return "empty text"
    try:
        text.encode()  # JSON escapes can spell half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError:
        return "text is not valid Unicode"
    return None
