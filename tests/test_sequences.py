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
from tests.test_loops import ON_EACH, info, run_onnxruntime

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
    module = luthier.compile(proto, target=target, threads=threads)
    for k in range(3):
        feeds = drawn.feeds(31 * seed + k)
        for want, got in zip(run_onnxruntime(proto, feeds), module.run(feeds).values(), strict=True):
            same(want, got)
