"""Commands on exported folders: ``sparsify verify``, ``sparsify merge`` and ``sparsify onnx``."""

from pathlib import Path
from typing import Literal

from sparsify.cli.commands.output import Format, say, say_json, say_written
from sparsify.common.errors import SparsifyError


def verify_folder(
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
    from sparsify.serving.verify import verify

    report = verify(folder, base, pattern, device)
    if format == "json":
        say_json(report.to_dict())
    else:
        say(report.table())
    return 0 if report.ok else 1


def merge_adapter(
    folder: Path,
    adapter: Path,
    output: Path | None = None,
    base: str | None = None,
    overwrite: bool = False,
    format: Format = "table",
) -> None:
    """Merge a LoRA adapter into an exported folder under its masks, so that its zeros stay zeros.

    Args:
        folder: what sparsify export wrote, on which the adapter was trained.
        adapter: the folder that PEFT saved.
        output: the folder to write.
        base: the name by which the adapter knows the folder, where that is another one.
        overwrite: replace an earlier export.
        format: table or json: how much of the adapter the masks took away.
    """
    if output is None:
        raise SparsifyError("name the folder to write with --output FOLDER")
    from sparsify.serving.merge import merge

    merged = merge(folder, adapter, output, base, overwrite)
    if format == "json":
        say_json(merged.describe())
        return
    say(merged.table())
    say_written(output)


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
    from sparsify.serving.onnx.write import export_onnx

    report = export_onnx(folder, file, dtype)
    if format == "json":
        say_json(report.describe())
        return
    ready = sum(layer.two_four for layer in report.layers)
    say(
        f"{len(report.layers)} products by masked weights, each equal to the folder's to the bit; "
        f"{ready} are 2:4 along the axis that is summed over"
    )
    say_written(file)
