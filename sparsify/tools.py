"""The commands on what was exported: folders and mask files.

They need no Trainer, so they are plain functions, whose docstrings are their help.
"""

import os
import sys
from collections.abc import Iterator
from json import dumps
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsify.base import EMBEDDED, Dtype, load_skeleton
from sparsify.calibration import Calibration
from sparsify.distillation import Distillation
from sparsify.errors import SparsifyError
from sparsify.masks.diff import MaskDiff
from sparsify.masks.diff import diff as diff_of
from sparsify.masks.diff_matrix import DiffMatrix, diff_matrix
from sparsify.masks.file import (
    SUFFIX,
    MaskFile,
    MaskWriter,
    find_file,
    open_index,
    read_masks,
    write_masks,
)
from sparsify.masks.interop import (
    apply_masks,
    check_layers,
    find_pattern,
    read_npz,
    read_pt,
    read_zero_pattern,
    stored_shapes,
    write_npz,
)
from sparsify.names import family
from sparsify.onnx_export import export_onnx
from sparsify.pattern import NMPattern
from sparsify.plan import PlanSettings, make_plan, to_dict, to_table
from sparsify.plan.settings import Device, Precision
from sparsify.registry import STRATEGIES, plugins
from sparsify.verify import verify as check_folder

Format = Literal["table", "json"]


def show(file: Path) -> None:
    """Say what a mask file, or the one in an exported folder, holds.

    Args:
        file: the file or folder.
    """
    index, path = open_index(file), find_file(file)
    weights = sum(entry.shape[0] * entry.shape[1] for entry in index.layers.values())
    bits = 8 * path.stat().st_size / max(weights, 1)
    _print(f"{path}: {len(index.layers)} layers, {bits:.4f} bits a weight")
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
    _print(table)
    _print(f"digest   {index.digest}")
    if index.prior:
        _print(f"changes  {index.prior}")
    _print(f"base     {index.base_hash or 'not known'}")
    _print(f"lineage  {dumps(index.lineage)}")


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
    _check_free(out)
    lineage = {"imported": source.resolve().name}
    with MaskWriter(out, "", lineage) as file:
        for name, mask, own in _foreign(source, base, pattern):
            file.add(name, mask, own)
    _wrote(out)


