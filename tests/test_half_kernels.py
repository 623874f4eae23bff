"""Products of f16 and bf16 operands: sums in f32, on targets with and without a dot product of pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from luthier.codegen.targets.target import parse_target
from luthier.ir.compute import Compute, axis, pull, sum_
from luthier.ir.dtypes import DType, bf16, f16, f32
from luthier.ir.expr import cast
from luthier.ir.loop import Buffer, For, walk_stmts
from luthier.schedules.select import build
from tests.schedules import cases
from tests.test_llvm import run, runnable

Array = np.ndarray[Any, Any]


def matmul(d: DType, m: int, n: int, k: int) -> Compute:
    """``y = a @ b`` over halves, the sum in f32."""
    a, b = Buffer.of("A", d, (m, k), writable=False), Buffer.of("B", d, (k, n), writable=False)
    i, j, r = axis("i", m), axis("j", n), axis("k", k)
    return Compute("mm", (a, b), (), (pull("Y", [i, j], sum_(r, cast(a[i.var, r.var], f32) * cast(b[r.var, j.var], f32))),), ("Y",))


@pytest.mark.parametrize("d", [f16, bf16], ids=str)
@pytest.mark.parametrize("mnk", [(5, 24, 19), (7, 40, 12), (1, 33, 66)])
@pytest.mark.parametrize("target", ["cpu:x86-64-v2", "cpu:x86-64-v3", "cpu:znver4"])
def test_sums_in_f32(d: DType, mnk: tuple[int, int, int], target: str) -> None:
    m, n, k = mnk
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((m, k)).astype(d.numpy), rng.standard_normal((k, n)).astype(d.numpy)
    t = parse_target(target)
    kernels = build(matmul(d, m, n, k), t.caps, {"B": b})
    assert kernels.template == "contract_half"
    assert ("vdpbf16ps" in str(kernels.funcs[-1])) == (target == "cpu:znver4" and d is bf16)
    got = cases.run(kernels.funcs, {"A": a, "B": b, **kernels.packed}, {}, "Y").reshape(m, n)
    np.testing.assert_allclose(got, a.astype(np.float64) @ b.astype(np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [f16, bf16], ids=str)
def test_compiled(d: DType) -> None:
    t = runnable("cpu:x86-64-v3")
    m, n, k = 9, 32, 48
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((m, k)).astype(d.numpy), rng.standard_normal((k, n)).astype(d.numpy)
    kernels = build(matmul(d, m, n, k), t.caps, {"B": b})
    y = np.zeros((m, n), np.float32)
    env = {"A": a, "B": b, "Y": y, **kernels.packed} | {x.name: np.zeros([e.attr for e in x.shape], x.dtype.numpy) for x in kernels.temps}
    for f in kernels.funcs:
        run(f, [env[x.name] for x in f.buffers], target=t, hi=1 << 20 if "parallel" not in str(f) else _rounds(f))
    np.testing.assert_allclose(y, a.astype(np.float64) @ b.astype(np.float64), rtol=1e-5, atol=1e-5)


def _rounds(f: Any) -> int:
    """Rounds of the parallel loop of a kernel."""
    return next(int(s.hi.attr) for s in walk_stmts(f.body) if isinstance(s, For) and s.kind == "parallel")
