"""Random models of sequences and optionals against onnxruntime: known when compiling, and known to the run only."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

import luthier
from luthier.errors import InputError, LuthierError, ShapeError
from tests.test_loops import ON_EACH, info, need, run_onnxruntime

Array = np.ndarray[Any, Any]
ELEMENT = h.make_tensor_type_proto(T.FLOAT, ["rows", 3])
SEQUENCE = h.make_sequence_type_proto(ELEMENT)


class Drawn:
    """A chain of sequence operators and the model's outputs: what the chain ends in, in several ways."""

    def __init__(self, seed: int) -> None:
        self.random = r = random.Random(seed)
        self.constants: dict[str, Array] = {"two": np.array(2), "minus": np.array(-1), "zero": np.array(0), "halves": np.array([1, 3, 2]), "on": np.array(True)}
        self.nodes: list[onnx.NodeProto] = []
        self.count = 0
        s = {"given": "q", "built": self.add("SequenceConstruct", ["x", "y", "x"]), "rows": self.add("SplitToSequence", ["z", "two"], axis=0), "parts": self.add("SplitToSequence", ["w", "halves"], axis=0)}[
            r.choice(["given", "built", "rows", "parts"])
        ]  # fmt: skip
        for _ in range(r.randrange(4)):
            s = getattr(self, r.choice(["insert", "erase", "either", "loop", "optional", "map"]))(s)
        self.outputs: list[onnx.ValueInfoProto] = []
        for kind in r.sample(["itself", "at", "any", "length", "concat", "columns", "stack"], 3):
            self.end(kind, s)

    def add(self, op: str, inputs: list[str], **attrs: Any) -> str:
        self.count += 1
        self.nodes.append(h.make_node(op, inputs, [f"v{self.count}"], **attrs))
        return f"v{self.count}"

    def insert(self, s: str) -> str:
        at = self.random.choice(["", "zero", "minus", "k"])
        return self.add("SequenceInsert", [s, self.random.choice("xy"), *([at] if at else [])])

    def erase(self, s: str) -> str:
        at = self.random.choice(["", "zero", "minus", "k"])
        s = self.add("SequenceInsert", [s, "x"])
        return self.add("SequenceErase", [s, *([at] if at else [])])

    def either(self, s: str) -> str:
        one = self.graph("then", [h.make_node("SequenceInsert", [s, "y"], ["then.out"])], [], "then.out")
        other = self.graph("else", [h.make_node("Identity", [s], ["else.out"])], [], "else.out")
        return self.add("If", ["c"], then_branch=one, else_branch=other)

    def loop(self, s: str) -> str:
        ins = [info("i", T.INT64, []), info("go", T.BOOL, []), h.make_value_info("state", SEQUENCE)]
        nodes = [h.make_node("Identity", ["go"], ["go_on"]), h.make_node("SequenceAt", ["state", "i"], ["e"])]
        nodes += [h.make_node("Add", ["e", "e"], ["ee"]), h.make_node("SequenceInsert", ["state", "ee"], ["next"])]
        body = self.graph("body", nodes, ins, "next", [info("go_on", T.BOOL, [])])
        return self.add("Loop", [self.random.choice(["two", "n"]), "on", self.add("SequenceInsert", [s, "y"])], body=body)

    def optional(self, s: str) -> str:
        return self.add("OptionalGetElement", [self.add("Optional", [s])])

    def map(self, s: str) -> str:
        ins = [h.make_value_info("e", ELEMENT)]
        return self.add("SequenceMap", [s], body=h.make_graph([h.make_node("Neg", ["e"], ["f"])], "map", ins, [info("f", T.FLOAT, ["rows", 3])]))

    def graph(self, name: str, nodes: list[onnx.NodeProto], ins: list[onnx.ValueInfoProto], out: str, first: Any = ()) -> onnx.GraphProto:
        return h.make_graph(nodes, name, ins, [*first, h.make_value_info(out, SEQUENCE)])

    def end(self, kind: str, s: str) -> None:
        if kind == "itself":
            self.outputs.append(h.make_value_info(self.add("Identity", [s]), SEQUENCE))
        elif kind == "length":
            self.outputs.append(info(self.add("SequenceLength", [s]), T.INT64, []))
        else:
            s = self.add("SequenceInsert", [s, "x", "zero"])  # no sequence is empty
            if kind in ("columns", "stack"):
                item = self.add("SequenceAt", [s, "zero"])
                s = self.add("SequenceConstruct", [item, item]) if self.random.random() < 0.5 else self.add("SplitToSequence", [item, "two"], axis=1)
            v = {
                "at": lambda: self.add("SequenceAt", [s, "minus"]), "any": lambda: self.add("SequenceAt", [s, "k"]),
                "concat": lambda: self.add("ConcatFromSequence", [s], axis=0), "columns": lambda: self.add("ConcatFromSequence", [s], axis=1),
                "stack": lambda: self.add("SequenceAt", [s, "k"]),
            }[kind]()  # fmt: skip
            self.outputs.append(info(v, T.FLOAT, None))

    def model(self) -> onnx.ModelProto:
        tensors = [info("x", T.FLOAT, ["a", 3]), info("y", T.FLOAT, [2, 3]), info("z", T.FLOAT, ["b", 3]), info("w", T.FLOAT, [6, 3])]
        scalars = [info("k", T.INT64, []), info("n", T.INT64, []), info("c", T.BOOL, [])]
        g = h.make_graph(self.nodes, "g", [h.make_value_info("q", SEQUENCE), *tensors, *scalars], self.outputs, [nh.from_array(a, n) for n, a in self.constants.items()])
        return h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=10)

    def feeds(self, seed: int) -> dict[str, Any]:
        r = np.random.default_rng(seed)
        make = lambda *s: r.standard_normal(s).astype(np.float32)  # noqa: E731
        return {
            "q": [make(int(r.integers(0, 4)), 3) for _ in range(int(r.integers(1, 4)))], "x": make(seed % 3, 3), "y": make(2, 3), "z": make(seed % 4 + 1, 3),
            "w": make(6, 3), "k": np.array(int(r.integers(-1, 1))), "n": np.array(int(r.integers(0, 3))), "c": np.array(bool(r.integers(0, 2))),
        }  # fmt: skip


