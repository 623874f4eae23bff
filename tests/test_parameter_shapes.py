"""Operands that hold one element, or one for each of an axis, whose extent only a run knows: the right extent gives the right
answer, any other is refused by name; known extents that do not fit are refused when compiling."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import luthier
from luthier.errors import LuthierError

RNG = np.random.default_rng(0)
A, B, X = (
    RNG.integers(0, 255, (3, 4)).astype(np.uint8),
    RNG.integers(0, 255, (4, 5)).astype(np.uint8),
    RNG.standard_normal((3, 4)).astype(np.float32),
)
F, U = np.float32, np.uint8
TRAINING = "ai.onnx.preview.training"


def f(*values: float) -> Any:
    return np.array(values, F)


def u(*values: int) -> Any:
    return np.array(values, U)


node = helper.make_node
CASES: dict[str, tuple[Any, dict[str, Any], str, int]] = {
    "clip max": (node("Clip", ["x", "lo", "hi"], ["y"]), {"x": X, "lo": f(-0.5), "hi": f(0.5)}, "hi", 1),
    "clip min": (node("Clip", ["x", "lo"], ["y"]), {"x": X, "lo": f(-0.5)}, "lo", 1),
    "scale along an axis": (
        node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=0),
        {"x": X, "s": f(0.1, 0.2, 0.3), "z": u(1, 2, 3)},
        "s",
        3,
    ),
    "zero point along an axis": (
        node("DequantizeLinear", ["x", "s", "z"], ["y"], axis=1),
        {"x": A, "s": f(0.1, 0.2, 0.3, 0.4), "z": u(1, 2, 3, 4)},
        "z",
        4,
    ),
    "zero points of rows": (
        node("MatMulInteger", ["a", "b", "za", "zb"], ["y"]),
        {"a": A, "b": B, "za": u(3, 4, 5), "zb": u(9)},
        "za",
        3,
    ),
    "zero points of columns": (
        node("MatMulInteger", ["a", "b", "za", "zb"], ["y"]),
        {"a": A, "b": B, "za": u(3), "zb": u(1, 2, 3, 4, 5)},
        "zb",
        5,
    ),
    "scale of a product": (
        node("QLinearMatMul", ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"], ["y"]),
        {"a": A, "sa": f(0.1), "za": u(3), "b": B, "sb": f(0.01), "zb": u(4), "sy": f(2.5), "zy": u(7)},
        "sy",
        1,
    ),
    "zero point of a convolution": (
        node("ConvInteger", ["x", "w", "zx"], ["y"]),
        {"x": RNG.integers(0, 255, (1, 2, 5, 5)).astype(U), "w": RNG.integers(0, 255, (3, 2, 3, 3)).astype(U), "zx": u(7)},
        "zx",
        1,
    ),
    "scale of a convolution": (
        node("QLinearConv", ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy"], ["y"]),
        {
            "x": RNG.integers(0, 255, (1, 2, 5, 5)).astype(U),
            "sx": f(0.1),
            "zx": u(7),
            "w": RNG.integers(0, 255, (3, 2, 3, 3)).astype(U),
            "sw": f(0.1, 0.2, 0.3),
            "zw": u(9, 9, 9),
            "sy": f(9.5),
            "zy": u(100),
        },
        "sx",
        1,
    ),
    "training of a dropout": (
        node("Dropout", ["x", "ratio", "training"], ["y"]),
        {"x": X, "ratio": f(0.5), "training": np.array([False])},
        "training",
        1,
    ),
    "gradient of a tensor": (
        node(
            "Adagrad",
            ["r", "t", "x", "g", "h"],
            ["y", "h2"],
            domain=TRAINING,
            norm_coefficient=0.1,
            decay_factor=0.1,
            epsilon=1e-3,
        ),
        {"r": f(0.1), "t": np.array([2], np.int64), "x": f(1, 2, 3), "g": f(3, 2, 1), "h": f(1, 1, 1)},
        "g",
        3,
    ),
}
# onnx's evaluator subtracts zero points of rows along the columns
WANT = {"zero points of rows": [(A.astype(np.int32) - np.array([[3], [4], [5]])) @ (B.astype(np.int32) - 9)]}


def model(node: Any, feeds: dict[str, Any], name: str, extent: int | str) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), [extent] if k == name else v.shape)
        for k, v in feeds.items()
    ]
    outputs = [helper.make_value_info(o, helper.make_tensor_type_proto(TensorProto.UNDEFINED, None)) for o in node.output]
    for o in outputs:
        o.ClearField("type")
    graph = helper.make_graph([node], "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(TRAINING, 1)], ir_version=10)


@pytest.mark.parametrize("case", CASES)
def test_extent_of_a_parameter(case: str) -> None:
    node, feeds, name, right = CASES[case]
    wrong = right + 1
    longer = {**feeds, name: np.resize(feeds[name], wrong)}
    want = WANT.get(case) or ReferenceEvaluator(model(node, feeds, name, right)).run(None, feeds)
    m = luthier.compile(model(node, feeds, name, "n"), threads=1)
    got = m.run(feeds)
    for o, w in zip(node.output, want, strict=True):
        np.testing.assert_allclose(
            got[o].astype(np.float64), w.astype(np.float64), rtol=1e-5, atol=1e-6 if w.dtype.kind == "f" else 0
        )
    with pytest.raises(LuthierError, match=node.op_type):
        m.run(longer)
    with pytest.raises(LuthierError, match=node.op_type):
        luthier.compile(model(node, feeds, name, wrong), threads=1)


def test_a_node_that_its_standard_definition_does_not_fit() -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])],
        "body",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, ["n"]) for k in "ab"],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, ["n"])],
    )  # fmt: skip
    node = helper.make_node("SequenceMap", ["s"], ["y"], body=body)
    sequence = helper.make_tensor_sequence_value_info
    graph = helper.make_graph([node], "g", [sequence("s", TensorProto.FLOAT, ["n"])], [sequence("y", TensorProto.FLOAT, ["n"])])
    with pytest.raises(LuthierError, match="SequenceMap"):
        luthier.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize(
    ("op", "attributes", "shapes", "name"),
    [
        ("LRN", {"size": 1 << 62}, [(1, 3, 4, 4)], "size"), ("LRN", {"size": 0}, [(1, 3, 4, 4)], "size"),
        ("RoiAlign", {"sampling_ratio": 1 << 20}, [(1, 1, 6, 6), (1, 4), (1,)], "sampling_ratio"),
        ("Split", {"num_outputs": 1 << 40}, [(6, 2)], "num_outputs"), ("Split", {"num_outputs": 0}, [(6, 2)], "num_outputs"),
        ("AveragePool", {"kernel_shape": [1 << 40, 3], "auto_pad": "SAME_UPPER"}, [(1, 3, 4, 4)], "kernel"),
    ],
)  # fmt: skip
def test_a_window_that_no_run_would_end(op: str, attributes: dict[str, Any], shapes: list[tuple[int, ...]], name: str) -> None:
    """An attribute alone says how much work there is; the error names it."""
    types = [TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64]
    inputs = [helper.make_tensor_value_info(f"x{k}", types[k], s) for k, s in enumerate(shapes)]
    node = helper.make_node(op, [i.name for i in inputs], ["y"], **attributes)
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    with pytest.raises(LuthierError, match=f"{name}.*{op}"):
        luthier.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), threads=1)


@pytest.mark.parametrize("op", ["CumSum", "CumProd", "ReduceSum", "ReduceMax", "Squeeze", "Unsqueeze", "Slice", "Pad", "DFT"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("known", ["axis", "axis and data", "nothing"])
def test_an_axis_that_is_an_operand(op: str, shape: tuple[int, ...], known: str) -> None:
    """One behind the last is refused with the operator's name, when compiling where it is known, else by the call (or when
    compiling)."""
    kind = np.float32 if op == "DFT" else np.int64
    rank = len(shape) + (op == "Unsqueeze")
    operands: dict[str, Any] = {"x": np.ones(shape, kind)}
    if op == "Slice":
        operands |= {"starts": np.array([0]), "ends": np.array([1])}
    if op == "Pad":
        operands |= {"pads": np.array([1, 1]), "value": np.array(0)}
    if op == "DFT":
        operands |= {"length": np.array(2)}
    operands |= {"axis": np.array(rank) if op in ("CumSum", "CumProd", "DFT") else np.array([rank])}
    fixed = {k for k in operands if known == "axis and data" or k != "x" and (known == "axis" or k != "axis")}
    feeds = {k: v for k, v in operands.items() if k not in fixed}
    inputs = [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()]
    kept = [numpy_helper.from_array(v, k) for k, v in operands.items() if k in fixed]
    result = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)
    graph = helper.make_graph([node(op, list(operands), ["y"])], "g", inputs, [result], kept)
    with pytest.raises(LuthierError, match=op):
        m = luthier.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)], ir_version=11), threads=1)
        m.run(feeds)


def float_input(name: str, *shape: Any) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def compiled(nodes: list[Any], inputs: list[Any], constants: dict[str, Any] | None = None, opset: int = 20) -> Any:
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    kept = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, [result], kept)
    m = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return luthier.compile(m, threads=1)


@pytest.mark.parametrize("op", ["AveragePool", "MaxPool", "LpPool"])
@pytest.mark.parametrize("pads", [{"auto_pad": "SAME_UPPER"}, {"pads": [1, 1, 1, 1]}, {}], ids=["same", "pads", "none"])
def test_a_window_without_elements(op: str, pads: dict[str, Any]) -> None:
    with pytest.raises(LuthierError, match=f"kernel.*{op}"):
        compiled([node(op, ["x"], ["y"], kernel_shape=[3, 0], **pads)], [float_input("x", 1, 1, 5, 5)])


@pytest.mark.parametrize("attribute", ["scan_input_axes", "scan_output_axes"])
@pytest.mark.parametrize("axis", [2, 1 << 40, -3])
def test_axes_of_a_scan(attribute: str, axis: int) -> None:
    body = helper.make_graph([node("Exp", ["a"], ["b"])], "body", [float_input("a", 3)], [float_input("b", 3)])
    with pytest.raises(LuthierError, match=f"{attribute}.*Scan"):
        compiled([node("Scan", ["x"], ["y"], body=body, num_scan_inputs=1, **{attribute: [axis]})], [float_input("x", 3, 3)])


@pytest.mark.parametrize("shape", [(1, 4, 3), (1, 4, 0), (2, 8, 8)], ids=str)
def test_complex_numbers_have_two_parts(shape: tuple[int, ...]) -> None:
    with pytest.raises(LuthierError, match="real and imaginary.*DFT"):
        compiled([node("DFT", ["x"], ["y"])], [float_input("x", *shape)])
    m = compiled([node("DFT", ["x"], ["y"])], [float_input("x", *shape[:-1], "parts")])
    with pytest.raises(LuthierError, match="DFT"):
        m.run({"x": np.ones(shape, np.float32)})


def test_two_inputs_of_one_name() -> None:
    with pytest.raises(LuthierError, match="one name.*'x'"):
        compiled([node("Exp", ["x"], ["y"])], [float_input("x", 3), float_input("x", 3)])


def test_a_slice_whose_start_is_a_scalar_behind_a_transpose() -> None:
    nodes = [node("Transpose", ["x"], ["t"], perm=[1, 0]), node("Slice", ["t", "from", "to"], ["y"])]
    m = compiled(nodes, [float_input("x", 2, 3)], {"from": np.int64(1), "to": np.array([3])})
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(m.run({"x": x})["y"], x.T[1:3])


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1)], ids=str)
def test_a_scale_of_ones_in_every_dimension(shape: tuple[int, ...]) -> None:
    """One element, however many dimensions it has."""
    parts = {"za": u(3).reshape(shape), "zb": u(9).reshape(shape)}
    graph = helper.make_graph(
        [node("MatMulInteger", ["a", "b", "za", "zb"], ["y"])],
        "g",
        [helper.make_tensor_value_info(k, TensorProto.UINT8, v.shape) for k, v in {"a": A, "b": B, **parts}.items()],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
    )
    m = luthier.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), threads=1)
    got = m.run({"a": A, "b": B, **parts})["y"]
    np.testing.assert_array_equal(got, (A.astype(np.int32) - 3) @ (B.astype(np.int32) - 9))
