"""Looks every masked layer up in an ONNX graph, and holds it to what TensorRT needs; see
:mod:`sparsify.serving.onnx.write`.

Shapes: O out, I in.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.common.bits import bits
from sparsify.common.errors import SparsifyError
from sparsify.masking.pattern import TWO_FOUR, NMPattern

SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes the modules that a node came from
MODEL = "lm"  # the name under which it knows the whole model
FIX = "nothing was written; docs/tensorrt.md names the versions of the exporter that work"


@dataclass(frozen=True)
class OnnxLayer:
    """One product by a masked weight.

    Attributes:
        name: the layer, as in the manifest.
        node: the product in the graph.
        op: ``MatMul`` or ``Gemm``.
        weight: the constant in the graph.
        shape: of the constant: (I, O), or (O, I) for a ``Gemm`` that transposes it.
        axis: of the constant: the one that is summed over, along which the pattern runs.
        pattern: the layer's N:M.
        nonzero: the share of its values that are not zero.
        two_four: whether it is what TensorRT looks for: at most 2 of every 4 are not zero.
    """

    name: str
    node: str
    op: str
    weight: str
    shape: tuple[int, int]
    axis: int
    pattern: str
    nonzero: float
    two_four: bool


def check_layers(
    graph: Any, folder: Path, weights: Mapping[str, Tensor], patterns: Mapping[str, NMPattern]
) -> tuple[OnnxLayer, ...]:
    """Find the products by masked weights in a graph, and hold them to what TensorRT needs.

    Args:
        graph: an ONNX ``GraphProto``.
        folder: where the files of its weights lie.
        weights: by layer, the values that must be found, ``[O, I]``.
        patterns: by layer, its N:M.

    Raises:
        SparsifyError: a layer has no product, its weight is no constant, or its values, type or
            pattern are not the layer's.
    """
    products = _products(graph, weights)
    found = []
    for name, weight_OI in weights.items():
        if not products[name]:
            raise SparsifyError(f"{name}: no MatMul or Gemm of the graph is this layer's; {FIX}")
        for product in products[name]:
            values = _values(_constant(name, product, graph), folder)
            axis = _summed_axis(product)
            values_OI = values if axis == 1 else values.mT
            _check_values(name, values_OI, weight_OI, patterns[name])
            rows, columns = values.shape
            found.append(
                OnnxLayer(
                    name=name,
                    node=product.name,
                    op=product.op_type,
                    weight=product.input[1],
                    shape=(rows, columns),
                    axis=axis,
                    pattern=str(patterns[name]),
                    nonzero=float((values != 0).double().mean()),
                    two_four=values_OI.shape[1] % 4 == 0 and TWO_FOUR.holds(values_OI),
                )
            )
    return tuple(found)


def _products(graph: Any, names: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The products that came from each layer; more than one if the model calls it again."""
    by_scope = {f"{MODEL}.{name}": name for name in names}
    found: dict[str, list[Any]] = {name: [] for name in names}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        scopes = [entry.value for entry in node.metadata_props if entry.key == SCOPES]
        for scope in ast.literal_eval(scopes[0]) if scopes else ():
            if scope in by_scope:
                found[by_scope[scope]].append(node)
    return found


def _summed_axis(product: Any) -> int:
    """The axis of the second operand along which the product sums."""
    return int(any(a.name == "transB" and a.i for a in product.attribute))


def _constant(name: str, product: Any, graph: Any) -> Any:
    """The constant that a product takes straight as its second operand."""
    source = product.input[1]
    for constant in graph.initializer:
        if constant.name == source:
            return constant
    makers = [f"{node.op_type} node" for node in graph.node if source in node.output]
    raise SparsifyError(
        f"{name}: its {product.op_type} takes the weight from the {(makers or ['input'])[0]} "
        f"{source!r}, and TensorRT sees the zeros of constants alone; {FIX}"
    )


def _values(constant: Any, folder: Path) -> Tensor:
    """A constant's values, bit by bit; they are read for this call alone."""
    from onnx import TensorProto, numpy_helper

    copy = TensorProto()
    copy.CopyFrom(constant)
    array = numpy_helper.to_array(copy, str(folder))
    bits = torch.from_numpy(array.view(f"i{array.itemsize}").copy())
    return bits.view(getattr(torch, array.dtype.name))


def _check_values(name: str, found_OI: Tensor, weight_OI: Tensor, pattern: NMPattern) -> None:
    what, wanted = ((v.dtype, tuple(v.shape)) for v in (found_OI, weight_OI))
    if what != wanted:
        raise SparsifyError(
            f"{name}: the graph holds {what[0]} {what[1]} as (out, in), and the folder {wanted[0]} "
            f"{wanted[1]}; {FIX}"
        )
    wrong = (bits(found_OI) != bits(weight_OI)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise SparsifyError(
            f"{name}: {len(wrong)} of the graph's values are not the folder's, the first at row "
            f"{row}, column {column}: {float(found_OI[row, column])} for "
            f"{float(weight_OI[row, column])}; {FIX}"
        )
    if not pattern.holds(found_OI):
        raise SparsifyError(
            f"{name}: more than {pattern.n} of {pattern.m} values are nonzero, in the folder too; "
            "export it again"
        )
