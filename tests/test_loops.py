"""Random Loops against onnxruntime: every way to end one, states that grow and shrink, scan outputs of any number of rounds."""

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
from luthier.errors import InvalidModel, KernelError, LuthierError
from tests.test_open_extents import webgpu_device

Array = np.ndarray[Any, Any]
ON_EACH = [("cpu", 1), ("cpu", 3), ("wasm", 1), ("webgpu", 1)]


def info(name: str, dtype: int, shape: list[Any] | None) -> onnx.ValueInfoProto:
    return h.make_tensor_value_info(name, dtype, shape)


def need(target: str) -> None:
    """Skips where this machine does not run ``target``."""
    if target == "wasm":
        pytest.importorskip("wasmtime")
    elif target == "webgpu":
        webgpu_device()


def run_onnxruntime(proto: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)  # type: ignore[no-any-return]


class Drawn:
    """A model with one Loop and feeds under which it ends. Its body: ``s' = s + 1`` of any number of states, each with an effect on the next."""

    def __init__(self, seed: int) -> None:
        r = self.random = random.Random(seed)
        self.constants: dict[str, Array] = {"one": np.float32(1), "first": np.array([1], np.int64), "last": np.array([1 << 40], np.int64), "half": np.float32(0.5)}
        self.inputs = [info("x", T.FLOAT, ["n", 2]), info("limit", T.INT64, []), info("go", T.BOOL, []), info("trips", T.INT64, [])]
        self.trip = r.choice(["", "const", "input", "huge"])
        self.constants["const"] = np.array(r.choice([0, 1, 3, 6]))
        self.constants["huge"] = np.array(r.choice([1 << 33, 1 << 61, (1 << 63) - 1]))
        self.start = r.choice(["", "true", "false", "go"])
        self.constants |= {"true": np.array(True), "false": np.array(False)}
        bounded = self.trip in ("const", "input")
        self.stop = r.choice(["same", "true", "limit"] if bounded else ["limit"])
        nodes = {"same": ["Identity", ["c"]], "true": ["Identity", ["true"]], "limit": ["Less", ["i", "limit"]]}[self.stop]
        self.body = [h.make_node(nodes[0], nodes[1], ["c_out"])]
        self.states: list[str] = []
        self.starts: list[str] = []
        self.scans: list[str] = []
        for k in range(r.choice([1, 1, 2, 3])):
            self.state(k, r.choice(["fixed", "append", "double", "drop", "columns"]))
        if r.random() < 0.8:
            for k in range(r.choice([1, 2])):
                self.scan(k, r.choice(["state", "round", "some", "outer"]))

    def add(self, op: str, inputs: list[str], output: str, **attrs: Any) -> str:
        self.body.append(h.make_node(op, inputs, [output], **attrs))
        return output

    def state(self, k: int, kind: str) -> None:
        s, out = f"s{k}", f"t{k}"
        self.add("Mul", [s, "half"], f"a{k}")
        self.add("Add", [f"a{k}", "one"], f"b{k}")
        if kind == "fixed":
            self.add("Identity", [f"b{k}"], out)
        elif kind == "append":
            self.add("Concat", [f"b{k}", "x"], out, axis=0)
        elif kind == "double":
            self.add("Concat", [f"b{k}", s], out, axis=0)
        elif kind == "columns":
            self.add("Concat", [s, f"b{k}"], out, axis=1)
        else:
            self.add("Slice", [f"b{k}", "first", "last"], out)
        self.states.append(s)
        self.starts.append("x")

    def scan(self, k: int, kind: str) -> None:
        out = f"y{k}"
        if kind == "state":
            self.add("ReduceSum", ["s0"], out, keepdims=0)
        elif kind == "round":
            self.add("Add", ["i", "i"], out)
        elif kind == "outer":
            self.add("Mul", ["x", "x"], out)
        else:
            self.add("Cast", ["i"], f"{out}.f", to=T.FLOAT)
            self.add("Greater", ["x", "half"], f"{out}.m")
            self.add("NonZero", [f"{out}.m"], f"{out}.z")
            self.add("Cast", [f"{out}.z"], f"{out}.g", to=T.FLOAT)
            self.add("Add", [f"{out}.g", f"{out}.f"], out)
        self.scans.append(out)

    def model(self) -> onnx.ModelProto:
        ins = [info("i", T.INT64, []), info("c", T.BOOL, []), *(info(s, T.FLOAT, None) for s in self.states)]
        outs = [info("c_out", T.BOOL, []), *(info(f"t{k}", T.FLOAT, None) for k in range(len(self.states)))]
        outs += [info(y, T.INT64 if any(n.output[0] == y and n.input[0] == "i" for n in self.body) else T.FLOAT, None) for y in self.scans]
        body = h.make_graph(self.body, "body", ins, outs)
        trip = "trips" if self.trip == "input" else self.trip
        results = [f"r{k}" for k in range(len(self.states))] + [f"z{k}" for k in range(len(self.scans))]
        nodes = [h.make_node("Loop", [trip, self.start, *self.starts], results, body=body)]
        nodes += [h.make_node("Identity", [v], [f"out_{v}"]) for v in results]
        types = [o.type.tensor_type.elem_type for o in outs[1:]]
        g = h.make_graph(nodes, "g", self.inputs, [info(f"out_{v}", t, None) for v, t in zip(results, types)], [nh.from_array(a, n) for n, a in self.constants.items()])
        return h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=10)

    def feeds(self, seed: int) -> dict[str, Array]:
        r = np.random.default_rng(seed)
        return {
            "x": r.standard_normal((seed % 3 + 1, 2)).astype(np.float32), "limit": np.array(int(r.integers(-1, 5))),
            "go": np.array(bool(r.integers(0, 4))), "trips": np.array(int(r.integers(0, 6))),
        }  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_random_loops(seed: int) -> None:
    drawn = Drawn(seed)
    proto = drawn.model()
    target, threads = ON_EACH[seed % len(ON_EACH)]
    need(target)
    module = luthier.compile(proto, target=target, threads=threads)
    for k in range(4):
        feeds = drawn.feeds(100 * seed + k)
        for name, want, got in zip([o.name for o in proto.graph.output], run_onnxruntime(proto, feeds), module.run(feeds).values(), strict=True):
            assert got.dtype == want.dtype
            if want.size or drawn.scans and name.startswith("out_z") and got.shape[0] != len(want):
                assert got.shape == want.shape, (target, name)
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=f"{target} {name}")
            else:
                assert got.size == 0, (target, name)


