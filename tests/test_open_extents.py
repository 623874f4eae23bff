"""Random graphs over open extents, several layers of one kind with other constants among them, at several sizes against numpy."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import luthier
from luthier.errors import TargetError

Array = np.ndarray[Any, Any]
NAMES = ("b", "t", "n", "k", "i0", "i1", "e0", "e1", "o0", "p0", "j", "position", "r.0", "2x")  # the compiler's own names among them
SIZES = ((1, 1), (2, 5), (3, 40))
FAR = 2**63 - 1


class Sketch:
    """A graph that grows, with the value of every tensor at each of the sizes."""

    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)
        self.g = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.values: dict[str, list[Array]] = {}
        self.open = self.r.sample(NAMES, 2)
        a, b = self.open
        self.shapes = {"x": (a, b, 6), "w": (a, 4, b)}
        for name, shape in self.shapes.items():
            self.values[name] = [self.g.standard_normal([dict(zip(self.open, s)).get(d, d) for d in shape]).astype(np.float32) for s in SIZES]

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, op: str, inputs: Sequence[str], f: Callable[..., Array], *extra: str, **attributes: Any) -> str:
        """A node whose value is ``f`` of its ``inputs``' values; ``extra``: inputs that are constants."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [*inputs, *extra], [name], **attributes))
        self.values[name] = [np.asarray(f(*args)) for args in zip(*(self.values[i] for i in inputs))]
        return name

    def pick(self, rank: int | None = None) -> str:
        """A tensor, rather a late one, of a rank where one is asked for and nothing empty."""
        fits = [n for n, vs in self.values.items() if (rank is None or vs[0].ndim >= rank) and vs[1].size and vs[1].size < 20_000]
        return self.r.choice(fits[-6:])

    def axis(self, x: str) -> int:
        return self.r.randrange(self.values[x][0].ndim)

    # ---------------------------------------------------------------- the kinds of nodes

    def slice(self) -> None:
        x = self.pick(1)
        axis = self.axis(x)
        for _ in range(self.r.randint(1, 3)):  # the very same layer with other constants
            start, end, step = self.r.choice(((1, FAR, 1), (2, FAR, 1), (4, FAR, 1), (0, -1, 1), (1, -2, 1), (-1, -FAR, -1), (-3, FAR, 1), (0, 3, 1), (0, FAR, 2), (1, FAR, 3), (7, 1, -2)))
            where = (slice(None),) * axis + (slice(start, None if abs(end) == FAR else end, step),)
            self.add("Slice", [x], lambda a, where=where: a[where], *(self.constant([c]) for c in (start, end, axis, step)))

    def pad(self) -> None:
        x = self.pick(1)
        n = self.values[x][0].ndim
        pads = [(self.r.randint(0, 3), self.r.randint(0, 3)) for _ in range(n)]
        self.add("Pad", [x], lambda a: np.pad(a, pads), self.constant([p[0] for p in pads] + [p[1] for p in pads]))

    def concat(self) -> None:
        x = self.pick(1)
        axis = self.axis(x)
        self.add("Concat", [x, x, x][: self.r.randint(2, 3)], lambda *a: np.concatenate(a, axis), axis=axis)

    def elementwise(self) -> None:
        x = self.pick()
        others = [n for n, vs in self.values.items() if all(a.shape == b.shape for a, b in zip(vs, self.values[x]))]
        self.add("Add", [x, self.r.choice(others)], lambda a, b: a + b)
        if self.r.random() < 0.5:
            self.add("Tanh", [list(self.values)[-1]], np.tanh)

    def softmax(self) -> None:
        x = self.pick(2)
        axis = self.axis(x)

        def f(a: Array) -> Array:
            e = np.exp(a - a.max(axis, keepdims=True, initial=-np.inf))
            return e / e.sum(axis, keepdims=True)

        self.add("Softmax", [x], f, axis=axis)

    def reduce(self) -> None:
        x = self.pick(2)
        axis = self.axis(x)
        keep = self.r.randint(0, 1)
        self.add("ReduceSum", [x], lambda a: a.sum(axis, keepdims=bool(keep)), self.constant([axis]), keepdims=keep)

    def transpose(self) -> None:
        x = self.pick(2)
        perm = self.r.sample(range(self.values[x][0].ndim), self.values[x][0].ndim)
        self.add("Transpose", [x], lambda a: a.transpose(perm), perm=perm)

    def matmul(self) -> None:
        x = self.pick(2)
        widths = {v.shape[-1] for v in self.values[x]}
        if len(widths) == 1:
            w = self.g.standard_normal((widths.pop(), self.r.choice((3, 5, 16)))).astype(np.float32) / 4
            self.add("MatMul", [x], lambda a: a @ w, self.constant(w, np.float32))
        else:
            self.add("Einsum", [x], lambda a: np.einsum("...ik,...jk->...ij", a, a), x, equation="...ik,...jk->...ij")
            self.add("Tanh", [list(self.values)[-1]], np.tanh)

    def trilu(self) -> None:
        if self.r.random() < 0.6:
            self.matmul()
        x = list(self.values)[-1] if self.values[list(self.values)[-1]][0].ndim >= 2 else self.pick(2)
        upper, k = self.r.randint(0, 1), self.r.randint(-2, 2)
        self.add("Trilu", [x], lambda a: np.triu(a, k) if upper else np.tril(a, k), self.constant(k), upper=upper)

    def position(self) -> None:
        """An epilogue that asks where it is: only the first few of an axis, or those off its start."""
        if self.r.random() < 0.6:
            self.matmul()
        x = self.r.choice(list(self.values)[-2:])
        if not self.values[x][0].ndim:
            return
        axis, limit = self.axis(x), self.r.randint(0, 4)
        n = self.values[x][0].ndim
        shape = [1] * n
        shape[axis] = -1
        dims = self.add("Shape", [x], lambda a: np.array(a.shape[axis : axis + 1]), start=axis, end=axis + 1)
        one = self.add("Squeeze", [dims], lambda a: a[0])
        count = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node("Range", [self.constant(0), one, self.constant(1)], [count]))
        self.values[count] = [np.arange(v.shape[axis]) for v in self.values[x]]
        mask = self.add("Less", [count], lambda a: a < limit, self.constant(limit))
        where = self.add("Reshape", [mask], lambda a: a.reshape(shape), self.constant(shape))
        self.add("Where", [where, x], lambda m, a: np.where(m, a, np.float32(2)), self.constant(2, np.float32))
        for name in (count, dims, one, mask, where):  # no floats: nothing else reads them
            del self.values[name]

    def cumsum(self) -> None:
        x = self.pick(1)
        axis = self.axis(x)
        self.add("CumSum", [x], lambda a: a.cumsum(axis), self.constant(axis))

    def gather(self) -> None:
        x = self.pick(2)
        axis = self.axis(x)
        at = [self.r.choice((0, -1)) for _ in range(self.r.randint(1, 3))]
        if all(v.shape[axis] for v in self.values[x]):
            self.add("Gather", [x], lambda a: a.take(at, axis), self.constant(at), axis=axis)

    def tile(self) -> None:
        x = self.pick(1)
        times = [self.r.randint(1, 2) for _ in self.values[x][0].shape]
        self.add("Tile", [x], lambda a: np.tile(a, times), self.constant(times))

    KINDS = (slice, slice, slice, slice, pad, concat, elementwise, elementwise, softmax, reduce, transpose, matmul, trilu, trilu, position, position, cumsum, gather, tile)


