"""Sin, Cos and Tan of angles of any size, on every target and in every type, against numpy in f64 (which reduces them exactly)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper as h

import luthier
from luthier.errors import TargetError
from luthier.ir.dtypes import f32, f64
from luthier.ir.expr import load, unary, walk
from luthier.ir.loop import Buffer, For, Func, If, Store, walk_stmts
from luthier.passes.loop.expand_math import expand_math

Array = np.ndarray[Any, Any]
REF = {"Sin": np.sin, "Cos": np.cos, "Tan": np.tan}


def angles(dt: Any, n: int = 2_000) -> Array:
    """Small and large ones side by side, up to the largest number; close to multiples of pi/2; all powers of two."""
    r = np.random.default_rng(5)
    top = float(np.log10(np.finfo(dt).max)) - 0.01
    spread = 10.0 ** r.uniform(-3, top, n) * r.choice([-1.0, 1.0], n)
    near = np.round(10.0 ** r.uniform(0, 9 if dt is not np.float16 else 4, n)) * (np.pi / 2)
    powers = 2.0 ** np.arange(0, np.finfo(dt).maxexp)
    with np.errstate(over="ignore"):
        x = np.concatenate([spread, near, powers, [np.finfo(dt).max, -np.finfo(dt).max, 0.0]]).astype(dt)
    return r.permutation(x[np.isfinite(x)])


def compiled(op: str, x: Array, target: str) -> Array:
    t = h.np_dtype_to_tensor_dtype(x.dtype)
    g = h.make_graph([h.make_node(op, ["x"], ["y"])], "angles", [h.make_tensor_value_info("x", t, ["n"])], [h.make_tensor_value_info("y", t, ["n"])])
    m = h.make_model(g, opset_imports=[h.make_opsetid("", 22)], ir_version=10)
    return luthier.compile(m, target=target).run({"x": x})["y"]


def places(got: Array, want: Array) -> float:
    """The largest error in units of the last place, of what fits the type."""
    fits = np.abs(want) < np.finfo(got.dtype).max
    unit = np.spacing(np.abs(want[fits]).astype(got.dtype)).astype(np.float64)
    return float(np.max(np.abs(got[fits].astype(np.float64) - want[fits]) / unit))


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
@pytest.mark.parametrize("dt", [np.float32, np.float64, np.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("op", REF)
def test_any_angle(op: str, dt: Any, target: str) -> None:
    if target == "wasm":
        pytest.importorskip("wasmtime")
    if target == "webgpu":
        if dt is np.float64:
            pytest.skip("WGSL has no f64")
        pytest.importorskip("wgpu")
        from luthier.backends.webgpu_device import device

        try:
            device()
        except TargetError as e:
            pytest.skip(str(e))
    x = angles(dt)
    assert places(compiled(op, x, target), REF[op](x.astype(np.float64))) <= (4 if dt is not np.float16 else 1)


@pytest.mark.parametrize("op", REF)
def test_no_angle(op: str) -> None:
    got = compiled(op, np.array([np.inf, -np.inf, np.nan, 1.0] * 9, np.float32), "cpu").reshape(9, 4)
    assert np.isnan(got[:, :3]).all() and not np.isnan(got[:, 3]).any()


@pytest.mark.parametrize("d", [f32, f64], ids=str)
def test_small_angles_do_not_pay(d: Any) -> None:
    """The branch that they take has no integer product."""
    x, y = Buffer("x", d, (8,), "param", False), Buffer("y", d, (8,), "param")
    from luthier.ir.compute import axis

    i = axis("i", 8).var
    f = expand_math(Func("f", (x, y), For(i, i * 0, i * 0 + 8, "serial", Store(y, (i,), unary("sin", load(x, (i,))) * unary("cos", load(x, (i,)))))))
    (choice,) = (s for s in walk_stmts(f.body) if isinstance(s, If))

    def products(s: Any) -> int:
        return sum(e.op == "mul" and e.dtype.scalar.kind == "u" for e in walk(s.value))

    assert products(choice.then) > 0 and products(choice.orelse) == 0