def _foreign(
    source: Path, base: str | None, pattern: str | None
) -> Iterator[tuple[str, Tensor, NMPattern]]:
    if (source / "config.json").is_file():
        given = None if pattern is None else NMPattern.parse(pattern)
        for layer in read_zero_pattern(source, given):
            if layer.mask is None or layer.pattern is None:
                _print(f"{layer.name} is dense")
                continue
            if layer.completed:
                _print(
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
    shapes = stored_shapes(load_skeleton(base))
    read = read_npz if source.suffix == ".npz" else read_pt
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
    if out.suffix == ".npz":
        if not overwrite:
            _check_free(out)
        known = stored_shapes(load_skeleton(base))
        shapes = {name: entry.shape for name, entry in masks.index.layers.items()}
        check_layers(str(masks.path), shapes, known)
        write_npz(out, masks, {name for name, shape in known.items() if shape.transposed})
    elif out.suffix in (".pt", ".bin", ".safetensors", SUFFIX):
        raise SparsifyError(f"{out}: masks are exported to a .npz file or a folder; name one")
    else:
        apply_masks(
            base,
            masks,
            masks.patterns,
            out,
            base_hash=masks.base_hash,
            source=file.resolve().name,
            dtype=dtype,
            overwrite=overwrite,
        )
    _wrote(out)


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
    found: MaskDiff | DiffMatrix
    if more:
        found = diff_matrix(dict(zip(_names(files), masks, strict=True)))
    else:
        found = diff_of(masks[0], masks[1], masks[0].patterns)
    if format == "json":
        _print_json(found.to_dict())
    else:
        _print(found.table())
    if plot is not None:
        try:
            found.plot(plot)
        except ImportError as error:
            raise SparsifyError(
                f"--plot needs a package that is not installed ({error}): "
                "pip install 'sparsify[plot]'"
            ) from error
        except ValueError as error:
            raise SparsifyError(f"--plot {plot}: {error}") from error
        _wrote(plot)


def _names(files: list[Path]) -> list[str]:
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
    _check_free(out)
    write_masks(out, masks, masks.patterns, masks.base_hash, masks.index.lineage, prior)
    _wrote(out)


def _check_free(out: Path) -> None:
    if out.exists():
        raise SparsifyError(f"{out} exists, and stays; name another file")


def _wrote(out: Path) -> None:
    size = f" ({out.stat().st_size:,} bytes)" if out.is_file() else ""
    _print(f"wrote {out}{size}")


def _print_json(content: Any) -> None:
    print(dumps(content, indent=2))


def _print(content: Any) -> None:
    # Text as it is: paths are not to be wrapped, nor brackets read as markup.
    Console().print(content, soft_wrap=isinstance(content, str), markup=False, highlight=False)


def verify(
    folder: Path,
    base: str | None = None,
    pattern: str | None = None,
    device: str = "cpu",
    format: Format = "table",
) -> int:
    """Check that a folder of sparse weights is what it says; exit status 1 if it is not.

    Args:
        folder: what sparsify export wrote, or any folder of safetensors files.
        base: the dense model, to compare kept weights and dense tensors with bit by bit.
        pattern: what every masked layer must hold, as N:M; needed where there is no manifest.
        device: cuda runs every layer's sparse product too, and times it.
        format: table or json.
    """
    report = check_folder(folder, base, pattern, device)
    if format == "json":
        _print_json(report.to_dict())
    else:
        _print(report.table())
    return 0 if report.ok else 1


def onnx(
    folder: Path,
    file: Path,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    format: Format = "table",
) -> None:
    """Write an exported folder as an ONNX graph in which TensorRT finds its zeros.

    Args:
        folder: what sparsify export wrote.
        file: the graph; its weights lie beside it, in FILE.data.
        dtype: of the weights.
        format: table or json: what was found in the graph.
    """
    report = export_onnx(folder, file, dtype)
    if format == "json":
        _print_json(report.describe())
        return
    ready = sum(layer.two_four for layer in report.layers)
    _print(
        f"{len(report.layers)} products by masked weights, each equal to the folder's to the bit; "
        f"{ready} are 2:4 along the axis that is summed over"
    )
    _wrote(file)


def plan(
    strategy: str | None = None,
    model: str = EMBEDDED,
    pattern: str = "2:4",
    dtype: Dtype = "float32",
    precision: Precision = "32-true",
    devices: int = 1,
    shard: bool = False,
    batch_size: int = 8,
    block_size: int = 256,
    gradient_checkpointing: bool = False,
    calibration: Calibration = Calibration(),
    distillation: Distillation = Distillation(),
    device: Device = "cpu",
    strategy_args: dict[str, Any] | None = None,
    memory: float | None = None,
    format: Format = "table",
) -> int:
    """Predict the peak memory of sparsify fit, by part, without loading the model; exit status 1
    if nothing fits.

    Args:
        strategy: a short name or import path.
        model: embedded, a local folder, a Hugging Face id, or a GGUF file.
        pattern: N:M.
        dtype: of the base weights.
        precision: of the matrix products.
        devices: how many.
        shard: divide what is held among them, instead of a copy on each.
        batch_size: windows of a micro-batch on each.
        block_size: tokens of a window.
        gradient_checkpointing: recompute each block in backward.
        calibration: how much text calibration reads.
        distillation: whether to learn from the dense model too.
        device: where it runs.
        strategy_args: the strategy's own settings, as JSON.
        memory: GiB of a device; if the settings do not fit, others are tried.
        format: table or json.
    """
    if strategy is None:
        names = ", ".join(plugins(STRATEGIES))
        raise SparsifyError(f"sparsify plan needs --strategy NAME; there are {names}")
    settings = PlanSettings(
        strategy,
        model,
        pattern,
        dtype,
        precision,
        devices,
        shard,
        batch_size,
        block_size,
        gradient_checkpointing,
        calibration,
        distillation,
        device,
        strategy_args or {},
    )
    found = make_plan(settings, None if memory is None else int(memory * 2**30))
    if format == "json":
        _print_json(to_dict(found))
    else:
        _print(to_table(found))
    return 0 if found.fits else 1


COMMANDS: Any = {
    "verify": verify,
    "plan": plan,
    "onnx": onnx,
    "mask": {
        "_help": "Show, compare, convert and pack masks.",
        "show": show,
        "import": import_masks,
        "export": export_masks,
        "diff": diff,
        "delta": delta,
        "join": join,
    },
}
ABOUT = {
    "verify": "Check that an exported folder is what it says.",
    "plan": "Predict the memory of a run, and find settings that fit.",
    "onnx": "Write an exported folder as an ONNX graph for TensorRT.",
    "mask": "Show, compare, convert and pack masks.",
}


FLAGS = ("--shard", "--gradient_checkpointing", "--overwrite")


def run(words: list[str]) -> int:
    """Run one of the commands: its exit status."""
    # Flags as those of fit: what says nothing says true.
    following = [*words[1:], "--"]
    words = [
        f"{word}=true" if word in FLAGS and after.startswith("--") else word
        for word, after in zip(words, following, strict=True)
    ]
    try:
        return auto_cli(COMMANDS, args=words, prog="sparsify", as_positional=True) or 0
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        raise SparsifyError(f"{error.filename or 'a file'}: {error.strerror}") from error
