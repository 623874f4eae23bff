"""``cuda:emulate``: the printed text of every family of kernels runs on the host in two orders; races, divergent barriers and
indices out of bounds are found; what has no GPU is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

import luthier
from luthier import settings
from luthier.backends.cuda_emulate import Emulator, build, compiler, translation_unit
from luthier.backends.cuda_module import CudaModule
from luthier.errors import KernelError, TargetError

Array = np.ndarray[Any, Any]

try:
    compiler()
except TargetError as e:
    pytest.skip(str(e), allow_module_level=True)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def compiled(
    nodes: list[Any], inputs: dict[str, tuple[Any, ...]], weights: dict[str, Array] | None = None, out: int = T.FLOAT
) -> CudaModule:
    ins = [h.make_tensor_value_info(n, T.FLOAT, list(s)) for n, s in inputs.items()]
    g = h.make_graph(
        nodes,
        "g",
        ins,
        [h.make_tensor_value_info("y", out, None)],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    m = luthier.compile(h.make_model(g, opset_imports=[h.make_opsetid("", 21)], ir_version=10), target="cuda:emulate")
    assert isinstance(m, CudaModule)
    return m


W, ROW, X4 = normal(70, 44, seed=5), normal(300, 64, seed=6), normal(1, 6, 9, 9, seed=7)
K = normal(8, 6, 3, 3, seed=8)
Q = [normal(1, 2, 19, 16, seed=k) for k in range(3)]


def conv(x: Array, k: Array) -> Array:
    p = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(p, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, k)


FAMILIES: dict[str, tuple[Callable[[], CudaModule], dict[str, Array], Array, str]] = {
    "points": (lambda: compiled([h.make_node("Abs", ["x"], ["y"])], {"x": ("n", 33)}), {"x": normal(5, 33)}, np.abs(normal(5, 33)), ""),
    "softmax": (lambda: compiled([h.make_node("Softmax", ["x"], ["y"])], {"x": ("n", 700)}), {"x": normal(3, 700)}, softmax(normal(3, 700)), "rowwise"),
    "columns": (
        lambda: compiled([h.make_node("ReduceSum", ["x", "a"], ["y"], keepdims=0)], {"x": (3000, 3)}, {"a": np.array([0])}),
        {"x": normal(3000, 3)}, normal(3000, 3).sum(0), "rowwise",
    ),
    "product": (lambda: compiled([h.make_node("MatMul", ["x", "w"], ["y"])], {"x": ("n", 70)}, {"w": W}), {"x": normal(50, 70)}, normal(50, 70) @ W, "contract"),
    "convolution": (lambda: compiled([h.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)], {"x": X4.shape}, {"w": K}), {"x": X4}, conv(X4, K), "contract"),
    "vector": (lambda: compiled([h.make_node("MatMul", ["x", "w"], ["y"])], {"x": (1, 300)}, {"w": ROW}), {"x": normal(1, 300)}, normal(1, 300) @ ROW, "gemv"),
    "attention": (
        lambda: compiled(
            [h.make_node("Transpose", ["k"], ["t"], perm=[0, 1, 3, 2]), h.make_node("MatMul", ["q", "t"], ["s"]), h.make_node("Softmax", ["s"], ["p"]), h.make_node("MatMul", ["p", "v"], ["y"])],
            {n: (1, 2, 19, 16) for n in "qkv"},
        ),
        dict(zip("qkv", Q, strict=True)), softmax(Q[0] @ Q[1].transpose(0, 1, 3, 2)) @ Q[2], "attention",
    ),
    "recurrence": (
        lambda: compiled([h.make_node("RNN", ["x", "w", "r"], ["", "y"], hidden_size=64)], {"x": (7, 1, 8)}, {"w": normal(1, 64, 8, seed=1) / 4, "r": normal(1, 64, 64, seed=2) / 8}),
        {"x": normal(7, 1, 8)}, np.zeros(0), "scan",
    ),
}  # fmt: skip


def recurrence(x: Array) -> Array:
    w, r, s = normal(1, 64, 8, seed=1)[0] / 4, normal(1, 64, 64, seed=2)[0] / 8, np.zeros((1, 64), np.float32)
    for row in x:
        s = np.tanh(row @ w.T + s @ r.T)
    return s[None]


@pytest.mark.parametrize("name", FAMILIES)
def test_right_and_the_same_in_both_orders(name: str) -> None:
    """Every launch runs twice and compares bit for bit, which is the default."""
    assert settings.cuda_checks.get() == {"orders"}
    make, feeds, want, _ = FAMILIES[name]
    m = make()
    got = m.run(feeds)["y"]
    np.testing.assert_allclose(got, want if want.size else recurrence(feeds["x"]), rtol=1e-5, atol=1e-5)
    assert m.counters()["dispatches"] >= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_no_races(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every access of every thread is looked at."""
    monkeypatch.setenv("LUTHIER_CUDA_CHECKS", "races")
    make, feeds, _, _ = FAMILIES[name]
    make().run(feeds)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f[3]])