def random_graph(seed: int) -> tuple[Any, list[tuple[dict[str, Array], dict[str, Array]]]]:
    """(model, [(feeds, wanted outputs) of each size])."""
    s = Sketch(seed)
    for _ in range(s.r.randint(3, 7)):
        s.r.choice(s.KINDS)(s)
    used = {i for n in s.nodes for i in n.input}
    outputs = [n for n in s.values if n not in s.shapes and (n not in used or s.r.random() < 0.3)]
    infos = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(s.values[n][0].dtype), [None] * s.values[n][0].ndim) for n in outputs]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in s.shapes.items()]
    model = helper.make_model(helper.make_graph(s.nodes, "g", inputs, infos, s.constants), opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    runs = [({n: s.values[n][k] for n in s.shapes}, {n: s.values[n][k] for n in outputs}) for k in range(len(SIZES))]
    return model, runs


CASES = [("cpu", seed) for seed in (*range(36), 44, 50, 282, 299, 359)] + [(target, seed) for target in ("wasm", "webgpu") for seed in (4, 14, 21, 29, 34)]


@pytest.mark.parametrize(("target", "seed"), CASES)
def test_random_graph(target: str, seed: int) -> None:
    if target == "wasm":
        pytest.importorskip("wasmtime")
    if target == "webgpu":
        webgpu_device()
    model, runs = random_graph(seed)
    module = luthier.compile(model, target=target, threads=1, debug="bounds" if target == "cpu" and seed % 4 == 0 else None)
    for feeds, want in runs:
        got = module.run(feeds)
        for name, w in want.items():
            assert got[name].shape == w.shape
            np.testing.assert_allclose(got[name], w, rtol=1e-4, atol=1e-4, err_msg=f"{name} of {onnx.printer.to_text(model.graph)}")


def webgpu_device() -> None:
    """Skips where there is none."""
    pytest.importorskip("wgpu")
    from luthier.backends.webgpu_device import device

    try:
        device()
    except TargetError as e:
        pytest.skip(str(e))


def cumulative(shape: tuple[Any, ...], axis: int) -> Any:
    g = helper.make_graph(
        [helper.make_node("CumSum", ["x", "axis"], ["y"])], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))], [numpy_helper.from_array(np.array(axis), "axis")],
    )  # fmt: skip
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 7, 13), (3, 7, "n"), ("b", 7, "n"), (3, 7, 61)])
def test_cumulative_sums_end_within_a_group_of_threads(shape: tuple[Any, ...], axis: int) -> None:
    """The last group of threads has more of them than there are points left: those must not store into the next row."""
    webgpu_device()
    x = np.random.default_rng(0).standard_normal([{"b": 3, "n": 13}.get(d, d) for d in shape]).astype(np.float32)
    module = luthier.compile(cumulative(shape, axis), target="webgpu")
    np.testing.assert_allclose(module.run({"x": x})["y"], x.cumsum(axis), rtol=1e-5, atol=1e-5)
