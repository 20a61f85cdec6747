"""``sparsify mask show``, which reads a mask file's index without PyTorch."""

from json import dumps
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparsify.cli.commands.output import say
from sparsify.export.mask_file.index import find_file, open_index
from sparsify.models.layer_names import family


def show(file: Path) -> None:
    """Say what a mask file, or the one in an exported folder, holds.

    Args:
        file: the file or folder.
    """
    index, path = open_index(file), find_file(file)
    weights = sum(entry.shape[0] * entry.shape[1] for entry in index.layers.values())
    bits = 8 * path.stat().st_size / max(weights, 1)
    say(f"{path}: {len(index.layers)} layers, {bits:.4f} bits a weight")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("layer")
    for column in ("n", "shape", "pattern", *(["groups changed"] if index.prior else [])):
        table.add_column(column, justify="right")
    rows: dict[tuple[str, str, str], list[float]] = {}
    for name, entry in index.layers.items():
        key = family(name), "{} x {}".format(*entry.shape), str(entry.pattern)
        share = 1.0 if entry.changed is None else entry.changed / entry.groups
        rows.setdefault(key, []).append(share)
    for (layer, shape, pattern), shares in rows.items():
        changed = [f"{min(shares):.2%} to {max(shares):.2%}"] if index.prior else []
        table.add_row(layer, str(len(shares)), shape, pattern, *changed)
    say(table)
    say(f"digest   {index.digest}")
    if index.prior:
        say(f"changes  {index.prior}")
    say(f"base     {index.base_hash or 'not known'}")
    if index.permutation is not None:
        say(f"         permuted from {index.permutation.base_hash}")
    say(f"lineage  {dumps(index.lineage)}")
