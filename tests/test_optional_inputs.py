"""Initializers that are graph inputs as well: defaults that a call may replace, in Python, C and JavaScript; and random keys."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import luthier
from luthier.backends.native import WORDS, Functions
from luthier.errors import InputError, InvalidModel

NODE = shutil.which("node")
SCALE, BIAS = np.array([2, 3, 4], np.float32), np.array([[1], [5]], np.float32)
value = helper.make_tensor_value_info


def model(ir_version: int = 10, scale: Any = (3,)) -> onnx.ModelProto:
    """y = x * scale + bias, z = y over an optional divisor; the declared order mixes what must be given and what need not."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["m"]), helper.make_node("Add", ["m", "bias"], ["y"]),
        helper.make_node("Sub", ["y", "t"], ["z"]),
    ]  # fmt: skip
    f = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "g", [value("x", f, ["n", 3]), value("scale", f, scale), value("t", f, ["n", 3]), value("bias", f, ["n", 1])],
        [value("y", f, None), value("z", f, None)], [numpy_helper.from_array(SCALE, "scale"), numpy_helper.from_array(BIAS, "bias")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)


X, T = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 3), np.float32)
CALLS: list[dict[str, np.ndarray[Any, Any]]] = [
    {}, {"scale": SCALE + 10}, {"bias": BIAS - 7}, {"scale": SCALE * 0, "bias": BIAS * 3}, {},
]  # fmt: skip


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
def test_override(target: str, tmp_path: Path) -> None:
    if target == "webgpu":
        pytest.importorskip("wgpu")
    fresh = luthier.compile(model(), target=target)
    fresh.save(tmp_path / "m")
    session = onnxruntime.InferenceSession(model().SerializeToString())
    for m in (fresh, luthier.load(tmp_path / "m")):
        assert [(s.name, s.optional) for s in m.inputs] == [("x", False), ("t", False), ("scale", True), ("bias", True)]
        for more in CALLS:
            got = m.run({"x": X, "t": T, **more})
            for a, want in zip(got.values(), session.run(None, {"x": X, "t": T, **more}), strict=True):
                np.testing.assert_array_equal(a, want)
        np.testing.assert_array_equal(m(X, T)[0], m(X, T, SCALE, BIAS)[0])
        with pytest.raises(InputError, match=r"missing input t.*scale float32\[3\] \(optional\)"):
            m.run({"x": X, "scale": SCALE})
        with pytest.raises(InputError, match="takes 2 to 4 inputs"):
            m(X)
        with pytest.raises(InputError, match="scale"):
            m.run({"x": X, "t": T, "scale": SCALE[:2]})


def tensor(words: Any, j: int, a: np.ndarray[Any, Any] | None) -> None:
    """Fills lt_tensor ``j`` with an f32 array; zeros for None."""
    words[WORDS * j : WORDS * (j + 1)] = [0] * WORDS
    if a is not None:
        words[WORDS * j] = a.ctypes.data
        words[WORDS * j + 2] = 1 | a.ndim << 32
        words[WORDS * j + 3 : WORDS * j + 3 + a.ndim] = list(a.shape)


def test_c_interface() -> None:
    """Optional inputs may be missing from the count, or be tensors of zeros."""
    m = luthier.compile(model(), threads=1)
    fns = m._fns
    assert isinstance(fns, Functions)
    ctx = fns.create(m._weights.ctypes.data, m._weights.nbytes, 1)
    ins, outs, y = (ctypes.c_int64 * (WORDS * 5))(), (ctypes.c_int64 * (WORDS * 2))(), np.zeros((2, 3), np.float32)

    def run(n: int, *arrays: np.ndarray[Any, Any] | None) -> int:
        for j, a in enumerate(arrays):
            tensor(ins, j, a)
        outs[:] = [y.ctypes.data, y.nbytes, *[0] * (2 * WORDS - 2)]
        status = int(fns.run(ctx, ctypes.addressof(ins), n, ctypes.addressof(outs), 2))
        if not status:
            fns.free(outs[WORDS])
        return status

    try:
        for n, scale, bias in ((2, None, None), (3, SCALE + 1, None), (4, None, BIAS + 1), (4, SCALE + 1, BIAS + 1), (4, None, None)):
            assert run(n, X, T, scale, bias) == 0
            np.testing.assert_array_equal(y, X * (SCALE if scale is None else scale) + (BIAS if bias is None else bias))
        for n in (1, 5):
            assert run(n, X, T, SCALE, BIAS) == 1 and b"expected 4 tensors" in fns.message(ctx)
        tensor(ins, 2, SCALE)
        ins[2 * WORDS] = 0  # described, but without data
        assert fns.run(ctx, ctypes.addressof(ins), 4, ctypes.addressof(outs), 2) == 1 and b"input scale: no data" in fns.message(ctx)
    finally:
        fns.destroy(ctx)


