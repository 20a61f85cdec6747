"""The check of an ONNX graph, on graphs of one product.

Shapes: B batch, O out, I in.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from sparsify import NMPattern, SparsifyError
from sparsify.serving.onnx.check import MODEL, SCOPES, OnnxLayer, check_layers

NAME = "block.0.proj"
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
NOWHERE = Path("nowhere")  # these graphs hold their weights themselves


def sparse(pattern: str = "2:4", shape: tuple[int, int] = (8, 8), seed: int = 0) -> Tensor:
    """A weight without zeros but those that the pattern drops, ``[O, I]``."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.rand(shape, generator=generator) + 0.5
    kept_OI = NMPattern.parse(pattern).top(torch.rand(shape, generator=generator))
    return torch.where(kept_OI, weight_OI, 0.0)


def product(weight: str, op: str = "MatMul", layer: str = NAME, **attributes: Any) -> NodeProto:
    node = helper.make_node(op, ["x", weight], ["y"], name="product", **attributes)
    entry = node.metadata_props.add()
    entry.key, entry.value = SCOPES, repr(["", MODEL, f"{MODEL}.{layer}", "linear"])
    return node


def graph(constant: Any, *nodes: NodeProto) -> GraphProto:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "w")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    values = numpy_helper.from_array(np.ascontiguousarray(constant), "constant")
    return helper.make_graph(nodes, "graph", inputs, [output], initializer=[values])


def check(some: GraphProto, weight_OI: Tensor, pattern: str = "2:4") -> tuple[OnnxLayer, ...]:
    return check_layers(some, NOWHERE, {NAME: weight_OI}, {NAME: NMPattern.parse(pattern)})


@pytest.mark.parametrize(
    ("op", "attributes", "axis"),
    [("MatMul", {}, 0), ("Gemm", {}, 0), ("Gemm", {"transB": 0}, 0), ("Gemm", {"transB": 1}, 1)],
)
def test_the_axis_is_the_one_that_the_product_sums_over(
    op: str, attributes: dict[str, int], axis: int
) -> None:
    weight_OI = sparse(shape=(12, 8))
    constant = weight_OI if axis == 1 else weight_OI.T
    [found] = check(graph(constant, product("constant", op, **attributes)), weight_OI)
    assert found == OnnxLayer(
        NAME, "product", op, "constant", tuple(constant.shape), axis, "2:4", 0.5, True
    )
    # A square one the other way round has the same shape.
    weight_OI = sparse()
    turned = weight_OI.T if axis == 1 else weight_OI
    with pytest.raises(SparsifyError, match="are not the folder's"):
        check(graph(turned, product("constant", op, **attributes)), weight_OI)


