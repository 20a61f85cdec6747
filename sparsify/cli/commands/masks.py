"""``sparsify mask``: compare, convert and pack masks."""

from collections.abc import Iterator
from pathlib import Path
from zipfile import is_zipfile

from torch import Tensor

from sparsify.cli.commands.output import Format, check_free, say, say_json, say_written
from sparsify.common.choices import Dtype
from sparsify.common.errors import SparsifyError
from sparsify.export.exchange.apply import (
    apply_masks,
    check_layers,
    find_pattern,
    read_npz,
    read_pt,
    read_zero_pattern,
    stored_shapes,
    write_npz,
)
from sparsify.export.mask_file.file import MaskFile, MaskWriter, read_masks, write_masks
from sparsify.export.mask_file.index import SUFFIX
from sparsify.masking.pattern import NMPattern
from sparsify.models.base import load_skeleton
from sparsify.models.permutation_file import check_same_order, permutation_of
from sparsify.results.mask_diff import DiffMatrix, MaskDiff, diff_matrix
from sparsify.results.mask_diff import diff as diff_of


def import_masks(
    source: Path, out: Path, base: str | None = None, pattern: str | None = None
) -> None:
    """Make a mask file of masks in another form.

    Args:
        source: a ``mask_compressed.npz``; a ``.pt`` file or a folder of them, one a layer; or a
            Hugging Face folder whose zeros are the masks.
        out: the mask file.
        base: the dense model that the masks are of; needed for npz and pt, whose layers have no
            shapes of their own.
        pattern: of a folder's masked layers, as N:M; found from its zeros if it is not given.
    """
    check_free(out)
    lineage = {"imported": source.resolve().name}
    permutation = permutation_of(source) if source.is_dir() else None
    with MaskWriter(out, "", lineage, permutation=permutation, overwrite=False) as file:
        for name, mask, own in _foreign(source, base, pattern):
            file.add(name, mask, own)
    say_written(out)


def _foreign(
    source: Path, base: str | None, pattern: str | None
) -> Iterator[tuple[str, Tensor, NMPattern]]:
    if (source / "config.json").is_file():
        given = None if pattern is None else NMPattern.parse(pattern)
        for layer in read_zero_pattern(source, given):
            if layer.mask is None or layer.pattern is None:
                say(f"{layer.name} is dense")
                continue
            if layer.completed:
                say(
                    f"{layer.name}: {layer.completed} groups hold fewer than {layer.pattern.n} "
                    "nonzero weights; their lowest free positions count as kept"
                )
            yield layer.name, layer.mask, layer.pattern
        return
    if not source.exists():
        raise SparsifyError(f"{source}: there is no such file or folder")
    if pattern is not None:
        raise SparsifyError(
            f"--pattern {pattern}: masks in npz and pt files have patterns of their own; leave it "
            "out"
        )
    if base is None:
        raise SparsifyError(
            f"{source}: files of this kind hold no shapes; give the model that the masks were made "
            "for with --base MODEL"
        )
    shapes = stored_shapes(load_skeleton(base, "--base"))
    read = read_npz if source.suffix.lower() == ".npz" else read_pt
    for name, mask in read(source, shapes):
        try:
            yield name, mask, find_pattern(mask)
        except SparsifyError as error:
            raise SparsifyError(f"{source}: {name}: {error}") from error


def export_masks(
    file: Path,
    out: Path,
    base: str | None = None,
    dtype: Dtype = "float32",
    overwrite: bool = False,
) -> None:
    """Give masks the form that others take.

    Args:
        file: a mask file, or an exported folder.
        out: a ``.npz`` file (``mask_compressed.npz``), or a folder: the base model with its masked
            weights zero, as any library loads it.
        base: the dense model that the masks were made for; for npz only its layers are looked at.
        dtype: the type of the base when its masks were made.
        overwrite: replace an earlier export.
    """
    if base is None:
        raise SparsifyError(
            f"{out}: give the dense model that the masks were made for with --base MODEL"
        )
    masks = read_masks(file)
    kind = out.suffix.lower()
    if kind == ".npz":
        if masks.permutation is not None:
            raise SparsifyError(
                f"{masks.path}: its masks are for permuted channels, and npz files cannot say so; "
                "export them to a folder, whose weights are in the same order"
            )
        # What is no archive was not written by an earlier export.
        if not overwrite or (out.exists() and not is_zipfile(out)):
            check_free(out)
        known = stored_shapes(load_skeleton(base, "--base"))
        shapes = {name: entry.shape for name, entry in masks.index.layers.items()}
        check_layers(str(masks.path), shapes, known)
        write_npz(out, masks, known, overwrite)
    elif kind in (".pt", ".bin", ".safetensors", SUFFIX):
        raise SparsifyError(f"{out}: masks are exported to a .npz file or a folder; name one")
    else:
        apply_masks(
            base,
            masks,
            masks.patterns,
            out,
            base_hash=masks.base_hash,
            permutation=masks.permutation,
            source=file.resolve().name,
            dtype=dtype,
            overwrite=overwrite,
        )
    say_written(out)


def diff(
    a: Path,
    b: Path,
    more: list[Path] | None = None,
    plot: Path | None = None,
    format: Format = "table",
) -> None:
    """Compare masks: two of them by block and kind of layer, more of them each with each.

    Args:
        a: a mask file or exported folder.
        b: another.
        more: others, as '[C, D]'.
        plot: draw it into this PNG file.
        format: table or json.
    """
    files = [a, b, *(more or [])]
    masks = [read_masks(file) for file in files]
    for file, one in zip(files[1:], masks[1:], strict=True):
        check_same_order(masks[0].permutation, one.permutation, str(a), str(file))
    found: MaskDiff | DiffMatrix
    if more:
        found = diff_matrix(dict(zip(_file_names(files), masks, strict=True)))
    else:
        found = diff_of(masks[0], masks[1], masks[0].patterns)
    if format == "json":
        say_json(found.to_dict())
    else:
        say(found.table())
    if plot is not None:
        try:
            found.plot(plot)
        except ImportError as error:
            raise SparsifyError(
                f"--plot needs a package that is not installed ({error}): "
                "pip install 'sparsify-llm[plot]'"
            ) from error
        except ValueError as error:
            raise SparsifyError(f"--plot {plot}: {error}") from error
        say_written(plot)


def _file_names(files: list[Path]) -> list[str]:
    """The last parts of the paths that tell all of them apart."""
    parts = [file.resolve().parts for file in files]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise SparsifyError("a mask file is named twice; give different ones")


def delta(prior: Path, file: Path, out: Path) -> None:
    """Write masks as changes to those of another file.

    Args:
        prior: the masks that a reader of the delta file will have.
        file: the masks to write.
        out: the delta file.
    """
    _copy(read_masks(file), out, read_masks(prior))


def join(prior: Path, delta: Path, out: Path) -> None:
    """Write the masks that a delta file stands for as a file of its own.

    Args:
        prior: the masks that it was made against.
        delta: the delta file.
        out: the file.
    """
    _copy(read_masks(delta, read_masks(prior)), out, None)


def _copy(masks: MaskFile, out: Path, prior: MaskFile | None) -> None:
    check_free(out)
    lineage, order = masks.index.lineage, masks.permutation
    write_masks(out, masks, masks.patterns, masks.base_hash, lineage, prior, order, overwrite=False)
    say_written(out)
