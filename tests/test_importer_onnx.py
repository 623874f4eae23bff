"""The ONNX importer: older forms, symbolic dimensions, functions, subgraphs, external data, refusals. Oracle: onnxruntime or
onnx's ReferenceEvaluator on the very same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from luthier.errors import InvalidModel, ShapeError, UnsupportedOperator
from luthier.importers.onnx.importer import import_onnx
from luthier.ir.interpret.evaluate import evaluate_graph

Array = np.ndarray[Any, Any]


def text_model(body: str, opset: int = 17, header: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{header}]>\n{body}')


def agree(model: onnx.ModelProto, feeds: dict[str, Array], rtol: float = 1e-5, **kw: Any) -> None:
    """evaluate_graph(import) equals the ReferenceEvaluator."""
    want = ReferenceEvaluator(model).run(None, feeds)
    got, _ = evaluate_graph(import_onnx(model, **kw), feeds)
    for o, w in zip(model.graph.output, want, strict=True):
        np.testing.assert_allclose(got[o.name], w, rtol=rtol, atol=1e-6)
        assert got[o.name].dtype == np.asarray(w).dtype


def f32(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_dimension_name_is_one_symbol_everywhere() -> None:
    m = text_model("g (float[N, 4] x, float[N, 4] y) => (float[N, 4] z) { z = Add(x, y) }")
    g = import_onnx(m)
    assert g.inputs[0].shape[0] is g.inputs[1].shape[0]
    assert g.outputs[0].shape[0] is g.inputs[0].shape[0]
    agree(m, {"x": f32(3, 4), "y": f32(3, 4, seed=1)})


def test_pinning_a_dimension_pins_its_name() -> None:
    m = text_model("g (float[N, 4] x, float[N, 4] y) => (float[N, 4] z) { z = Add(x, y) }")
    g = import_onnx(m, {"x": (3, 4)})
    assert g.inputs[1].type.static_shape == (3, 4)
    assert g.outputs[0].type.static_shape == (3, 4)


def test_unnamed_dimensions_stay_apart() -> None:
    m = text_model("g (float[M, K] x) => (float[M, K] z) { z = Relu(x) }")
    for d in m.graph.input[0].type.tensor_type.shape.dim:
        d.dim_param = "?"
    a, b = import_onnx(m).inputs[0].shape
    assert a is not b and a.op == b.op == "var"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [({"q": (1,)}, "names no input"), ({"x": (1, 2, 3)}, "rank 2"), ({"x": (1, 5)}, "declares 4"), ({"x": (1, 4), "y": (2, 4)}, "pinned to 1 and to 2")],
)
def test_contradicting_shapes_are_refused(shapes: dict[str, Any], message: str) -> None:
    m = text_model("g (float[N, 4] x, float[N, 4] y) => (float[N, 4] z) { z = Add(x, y) }")
    with pytest.raises(ShapeError, match=message):
        import_onnx(m, shapes)


def test_clip_of_opset_6_takes_its_bounds_from_attributes() -> None:
    m = text_model("g (float[5] x) => (float[5] y) { y = Clip<min = -0.5, max = 0.5>(x) }", 6)
    got, _ = evaluate_graph(import_onnx(m), {"x": f32(5)})
    np.testing.assert_array_equal(got["y"], np.clip(f32(5), -0.5, 0.5))


def test_add_of_opset_6_broadcasts_from_an_axis() -> None:
    m = text_model("g (float[2, 3, 4] x, float[3] b) => (float[2, 3, 4] y) { y = Add<broadcast = 1, axis = 1>(x, b) }", 6)
    got, _ = evaluate_graph(import_onnx(m), {"x": f32(2, 3, 4), "b": f32(3)})
    np.testing.assert_allclose(got["y"], f32(2, 3, 4) + f32(3)[:, None], rtol=1e-6)


def test_a_local_function_is_inlined_with_its_attributes() -> None:
    m = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[N] x) => (float[N] z) { y = own.scaled<alpha = 0.25>(x)  z = Neg(y) }
        <domain: "own", opset_import: ["" : 17]>
        scaled <alpha: float = 0.5>(a) => (b) { h = LeakyRelu<alpha = @alpha>(a)  b = Abs(h) }"""
    )
    x = f32(6)
    got, _ = evaluate_graph(import_onnx(m), {"x": x})
    np.testing.assert_allclose(got["z"], -np.abs(np.where(x < 0, np.float32(0.25) * x, x)), rtol=1e-6)