def test_random_key_in_c() -> None:
    """Two calls and two contexts draw different numbers when the key is left out."""
    node = helper.make_node("RandomNormal", [], ["y"], shape=[4])
    m = luthier.compile(helper.make_model(helper.make_graph([node], "g", [], [value("y", TensorProto.FLOAT, [4])]), ir_version=10), threads=1)
    fns = m._fns
    assert isinstance(fns, Functions)
    outs, seen = (ctypes.c_int64 * WORDS)(), []
    for _ in range(2):
        ctx = fns.create(m._weights.ctypes.data, m._weights.nbytes, 1)
        for _ in range(3):
            y = np.zeros(4, np.float32)
            outs[:] = [y.ctypes.data, y.nbytes, *[0] * (WORDS - 2)]
            assert fns.run(ctx, 0, 0, ctypes.addressof(outs), 1) == 0
            seen.append(tuple(y))
        fns.destroy(ctx)
    assert len(set(seen)) == 6


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_javascript(tmp_path: Path) -> None:
    assert NODE is not None
    m = model()
    m.graph.node.append(helper.make_node("RandomUniformLike", ["x"], ["r"]))
    m.graph.output.append(value("r", TensorProto.FLOAT, None))
    folder = luthier.compile(m, target="wasm").save(tmp_path / "m")
    assert '"scale"?: Float32Array' in (folder / "index.d.ts").read_text()
    script = f"""
    import {{ load }} from "./index.js";
    const model = await load(undefined, {{ threads: 1 }});
    const x = {json.dumps(X.ravel().tolist())}, t = {json.dumps(T.ravel().tolist())};
    const calls = {json.dumps([{k: a.ravel().tolist() for k, a in c.items()} for c in CALLS])};
    const out = [];
    for (const more of calls) {{
      const given = Object.fromEntries(Object.entries(more).map(([k, v]) => [k, Float32Array.from(v)]));
      const got = await model.run({{ x: Float32Array.from(x), t: Float32Array.from(t), ...given }});
      out.push([Array.from(got.y.data), Array.from(got.r.data)]);
    }}
    console.log(JSON.stringify({{ out, inputs: model.inputs.map((i) => [i.name, Boolean(i.optional)]) }}));
    await model.close();
    """
    (folder / "try.mjs").write_text(script)
    done = json.loads(subprocess.run([NODE, str(folder / "try.mjs")], capture_output=True, text=True, timeout=60, check=True).stdout)
    assert done["inputs"] == [["x", False], ["t", False], ["scale", True], ["bias", True], ["luthier.random", True]]
    for more, (y, _) in zip(CALLS, done["out"], strict=True):
        np.testing.assert_array_equal(np.array(y, np.float32).reshape(2, 3), X * more.get("scale", SCALE) + more.get("bias", BIAS))
    drawn = np.array([r for _, r in done["out"]])
    assert len(np.unique(drawn)) == drawn.size and drawn.min() >= 0 and drawn.max() < 1


def test_which_are_replaceable() -> None:
    """Old files list all initializers among the inputs, and so do exporters of large ones: they are constants."""

    def optional(m: onnx.ModelProto, **options: Any) -> list[str]:
        return [s.name for s in luthier.compile(m, **options).inputs if s.optional]

    assert optional(model()) == ["scale", "bias"]
    assert optional(model(ir_version=3)) == []
    assert optional(model(), overridable=False) == []
    assert optional(model(), overridable=["bias"]) == ["bias"]
    with pytest.raises(InputError, match="no input 'scale'"):
        luthier.compile(model(), overridable=["bias"]).run({"x": X, "t": T, "scale": SCALE})
    with pytest.raises(InvalidModel, match=r"overridable names \['x'\]"):
        luthier.compile(model(), overridable=["x"])
    large = model()
    large.graph.initializer.append(numpy_helper.from_array(np.ones((1, 20_000), np.float32), "w"))
    large.graph.input.append(value("w", TensorProto.FLOAT, [1, 20_000]))
    assert optional(large) == []
    assert optional(large, overridable=True) == ["scale", "bias", "w"]
    with pytest.raises(InvalidModel, match=r"input 'scale' is declared as f32\[4\], its initializer is f32\[3\]"):
        luthier.compile(model(scale=(4,)))


def test_types_of_defaults() -> None:
    """Elements of other widths, a scalar, and an empty default."""
    arrays = {
        "i4": np.array([[1, -2, 7]], ml_dtypes.int4), "b": np.array(True), "h": np.array([0.5, 2], np.float16), "e": np.zeros((0, 2), np.float32),
    }  # fmt: skip
    kinds = {"i4": TensorProto.INT4, "b": TensorProto.BOOL, "h": TensorProto.FLOAT16, "e": TensorProto.FLOAT}
    nodes = [helper.make_node("Identity", [n], [f"{n}.out"]) for n in arrays]
    graph = helper.make_graph(
        nodes, "g", [value(n, kinds[n], a.shape) for n, a in arrays.items()], [value(f"{n}.out", kinds[n], None) for n in arrays],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )  # fmt: skip
    m = luthier.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    for got, want in zip(m(), arrays.values(), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype
    other = arrays["i4"][:, ::-1]
    np.testing.assert_array_equal(m.run({"i4": other})["i4.out"], other)
