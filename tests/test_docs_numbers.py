"""Numbers of the documentation are those of the results files that it links.

A section's tables and sentences are held to the files that the same section links. A section
without such a link is not: it describes, or says itself that its figures were not kept. Settings
are set as code, which is not looked at.
"""

import json
import re
import statistics
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LINK = re.compile(r"benchmarks/results/([\w.-]+\d\.json)")
# With a decimal point, and no part of a version; of shares only those that a file holds.
NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*\.\d+(?![\w.])(?! ?%)")
# A share in percent; bytes in KiB, MiB, GiB; millions and billions.
UNITS = (1, 100, 2**-10, 2**-20, 2**-30, 1e-6, 1e-9)


def numbers(node: Any) -> Iterator[float]:
    """All numbers of a file; of rows that differ by seed also mean and standard deviation."""
    if isinstance(node, dict):
        for value in node.values():
            yield from numbers(value)
    elif isinstance(node, list):
        rows = [dict(places(row)) for row in node if isinstance(row, dict)]
        for place in rows[0] if len(rows) > 1 else ():
            found = [row[place] for row in rows if place in row]
            if len(found) > 1:
                yield statistics.mean(found)
                yield statistics.stdev(found)
        for value in node:
            yield from numbers(value)
    elif isinstance(node, int | float):
        yield float(node)


def places(node: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from places(value, (*place, name))
    elif isinstance(node, int | float):
        yield place, float(node)


def in_tables(section: str) -> Iterator[str]:
    """The numbers of a section's tables. The first cell of a row is its name, and columns of what
    a paper found are not ours.
    """
    head: list[str] = []
    for line in section.splitlines():
        cells = line.strip().strip("|").split("|") if line.startswith("|") else []
        head = head if head and cells else cells
        for title, cell in zip(head[1:], cells[1:], strict=True):
            if "paper" not in title:
                yield from NUMBER.findall(cell)


def in_sentences(section: str) -> Iterator[str]:
    """The numbers of a section outside its tables, code, formulas and links."""
    section = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$|\]\([^)]*\)", "", section, flags=re.DOTALL)
    for line in section.splitlines():
        if not line.startswith("|"):
            yield from NUMBER.findall(line)


def changes(section: str) -> Iterator[tuple[float, float]]:
    """(what is said, what it is) of rows that end with a change in percent: that from the cell two
    before it to the cell before it.
    """
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) >= 4 and re.fullmatch(r"[-+][\d.]+ %", cells[-1]):
            before, after = (float(cell.split(" ")[0]) for cell in cells[-3:-1])
            yield float(cells[-1].rstrip(" %")), 100 * (after / before - 1)


def is_known(number: str, sorted_known: list[float]) -> bool:
    """Whether the number is one of these, rounded."""
    digits = len(number.split(".")[1])
    value, half = float(number.replace(",", "")), 0.5001 * 10**-digits
    for unit in UNITS:
        place = bisect_left(sorted_known, (value - half) / unit)
        if place < len(sorted_known) and sorted_known[place] * unit <= value + half:
            return True
    return False


def linked() -> Iterator[tuple[str, str, list[str]]]:
    """(page and heading, section, files) of all sections that link results and have numbers."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for section in re.split(r"^(?=#+ )", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            files = sorted(set(LINK.findall(section)))
            if files and NUMBER.search(section):
                heading = section.split("\n", 1)[0].strip("# ")
                yield f"{page.relative_to(ROOT)}: {heading}", section, files


SECTIONS = list(linked())


@pytest.mark.parametrize(
    ("section", "files"), [row[1:] for row in SECTIONS], ids=[row[0] for row in SECTIONS]
)
def test_numbers_are_of_the_linked_results(section: str, files: list[str]) -> None:
    known = sorted(x for name in files for x in numbers(json.loads((RESULTS / name).read_text())))
    found = [*in_tables(section), *in_sentences(section)]
    unknown = [number for number in found if not is_known(number, known)]
    assert unknown == [], f"not in {', '.join(files)}"
    for said, is_so in changes(section):  # of numbers that are rounded themselves
        assert said == pytest.approx(is_so, abs=0.1)


def test_most_numbers_are_held_to_a_file() -> None:
    assert sum(len(list(in_tables(section))) for _, section, _ in SECTIONS) > 400


def test_a_wrong_number_is_found() -> None:
    known = sorted(numbers({"rows": [{"a": 1.234}, {"a": 1.238}], "bytes": 3 * 2**29}))
    assert all(is_known(number, known) for number in ("1.23", "1.24", "1.236", "1.50"))
    assert not any(is_known(number, known) for number in ("1.25", "1.2361", "1.51"))
