"""Models that break the operators' declarations, or ONNX's: each is refused with its node and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper
from onnx import helper as h

import luthier
from luthier.errors import InvalidModel, LuthierError, ShapeError, TypeMismatch
from luthier.importers.onnx.importer import import_onnx
from luthier.ir.op import REGISTRY, lookup

lookup("")
OPSET = onnx.defs.onnx_opset_version()
Required = onnx.defs.OpSchema.FormalParameterOption.Single
SCHEMAS = sorted((s for s in onnx.defs.get_all_schemas() if s.domain == "" and s.name in REGISTRY and not s.deprecated and s.name != "Constant"), key=lambda s: s.name)
VALUES: dict[int, Any] = {
    AttributeProto.INT: 1, AttributeProto.FLOAT: 1.5, AttributeProto.STRING: "text", AttributeProto.INTS: [1, 1], AttributeProto.FLOATS: [1.5], AttributeProto.STRINGS: ["text"],
    AttributeProto.TENSOR: h.make_tensor("t", TensorProto.FLOAT, [1], [1.0]), AttributeProto.GRAPH: h.make_graph([], "g", [], []),
}  # fmt: skip


def refusal(node: NodeProto, dtype: int = TensorProto.FLOAT, other: int | None = None) -> LuthierError:
    """What a model of this node alone is refused with; input 0 is of type ``dtype``, all others of ``other``."""
    ins = [h.make_tensor_value_info(n, other if k and other else dtype, [2, 2]) for k, n in enumerate(dict.fromkeys(n for n in node.input if n))]
    graph = h.make_graph([node], "one", ins, [h.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in node.output if o][:1])
    with pytest.raises(LuthierError) as e:
        import_onnx(h.make_model(graph, opset_imports=[h.make_opsetid("", OPSET), h.make_opsetid("com.microsoft", 1)]))
    assert e.value.node == "broken" and e.value.op is not None and e.value.op.endswith(node.op_type), str(e.value)
    return e.value


def node(s: Any, inputs: int | None = None, **attributes: Any) -> NodeProto:
    n = h.make_node(s.name, [f"i{k}" for k in range(s.min_input if inputs is None else inputs)], ["o"], name="broken")
    for name, value in attributes.items():
        n.attribute.append(h.make_attribute(name, value))
    return n


def required(s: Any) -> dict[str, Any]:
    return {k: VALUES[int(a.type.value)] for k, a in s.attributes.items() if a.required}


@pytest.mark.parametrize("s", SCHEMAS, ids=lambda s: s.name)
def test_every_operator(s: Any) -> None:
    given = required(s)
    for name in given:
        error = refusal(node(s, **{k: v for k, v in given.items() if k != name}))
        assert isinstance(error, InvalidModel) and f"attribute {name!r} is missing" in error.message
    for name, a in s.attributes.items():
        wrong = [k for k in VALUES if k != int(a.type.value)]
        kind = wrong[len(name) % len(wrong)]
        error = refusal(node(s, **{**given, name: VALUES[kind]}))
        assert isinstance(error, InvalidModel) and f"attribute {name!r} is of the kind {AttributeProto.AttributeType.Name(kind)}" in error.message
    if s.min_input and s.name != "Loop":  # whose trailing inputs may be blank
        error = refusal(node(s, s.min_input - 1, **given))
        assert f"it has {s.min_input - 1} inputs" in error.message
        if s.inputs[0].option == Required:
            n = node(s, **given)
            if len(n.input) > 1:
                n.input[0] = ""
                assert "is missing" in refusal(n).message
    if s.max_input < 100:
        assert f"it has {s.max_input + 1} inputs" in refusal(node(s, s.max_input + 1, **given)).message
    n = node(s, **given)
    n.output[:] = ["", ""]
    assert "none of its outputs has a name" in refusal(n).message
    shared = [i.type_str for i in s.inputs[:2]]
    if s.min_input >= 2 and len(set(shared)) == 1 and shared[0].startswith("T") and s.inputs[1].is_homogeneous and {"tensor(float)", "tensor(int32)"} <= set(s.inputs[0].types):
        error = refusal(node(s, **given), TensorProto.FLOAT, TensorProto.INT32)
        assert isinstance(error, TypeMismatch) and "it should be of the same type as" in error.message


def test_contributed_operators() -> None:
    for op, attributes in (("MatMulNBits", {"K": 2, "N": 2, "block_size": 16}), ("GroupQueryAttention", {"num_heads": 2, "kv_num_heads": 2}), ("QLinearConcat", {"axis": 0})):
        for left in attributes:
            n = h.make_node(op, ["a", "b", "c", "d", "e", "f", "g"][: 3 if op == "MatMulNBits" else 7], ["o"], name="broken", domain="com.microsoft", **{k: v for k, v in attributes.items() if k != left})
            assert f"attribute {left!r} is missing" in refusal(n).message
        assert "inputs" in refusal(h.make_node(op, ["a"], ["o"], name="broken", domain="com.microsoft", **attributes)).message


def test_types_of_loops() -> None:
    body = h.make_graph([h.make_node("Identity", ["c"], ["c2"]), h.make_node("Identity", ["s"], ["s2"])], "b",
                        [h.make_tensor_value_info("i", TensorProto.INT64, []), h.make_tensor_value_info("c", TensorProto.BOOL, []), h.make_tensor_value_info("s", TensorProto.FLOAT, [2, 2])],
                        [h.make_tensor_value_info("c2", TensorProto.BOOL, []), h.make_tensor_value_info("s2", TensorProto.FLOAT, [2, 2])])  # fmt: skip
    assert "input 0 (i0) is f32, it may be int64" in refusal(h.make_node("Loop", ["i0", "", "i1"], ["o"], name="broken", body=body)).message
    assert "input 1 (i0) is f32, it may be bool" in refusal(h.make_node("Loop", ["", "i0", "i1"], ["o"], name="broken", body=body)).message
    assert "its subgraph 'b' has 3 inputs and 2 outputs" in refusal(h.make_node("Loop", ["", "", "i1", "i1"], ["o", "p"], name="broken", body=body)).message
    assert "input 0 (i0) is f32, it may be bool" in refusal(h.make_node("If", ["i0"], ["o"], name="broken", then_branch=body, else_branch=body)).message


# ---------------------------------------------------------------- constants


def with_constant(change: Callable[[TensorProto], object], folder: Path) -> str:
    """The message that a model is refused with whose external weight ``w`` was changed."""
    np.zeros(8, np.float32).tofile(folder / "w.bin")
    graph = h.make_graph([h.make_node("Add", ["x", "w"], ["y"], name="sum")], "g", [h.make_tensor_value_info("x", 1, [2, 2])], [h.make_tensor_value_info("y", 1, None)])
    t = graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[2, 2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "16"), ("length", "16")):
        t.external_data.add(key=key, value=value)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)])
    onnx.save(model, folder / "good.onnx")
    import_onnx(folder / "good.onnx")
    change(model.graph.initializer[0])
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModel) as e:
        import_onnx(folder / "m.onnx")
    return str(e.value)


@pytest.mark.parametrize("key", [1, 2])
@pytest.mark.parametrize("text", ["abc", "", "1.5", "-1", "9" * 5000, "0x10", " 16", "1_6", "\u0661\u0666", str(2**64)])
def test_numbers_of_external_data(tmp_path: Path, key: int, text: str) -> None:
    message = with_constant(lambda t: setattr(t.external_data[key], "value", text), tmp_path)
    assert "constant 'w'" in message and len(message) < 400


@pytest.mark.parametrize("text", ["", "a\x00b", "/etc/passwd", "../w.bin", ".", "missing", "x" * 1000])
def test_places_of_external_data(tmp_path: Path, text: str) -> None:
    assert "constant 'w'" in with_constant(lambda t: setattr(t.external_data[0], "value", text), tmp_path)


@pytest.mark.parametrize("dims", [[-1, 2], [-2, -2], [2**62, 4], [2**40, 2**40], [2**63 - 1], [2], [2, 3]])
@pytest.mark.parametrize("inline", [False, True])
def test_shapes_of_constants(tmp_path: Path, dims: list[int], inline: bool) -> None:
    def change(t: TensorProto) -> None:
        del t.dims[:]
        t.dims.extend(dims)
        if inline:
            t.ClearField("external_data")
            t.ClearField("data_location")
            t.raw_data = bytes(16)

    assert "constant 'w'" in with_constant(change, tmp_path)


def test_strings_as_external_data(tmp_path: Path) -> None:
    assert "constant 'w' holds strings" in with_constant(lambda t: setattr(t, "data_type", TensorProto.STRING), tmp_path)


@pytest.mark.parametrize("bad", [b"\xff\xfe", b"\xc3("])
def test_texts_that_are_not_utf8(bad: bytes) -> None:
    """Wherever a model has a text."""
    graph = h.make_graph([h.make_node("Elu", ["inputname"], ["outputname"], name="nodename", alpha=2.0)], "graphname",
                         [h.make_tensor_value_info("inputname", 1, ["dimname"])], [h.make_tensor_value_info("outputname", 1, None)])  # fmt: skip
    data = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)]).SerializeToString()
    for name in (b"Elu", b"inputname", b"outputname", b"nodename", b"graphname", b"dimname", b"alpha"):
        model = onnx.ModelProto.FromString(data.replace(name, bad + name[2:]))
        with pytest.raises(InvalidModel, match="not UTF-8"):
            import_onnx(model)


@pytest.mark.parametrize("extents", [[8], [8, 8, 8, 8, 8]])
def test_output_shape_of_a_transposed_convolution(extents: list[int]) -> None:
    """Extents for every spatial dimension, with or without those of batch and channels."""
    w = numpy_helper.from_array(np.ones((2, 2, 3, 3), np.float32), "w")
    io = [h.make_tensor_value_info("x", 1, [1, 2, 4, 4]), h.make_tensor_value_info("y", 1, None)]
    node = h.make_node("ConvTranspose", ["x", "w"], ["y"], name="up", strides=[2, 2], output_shape=extents)
    model = h.make_model(h.make_graph([node], "g", io[:1], io[1:], [w]), opset_imports=[h.make_opsetid("", 17)], ir_version=10)
    if len(extents) == 5:  # the last ones count
        assert luthier.compile(model, threads=1).run({"x": np.zeros((1, 2, 4, 4), np.float32)})["y"].shape == (1, 2, 8, 8)
    else:
        with pytest.raises(ShapeError, match="output_shape has .* extents for 2 spatial dimensions"):
            luthier.compile(model)


def test_windows_longer_than_any_input() -> None:
    """SAME padding grows with the kernel, so that no extent refuses it, and its taps would be counted one by one."""
    io = [h.make_tensor_value_info("x", 1, [1, 2, 4, 4]), h.make_tensor_value_info("y", 1, None)]
    node = h.make_node("AveragePool", ["x"], ["y"], name="pool", auto_pad="SAME_UPPER", kernel_shape=[3, 1 << 31])
    model = h.make_model(h.make_graph([node], "g", io[:1], io[1:]), opset_imports=[h.make_opsetid("", 17)], ir_version=10)
    with pytest.raises(ShapeError, match=r"a kernel of \[3, 2147483648\] elements"):
        luthier.compile(model)