@pytest.mark.parametrize("keeps_going", [True, False])
def test_a_loop_that_never_starts_gives_no_rows(keeps_going: bool) -> None:
    """After a call that had rows: nothing of it is seen again."""
    body = h.make_graph(
        [h.make_node("Identity", ["c"], ["d"]) if keeps_going else h.make_node("And", ["c", "c"], ["d"]), h.make_node("Add", ["v", "v"], ["w"])], "body",
        [info("i", T.INT64, []), info("c", T.BOOL, []), info("v", T.FLOAT, [2])], [info("d", T.BOOL, []), info("w", T.FLOAT, [2]), info("w", T.FLOAT, [2])],
    )  # fmt: skip
    nodes = [h.make_node("Loop", ["m", "go", "x"], ["y", "rows"], body=body), h.make_node("ReduceSum", ["rows", "first"], ["sum"], keepdims=0)]
    outs = [info("y", T.FLOAT, [2]), info("rows", T.FLOAT, None), info("sum", T.FLOAT, [2])]
    constants = [nh.from_array(np.array(5), "m"), nh.from_array(np.array([0]), "first")]
    g = h.make_graph(nodes, "g", [info("x", T.FLOAT, [2]), info("go", T.BOOL, [])], outs, constants)
    proto = h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=10)
    x = np.array([1, 2], np.float32)
    for target in ("cpu", "wasm", "webgpu"):
        need(target)
        module = luthier.compile(proto, target=target)
        assert module.run({"x": x, "go": np.array(True)})["rows"].shape == (5, 2)
        got = module.run({"x": x, "go": np.array(False)})
        assert got["rows"].shape == (0, 2)
        np.testing.assert_array_equal(got["sum"], [0, 0])
        np.testing.assert_array_equal(got["y"], x)


