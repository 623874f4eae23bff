"""What this machine can do: peak rates of f32 FMA and of integer dot products, read bandwidth by footprint, measured with
JIT-compiled loops.

The loops are LLVM text of the widest vectors that the host has; nothing of the compiler is used, so that its output can be
compared with them.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {"L1": 16 << 10, "L2": 256 << 10, "L3": 6 << 20, "DRAM": 256 << 20}


def lanes() -> int:
    """f32 lanes of the host's widest vectors: 16, 8 or 4."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return 16 if "avx512f" in flags else 8 if "avx2" in flags else 4


def fma_text(width: int, chains: int = 12) -> str:
    """LLVM text of `float fma_loop(i64 n)`: n rounds of `chains` independent fused multiply-adds of `width` lanes."""
    vec = f"<{width} x float>"
    parts = [f"declare {vec} @llvm.fma.v{width}f32({vec}, {vec}, {vec})", "define float @fma_loop(i64 %n, float %s) {", "entry:"]
    parts += [f"%u = insertelement {vec} poison, float %s, i32 0"]
    parts += [f"%a = shufflevector {vec} %u, {vec} poison, <{width} x i32> zeroinitializer", "br label %loop", "loop:"]
    parts += ["%i = phi i64 [0, %entry], [%i1, %loop]"]
    parts += [f"%c{k} = phi {vec} [%a, %entry], [%d{k}, %loop]" for k in range(chains)]
    parts += [f"%d{k} = call {vec} @llvm.fma.v{width}f32({vec} %c{k}, {vec} %a, {vec} %a)" for k in range(chains)]
    parts += ["%i1 = add i64 %i, 1", "%more = icmp ult i64 %i1, %n", "br i1 %more, label %loop, label %done", "done:"]
    parts += ["%t0 = fadd " + f"{vec} %d0, %d1"]
    parts += [f"%t{k} = fadd {vec} %t{k - 1}, %d{k + 1}" for k in range(1, chains - 1)]
    parts += [f"%r = extractelement {vec} %t{chains - 2}, i32 0", "ret float %r", "}"]
    return "\n".join(parts)


def read_text(width: int, streams: int = 4, unroll: int = 4) -> str:
    """LLVM text of `float read_loop(ptr p, i64 bytes, i64 times)`: sums a buffer as four interleaved streams."""
    vec, step = f"<{width} x i32>", width * 4
    total = streams * unroll
    parts = ["define i32 @read_loop(ptr %p, i64 %bytes, i64 %times) {", "entry:"]
    parts += [f"%part = udiv i64 %bytes, {streams}"]
    parts += [f"%b{s} = mul i64 %part, {s}\n%p{s} = getelementptr i8, ptr %p, i64 %b{s}" for s in range(streams)]
    parts += ["br label %outer", "outer:"]
    parts += ["%t = phi i64 [0, %entry], [%t1, %next]"]
    parts += [f"%o{k} = phi {vec} [zeroinitializer, %entry], [%n{k}, %next]" for k in range(total)]
    parts += ["br label %loop", "loop:", "%i = phi i64 [0, %outer], [%i1, %loop]"]
    parts += [f"%c{k} = phi {vec} [%o{k}, %outer], [%n{k}, %loop]" for k in range(total)]
    for s in range(streams):
        parts += [f"%x{s} = getelementptr i8, ptr %p{s}, i64 %i"]
        for u in range(unroll):
            k = s * unroll + u
            parts += [f"%q{k} = getelementptr i8, ptr %x{s}, i64 {u * step}"]
            parts += [f"%v{k} = load {vec}, ptr %q{k}, align {step}", f"%n{k} = add {vec} %c{k}, %v{k}"]
    parts += [f"%i1 = add i64 %i, {unroll * step}", "%more = icmp ult i64 %i1, %part"]
    parts += ["br i1 %more, label %loop, label %next", "next:", "%t1 = add i64 %t, 1"]
    parts += ["%again = icmp ult i64 %t1, %times", "br i1 %again, label %outer, label %done", "done:"]
    parts += [f"%s0 = add {vec} %n0, %n1"]
    parts += [f"%s{k} = add {vec} %s{k - 1}, %n{k + 1}" for k in range(1, total - 1)]
    parts += [f"%r = extractelement {vec} %s{total - 2}, i32 0", "ret i32 %r", "}"]
    return "\n".join(parts)


