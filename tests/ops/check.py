"""One operator or graph against its definitions: Compute by the interpreter, ``Op.reference``, onnx, onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luthier.ir.builder import Names, make_node, operator
from luthier.ir.compute import Compute
from luthier.ir.dtypes import from_numpy
from luthier.ir.expr import Expr, free_vars, var
from luthier.ir.graph import Graph, Node, TensorType, Value, subgraphs
from luthier.ir.interpret.computes import evaluate
from luthier.ir.interpret.evaluate import SYMBOLS, bind_symbols, evaluate_node
from luthier.ir.interpret.loops import evaluate_expr, run_func, storage
from luthier.ir.loop import Buffer
from luthier.ir.op import Kernel, lookup

Array = np.ndarray[Any, Any]
COMPILED = False  # check_op also compiles and runs every node on this machine (set by the fixture in conftest.py)


def extent(e: Expr, dims: Mapping[str, int]) -> int:
    return int(evaluate_expr(e, dims))


def shape_of(shape: Sequence[Expr], dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(extent(s, dims) for s in shape)


def bind(v: Value, a: Array, dims: dict[str, int]) -> None:
    """Symbols that array ``a`` of value ``v`` decides, checked where they are known already."""
    assert a.ndim == v.rank, f"{v!r} got an array of shape {a.shape}"
    for s, n in zip(v.shape, a.shape, strict=True):
        if s.op == "var":
            assert dims.setdefault(s.attr[0], n) == n, f"{v!r}: {s!r} is {dims[s.attr[0]]} and {n}"
        elif all(x.attr[0] in dims for x in free_vars(s)):
            assert extent(s, dims) == n, f"{v!r} got an array of shape {a.shape} with {dims}"
    if v.content is not None:
        for e, x in zip(v.content, a.reshape(-1), strict=True):
            if v.bound and e.op == "var":
                dims.setdefault(e.attr[0], float(x) if e.dtype.is_float else int(x))  # type: ignore[arg-type]
            elif all(y.attr[0] in dims for y in free_vars(e)):
                assert extent(e, dims) == int(x), f"{v!r}: content {e!r} is {extent(e, dims)}, the tensor says {x}"


def run_node(node: Node, args: Sequence[Array | None], dims: dict[str, int]) -> list[Array]:
    """The outputs of one node by its Compute, Kernel or legalised Graph."""
    ins: list[Buffer | None] = [None if v is None else Buffer(f"in{k}", v.dtype, v.shape, "param", False) for k, v in enumerate(node.inputs)]
    outs = [Buffer(f"out{k}", v.dtype, v.shape, "param") for k, v in enumerate(node.outputs)]
    c = operator(node).compute(node, ins, outs)
    arrays = {b.name: np.asarray(a, order="C") for b, a in zip(ins, args, strict=True) if b is not None and a is not None}
    if isinstance(c, Graph):
        env = {v: a for v, a in zip(c.inputs, args, strict=True) if a is not None}
        return run_nodes(c, env, dims)
    if isinstance(c, Kernel):
        given = dict(arrays)
        for b in (*outs, *c.temps):
            given[b.name] = np.zeros(shape_of(c.capacity.get(b.name, b.shape), dims), storage(b.dtype))
        run_func(c.func, given, dims)
        for s, (name, at) in c.symbols.items():
            dims[s.attr[0]] = int(given[name].reshape(-1)[at])
        res = []
        for b in outs:
            want = shape_of(b.shape, dims)
            res.append(given[b.name].reshape(-1)[: int(np.prod(want))].reshape(want))
        return res
    assert isinstance(c, Compute)
    for b in c.outs:
        assert b in {o.name for o in outs}
    missing = [d.attr[0] for d in c.dims if d.attr[0] not in dims]
    assert not missing, f"{node}: the Compute needs the values of {missing}, which nothing defines"
    got = evaluate(c, arrays, dims)
    return [got[b.name] for b in outs]


def run_compiled(node: Node, args: Sequence[Array | None]) -> list[Array]:
    """The outputs of one node as a module compiled for this machine, one thread."""
    from luthier.codegen.targets.target import parse_target
    from luthier.module import Module
    from luthier.pipeline import compile_program

    target = parse_target("cpu")
    ins = [v for v in node.inputs if v is not None and v.data is None]
    graph = Graph("one", ins, list(node.outputs), [node])
    module = Module.from_program(compile_program(graph, target.caps), target, 1)
    feeds = {v.name: a for v, a in zip(node.inputs, args, strict=True) if v is not None and v.data is None and a is not None}
    got = module.run(feeds)  # in the order of the outputs; passes may rename them
    return list(got.values())


def run_nodes(graph: Graph, env: dict[Value, Array], dims: dict[str, int]) -> list[Array]:
    """Like ``luthier.ir.interpret.evaluate.run_nodes``, by Compute instead of reference."""

    def read(v: Value | None) -> Array | None:
        return None if v is None else v.data if v.data is not None else env[v]

    for v, a in list(env.items()):
        bind(v, a, dims)
    for n in graph.nodes:
        if any(True for _ in subgraphs(n)) or lookup(n.op) is None:
            inner: dict[Value, Any] = {**env, SYMBOLS: {}}
            for v in env:
                bind_symbols(inner, v)
            outs = evaluate_node(n, inner)
        else:
            outs = run_node(n, [read(v) for v in n.inputs], dims)
        for v, a in zip(n.outputs, outs, strict=True):
            assert a.dtype == storage(v.dtype), f"{n}: {v!r} came as {a.dtype}"
            bind(v, a, dims)
            env[v] = a
    return [x for v in graph.outputs if (x := read(v)) is not None]


def run_graph(graph: Graph, feeds: Mapping[str, Array]) -> list[Array]:
    """Graph outputs in order, every node through its Compute."""
    return run_nodes(graph, {v: np.asarray(feeds[v.name]) for v in graph.inputs}, {})


def close(got: Array, want: Array, rtol: float, atol: float, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert got.dtype == want.dtype, f"{what}: type {got.dtype}, expected {want.dtype}"
    if want.dtype.kind in "iub" or want.dtype.name.startswith(("int", "uint")):
        np.testing.assert_array_equal(got, want, err_msg=what)
    else:
        np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol, err_msg=what)


def build(op: str, arrays: Sequence[Array | None], attrs: Mapping[str, Any], outputs: int, symbolic: str, const: Sequence[int]) -> Node:
    """A node on fresh values. ``symbolic``: "" static shapes, "shared" one symbol per extent, "distinct" one per dimension."""
    ins: list[Value | None] = []
    for k, a in enumerate(arrays):
        if a is None:
            ins.append(None)
            continue
        if k in const:
            ins.append(Value.const(f"x{k}", a))
            continue
        dims: list[Any] = []
        plain = not symbolic or (a.ndim == 1 and a.dtype == np.int64) or (op == "Resize" and k > 0)  # such inputs decide shapes: their length must be known
        for d, n in enumerate(a.shape):
            dims.append(n if plain else var(f"n{n}") if symbolic == "shared" and n > 1 else var(f"d{k}_{d}") if symbolic == "distinct" else n)
        ins.append(Value(f"x{k}", TensorType.of(from_numpy(a.dtype), dims)))
    plain_attrs = {k: tuple(v) if isinstance(v, list) else v for k, v in attrs.items()}
    return make_node(op, ins, plain_attrs, names=Names(), outputs=outputs)


def check_op(
    op: str, arrays: Sequence[Any], attrs: Mapping[str, Any] | None = None, *, outputs: int = 1, const: Sequence[int] = (),
    symbolic: Sequence[str] = ("", "shared"), rtol: float = 1e-5, atol: float = 1e-6, want: Sequence[Array] | None = None, oracle: str = "ort",
) -> list[Array]:
    """Compute == reference == an independent oracle, with static and with symbolic shapes.

    ``const``: inputs given as constants. ``oracle``: "ort", "onnx", or "" when ``want`` is given or none exists. Returns the
    outputs of the reference."""
    arrays = [None if a is None else np.asarray(a) for a in arrays]
    attrs = dict(attrs or {})
    ref: list[Array] = []
    for mode in symbolic:
        node = build(op, arrays, attrs, outputs, mode, const)
        ref = [np.asarray(a) for a in operator(node).reference(node, *arrays)][:outputs]
        dims: dict[str, int] = {}
        for v, a in zip(node.inputs, arrays, strict=False):
            if v is not None and a is not None:
                bind(v, a, dims)
        got = run_node(node, arrays[: len(node.inputs)], dims)
        if COMPILED:
            for k, (g, r) in enumerate(zip(run_compiled(node, arrays[: len(node.inputs)]), ref, strict=True)):
                close(g, r, rtol, atol, f"{op} output {k}, {mode or 'static'} shapes: compiled against reference")
        for k, (g, r, v) in enumerate(zip(got, ref, node.outputs, strict=True)):
            assert shape_of(v.shape, dims) == g.shape
            close(g, r, rtol, atol, f"{op} output {k}, {mode or 'static'} shapes: compute against reference")
    if want is None and oracle:
        want = oracle_outputs(op, arrays, attrs, outputs, oracle)
    for k, (r, w) in enumerate(zip(ref, want or (), strict=False)):
        close(r, np.asarray(w), rtol, atol, f"{op} output {k}: reference against {oracle}")
    return ref


def onnx_model(op: str, arrays: Sequence[Array | None], attrs: Mapping[str, Any], outputs: int) -> Any:
    """The equivalent model of one node; input names x0, x1 ..., outputs y0 ..."""
    import onnx
    from onnx import helper

    domain, _, name = op.rpartition("::")
    node = helper.make_node(name, ["" if a is None else f"x{k}" for k, a in enumerate(arrays)], [f"y{k}" for k in range(outputs)], domain=domain, **attrs)
    ins = [helper.make_tensor_value_info(f"x{k}", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for k, a in enumerate(arrays) if a is not None]
    outs = [helper.make_empty_tensor_value_info(f"y{k}") for k in range(outputs)]
    graph = helper.make_graph([node], "one", ins, outs)
    version = min(onnx.defs.onnx_opset_version(), 25)
    opsets = [helper.make_opsetid("", version)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def oracle_outputs(op: str, arrays: Sequence[Array | None], attrs: Mapping[str, Any], outputs: int, oracle: str) -> list[Array]:
    model = onnx_model(op, arrays, attrs, outputs)
    feeds = {f"x{k}": a for k, a in enumerate(arrays) if a is not None}
    if oracle == "onnx":
        from onnx.reference import ReferenceEvaluator

        return [np.asarray(a) for a in ReferenceEvaluator(model).run(None, feeds)]
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(a) for a in session.run(None, feeds)]
