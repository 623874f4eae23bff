"""The wasm target as a whole program, in all variants, through wasmtime.

Expected values come from numpy, onnxruntime and the loop-IR interpreter; the CPU target is never the reference."""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

import luthier
from luthier.backends.wasm_module import VARIANTS, WasmModule
from luthier.codegen.targets.target import parse_target
from luthier.codegen.wasm.main import ProgramPrinter
from luthier.errors import ArtifactError, CompilationError, InputError, KernelError, TargetError
from luthier.ir.dtypes import f32, i64, index
from luthier.ir.expr import Expr, const, load, var
from luthier.ir.interpret.programs import run_program
from luthier.ir.loop import Block, Buffer, Call, For, Func, If, Let, Stmt, Store, While, walk_stmts
from luthier.ir.program import Program
from luthier.module import Module

wasmtime = pytest.importorskip("wasmtime")

Array = np.ndarray[Any, Any]
ZERO = (const(0),)


@pytest.fixture(autouse=True)
def _every_thread_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small as the models here are, all threads take part."""
    monkeypatch.setattr("luthier.codegen.program.sharing.THREAD_WORK", 1)
    monkeypatch.setattr("luthier.codegen.program.sharing.SMALL_WORK", 0)


def model(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[tuple[str, int]], weights: dict[str, Array] | None = None) -> Any:
    initializers = [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()]
    outs = [h.make_tensor_value_info(n, t, None) for n, t in outputs]
    graph = h.make_graph(list(nodes), "test", list(inputs), outs, initializers)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9)


def value(name: str, dtype: int, shape: Sequence[Any]) -> Any:
    return h.make_tensor_value_info(name, dtype, list(shape))


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def targets(threads: Sequence[int] = (1, 2, 3)) -> list[Any]:
    return [pytest.param(f"wasm:{v}", n, id=f"{v}-{n}") for v in VARIANTS for n in (threads if "threads" in v else (1,))]


def deep_model(layers: int = 3, width: int = 96) -> tuple[Any, dict[str, Array]]:
    weights = {f"w{k}": normal(width, width, seed=k) / np.float32(np.sqrt(width)) for k in range(layers)}
    nodes, last = [], "x"
    for k in range(layers):
        nodes += [
            h.make_node("MatMul", [last, f"w{k}"], [f"m{k}"]), h.make_node("Tanh", [f"m{k}"], [f"t{k}"]),
            h.make_node("Add", [f"t{k}", last], [f"a{k}"]), h.make_node("Softmax", [f"a{k}"], [f"s{k}"], axis=0),
        ]  # fmt: skip
        last = f"s{k}"
    nodes.append(h.make_node("Transpose", [last], ["y"], perm=[1, 0]))
    return model(nodes, [value("x", T.FLOAT, ["n", width])], [("y", T.FLOAT)], weights), weights


def deep_reference(x: Array, weights: dict[str, Array]) -> Array:
    v = x.astype(np.float64)
    for w in weights.values():
        v = np.tanh(v @ w.astype(np.float64)) + v
        e = np.exp(v - v.max(0))
        v = e / e.sum(0)
    return v.T


@pytest.mark.parametrize(("target", "threads"), targets())
def test_layers_and_symbolic_rows(target: str, threads: int) -> None:
    """One module, many row counts, 0 included; results do not depend on the threads."""
    proto, weights = deep_model()
    module = luthier.compile(proto, target=target, threads=threads)
    alone = luthier.compile(proto, target=target, threads=1)
    for n in (1, 64, 7, 130, 2):
        x = normal(n, 96, seed=n)
        got = module.run({"x": x})["y"]
        np.testing.assert_allclose(got, deep_reference(x, weights), rtol=3e-4, atol=1e-6)
        np.testing.assert_array_equal(got, alone.run({"x": x})["y"])
    assert module.run({"x": normal(0, 96)})["y"].shape == (96, 0)


@pytest.mark.parametrize(("target", "threads"), targets((3,)))
def test_control_flow(target: str, threads: int) -> None:
    body = h.make_graph(
        [h.make_node("Add", ["s", "x"], ["s2"]), h.make_node("Identity", ["cin"], ["cout"]), h.make_node("Tanh", ["s2"], ["slice"])],
        "body", [value("i", T.INT64, []), value("cin", T.BOOL, []), value("s", T.FLOAT, ["n", 3])],
        [value("cout", T.BOOL, []), value("s2", T.FLOAT, ["n", 3]), value("slice", T.FLOAT, ["n", 3])],
    )  # fmt: skip
    then = h.make_graph([h.make_node("Add", ["y", "x"], ["a"])], "then", [], [value("a", T.FLOAT, ["n", 3])])
    other = h.make_graph([h.make_node("Exp", ["y"], ["b"])], "else", [], [value("b", T.FLOAT, ["n", 3])])
    nodes = [h.make_node("Loop", ["k", "", "x"], ["y", "ys"], body=body), h.make_node("If", ["c"], ["z"], then_branch=then, else_branch=other)]
    ins = [value("x", T.FLOAT, ["n", 3]), value("k", T.INT64, []), value("c", T.BOOL, [])]
    module = luthier.compile(model(nodes, ins, [("ys", T.FLOAT), ("z", T.FLOAT)]), target=target, threads=threads)
    x = normal(5, 3)
    for rounds in (4, 1, 0, 6):
        states = [x * np.float32(r + 2) for r in range(rounds)]
        last = states[-1] if rounds else x
        for c in (True, False):
            got = module.run({"x": x, "k": np.array(rounds), "c": np.array(c)})
            assert got["ys"].shape == (rounds, 5, 3)
            np.testing.assert_allclose(got["z"], last + x if c else np.exp(last), rtol=1e-5)
            if rounds:
                np.testing.assert_allclose(got["ys"], np.tanh(np.stack(states)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("target", "threads"), targets((2,)))
def test_extents_read_from_an_input(target: str, threads: int) -> None:
    """Outputs are allocated when their extents are known, in memory that grows."""
    nodes = [h.make_node("Reshape", ["x", "s"], ["z"]), h.make_node("Exp", ["z"], ["y"])]
    module = luthier.compile(model(nodes, [value("x", T.FLOAT, ["n", 4]), value("s", T.INT64, [2])], [("y", T.FLOAT)]), target=target, threads=threads)
    for n, s in ((6, (8, 3)), (6, (2, 12)), (60_000, (1000, 240)), (1, (4, 1))):
        x = normal(n, 4)
        got = module.run({"x": x, "s": np.array(s)})["y"]
        assert got.shape == s
        np.testing.assert_allclose(got, np.exp(x).reshape(s), rtol=1e-5)


def mix(kind: str) -> Func:
    """o[i] = a[i] / 2 + b[n - 1 - i], so that a chunk reads what other chunks wrote; ``kind``: the loop's."""
    n, i = var("n"), var("i")
    a, b = Buffer("p0", f32, (n,), "param", False), Buffer("p1", f32, (n,), "param", False)
    o = Buffer("o0", f32, (n,), "param")
    body = Store(o, (i,), load(a, [i]) * const(0.5, f32) + load(b, [n - 1 - i]))
    return Func(f"mix_{kind}", (a, b, o, n), For(i, const(0), n, kind, body))