def test_a_missing_barrier_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each barrier of the family's kernels is taken out in turn. Some stand between accesses of one thread to places of its own,
    or another one does their work: whatever makes a difference is a race that looking at every access finds too."""
    make, feeds, _, _ = FAMILIES[name]
    m = make()
    found: dict[str, set[int]] = {"orders": set(), "races": set()}
    places = [x.start() for x in re.finditer(r"__syncthreads\(\);", m.source)]
    for checks, hits in found.items():
        monkeypatch.setenv("LUTHIER_CUDA_CHECKS", checks)
        for at in places:
            text = m.source[:at] + m.source[at + len("__syncthreads();") :]
            try:
                CudaModule(m.manifest, m.host, text, build(text), m._weights).run(feeds)
            except KernelError as e:
                assert "race" in str(e) or "divergent" in str(e)
                hits.add(at)
    assert found["races"] and found["orders"] <= found["races"]
    if name in ("product", "convolution", "vector", "attention"):
        assert len(found["orders"]) == len(places)


def launch(text: str, threads: int, *arrays: Array, waits: bool = True, blocks: int = 1) -> None:
    """Kernel ``k`` of C++ for the emulator on arrays, all of them written."""
    names = "abc"[: len(arrays)]
    types = {"f": "float", "i": "int", "l": "long long"}
    params = ", ".join(f"lt_span<{types[a.dtype.char]}> {n}" for n, a in zip(names, arrays, strict=True))
    args = ", ".join(
        f'{{({types[x.dtype.char]}*)q[{j}].p, q[{j}].n, "{n}"}}' for j, (n, x) in enumerate(zip(names, arrays, strict=True))
    )
    source = translation_unit(
        [f'extern "C" __global__ void k({params}) {{\n{text}\n}}\nextern "C" void call_k(const lt_arg* q) {{ k({args}); }}']
    )
    device = Emulator(build(source), source)
    entry = {
        "symbol": "k",
        "group": [threads, 1, 1],
        "buffers": [[n, a.itemsize, True] for n, a in zip(names, arrays, strict=True)],
        "waits": waits,
        "nodes": ["n1"],
    }
    memory = [device.allocate(a.nbytes) for a in arrays]
    for m, a in zip(memory, arrays, strict=True):
        device.upload(m, 0, a)
    device.launch(entry, [(m, 0, a.size) for m, a in zip(memory, arrays, strict=True)], [], (blocks, 1, 1))
    for m, a in zip(memory, arrays, strict=True):
        a.reshape(-1)[...] = m.view(a.dtype)[: a.size]


def test_race_between_blocks() -> None:
    with pytest.raises(KernelError, match=r"race: 1 of 4 elements of a depend on the order of threads, the first is 2.*n1"):
        launch("a[2] = blockIdx.x;", 1, np.zeros(4, np.int32), waits=False, blocks=3)


def test_divergent_barriers() -> None:
    with pytest.raises(
        KernelError, match=r"divergent barrier: 5 of 8 threads wait at it, 3 have ended: if \(threadIdx.x < 5\) __syncthreads"
    ):
        launch("if (threadIdx.x < 5) __syncthreads();", 8, np.zeros(1, np.int32))
    with pytest.raises(KernelError, match="divergent barrier: 8 of 8 threads wait at several"):
        launch("if (threadIdx.x < 5) __syncthreads();\nelse __syncthreads();", 8, np.zeros(1, np.int32))
    with pytest.raises(KernelError, match="divergent"):  # half a warp's exchange
        launch("if (threadIdx.x < 16) a[0] = __shfl_xor_sync(0xffffffffu, 1, 1);", 32, np.zeros(1, np.int32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a[threadIdx.x * 2] = 1;", r"index 8 is outside of a, which has 8 elements \(block 0,0,0 thread 4,0,0\)"),
        ("a[(int)threadIdx.x - 3] = 1;", "index -3 is outside of a"),
        (
            "__shared__ int s[4]; s[threadIdx.x] = 1; a[0] = s[0];",
            r"index 4 is outside of an array of type 'int ?\[4\]': __shared__ int s",
        ),
        ("int v[3]; v[threadIdx.x] = 1; a[0] = v[0];", r"index 3 is outside of an array of type 'int ?\[3\]'"),
    ],
)
def test_outside_of_a_buffer(text: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        launch(text, 8, np.zeros(8, np.int32), waits=False)


def test_warps() -> None:
    """Two exchanges in a row, threads in both orders, two warps and a half that is none: values never overtake each other."""
    a = np.arange(64, dtype=np.int32)
    launch(
        "int x = a[threadIdx.x]; for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(0xffffffffu, x, k); a[threadIdx.x] = x;", 64, a
    )
    np.testing.assert_array_equal(a, np.repeat([np.arange(32).sum(), np.arange(32, 64).sum()], 32))


def test_conversions_saturate() -> None:
    x = np.array([1e30, -1e30, np.nan, -0.9, 3.5e9, 2147483520.0], np.float32)
    i, l = np.zeros(6, np.int32), np.zeros(6, np.int64)
    launch("int t = threadIdx.x; b[t] = __float2int_rz(a[t]); c[t] = __float2ll_rz(a[t]);", 6, x, i, l, waits=False)
    np.testing.assert_array_equal(i, [2**31 - 1, -(2**31), 0, 0, 2**31 - 1, 2147483520])
    np.testing.assert_array_equal(l[[0, 1, 3, 4]], [2**63 - 1, -(2**63), 0, 3500000000])


def test_four_bits() -> None:
    x = (np.arange(77) % 16 - 8).astype(np.float32)
    m = compiled([h.make_node("Cast", ["x"], ["y"], to=T.INT4)], {"x": ("n",)}, out=T.INT4)
    np.testing.assert_array_equal(m.run({"x": x})["y"].astype(np.float32), x)


def test_saved_and_loaded(tmp_path: Any) -> None:
    make, feeds, want, _ = FAMILIES["product"]
    make().save(tmp_path / "m")
    np.testing.assert_allclose(luthier.load(tmp_path / "m").run(feeds)["y"], want, rtol=1e-4, atol=1e-4)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CXX", "no-such-compiler")
    compiler.cache_clear()
    try:
        with pytest.raises(TargetError, match="C[+][+] compiler"):
            FAMILIES["points"][0]()
    finally:
        compiler.cache_clear()


def test_unknown_architecture() -> None:
    with pytest.raises(TargetError, match="sm_90"):
        luthier.compile("m.onnx", target="cuda:sm_20")


@pytest.mark.parametrize(("k", "vector"), [(4096, True), (1024, True), (512, False), (256, False), (96, False)])
@pytest.mark.parametrize("bits", [4, 2])
def test_matrix_vector_of_few_bits(k: int, vector: bool, bits: int) -> None:
    """Weights are loaded 16 bytes a thread where rows are long enough, whole words where they are not."""
    n, block, per = 40, 32, 8 // bits
    rng = np.random.default_rng(k)
    w, scales = rng.integers(0, 256, (n, k // block, block // per)).astype(np.uint8), rng.standard_normal((n, k // block)).astype(np.float32)
    node = h.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=block)
    ins = [h.make_tensor_value_info("x", T.FLOAT, [1, k])]
    constants = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(scales.reshape(-1), "s")]
    g = h.make_graph([node], "g", ins, [h.make_tensor_value_info("y", T.FLOAT, [1, n])], constants)
    opsets = [h.make_opsetid("", 21), h.make_opsetid("com.microsoft", 1)]
    m = luthier.compile(h.make_model(g, opset_imports=opsets, ir_version=10), target="cuda:emulate")
    values = np.stack([w >> bits * j & (1 << bits) - 1 for j in range(per)], -1).reshape(n, k // block, block).astype(np.float64)
    matrix = ((values - (1 << bits - 1)) * scales[..., None]).reshape(n, k)
    x = rng.standard_normal((1, k)).astype(np.float32)
    np.testing.assert_allclose(m.run({"x": x})["y"], x @ matrix.T, rtol=1e-4, atol=1e-3)
    assert isinstance(m, CudaModule)
    assert not (vector and bits == 4) or "lt_span<const uint4>" in m.source


@pytest.mark.parametrize("signed", [False, True])
def test_products_of_bytes(signed: bool) -> None:
    """Four at a time by ``__dp4a``, exact."""
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (33, 250)).astype(np.int8) if signed else rng.integers(0, 256, (33, 250)).astype(np.uint8)
    w, zero = rng.integers(-128, 128, (250, 120)).astype(np.int8), np.array(-7 if signed else 117, x.dtype)
    g = h.make_graph(
        [h.make_node("MatMulInteger", ["x", "w", "z"], ["y"])], "g",
        [h.make_tensor_value_info("x", T.INT8 if signed else T.UINT8, ["n", 250])], [h.make_tensor_value_info("y", T.INT32, None)],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(zero, "z")],
    )  # fmt: skip
    m = luthier.compile(h.make_model(g, opset_imports=[h.make_opsetid("", 21)], ir_version=10), target="cuda:emulate")
    assert isinstance(m, CudaModule) and "__dp4a" in m.source
    np.testing.assert_array_equal(m.run({"x": x})["y"], (x.astype(np.int32) - int(zero)) @ w.astype(np.int32))


def test_a_whole_network() -> None:
    """silero, three steps with the state carried, against onnxruntime."""
    ort = pytest.importorskip("onnxruntime")
    from benchmarks.models import model_dir

    path = model_dir() / "silero.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there (benchmarks/models.py makes it)")
    theirs = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ours = luthier.compile(str(path), target="cuda:emulate")
    a = b = np.zeros((2, 1, 128), np.float32)
    for k in range(3):
        x = {"input": normal(1, 576, seed=k) / 10, "sr": np.array(16000)}
        want, a = theirs.run(["output", "stateN"], {**x, "state": a})
        got = ours.run({**x, "state": b})
        b = got["stateN"]
        np.testing.assert_allclose(got["output"], want, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)
