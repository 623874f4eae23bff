"""The measurer: times of kernels that run, errors for those that do not, in a process that may die."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.codegen.targets.target import host, parse_target
from luthier.errors import TuningError
from luthier.ir.compute import Compute, axis, pull, sum_
from luthier.ir.dtypes import f32
from luthier.ir.expr import const, load, var
from luthier.ir.loop import Alloc, Buffer, For, Func, Let, Store, While, block
from luthier.schedules.select import Kernels, build
from luthier.tuner.measure import Measurer, compare


def product(n: int) -> Compute:
    a, b = Buffer.of("a", f32, (n, n), writable=False), Buffer.of("b", f32, (n, n), writable=False)
    i, j, k = axis("i", n), axis("j", n), axis("k", n)
    return Compute("product", (a, b), (), (pull("o0", [i, j], sum_([k], a[i.var, k.var] * b[k.var, j.var])),), ("o0",))


def test_a_larger_product_takes_longer_and_knobs_can_be_compared() -> None:
    caps = host().caps
    with Measurer(host()) as m:
        small, large = compare(m, [build(product(32), caps), build(product(256), caps)], rounds=2)
        assert not small.error and not large.error and len(small.seconds) == 10
        assert 4 * small.median < large.median  # 512 times the work
        b = np.ones((64, 64), np.float32)
        one, other = compare(m, [build(product(64), caps, {"b": b}, template="contract", mu=mu, nv=caps.lanes(32)) for mu in (1, 4)], {"b": b}, rounds=1)
        assert one.seconds and other.seconds


def test_run_time_extents_are_given_by_name() -> None:
    n = var("n", lo=1)
    x = Buffer.of("x", f32, (n,), writable=False)
    i = axis("i", n)
    k = build(Compute("twice", (x,), (n,), (pull("o0", [i], load(x, [i.var]) * 2.0),), ("o0",)), host().caps)
    with Measurer(host()) as m:
        assert m.measure(k, dims={"n": 1000}).seconds


def test_a_kernel_that_never_ends_or_kills_its_process_is_an_error_and_the_next_one_runs() -> None:
    y = Buffer.of("y", f32, (4,))
    c = Buffer.of("c", f32, (), "local")
    forever = Func("forever", (y,), Alloc(c, block(Store(c, (), const(1.0, f32)), While(const(0.0, f32) < load(c, ()), Store(y, (const(0),), load(c, ()))))))
    i = var("i", lo=0, hi=(1 << 40) - 1)
    far = Func("far", (y,), For(i, const(0), const(1 << 40), "serial", Store(y, (i,), const(1.0, f32))))
    fine = build(product(16), host().caps)
    with Measurer(host(), timeout=4.0) as m:
        assert "not done" in m.measure(Kernels((forever,))).error
    with Measurer(host()) as m:
        assert "died" in m.measure(Kernels((far,))).error  # writes past everything
        assert m.measure(fine).seconds
        unbound = Func("unbound", (y,), block(Let(var("a"), var("b")), Store(y, (var("a"),), const(1.0, f32))))
        assert "not defined" in m.measure(Kernels((unbound,))).error


def test_a_target_of_another_machine_is_refused() -> None:
    with pytest.raises(TuningError, match="does not run on this machine"):
        Measurer(parse_target("cpu:aarch64" if host().is_x86 else "cpu:x86-64-v3"))