def random_program(seed: int) -> Program:
    """Calls over ``n`` elements, in branches and counted loops, over temporaries and an extent read from memory."""
    r = random.Random(seed)
    n, m = var("n"), var("m")
    x, flags = Buffer("x", f32, (n,), "param", False), Buffer("flags", i64, (const(4),), "param", False)
    outs = (Buffer("y0", f32, (n,), "param"), Buffer("y1", f32, (m,), "param"))
    temps: list[Buffer] = []

    def fresh(size: Expr) -> Buffer:
        temps.append(Buffer(f"t{len(temps)}", f32, (size,), "global"))
        return temps[-1]

    def call(a: Buffer, b: Buffer, o: Buffer, size: Expr) -> Call:
        return Call(r.choice(("mix_parallel", "mix_parallel", "mix_serial")), (a, b, o, size))

    def block(ready: list[Buffer], depth: int, size: Expr) -> list[Stmt]:
        out: list[Stmt] = []
        for _ in range(r.randint(2, 6)):
            what = r.random()
            target = fresh(size)
            if what < 0.2 and depth < 2:
                sides = []
                for _ in range(2):
                    mine = list(ready)
                    inner = block(mine, depth + 1, size)
                    sides.append(Block((*inner, call(r.choice(mine), r.choice(mine), target, size))))
                out.append(If(load(flags, [const(r.randint(0, 3))]) < const(r.randint(0, 3), i64), sides[0], sides[1]))
            elif what < 0.4 and depth < 2:
                i = Buffer(f"i{len(temps)}", i64, (const(1),), "global")
                temps.append(i)
                other, k = fresh(size), var(f"k{len(temps)}", lo=None)
                out += [Store(i, ZERO, const(0, i64)), call(r.choice(ready), r.choice(ready), target, size)]
                mine = [*ready, target]
                inner = block(mine, depth + 1, size)
                out.append(While(load(i, ZERO) < load(flags, [const(r.randint(0, 3))]), Block((
                    Let(k, load(i, ZERO).cast(index)), *inner, call(r.choice(mine), target, other, size), call(other, r.choice(ready), target, size),
                    Store(i, ZERO, (k + 1).cast(i64)),
                ))))  # fmt: skip
            else:
                out.append(call(r.choice(ready), r.choice(ready), target, size))
            ready.append(target)
        return out

    ready = [x]
    body = block(ready, 0, n)
    body.append(call(ready[-1], r.choice(ready), outs[0], n))
    body.append(Let(m, load(flags, [const(3)]).cast(index)))
    late = [x, ready[-1]]
    body += block(late, 1, m)
    body.append(call(late[-1], r.choice(late), outs[1], m))
    kernels = {f.name: f for f in (mix("parallel"), mix("serial"))}
    return Program(f"random{seed}", (x, flags), outs, {n: (0, 0)}, {}, kernels, tuple(temps), Block(tuple(body)))


