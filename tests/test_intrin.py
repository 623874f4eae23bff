"""Dot product instructions: what they mean, that targets print them and never one they lack, and ``tensorize``."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from luthier.codegen.llvm.backend import assembly
from luthier.codegen.llvm.printer import print_kernels
from luthier.codegen.targets.target import parse_target
from luthier.ir.compute import Axis, Compute, axis, pull, sum_
from luthier.ir.dtypes import DType, f32, i8, i16, i32, u8
from luthier.ir.expr import call, cast, const, load, ramp
from luthier.ir.interpret.loops import evaluate_intrinsic
from luthier.ir.intrin import Instruction
from luthier.ir.loop import Buffer, Func, Store
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.lower import lower
from luthier.schedules.base.schedule import Schedule, ScheduleError, annotate, pack, reorder, schedule, split, tensorize
from luthier.schedules.cpu.integer_packing import CenteredPacking
from luthier.schedules.intrin import ALL, usable, x86
from tests.test_llvm import run, runnable

Array = np.ndarray[Any, Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def numbers(d: DType, n: int, rng: np.random.Generator) -> Array:
    """Random values of ``d`` with its extremes."""
    if d.is_float:
        return rng.standard_normal(n).astype(d.numpy)
    lo, hi = d.limits()
    a = rng.integers(lo, hi, n, endpoint=True).astype(d.numpy)
    a[:2] = lo
    a[2:4] = hi
    return a


def expected(i: Instruction, acc: Array, a: Array, b: Array) -> Array:
    """numpy, in 64 bits and wrapped."""
    wide = np.float64 if i.acc.is_float else np.int64
    p = a.astype(wide) * b.astype(wide)
    return np.asarray((acc.astype(wide) + p.reshape(-1, i.group).sum(1)).astype(i.acc.numpy))


@pytest.mark.parametrize("i", ALL, ids=lambda i: i.name)
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_meaning(i: Instruction, lanes: int, rng: np.random.Generator) -> None:
    acc, a, b = numbers(i.acc, lanes * 2, rng)[:lanes], numbers(i.a, lanes * i.group + 4, rng), numbers(i.b, lanes * i.group + 4, rng)
    a, b = a[: lanes * i.group], b[: lanes * i.group]
    got = evaluate_intrinsic(call(i.name, i.acc.vec(lanes), *i.operands(lanes)), acc, a, b)
    np.testing.assert_allclose(got, expected(i, acc, a, b), rtol=1e-5 if i.acc.is_float else 0, atol=1e-5 if i.acc.is_float else 0)


def kernel(i: Instruction, lanes: int) -> Func:
    """``y = dot(acc, a, b)``."""
    n = lanes * i.group
    a, b = Buffer.of("a", i.a, (n,), writable=False), Buffer.of("b", i.b, (n,), writable=False)
    acc, y = Buffer.of("acc", i.acc, (lanes,), writable=False), Buffer.of("y", i.acc, (lanes,))
    whole = ramp(const(0), 1, n) if n > 1 else const(0)
    at = ramp(const(0), 1, lanes)
    return Func("f", (a, b, acc, y), Store(y, (at,), call(i.name, i.acc.vec(lanes), load(acc, (at,)), load(a, (whole,)), load(b, (whole,)))))


@pytest.mark.parametrize("i", ALL, ids=lambda i: i.name)
@pytest.mark.parametrize("target", ["cpu:x86-64-v2", "cpu:x86-64-v3", "cpu"])
def test_machine_computes_the_meaning(i: Instruction, target: str, rng: np.random.Generator) -> None:
    """The instruction where the target has it, its meaning in plain operations where it has not."""
    t = runnable(target)
    lanes = t.caps.lanes(32)
    acc, a, b = (numbers(d, n, rng) for d, n in ((i.acc, lanes), (i.a, lanes * i.group), (i.b, lanes * i.group)))
    y = np.zeros(lanes, i.acc.numpy)
    run(kernel(i, lanes), [a, b, acc, y], target=t)
    np.testing.assert_allclose(y, expected(i, acc, a, b), rtol=1e-5 if i.acc.is_float else 0, atol=1e-5 if i.acc.is_float else 0)


PRINTED = [
    ("cpu:x86-64-v2", x86.PMADDWD, "pmaddwd", "xmm"), ("cpu:x86-64-v3", x86.PMADDWD, "vpmaddwd", "ymm"), ("cpu:x86-64-v4", x86.PMADDWD, "vpmaddwd", "zmm"),
    ("cpu:alderlake", x86.VPDPBUSD, "vpdpbusd", "ymm"), ("cpu:x86-64-v4+avx512vnni", x86.VPDPBUSD, "vpdpbusd", "zmm"), ("cpu:znver4", x86.VPDPBUSD, "vpdpbusd", "zmm"),
    ("cpu:znver4", x86.VPDPWSSD, "vpdpwssd", "zmm"), ("cpu:znver4", x86.VDPBF16PS, "vdpbf16ps", "zmm"), ("cpu:aarch64+dotprod", None, "sdot", "v"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "i", "mnemonic", "register"), PRINTED, ids=lambda x: getattr(x, "name", x) if not isinstance(x, str) else x)
def test_machine_code(target: str, i: Instruction | None, mnemonic: str, register: str) -> None:
    t = parse_target(target)
    i = i or next(x for x in ALL if x.name == "arm.sdot")
    assert i in usable(t.caps)
    text = assembly(print_kernels([("k", kernel(i, t.caps.vector_bits // i.acc.bits))], t), t)
    assert re.search(rf"\b{mnemonic}\b.*{register}", text), text


@pytest.mark.parametrize("target", ["cpu:x86-64-v2", "cpu:x86-64-v3", "cpu:znver3", "cpu:x86-64-v4", "cpu:alderlake", "cpu:x86-64-v4+avxvnni", "cpu:aarch64"])
def test_targets_offer_what_they_have(target: str) -> None:
    t = parse_target(target)
    names = {i.name for i in usable(t.caps)}
    assert ("x86.vpdpbusd" in names) == (target == "cpu:alderlake")
    assert "x86.vdpbf16ps" not in names
    assert ("x86.vpmaddwd" in names) == t.is_x86


def product(m: int, n: int, k: int) -> tuple[Compute, Axis]:
    a, b = Buffer.of("A", i16, (m, k), writable=False), Buffer.of("B", i8, (k, n), writable=False)
    i, j, r = axis("i", m), axis("j", n), axis("k", k)
    y = pull("y", [i, j], sum_(r, cast(a[i.var, r.var], i32) * cast(b[r.var, j.var], i32)))
    return Compute("p", (a, b), (), (y,), ("y",)), r


def tiled(n: int = 8, k: int = 6, pad: bool = True) -> Schedule:
    c, _ = product(3, n, k)
    s = schedule(c)
    if pad:
        s = pack(s, "B", (1, 0), {1: 8, 0: 2})
    s = split(s, "y.k", 2)
    s = reorder(s, "y.i", "y.k.0", "y.k.1", "y.j")
    return annotate(s, "y.j", "vectorize")


def test_tensorize_golden() -> None:
    s = tensorize(tiled(), "y.k.1", x86.PMADDWD)
    assert s.trace[-1] == ("tensorize", "y.k.1", "x86.vpmaddwd")
    (f,) = lower(s)
    assert "@x86.vpmaddwd.i32x8(y.r[ramp(0, 1, 8)], bitcast.i16x16(bcast(bitcast.u32(A[ramp(" in str(f).replace("y.r[bcast(0, 8), ", "y.r[")
    assert "i16x16(B.pack[ramp(" in str(f)


def test_tensorize_computes_the_product(rng: np.random.Generator) -> None:
    from luthier.ir.interpret.loops import run_func

    s = tensorize(tiled(), "y.k.1", x86.PMADDWD)
    a, b = rng.integers(-300, 300, (3, 6)).astype(np.int16), rng.integers(-128, 128, (6, 8)).astype(np.int8)
    y = np.zeros((3, 8), np.int32)
    (f,) = lower(s)
    run_func(f, {"A": a, "B.pack": s.packed["B.pack"].apply(b), "y": y})
    np.testing.assert_array_equal(y, a.astype(np.int32) @ b.astype(np.int32))


def test_tensorize_refuses() -> None:
    with pytest.raises(ScheduleError, match="no reduction loop"):
        tensorize(tiled(), "y.i", x86.PMADDWD)
    with pytest.raises(ScheduleError, match="must have the 4 rounds"):
        tensorize(tiled(), "y.k.1", x86.VPDPBUSD)
    with pytest.raises(ScheduleError, match="vectorised loop"):
        tensorize(annotate(tiled(), "y.j", "serial"), "y.k.1", x86.PMADDWD)
    with pytest.raises(ScheduleError, match="no reduction loop of a sum in f32"):
        tensorize(tiled(), "y.k.1", x86.VDPBF16PS)
    with pytest.raises(ScheduleError, match="stand together"):  # the lanes of B are not in groups
        lower(tensorize(tiled(pad=False), "y.k.1", x86.PMADDWD))
    with pytest.raises(ScheduleError, match="whole groups"):  # seven products do not fill four pairs
        lower(tensorize(tiled(k=7), "y.k.1", x86.PMADDWD))


def test_centred_packing(rng: np.random.Generator) -> None:
    c, _ = product(3, 10, 6)
    p = pack(schedule(c), "B", (1, 0), {1: 8, 0: 2}).packed["B.pack"]
    w = rng.integers(0, 256, (6, 10)).astype(np.uint8)
    q = CenteredPacking(p.param, p.order, p.tile, p.job, Buffer.of("q", i16, (2, 3, 8, 2)), 130)
    got = q.apply(w)
    assert got.dtype == np.int16 and got.shape == (2, 3, 8, 2)
    np.testing.assert_array_equal(got[1, 2, 1], w[4:6, 9].astype(int) - 130)
    assert not got[1, :, 2:].any()


def test_dot_products_are_data() -> None:
    assert len({i.name for i in ALL}) == len(ALL) >= 9
    assert not usable(Capabilities(vector_bits=256))
    assert {i.a for i in ALL} >= {u8, i8, i16} and any(i.acc is f32 for i in ALL)
