"""``sparsify cache``: the results of calibration that are kept for later runs."""

import time
from datetime import datetime

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparsify.calibration.cache import Entry, cache_limit, entries
from sparsify.cli.commands.output import Format, say, say_json
from sparsify.common.errors import SparsifyError
from sparsify.common.files import cache_folder


def show_cache(format: Format = "table") -> None:
    """List what the cache holds, what was used longest ago first.

    Args:
        format: table or json.
    """
    found = _entries()
    size = sum(entry.size for entry in found)
    if format == "json":
        content = {"folder": str(cache_folder()), "bytes": size, "limit": cache_limit()}
        say_json(content | {"entries": [_describe(entry) for entry in found]})
        return
    say(f"{cache_folder()}: {len(found)} results, {_gib(size)} of {_gib(cache_limit())}")
    if not found:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("last used", "strategy", "model"):
        table.add_column(column)
    for column in ("samples", "seconds", "MiB", ""):
        table.add_column(column, justify="right")
    for entry in found:
        told = _describe(entry)
        cells = [told["used"], *(told[key] for key in ("strategy", "model", "samples"))]
        seconds = "?" if told["seconds"] is None else f"{told['seconds']:.1f}"
        cells += [seconds, f"{entry.size / 2**20:.1f}", "a part" if entry.partial else ""]
        table.add_row(*("?" if cell is None else str(cell) for cell in cells))
    say(table)


def _entries() -> list[Entry]:
    root = cache_folder()
    if root.exists() and not root.is_dir():
        raise SparsifyError(
            f"{root} is no folder, so that nothing is kept in it; name a folder in SPARSIFY_CACHE, "
            "or unset it"
        )
    return entries()


def clear_cache(older_than: float | None = None, partial: bool = False) -> None:
    """Remove results from the cache; what a run writes at this time stays.

    Args:
        older_than: days; only what was not used since.
        partial: only what runs that were stopped left.

    Raises:
        SparsifyError: the number of days is negative, or the cache is no folder.
    """
    if older_than is not None and not older_than >= 0:
        raise SparsifyError(f"--older_than {older_than}: it is a number of days, 0 or more")
    before = time.time() - 86400 * (older_than or 0)
    chosen = [e for e in _entries() if (e.partial or not partial) and e.used <= before]
    removed = [entry for entry in chosen if entry.remove()]
    size = sum(entry.size for entry in removed)
    say(f"removed {len(removed)} results, {_gib(size)}, from {cache_folder()}")
    if len(removed) < len(chosen):
        say(f"{len(chosen) - len(removed)} stay: a run writes them, or they cannot be removed")


def _describe(entry: Entry) -> dict[str, object]:
    known = {key: entry.about.get(key) for key in ("strategy", "model", "samples", "seconds")}
    used = datetime.fromtimestamp(entry.used).isoformat(" ", "minutes")
    return {"used": used, "bytes": entry.size, "partial": entry.partial, **known}


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