@pytest.mark.parametrize("seed", range(6))
def test_random_programs(seed: int) -> None:
    program = random_program(seed)
    generator = np.random.default_rng(seed)
    feeds: list[dict[str, Any]] = [
        {"x": generator.standard_normal(n, dtype=np.float32), "flags": np.array([*generator.integers(0, 4, 3), count])} for n, count in ((37, 37), (12, 5), (64, 20))
    ]
    expected = [run_program(program, f) for f in feeds]
    for target, threads in (("wasm:simd", 1), ("wasm:relaxed-threads", 2), ("wasm:simd-threads", 4)):
        module = Module.from_program(program, target, threads)
        for _ in range(8):
            for f, want in zip(feeds, expected, strict=True):
                got = module.run(f)
                for name in want:
                    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=f"{name}, {target}, {threads} threads")


def test_refusals() -> None:
    module = luthier.compile(deep_model()[0], target="wasm")
    with pytest.raises(InputError, match=r"input x: dimension 1 is 95, expected 96"):
        module.run({"x": normal(3, 95)})
    with pytest.raises(InputError, match=r"rank 3"):
        module.run({"x": normal(3, 96, 1)})
    assert module.run({"x": normal(3, 96)})["y"].shape == (96, 3)  # a refused call leaves the module as it was
    two = model([h.make_node("Add", ["a", "b"], ["y"])], [value("a", T.FLOAT, ["n", 2]), value("b", T.FLOAT, ["n", 2])], [("y", T.FLOAT)])
    with pytest.raises(InputError, match=r"input b: dimension 0 is 4, expected 3"):
        luthier.compile(two, target="wasm").run({"a": normal(3, 2), "b": normal(4, 2)})
    with pytest.raises(TargetError, match="no WebAssembly variant 'sse'"):
        luthier.compile(two, target="wasm:sse")