def test_an_unused_default_of_a_local_function_applies() -> None:
    m = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[N] x) => (float[N] z) { z = own.scaled(x) }
        <domain: "own", opset_import: ["" : 17]>
        scaled <alpha: float = 0.5>(a) => (b) { b = LeakyRelu<alpha = @alpha>(a) }"""
    )
    x = f32(6)
    got, _ = evaluate_graph(import_onnx(m), {"x": x})
    np.testing.assert_allclose(got["z"], np.where(x < 0, np.float32(0.5) * x, x), rtol=1e-6)


def test_a_recursive_function_is_refused() -> None:
    m = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[N] x) => (float[N] z) { z = own.f(x) }
        <domain: "own", opset_import: ["own" : 1]> f (a) => (b) { b = own.f(a) }"""
    )
    with pytest.raises(InvalidModel, match="calls itself"):
        import_onnx(m)


def test_an_unknown_operator_is_named_with_its_node() -> None:
    m = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17, "far.away" : 1]> g (float[2] x) => (float[2] y) { y = far.away.Frobnicate(x) }')
    m.graph.node[0].name = "frob"
    with pytest.raises(UnsupportedOperator, match=r'far\.away::Frobnicate.*node "frob"'):
        import_onnx(m)


@pytest.mark.parametrize("flag", [True, False])
def test_if_reads_outer_values(flag: bool) -> None:
    m = text_model(
        """g (bool c, float[3] x) => (float[3] y) {
             h = Abs(x)
             y = If(c) <then_branch = t () => (float[3] a) { a = Neg(h) }, else_branch = e () => (float[3] b) { b = Exp(h) }>
           }"""
    )
    agree(m, {"c": np.array(flag), "x": f32(3)})


def test_an_if_whose_condition_is_constant_is_inlined() -> None:
    m = text_model(
        """g (float[3] x) => (float[3] y) <bool c = {1}> {
             y = If(c) <then_branch = t () => (float[3] a) { a = Neg(x) }, else_branch = e () => (float[3] b) { b = Exp(x) }>
           }"""
    )
    g = import_onnx(m)
    assert [n.op for n in g.nodes] == ["Neg"]


def test_loop_carries_state() -> None:
    m = text_model(
        """g (int64 n, float[3] x) => (float[3] y, float[K, 3] s) <bool on = {1}> {
             y, s = Loop(n, on, x) <body = b (int64 i, bool c, float[3] v) => (bool d, float[3] w, float[3] o) {
               d = Identity(c)  w = Mul(v, v)  o = Neg(w) }>
           }"""
    )
    agree(m, {"n": np.array(3, np.int64), "x": f32(3) * 0.5})


def test_external_data_is_read_from_the_models_folder_only(tmp_path: Path) -> None:
    w = numpy_helper.from_array(f32(4), "w")
    g = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])], [w])
    m = helper.make_model(g, opset_imports=[helper.make_opsetid("", 17)])
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir()
    onnx.save(m, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    got, _ = evaluate_graph(import_onnx(path), {"x": f32(4, seed=2)})
    np.testing.assert_allclose(got["y"], f32(4) + f32(4, seed=2), rtol=1e-6)
    bad = onnx.load(path, load_external_data=False)
    (tmp_path / "w.bin").write_bytes((path.parent / "w.bin").read_bytes())
    bad.graph.initializer[0].external_data[0].value = "../w.bin"
    path.write_bytes(bad.SerializeToString())
    with pytest.raises(InvalidModel, match="outside the model's folder"):
        import_onnx(path)


def test_a_sparse_initializer_becomes_dense() -> None:
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [5.0, 7.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [2], [1, 4])
    g = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5])])
    g.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [5]))
    m = helper.make_model(g, opset_imports=[helper.make_opsetid("", 17)])
    got, _ = evaluate_graph(import_onnx(m), {"x": np.zeros(5, np.float32)})
    np.testing.assert_array_equal(got["y"], [0, 5, 0, 0, 7])


def test_strings_and_maps_are_refused_clearly() -> None:
    g = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [helper.make_tensor_value_info("x", TensorProto.STRING, [2])], [helper.make_tensor_value_info("y", TensorProto.STRING, [2])])
    with pytest.raises(UnsupportedOperator, match="strings"):
        import_onnx(helper.make_model(g))
    words = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    s = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [helper.make_value_info("x", words)], [helper.make_value_info("y", words)])
    with pytest.raises(UnsupportedOperator, match="map"):
        import_onnx(helper.make_model(s))



def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    p = tmp_path / "x.onnx"
    p.write_bytes(b"not a model at all")
    with pytest.raises(InvalidModel):
        import_onnx(p)
    with pytest.raises(InvalidModel, match="cannot read"):
        import_onnx(tmp_path / "missing.onnx")


def test_a_missing_value_is_named() -> None:
    g = helper.make_graph([helper.make_node("Relu", ["nowhere"], ["y"], "r")], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])])
    with pytest.raises(InvalidModel, match=r"nowhere.*\"r\""):
        import_onnx(helper.make_model(g))
