"""Sizes that no machine has: they saturate, and are refused before anything is allocated, never taken modulo a power of two."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import luthier
from luthier.errors import KernelError, ShapeError
from luthier.ir.expr import as_expr, bounds, const, var

FAR = 2**63 - 1
SHAPES = [[2**40, 2**40, 4], [2**62, 4], [2**61, 2], [FAR], [2**31, 2**31, 4], [2**32, 2**32], [2**32, 2**31, 2]]


def filled(shape: list[int], known: bool) -> Any:
    """ConstantOfShape; ``known``: the shape is a constant."""
    given = [] if known else [helper.make_tensor_value_info("s", TensorProto.INT64, [len(shape)])]
    constants = [numpy_helper.from_array(np.array(shape, np.int64), "s")] if known else []
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))
    g = helper.make_graph([helper.make_node("ConstantOfShape", ["s"], ["y"])], "g", given, [y], constants)
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_shape_is_refused_when_compiling(shape: list[int]) -> None:
    with pytest.raises(ShapeError, match=r'elements or more; node "y" \(ConstantOfShape\)'):
        luthier.compile(filled(shape, True))


@pytest.mark.parametrize("target", ["cpu", "wasm"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_shape_of_the_run_is_refused_by_the_call(rank: int, target: str) -> None:
    module = luthier.compile(filled([1] * rank, False), target=target)
    for shape in [s for s in SHAPES if len(s) == rank]:
        with pytest.raises(KernelError, match="out of memory"):
            module.run({"s": np.array(shape)})
        np.testing.assert_array_equal(module.run({"s": np.full(rank, 3)})["y"], np.zeros([3] * rank))  # and the next call is as good as new


def test_an_output_that_is_too_large_for_memory() -> None:
    """Few enough to be a tensor, too many for this machine."""
    for target in ("cpu", "wasm"):
        with pytest.raises(KernelError, match="out of memory"):
            luthier.compile(filled([2**40, 2], True), target=target).run({})


@pytest.mark.parametrize("target", ["cpu", "wasm"])
def test_ends_that_mean_the_end(target: str) -> None:
    """Operands of a slice that come at run time and are the largest or least there are."""
    g = helper.make_graph(
        [helper.make_node("Slice", ["x", "s", "e", "axis", "t"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]), *(helper.make_tensor_value_info(k, TensorProto.INT64, [1]) for k in "set")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])], [numpy_helper.from_array(np.array([0]), "axis")],
    )  # fmt: skip
    module = luthier.compile(helper.make_model(g, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), target=target)
    for n, start, end, step in itertools.product((0, 1, 5), (0, -3, 3, FAR, -FAR - 1), (2, -1, FAR, -FAR - 1), (1, -1, 2, -3, FAR, -FAR - 1)):
        x = np.arange(n, dtype=np.float32)
        first = max(start + n, 0) if start < 0 else start  # the standard clamps where Python would have nothing left
        stop = None if step < 0 and end < -n else end
        got = module.run({"x": x, "s": np.array([start]), "e": np.array([end]), "t": np.array([step])})["y"]
        np.testing.assert_array_equal(got, x[slice(first, stop, step)], err_msg=f"{n}: {start}:{end}:{step}")


def test_index_constants_saturate() -> None:
    big = as_expr(2**62)
    assert (big * 4) is const(FAR) and (big * -4) is const(-(2**63)) and (big + big) is const(FAR)
    assert as_expr(2**64) is const(FAR) and as_expr(-(2**64)) is const(-(2**63))
    n = var("n", lo=1, hi=2**40)
    assert bounds(n * n * 4) == (4, 2**82) and ((n * n) < 2**62).op != "const"
