"""split_transposed_conv: equal results in every form that is split; the forms that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from luthier.ir.builder import Names, make_node
from luthier.ir.dtypes import f32
from luthier.ir.graph import Graph, TensorType, Value
from luthier.ir.interpret.evaluate import evaluate_graph
from luthier.passes.graph.split_transposed_conv import split_transposed_conv

RNG = np.random.default_rng(1)
SHAPES = {1: (2, 5, 7), 2: (2, 5, 4, 3), 3: (1, 5, 2, 3, 4)}


def graph(kernel: tuple[int, ...], attrs: dict[str, Any], bias: bool = True) -> Graph:
    x = Value("x", TensorType.of(f32, SHAPES[len(kernel)]))
    m = 6 // int(attrs.get("group", 1)) if attrs.get("group", 1) != 5 else 2
    ins = [x, Value.const("w", RNG.standard_normal((5, m, *kernel)).astype(np.float32))]
    if bias:
        ins.append(Value.const("b", RNG.standard_normal(m * int(attrs.get("group", 1))).astype(np.float32)))
    n = make_node("ConvTranspose", ins, attrs, names=Names(), outputs=["y"])
    return Graph("g", [x], [n.outputs[0]], [n])


def same(g: Graph, ops: list[str]) -> None:
    a = RNG.standard_normal([d.attr for d in g.inputs[0].shape]).astype(np.float32)
    want = next(iter(evaluate_graph(g, {"x": a})[0].values()))
    assert split_transposed_conv(g)
    assert [n.op for n in g.nodes] == ops
    np.testing.assert_allclose(next(iter(evaluate_graph(g, {"x": a})[0].values())), want, rtol=1e-5, atol=1e-5)
    assert not split_transposed_conv(g)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_windows_side_by_side(k: int, bias: bool) -> None:
    same(graph((k, k), {"strides": (k, k)}, bias), ["Conv", "DepthToSpace"])


@pytest.mark.parametrize(
    ("k", "s", "pads", "more"),
    [
        (4, 2, (1, 1, 1, 1), (0, 0)), (3, 2, (1, 1, 1, 1), (1, 1)), (3, 2, (0, 0, 0, 0), (0, 0)), (5, 2, (2, 1, 0, 2), (0, 1)),
        (7, 3, (2, 2, 2, 2), (0, 0)), (6, 3, (0, 1, 2, 0), (0, 0)), (2, 2, (1, 0, 0, 0), (0, 0)), (4, 2, (0, 0, 2, 2), (1, 1)),
    ],
)  # fmt: skip
def test_overlapping_windows(k: int, s: int, pads: tuple[int, ...], more: tuple[int, ...]) -> None:
    g = graph((k, k), {"strides": (s, s), "pads": pads, "output_padding": more})
    surplus = (*pads[:2], *(-(-k // s) * s - k + pads[d + 2] - more[d] for d in (0, 1)))
    cropped = any(v - min(v // s, -(-k // s) - 1) * s for v in surplus)  # whole blocks are not made at all
    same(g, ["Conv", "DepthToSpace", *(["Slice"] if cropped else [])])


@pytest.mark.parametrize(
    ("kernel", "strides", "pads", "more"),
    [
        ((16,), (8,), (4, 4), (0,)), ((4,), (2,), (1, 1), (0,)), ((4,), (4,), (0, 0), (0,)), ((5,), (2,), (0, 3), (1,)), ((7,), (3,), (6, 5), (0,)), ((3,), (2,), (2, 0), (1,)),
        ((3, 4), (1, 2), (1, 1, 1, 1), (0, 0)), ((1, 4), (1, 2), (0, 1, 0, 1), (0, 0)), ((2, 3), (1, 3), (0, 0, 1, 0), (0, 0)), ((1, 3, 4), (1, 1, 2), (0, 1, 1, 0, 1, 1), (0, 0, 0)),
    ],
)  # fmt: skip
def test_stride_along_the_last_dimension(kernel: tuple[int, ...], strides: tuple[int, ...], pads: tuple[int, ...], more: tuple[int, ...]) -> None:
    g = graph(kernel, {"strides": strides, "pads": pads, "output_padding": more})
    a = RNG.standard_normal([d.attr for d in g.inputs[0].shape]).astype(np.float32)
    want = next(iter(evaluate_graph(g, {"x": a})[0].values()))
    assert split_transposed_conv(g)
    assert [n.op for n in g.nodes if n.op != "Slice"] == ["Transpose", "Conv", "Reshape", "Transpose"]
    np.testing.assert_allclose(next(iter(evaluate_graph(g, {"x": a})[0].values())), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "attrs"),
    [
        ((2, 2), {"strides": (3, 3)}), ((2, 3), {"strides": (2, 3)}), ((3, 3), {"strides": (2, 2), "dilations": (2, 2)}), ((3, 3), {}),
        ((2, 2), {"strides": (2, 2), "output_padding": (1, 0)}), ((2, 2), {"strides": (2, 2), "group": 5}), ((1, 1), {}),
    ],
)  # fmt: skip
def test_others_stay(kernel: tuple[int, int], attrs: dict[str, Any]) -> None:
    assert not split_transposed_conv(graph(kernel, attrs))