def same(want: Any, got: Any) -> None:
    if isinstance(want, list):
        assert isinstance(got, list) and len(got) == len(want)
        for a, b in zip(want, got, strict=True):
            same(a, b)
        return
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("seed", range(24))
def test_random_sequences(seed: int) -> None:
    drawn = Drawn(seed)
    proto = drawn.model()
    target, threads = ON_EACH[seed % len(ON_EACH)]
    need(target)
    module = luthier.compile(proto, target=target, threads=threads)
    for k in range(3):
        feeds = drawn.feeds(31 * seed + k)
        for want, got in zip(run_onnxruntime(proto, feeds), module.run(feeds).values(), strict=True):
            same(want, got)


def model(nodes: list[onnx.NodeProto], ins: list[onnx.ValueInfoProto], outs: list[onnx.ValueInfoProto], **constants: Array) -> onnx.ModelProto:
    g = h.make_graph(nodes, "g", ins, outs, [nh.from_array(a, n) for n, a in constants.items()])
    return h.make_model(g, opset_imports=[h.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_parts_of_an_open_extent(axis: int, target: str) -> None:
    """How many there are, only the run knows; the last one is shorter. Numbers of all parts meet again along the axis."""
    need(target)
    nodes = [h.make_node("SplitToSequence", ["x", "size"], ["q"], axis=axis), h.make_node("SequenceAt", ["q", "k"], ["part"])]
    nodes += [h.make_node("ConcatFromSequence", ["q"], ["whole"], axis=axis), h.make_node("SequenceLength", ["q"], ["n"])]
    outs = [info("part", T.FLOAT, None), info("whole", T.FLOAT, None), info("n", T.INT64, [])]
    proto = model(nodes, [info("x", T.FLOAT, ["a", "b", "c"]), info("size", T.INT64, []), info("k", T.INT64, [])], outs)
    module = luthier.compile(proto, target=target)
    x = np.random.default_rng(axis).standard_normal((5, 4, 6)).astype(np.float32)
    for size in (1, 2, 3, 7):
        parts = np.split(x, range(size, x.shape[axis], size), axis)
        for k in (0, len(parts) - 1, -1):
            got = module.run({"x": x, "size": np.array(size), "k": np.array(k)})
            np.testing.assert_array_equal(got["part"], parts[k])
            np.testing.assert_array_equal(got["whole"], x)
            assert got["n"] == len(parts)
    with pytest.raises(LuthierError, match="SequenceAt"):
        module.run({"x": x, "size": np.array(2), "k": np.array(9)})
    with pytest.raises(LuthierError, match="SplitToSequence"):
        module.run({"x": x, "size": np.array(0), "k": np.array(0)})


def test_elements_that_do_not_fit_are_refused() -> None:
    proto = model([h.make_node("ConcatFromSequence", ["q"], ["y"], axis=1)], [h.make_value_info("q", SEQUENCE)], [info("y", T.FLOAT, None)])
    module = luthier.compile(proto)
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(module.run({"q": [x, 2 * x]})["y"], np.concatenate([x, 2 * x], 1))
    np.testing.assert_array_equal(module([x, 2 * x])[0], np.concatenate([x, 2 * x], 1))
    with pytest.raises(LuthierError, match="extents agree"):
        module.run({"q": [x, np.ones((4, 3), np.float32)]})
    with pytest.raises(InputError, match="list of arrays"):
        module.run({"q": x})
    with pytest.raises(InputError, match="missing"):
        module.run({})
    with pytest.raises(InputError, match="dtype"):
        module.run({"q": [x.astype(np.float64)]})


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
def test_optionals_at_the_door(target: str) -> None:
    """An optional input may be None or left out; what an If leaves empty is None."""
    need(target)
    kind = h.make_optional_type_proto(h.make_tensor_type_proto(T.FLOAT, [2]))
    full = h.make_graph([h.make_node("Identity", ["o"], ["a"])], "full", [], [h.make_value_info("a", kind)])
    empty = h.make_graph([h.make_node("Optional", [], ["b"], type=h.make_tensor_type_proto(T.FLOAT, [2]))], "empty", [], [h.make_value_info("b", kind)])
    nodes = [h.make_node("OptionalHasElement", ["o"], ["has"]), h.make_node("If", ["c"], ["y"], then_branch=full, else_branch=empty)]
    module = luthier.compile(model(nodes, [h.make_value_info("o", kind), info("c", T.BOOL, [])], [info("has", T.BOOL, []), h.make_value_info("y", kind)]), target=target)
    x = np.array([1, 2], np.float32)
    for given in (x, None):
        for c in (True, False):
            got = module.run({"o": given, "c": np.array(c)})
            assert got["has"] == (given is not None)
            if given is not None and c:
                np.testing.assert_array_equal(got["y"], x)
            else:
                assert got["y"] is None
    assert not module.run({"c": np.array(True)})["has"]
    get = luthier.compile(model([h.make_node("OptionalGetElement", ["o"], ["y"])], [h.make_value_info("o", kind)], [info("y", T.FLOAT, [2])]), target=target)
    np.testing.assert_array_equal(get.run({"o": x})["y"], x)
    with pytest.raises(LuthierError, match="optional"):
        get.run({"o": None})


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
def test_branches_of_several_ranks(target: str) -> None:
    """An output has the rank of the branch that was taken; what computes needs a rank that is known."""
    need(target)
    then = h.make_graph([h.make_node("Squeeze", ["x", "zero"], ["a"])], "then", [], [info("a", T.FLOAT, ["n"])])
    other = h.make_graph([h.make_node("Add", ["x", "x"], ["b"])], "else", [], [info("b", T.FLOAT, [1, "n"])])
    nodes = [h.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)]
    ins = [info("x", T.FLOAT, [1, "n"]), info("c", T.BOOL, [])]
    module = luthier.compile(model(nodes, ins, [info("y", T.FLOAT, None)], zero=np.array([0])), target=target)
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    for c, want in ((True, x[0]), (False, x + x)):
        got = module.run({"x": x, "c": np.array(c)})["y"]
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ShapeError, match="rank .* is not known when compiling"):
        luthier.compile(model([*nodes, h.make_node("Relu", ["y"], ["z"])], ins, [info("z", T.FLOAT, None)], zero=np.array([0])), target=target)