def test_memory_that_cannot_grow_is_an_error() -> None:
    nodes = [h.make_node("ConstantOfShape", ["s"], ["y"])]
    module = luthier.compile(model(nodes, [value("s", T.INT64, [3])], [("y", T.FLOAT)]), target="wasm")
    with pytest.raises(KernelError, match=r"out of memory: 16000000000 bytes for y"):
        module.run({"s": np.array([1000, 1000, 4000])})
    np.testing.assert_array_equal(module.run({"s": np.array([1, 2, 3])})["y"], np.zeros((1, 2, 3), np.float32))


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "uint64", "int32", "uint32", "int16", "uint16", "int8", "uint8"])
@pytest.mark.parametrize("variant", ["simd", "relaxed"])
def test_element_types(dtype: str, variant: str) -> None:
    """Add, multiply and compare against numpy; integers wrap."""
    d = np.dtype(dtype)
    t = h.np_dtype_to_tensor_dtype(d)
    rng = np.random.default_rng(1)
    a, b = ((rng.standard_normal(333) * 9).astype(d) if d.kind == "f" else rng.integers(np.iinfo(d).min, np.iinfo(d).max, 333, d, True) for _ in range(2))
    nodes = [h.make_node("Add", ["a", "b"], ["s"]), h.make_node("Mul", ["a", "b"], ["p"]), h.make_node("Less", ["a", "b"], ["l"])]
    proto = model(nodes, [value("a", t, ["n"]), value("b", t, ["n"])], [("s", t), ("p", t), ("l", T.BOOL)])
    got = luthier.compile(proto, target=f"wasm:{variant}").run({"a": a, "b": b})
    np.testing.assert_array_equal(got["s"], a + b)
    np.testing.assert_array_equal(got["p"], a * b)
    np.testing.assert_array_equal(got["l"], a < b)