@pytest.mark.parametrize(
    ("pattern", "shape", "two_four"),
    [
        ("1:4", (4, 8), True),
        ("1:2", (4, 8), True),
        ("1:2", (4, 6), False),  # the last group of four is not whole
        ("2:8", (64, 8), True),
        ("4:8", (64, 8), False),
    ],
)
def test_what_tensorrt_takes_for_sparse(
    pattern: str, shape: tuple[int, int], two_four: bool
) -> None:
    weight_OI = sparse(pattern, shape)
    [found] = check(graph(weight_OI.T, product("constant")), weight_OI, pattern)
    assert found.two_four == two_four
    assert found.nonzero == NMPattern.parse(pattern).density


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    dtype=st.sampled_from(list(TYPES)),
    data=st.data(),
)
def test_any_value_that_is_another_is_found(
    seed: int, rows: int, groups: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    weight_OI = sparse("2:4", (rows, 4 * groups), seed).to(dtype)
    wrong_OI = weight_OI.clone()
    row = data.draw(st.integers(0, rows - 1))
    column = data.draw(st.integers(0, 4 * groups - 1))
    wrong_OI[row, column] += 1.0

    def of_type(values_OI: Tensor) -> GraphProto:
        values_IO = values_OI.T.contiguous()
        raw = values_IO.flatten().view(torch.uint8).numpy().tobytes()
        some = graph(np.zeros(1), product("constant"))
        some.initializer[0].CopyFrom(
            helper.make_tensor("constant", TYPES[dtype], values_IO.shape, raw, raw=True)
        )
        return some

    [found] = check(of_type(weight_OI), weight_OI)
    assert found.nonzero == 0.5
    with pytest.raises(SparsifyError, match=f"1 of .* first at row {row}, column {column}: "):
        check(of_type(wrong_OI), weight_OI)


def test_a_nonzero_in_a_dropped_place_is_refused() -> None:
    weight_OI = sparse()
    row, column = (weight_OI == 0).nonzero()[5].tolist()
    wrong_OI = weight_OI.clone()
    wrong_OI[row, column] = 0.25
    message = (
        rf"^{NAME}: 1 of the graph's values are not the folder's, the first at row {row}, column "
        rf"{column}: 0.25 for 0.0; nothing was written; docs/tensorrt.md names the versions"
    )
    with pytest.raises(SparsifyError, match=message):
        check(graph(wrong_OI.T, product("constant")), weight_OI)
    # If the folder holds it too, the pattern is broken there.
    with pytest.raises(SparsifyError, match=f"^{NAME}: more than 2 of 4 .* in the folder too"):
        check(graph(wrong_OI.T, product("constant")), wrong_OI)


def test_a_negative_zero_is_refused() -> None:
    weight_OI = sparse()
    wrong_OI = torch.where(weight_OI == 0, -0.0, weight_OI)
    with pytest.raises(SparsifyError, match=r"32 of the graph's values .*: -0.0 for 0.0"):
        check(graph(wrong_OI.T, product("constant")), weight_OI)


def test_another_type_or_shape_is_refused() -> None:
    weight_OI = sparse(shape=(4, 8))
    message = r"holds torch.float16 \(4, 8\) as \(out, in\), and the folder torch.float32 \(4, 8\)"
    with pytest.raises(SparsifyError, match=message):
        check(graph(weight_OI.T.half(), product("constant")), weight_OI)
    with pytest.raises(SparsifyError, match=r"holds torch.float32 \(8, 4\)"):
        check(graph(weight_OI, product("constant")), weight_OI)


@pytest.mark.parametrize("op", ["Transpose", "Cast", "DequantizeLinear"])
def test_a_weight_that_the_graph_computes_is_refused(op: str) -> None:
    weight_OI = sparse()
    between = helper.make_node(op, ["constant"], ["w_2"])
    with pytest.raises(SparsifyError, match=f"takes the weight from the {op} node 'w_2'"):
        check(graph(weight_OI, between, product("w_2")), weight_OI)


def test_a_weight_that_is_an_input_is_refused() -> None:
    with pytest.raises(SparsifyError, match="MatMul takes the weight from the input 'w'"):
        check(graph(sparse().T, product("w")), sparse())


def test_a_layer_that_is_not_there_is_refused() -> None:
    add = product("constant", "Add")
    unnamed = helper.make_node("MatMul", ["x", "constant"], ["y"])
    other = product("constant", layer=f"{NAME}.lora")
    for node in (add, unnamed, other):
        with pytest.raises(SparsifyError, match=f"^{NAME}: no MatMul or Gemm of the graph"):
            check(graph(sparse().T, node), sparse())


def test_every_product_of_a_layer_that_is_called_twice_is_checked() -> None:
    weight_OI = sparse()
    first, second = product("constant"), product("constant")
    second.name = "again"
    found = check(graph(weight_OI.T, first, second), weight_OI)
    assert [layer.node for layer in found] == ["product", "again"]
    with pytest.raises(SparsifyError, match="takes the weight from the input 'w'"):
        check(graph(weight_OI.T, first, product("w")), weight_OI)
