"""Writes the tables of settings and of results into the pages of the strategies::

    python docs/fill_pages.py

A table stands between ``<!-- settings: maskllm -->`` or ``<!-- result: maskllm -->`` and
``<!-- end -->``. Run this after a change of a strategy's settings, and after a new results file.
"""

import re
from pathlib import Path

from fill_results import result_tables
from fill_settings import settings_table

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- (settings|result): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with all of its tables made anew."""

    def table(place: re.Match[str]) -> str:
        start, kind, name, end = place.groups()
        tables = [settings_table(name)] if kind == "settings" else result_tables(name, RESULTS)
        return f"{start}\n" + "\n".join(tables) + f"\n{end}"

    return PLACE.sub(table, page)


def main() -> None:
    for path in sorted((DOCS / "strategies").glob("*.md")):
        page = path.read_text(encoding="utf-8")
        path.write_text(filled(page), encoding="utf-8")


if __name__ == "__main__":
    main()