@pytest.mark.parametrize("target", ["wasm", "wasm:simd-threads"])
def test_artifact(target: str, tmp_path: Path) -> None:
    proto, weights = deep_model()
    x = normal(9, 96)
    module = luthier.compile(proto, target=target, threads=2)
    folder = module.save(tmp_path / "m")
    again = luthier.load(folder, threads=2)
    assert isinstance(again, WasmModule) and again.variant == module.variant  # type: ignore[attr-defined]
    np.testing.assert_array_equal(again.run({"x": x})["y"], module.run({"x": x})["y"])
    np.testing.assert_allclose(again.run({"x": x})["y"], deep_reference(x, weights), rtol=3e-4, atol=1e-6)
    broken = bytearray((folder / "model.relaxed.wasm").read_bytes())
    broken[len(broken) // 2] ^= 1
    (folder / "model.relaxed.wasm").write_bytes(bytes(broken))
    with pytest.raises(ArtifactError, match="damaged"):
        luthier.load(folder)


def imports_and_exports(binary: bytes) -> tuple[list[str], list[str]]:
    m = wasmtime.Module(wasmtime.Engine(_config()), binary)
    return [f"{i.module}.{i.name}" for i in m.imports], [e.name for e in m.exports]


def _config() -> Any:
    c = wasmtime.Config()
    c.wasm_threads = c.wasm_relaxed_simd = c.shared_memory = True
    return c


def test_interface_of_the_variants() -> None:
    """One import, the exports of docs/web.md; all variants share layout and manifest."""
    module = luthier.compile(deep_model()[0], target="wasm")
    assert isinstance(module, WasmModule)
    for v in VARIANTS:
        imports, exports = imports_and_exports(module.binary(v))
        assert imports == ["env.memory"]
        assert sorted(exports) == sorted(["lt_bind", "lt_run"] + (["lt_worker", "lt_stop"] if "threads" in v else []))
    spec = module.manifest["wasm"]
    assert spec["weights"] % 64 == spec["heap"] % 64 == 0
    assert spec["io"] + 48 * 2 <= spec["weights"] and spec["weights"] + module.manifest["weights_bytes"] <= spec["heap"] <= spec["pages"] * 65536
    for name in ("simd", "relaxed", "threads"):
        wasmtime.Module.validate(wasmtime.Engine(_config()), base64.b64decode(spec["probes"][name]))


def test_variants_differ_in_what_they_need() -> None:
    """Without relaxed SIMD and threads in the engine, the baseline loads and the others do not."""
    c = wasmtime.Config()
    c.wasm_relaxed_simd = c.wasm_threads = False
    engine = wasmtime.Engine(c)
    module = luthier.compile(deep_model()[0], target="wasm")
    assert isinstance(module, WasmModule)
    wasmtime.Module.validate(engine, module.binary("simd"))
    probes = module.manifest["wasm"]["probes"]
    wasmtime.Module.validate(engine, base64.b64decode(probes["simd"]))
    for binary in (module.binary("relaxed"), module.binary("simd-threads"), base64.b64decode(probes["relaxed"]), base64.b64decode(probes["threads"])):
        with pytest.raises(wasmtime.WasmtimeError):
            wasmtime.Module.validate(engine, binary)


def test_error_block_as_documented() -> None:
    """A loader without this package's Python side reads the same numbers."""
    module = luthier.compile(deep_model()[0], target="wasm")
    assert isinstance(module, WasmModule)
    spec = module.manifest["wasm"]
    store = wasmtime.Store(wasmtime.Engine(_config()))
    memory = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(spec["pages"], None)))
    exports = wasmtime.Instance(store, wasmtime.Module(store.engine, module.binary("relaxed")), [memory]).exports(store)
    memory.write(store, struct.pack("<2i", 5, 97), spec["io"] + 16)
    assert exports["lt_bind"](store, 1) == 1
    status, kind, name, axis, got, want, _ = struct.unpack("<4i3q", memory.read(store, spec["error"], spec["error"] + 40))
    assert (status, kind, spec["names"][name], axis, got, want) == (1, 1, "x", 1, 97, 96)
    memory.write(store, struct.pack("<2i", 5, 96), spec["io"] + 16)
    assert exports["lt_bind"](store, 1) == 0
    address, size = struct.unpack("<2I", memory.read(store, spec["io"] + 48, spec["io"] + 56))
    assert size == 96 * 5 * 4 and address % 64 == 0 and address >= spec["heap"]


def test_profile_and_unknown_kernels() -> None:
    program = random_program(3)
    rows = Module.from_program(program, "wasm", 1).profile({"x": normal(50), "flags": np.array([1, 2, 0, 20])}, runs=3)
    sites = [s.callee for s in walk_stmts(program.body) if isinstance(s, Call)]
    assert [r["kernel"] for r in rows] == sites and rows[-1]["ms"] > 0
    program.kernels.clear()
    with pytest.raises(CompilationError, match="unknown kernel mix"):
        Module.from_program(program, "wasm")


def test_equal_kernels_are_printed_once() -> None:
    program = random_program(1)
    copy = mix("parallel")
    program.kernels["copy"] = Func("copy", copy.params, copy.body)
    calls = [Call("copy" if k % 2 else "mix_parallel", (program.inputs[0], program.inputs[0], program.outputs[0], next(iter(program.dims)))) for k in range(4)]
    one = Program("p", program.inputs, program.outputs[:1], program.dims, {}, program.kernels, (), Block(tuple(calls)))
    printer = ProgramPrinter(one)
    printer.print(True, False)
    assert printer.kernel_index["copy"] == printer.kernel_index["mix_parallel"]


def test_target_names() -> None:
    assert parse_target("wasm").kind == "wasm" and parse_target("wasm:simd128") == parse_target("wasm:simd")
    assert parse_target("wasm").caps.vector_bits == 128
    with pytest.raises(TargetError, match="no target 'wasn'"):
        parse_target("wasn")
