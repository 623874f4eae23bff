"""Graphs whose nodes read what came before several times: compiled in a time that is linear in their length, not in their paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import luthier
from luthier.errors import CompilationError, InvalidModel
from luthier.ir.dtypes import f32
from luthier.ir.expr import bounds, cast, const, free_vars, substitute, tree_size, var
from luthier.ir.interpret.loops import evaluate_expr
from luthier.ir.loop import Buffer, For, Func, Store
from luthier.ir.printer import format_func
from luthier.passes.loop.place_lets import place_lets

LONG = 40  # steps; 2**40 paths
Chain = tuple[list[Any], str]


def floats(op: str, *attributes: Any) -> Callable[[int], Chain]:
    """Each step takes the last value twice."""
    return lambda n: ([helper.make_node(op, ["x" if k == 0 else f"v{k - 1}"] * 2, [f"v{k}"]) for k in range(n)], f"v{n - 1}")


def arithmetic(*step: tuple[str, str, str]) -> Callable[[int], Chain]:
    """Integer arithmetic on an extent: ``step``: operator and operands, ``s`` the last value, digits constants, ``0.`` and so on the
    step's own values. The last one is a shape."""

    def build(n: int) -> Chain:
        nodes, last = [helper.make_node("Shape", ["x"], ["s0"], start=0, end=1)], "s0"
        for k in range(n):
            names = {"s": last}
            for j, (op, *operands) in enumerate(step):
                names[f"{j}."] = f"s{k + 1}" if j == len(step) - 1 else f"t{k}.{j}"
                nodes.append(helper.make_node(op, [names.get(o, f"c{o}") for o in operands], [names[f"{j}."]]))
            last = names[f"{len(step) - 1}."]
        return [*nodes, helper.make_node("Mod", [last, "c7"], ["small"]), helper.make_node("ConstantOfShape", ["small"], ["y"])], "y"

    return build


def halves(n: int) -> Chain:
    """``x[:-1] + x[1:]``: an open extent that every step broadcasts."""
    nodes, last = [], "x"
    for k in range(n):
        nodes += [
            helper.make_node("Slice", [last, "c0", "c-1", "c0"], [f"a{k}"]), helper.make_node("Slice", [last, "c1", "c99", "c0"], [f"b{k}"]),
            helper.make_node("Add", [f"a{k}", f"b{k}"], [f"v{k}"]),
        ]
        last = f"v{k}"
    return nodes, last


def lookups(n: int) -> Chain:
    """``i = i[i]``."""
    first = [helper.make_node("Cast", ["x"], ["i0"], to=TensorProto.INT64), helper.make_node("Reshape", ["i0", "c-1"], ["v0"])]
    return first + [helper.make_node("Gather", [f"v{k}", f"v{k}"], [f"v{k + 1}"]) for k in range(n)], f"v{n}"


CHAINS: dict[str, Callable[[int], Chain]] = {
    "add": floats("Add"), "power": floats("Pow"), "maximum": floats("Max"), "sum of shapes": arithmetic(("Add", "s", "s")),
    "square": arithmetic(("Mul", "s", "s")), "polynomial": arithmetic(("Mul", "s", "s"), ("Add", "0.", "7")),
    "remainders": arithmetic(("Div", "s", "3"), ("Mod", "s", "7"), ("Add", "0.", "1.")),
    "larger": arithmetic(("Div", "s", "3"), ("Sub", "9", "s"), ("Max", "0.", "1.")),
    "chosen": arithmetic(("Less", "s", "3"), ("Sub", "9", "s"), ("Where", "0.", "s", "1.")), "halves": halves, "lookups": lookups,
}  # fmt: skip


def model(chain: Chain) -> Any:
    nodes, last = chain
    used = {i for n in nodes for i in n.input}
    constants = [numpy_helper.from_array(np.array([k], np.int64), f"c{k}") for k in (-1, 0, 1, 3, 7, 9, 99) if f"c{k}" in used]
    out = helper.make_empty_tensor_value_info(last)
    g = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 2])], [out], constants)
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
@pytest.mark.parametrize("name", CHAINS)
def test_chain(name: str, target: str) -> None:
    """That it ends at all is what is tested: the tree has 2**40 nodes."""
    m = model(CHAINS[name](LONG))
    if name == "halves" and target != "cpu":
        with pytest.raises(CompilationError, match="operations"):
            luthier.compile(m, target=target)
    else:
        luthier.compile(m, target=target, threads=1)


@pytest.mark.parametrize("name", ["add", "remainders", "larger", "chosen", "square", "halves", "lookups"])
def test_values(name: str) -> None:
    import onnxruntime

    m = model(CHAINS[name](12))
    x = np.array([[0, 1]] * 19, np.float32)
    session = onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": x})
    (got,) = luthier.compile(m, threads=1).run({"x": x}).values()
    np.testing.assert_array_equal(got, want)


def test_functions_that_call_each_other_twice() -> None:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    functions = [helper.make_function("f", "f0", ["a"], ["c"], [helper.make_node("Relu", ["a"], ["c"])], opsets)]
    for k in range(1, 24):
        calls = [helper.make_node(f"f{k - 1}", ["a"], ["b"], domain="f"), helper.make_node(f"f{k - 1}", ["b"], ["c"], domain="f")]
        functions.append(helper.make_function("f", f"f{k}", ["a"], ["c"], calls, opsets))

    def calling(depth: int) -> Any:
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b"]) for n in "xy")
        g = helper.make_graph([helper.make_node(f"f{depth}", ["x"], ["y"], domain="f")], "g", [x], [y])
        return helper.make_model(g, opset_imports=opsets, functions=functions, ir_version=9)

    np.testing.assert_array_equal(luthier.compile(calling(4), threads=1).run({"x": np.array([-1, 2], np.float32)})["y"], [0, 2])
    with pytest.raises(InvalidModel, match="expand to"):
        luthier.compile(calling(23))


def test_text_of_shared_operands() -> None:
    """Short expressions are written as they were; the text of one that shares its parts names them."""
    a = var("a")
    e = a
    for _ in range(60):
        e = (e // 3) + (e % 7)
    assert tree_size(e) == tree_size(e * 1) and tree_size(a + 1) == 3
    assert repr(a // 3 + a % 7) == "a // 3 + a % 7"
    assert len(repr(e)) < 5000 and "t1 = t0" in repr(e) and len(e.key) < 2000
    assert evaluate_expr(e, {"a": 1000}) == walked(1000)


def walked(a: int) -> int:
    for _ in range(60):
        a = a // 3 + a % 7
    return a


def test_products_that_are_not_multiplied_out() -> None:
    a = var("a", lo=1, hi=2)
    e = a
    for _ in range(7):
        e = e * e
    assert bounds(e) == (1, 1 << 128) and free_vars(e) == {a}
    assert substitute(e, {a: const(1)}) is const(1) and evaluate_expr(substitute(e, {a: var("b") + 1}), {"b": 0}) == 1


def test_places_of_shared_operands() -> None:
    """Each operand of an invariant that shares itself is looked at once; 2 to the 60th looks would never end."""
    out = Buffer.of("out", f32, (8, 8))
    i, j = var("i", lo=0, hi=7), var("j", lo=0, hi=7)
    e = cast(i, f32)
    for _ in range(60):
        e = e * e + e
    body = For(i, const(0), const(8), "serial", For(j, const(0), const(8), "serial", Store(out, (i, j), e)))
    assert len(format_func(place_lets(Func("f", (out,), body))).splitlines()) < 300