def dots() -> dict[str, tuple[str, int]]:
    """{name: (LLVM text of one step on x86: ``%d = f(%c, %a)`` on vectors of i32, products of a vector)} of the host's integer dot products."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    bits = lanes() * 32
    if "sse2" not in flags or "ssse3" not in flags:
        return {}
    i8, i16, i32 = (f"<{bits // n} x i{n}>" for n in (8, 16, 32))
    words = {512: "llvm.x86.avx512.pmaddw.d.512", 256: "llvm.x86.avx2.pmadd.wd", 128: "llvm.x86.sse2.pmadd.wd"}[bits]
    pairs = {512: "llvm.x86.avx512.pmaddubs.w.512", 256: "llvm.x86.avx2.pmadd.ub.sw", 128: "llvm.x86.ssse3.pmadd.ub.sw.128"}[bits]
    ones = ", ".join(["i16 1"] * (bits // 16))
    head = f"%w = bitcast {i32} %a to {i16}\n%x = bitcast {i32} %c to {i16}\n"
    out = {
        "words": (head + f"%p = call {i32} @{words}({i16} %x, {i16} %w)\n%d = add {i32} %c, %p", bits // 16),
        "bytes": (
            f"%w = bitcast {i32} %a to {i8}\n%x = bitcast {i32} %c to {i8}\n%q = call {i16} @{pairs}({i8} %x, {i8} %w)\n"
            f"%p = call {i32} @{words}({i16} %q, {i16} <{ones}>)\n%d = add {i32} %c, %p", bits // 8,
        ),
    }  # fmt: skip
    if "avx512_vnni" in flags and "avx512vl" in flags:
        # LLVM's older form takes i32 vectors, its newer one bytes; the instruction by name suits both
        out["vnni"] = (f'%d = call {i32} asm "vpdpbusd $2, $2, $0", "=x,0,x"({i32} %c, {i32} %a)', bits // 8)
    return out


def dot_text(name: str, step: str, width: int, chains: int = 12) -> str:
    """LLVM text of `i32 NAME_loop(i64 n, i32 s)`: n rounds of `chains` independent steps."""
    vec = f"<{width} x i32>"
    parts = [f"define i32 @{name}_loop(i64 %n, i32 %s) {{", "entry:", f"%u = insertelement {vec} poison, i32 %s, i32 0"]
    parts += [f"%a = shufflevector {vec} %u, {vec} poison, <{width} x i32> zeroinitializer", "br label %loop", "loop:"]
    parts += ["%i = phi i64 [0, %entry], [%i1, %loop]"]
    parts += [f"%c{k} = phi {vec} [%a, %entry], [%d{k}, %loop]" for k in range(chains)]
    for k in range(chains):
        parts.append(re.sub(r"%([cdpqwx])\b", rf"%\g<1>{k}", step))
    parts += ["%i1 = add i64 %i, 1", "%more = icmp ult i64 %i1, %n", "br i1 %more, label %loop, label %done", "done:"]
    parts += [f"%t0 = add {vec} %d0, %d1"]
    parts += [f"%t{k} = add {vec} %t{k - 1}, %d{k + 1}" for k in range(1, chains - 1)]
    parts += [f"%r = extractelement {vec} %t{chains - 2}, i32 0", "ret i32 %r", "}"]
    return "\n".join(parts)


@functools.cache
def compiled_dots() -> tuple[Any, dict[str, tuple[Callable[..., int], int]]]:
    """(engine, {name: (loop, products of a vector)}) for this host; empty where none is known."""
    import llvmlite.binding as llvm

    kinds, width = dots(), lanes()
    if not kinds:
        return None, {}
    vectors = {n: f"<{width * 32 // n} x i{n}>" for n in (8, 16, 32)}
    names = {m: (16 if "pmadd.wd" in m or "pmaddw.d" in m else 8) for step, _ in kinds.values() for m in re.findall(r"@(llvm[\w.]+)", step)}
    declared = [f"declare {vectors[32 if n == 16 else 16]} @{m}({vectors[n]}, {vectors[n]})" for m, n in names.items()]
    text = "\n".join([*declared, *(dot_text(n, step, width) for n, (step, _) in kinds.items())])
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    features = llvm.get_host_cpu_features().flatten() + (",-prefer-256-bit" if width == 16 else "")
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int32)
    return engine, {n: (kind(engine.get_function_address(f"{n}_loop")), products) for n, (_, products) in kinds.items()}


def dot_peak(threads: int = 1, tries: int = 3) -> float:
    """Thousands of millions of integer operations a second (a product and its sum are two) of the host's fastest dot product; 0 where none
    is known. That one may saturate; no exact kernel is faster."""
    rounds = 3_000_000
    rates = [0.0]
    for loop, products in compiled_dots()[1].values():
        best = min(together(threads, lambda _, loop=loop: loop(rounds, 3)) for _ in range(tries))  # type: ignore[misc]
        rates.append(threads * rounds * 12 * products * 2 / best / 1e9)
    return max(rates)


@functools.cache
def compiled() -> tuple[Any, Callable[..., float], Callable[..., int]]:
    """(engine, fma_loop, read_loop) for this host; calls release the interpreter lock."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    width = lanes()
    features = llvm.get_host_cpu_features().flatten()
    # Without this LLVM prefers 256-bit vectors on some processors that have 512-bit ones.
    features += ",-prefer-256-bit" if width == 16 else ""
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3
    )
    # Sixteen accumulators and no operand to spare: 128-bit hosts have as many registers as 256-bit ones.
    module = llvm.parse_assembly(fma_text(width) + "\n" + read_text(width, unroll=3 if width < 16 else 4))
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    fma = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64, ctypes.c_float)(engine.get_function_address("fma_loop"))
    read = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(
        engine.get_function_address("read_loop")
    )
    return engine, fma, read


