"""An exported folder as an ONNX graph for TensorRT; needs the packages of ``sparsify-llm[onnx]``.

TensorRT runs a product on sparse tensor cores if its weight is a constant that keeps at most 2 of
every 4 values along the axis that is summed over. How a weight comes into the graph is up to the
exporter (it may be transposed, cast or computed there), so the written file is read back, and every
masked layer is looked up in it: docs/tensorrt.md.

Shapes: O out, I in.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsify.common.errors import SparsifyError, first_line
from sparsify.common.replace import partial_folder, put_new
from sparsify.export.manifest import manifest_patterns
from sparsify.export.target import check_writable
from sparsify.masking.linear import Stack, maskable
from sparsify.models.base import load_model
from sparsify.serving.onnx.check import FIX, MODEL, OnnxLayer, check_layers

OnnxDtype = Literal["float16", "bfloat16", "float32"]

SAMPLE = (2, 8)  # sequences and tokens to trace with; more than one, as 1 would be fixed
DATA = ".data"  # what the exporter adds to the graph's name for the file of its weights


@dataclass(frozen=True)
class OnnxReport:
    """What was written and found in it.

    Attributes:
        dtype: the type of the weights.
        opset: the version of ONNX's operators.
        max_tokens: the longest sequence that the model takes; None if its config says nothing.
        layers: the products by masked weights, in the order of the manifest.
    """

    dtype: str
    opset: int
    max_tokens: int | None
    layers: tuple[OnnxLayer, ...]

    def describe(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)


def export_onnx(folder: Path, file: Path, dtype: OnnxDtype = "float16") -> OnnxReport:
    """Write the graph and its weights, ``file`` and ``file.data``; both, checked, or none.

    The graph takes ``input_ids``, int64 ``[batch, tokens]`` with both axes free, and gives
    ``logits``, ``[batch, tokens, vocabulary]``, without a cache of keys and values.

    Args:
        folder: an export of sparsify.
        file: the ``.onnx`` file to write.
        dtype: the type of the weights in the graph.

    Raises:
        SparsifyError: a package is missing, the folder is no export, the place is taken, a weight
            does not fit into the type, the model cannot be traced, or a masked layer is not in the
            graph as TensorRT needs it.
    """
    _require_packages()
    _check_target(file)
    patterns = manifest_patterns(folder)
    model = load_model(str(folder), dtype, "")
    _check_range(model, dtype)
    _check_linear(model, patterns)
    weights = {name: _weight_OI(model.get_submodule(name)) for name in patterns}
    with partial_folder(file) as partial:
        _write(model, partial / file.name)
        graph, opset = _read(partial / file.name)
        layers = check_layers(graph, partial, weights, patterns)
        _move(partial, file)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return OnnxReport(dtype, opset, limit, layers)


def _require_packages() -> None:
    try:
        for name in ("onnx", "onnxscript"):
            import_module(name)
    except ImportError as error:
        raise SparsifyError(
            f"an ONNX graph needs a package that is not installed ({error}): "
            "pip install 'sparsify-llm[onnx]'"
        ) from error


def _data_of(file: Path) -> Path:
    return file.with_name(file.name + DATA)


def _check_target(file: Path) -> None:
    check_writable(file)
    for path in (file, _data_of(file)):
        if path.exists():
            raise SparsifyError(f"{path} exists and stays; remove it, or name another file")


def _check_range(model: PreTrainedModel, dtype: str) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise SparsifyError(
                f"{name} holds values that are not finite as {dtype}; a graph needs numbers: "
                "take bfloat16 or float32"
            )


def _check_linear(model: PreTrainedModel, patterns: Iterable[str]) -> None:
    layers = maskable(model)
    if stack := next((name for name in patterns if isinstance(layers.get(name), Stack)), None):
        raise SparsifyError(
            f"{stack} holds masked experts: which of them a token needs depends on its values, "
            "and a graph holds no such choice; serve the folder itself"
        )


def _weight_OI(linear: nn.Module) -> Tensor:
    weight = cast(Tensor, linear.weight).detach()
    return weight.T if isinstance(linear, Conv1D) else weight


class _Logits(nn.Module):
    """The model as a function of one tensor, with one tensor as its result."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.add_module(MODEL, lm)

    def forward(self, input_ids: Tensor) -> Tensor:
        lm = cast(Any, self.get_submodule(MODEL))
        return cast(Tensor, lm(input_ids=input_ids, use_cache=False).logits)


def _write(model: PreTrainedModel, file: Path) -> None:
    try:
        with _without_torchvision_notes():
            program: Any = torch.onnx.export(
                _Logits(model).eval(),
                (torch.zeros(SAMPLE, dtype=torch.int64),),
                dynamo=True,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": {0: "batch", 1: "tokens"}},
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = first_line(error.__cause__ or error)
        raise SparsifyError(
            f"{type(model).__name__} cannot be traced into an ONNX graph ({reason}); {FIX}"
        ) from error
    # Always beside the graph, which itself can hold no more than 2 GB.
    program.save(file, external_data=True)


@contextmanager
def _without_torchvision_notes() -> Iterator[None]:
    """The exporter notes each operator of torchvision that it will not need."""

    def other(record: logging.LogRecord) -> bool:
        return "torchvision is not installed" not in record.getMessage()

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _read(file: Path) -> tuple[Any, int]:
    """The graph, without its weights, and the version of ONNX's own operators."""
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    [opset] = [used.version for used in model.opset_import if not used.domain]
    return model.graph, opset


def _move(partial: Path, file: Path) -> None:
    """Put both files in their place, the graph last: where it is, its weights are."""
    data = _data_of(file)
    put_new(_data_of(partial / file.name), data)
    try:
        put_new(partial / file.name, file)
    except BaseException:
        data.unlink()
        raise