@pytest.mark.parametrize("target", ["cpu", "wasm"])
@pytest.mark.parametrize("trips", [1 << 33, 1 << 45, 1 << 61, (1 << 63) - 1])
def test_trip_counts_that_no_memory_holds_are_refused(target: str, trips: int) -> None:
    """A loop that nothing stops has room for all its rounds, or does not begin."""
    need(target)
    body = h.make_graph(
        [h.make_node("Identity", ["c"], ["d"])], "body", [info("i", T.INT64, []), info("c", T.BOOL, [])], [info("d", T.BOOL, []), info("i", T.INT64, [])],
    )  # fmt: skip
    g = h.make_graph([h.make_node("Loop", ["m", ""], ["rows"], body=body)], "g", [info("m", T.INT64, [])], [info("rows", T.INT64, None)])
    module = luthier.compile(h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=10), target=target)
    with pytest.raises((KernelError, LuthierError), match="memory|bytes|trip count"):
        module.run({"m": np.array(trips)})
    np.testing.assert_array_equal(module.run({"m": np.array(3)})["rows"], [0, 1, 2])


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
def test_a_loop_in_a_loop(target: str) -> None:
    """The inner one runs as often as the outer one has: its rows are of another number each time, its state grows in the outer one's."""
    need(target)
    rows = [h.make_node("Identity", ["ic"], ["id"]), h.make_node("Concat", ["iv", "x"], ["iw"], axis=0), h.make_node("ReduceSum", ["iw"], ["row"], keepdims=0)]
    ins = [info("j", T.INT64, []), info("ic", T.BOOL, []), info("iv", T.FLOAT, None)]
    inner = h.make_graph(rows, "inner", ins, [info("id", T.BOOL, []), info("iw", T.FLOAT, None), info("row", T.FLOAT, [])])
    nodes = [h.make_node("Less", ["i", "limit"], ["oc"]), h.make_node("Loop", ["i", "", "v"], ["w", "part"], body=inner)]
    nodes += [h.make_node("ReduceSum", ["part"], ["all"], keepdims=0), h.make_node("Concat", ["seen", "part"], ["more"], axis=0)]
    ins = [info("i", T.INT64, []), info("c", T.BOOL, []), info("v", T.FLOAT, None), info("seen", T.FLOAT, None)]
    outs = [info("oc", T.BOOL, []), info("w", T.FLOAT, None), info("more", T.FLOAT, None), info("all", T.FLOAT, [])]
    outer = h.make_graph(nodes, "outer", ins, outs)
    g = h.make_graph(
        [h.make_node("Loop", ["", "go", "x", "none"], ["y", "parts", "sums"], body=outer)], "g",
        [info("x", T.FLOAT, ["n"]), info("limit", T.INT64, []), info("go", T.BOOL, [])],
        [info("y", T.FLOAT, None), info("parts", T.FLOAT, None), info("sums", T.FLOAT, None)], [nh.from_array(np.zeros(0, np.float32), "none")],
    )  # fmt: skip
    proto = h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=10)
    module = luthier.compile(proto, target=target)
    x = np.array([1, 2, 3], np.float32)
    for limit, go in ((3, True), (0, True), (5, True), (2, False)):
        feeds = {"x": x, "limit": np.array(limit), "go": np.array(go)}
        for want, got in zip(run_onnxruntime(proto, feeds), module.run(feeds).values(), strict=True):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_loop_that_never_ends_is_refused() -> None:
    body = h.make_graph([h.make_node("Identity", ["c"], ["d"])], "body", [info("i", T.INT64, []), info("c", T.BOOL, [])], [info("d", T.BOOL, []), info("i", T.INT64, [])])
    g = h.make_graph([h.make_node("Loop", ["", "on"], ["rows"], body=body)], "g", [], [info("rows", T.INT64, None)], [nh.from_array(np.array(True), "on")])
    with pytest.raises(InvalidModel, match="never ends"):
        luthier.compile(h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=10))