def together(threads: int, work: Callable[[int], object]) -> float:
    """Seconds that `threads` pinned threads take for `work(index)`, all started at once."""
    gate = threading.Barrier(threads + 1)
    cpus = sorted(os.sched_getaffinity(0))

    def run(index: int) -> None:
        os.sched_setaffinity(0, {cpus[index % len(cpus)]})
        gate.wait()
        work(index)

    pool = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for thread in pool:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in pool:
        thread.join()
    return time.perf_counter() - started


def fma_peak(threads: int = 1, tries: int = 5) -> float:
    """GFLOP/s of f32 fused multiply-adds (two operations each), the best of `tries` runs of some 30 ms."""
    _, fma, _ = compiled()
    rounds = 10_000_000
    best = min(together(threads, lambda _: fma(rounds, 0.5)) for _ in range(tries))
    return threads * rounds * 12 * lanes() * 2 / best / 1e9


def bandwidth(size: int, threads: int = 1, tries: int = 5) -> float:
    """GB/s read from a buffer of `size` bytes per thread, the best of `tries` runs of some 20 ms."""
    _, _, read = compiled()
    grain = 4 * 4 * lanes() * 4 * 3  # streams * vectors * bytes, and the unroll of either width
    size = max(grain, size // grain * grain)
    buffers = [mmap.mmap(-1, size + 4096) for _ in range(threads)]
    addresses = []
    for buffer in buffers:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, size, 4096):
            buffer[offset] = 1
        addresses.append(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))
    times = max(1, (1 << 30) // size)
    best = min(together(threads, lambda i: read(addresses[i], size, times)) for _ in range(tries))
    return threads * size * times / best / 1e9


@dataclass(frozen=True)
class Ceilings:
    """``flops``: GFLOP/s of f32 FMA; ``integers``: Gop/s of the fastest integer dot product, 0 where it is not known. ``reads``: {level: GB/s}, all threads together. ``sizes``: {level: bytes of a core's share}
    that still count as lying there; what is larger comes from DRAM. ``cpu``: the processor as LLVM knows it."""

    threads: int
    flops: float
    reads: dict[str, float]
    sizes: dict[str, int]
    cpu: str = ""
    integers: float = 0.0

    def level(self, size: float) -> str:
        """The nearest level that holds ``size`` bytes."""
        return next((k for k, n in self.sizes.items() if size <= n), "DRAM")


def measure(threads: int = 1, tries: int = 3) -> Ceilings:
    """Measured now, in about a second. Only as good as the machine is idle."""
    import llvmlite.binding as llvm

    from luthier.codegen.targets.target import host

    caps = host().caps
    sizes = {"L1": caps.l1 * threads, "L2": caps.l2 * threads, "L3": caps.l3}
    reads = {k: bandwidth(n, threads, tries) for k, n in KINDS.items()}
    return Ceilings(threads, fma_peak(threads, tries), reads, sizes, llvm.get_host_cpu_name(), dot_peak(threads, tries))
