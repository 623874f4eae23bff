"""T-MAC's kernels (github.com/microsoft/T-MAC, arXiv 2407.00088), built for the host and driven through ctypes.

``LUTHIER_TMAC`` names a checkout. Its table construction and look-up routines (``python/t_mac/intrins/*.cc``) are compiled by clang with the flags its
own build uses; the loops around them, which it lets TVM generate, are written here as its schedule orders them (rows in tiles of ``bm``, then k in
steps of ``kfactor`` groups). Weights are packed by its ``preprocess_weights``. As its tuner does, every ``bm`` and ``kfactor`` of its space is timed,
and activation groups of 32 and 64 where the weights' groups allow; the fastest is taken. Ternary weights run as its BitNet models do: 2 bits, one
scale, int32 sums. Its fast aggregation is left out: on AVX2 it averages signed bytes as unsigned ones, and the result is of no use (NMSE above 10).
Tiles are spread over threads by OpenMP (Debian: clang, libomp-dev). Only used by benchmarks.
"""

from __future__ import annotations

import ctypes as C
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TILES = {3: (192, 384, 576, 768)}
OTHER_TILES = (256, 128, 512, 1024, 320, 640)
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-mllvm", "-inline-threshold=10000")


def folder() -> Path | None:
    """The checkout, or None when it is not there."""
    p = Path(os.environ.get("LUTHIER_TMAC", "build/T-MAC"))
    return p if (p / "python/t_mac/intrins/tbl.cc").exists() else None


def clang() -> str | None:
    names = ["clang++", *(f"clang++-{v}" for v in range(30, 13, -1))]
    return next((f for f in map(shutil.which, names) if f), None)


def source(bits: int, n: int, k: int, group: int, act: int, bm: int, kfactor: int, unified: bool) -> str:
    """C++ of ``tables(b, lut, scales, biases)`` and ``gemv(a, lut, w_scales, scales, biases, c, threads)``; ``unified``: one scale for all weights."""
    per_act, alphas = min(act // 4, kfactor), ("0.5f", "1.0f", "2.0f", "4.0f")
    name = f"strue_k{kfactor}_b{bits}_ak{per_act}_fafalse_zfalse_os{str(unified).lower()}"
    args = f"true, {kfactor}, {bits}, {per_act}, false, false, {str(unified).lower()}"
    rows = bm // bits
    if unified:
        sums, reset, instance = "int32_t", "tbl_int32_reset", f"tbl_g4_int8_int32_update({args})"
        update = f"tbl_g4_int8_int32_update_{name}({bm}, sums, lut + k * {kfactor * 16}, a + ((long)t * {k // 4} + k * {kfactor}) * {bm // 2})"
        final = "v * scales[0] + 0.5f * biases[0]"
        factor = "w_scales[0]"
    else:
        sums, reset, instance = "float", "tbl_float_reset", f"tbl_g4_int8_float_update({args})"
        at = f"k * {kfactor * 4} / {group}"
        update = (
            f"tbl_g4_int8_float_update_{name}({bm}, sums, lut + k * {kfactor * 16}, a + ((long)t * {k // 4} + k * {kfactor}) * {bm // 2}, "
            f"w_scales + ((long)t * {k // group} + {at}) * {rows}, scales + k * {kfactor * 4} / {act}, biases + k * {kfactor * 4} / {act})"
        )
        final, factor = "v", "1.0f"
    total = " + ".join(f"{alphas[b]} * (float)sums[(r / 8 * {bits} + {b}) * 8 + r % 8]" for b in range(bits))
    return f"""
#include <cstdint>
#include <cstddef>
#include "tbl.cc"
#include "lut_ctor.cc"
extern "C" {{
{instance}
lut_ctor(0, {bits})
void tables(float* b, int8_t* lut, float* scales, float* biases) {{
  for (int g = 0; g < {k // act}; ++g) {{
    partial_max_reset(scales + g);
    for (int p = 0; p < {act // 32}; ++p) partial_max_g4_int8_k8(scales + g, b + g * {act} + p * 32);
  }}
  for (int g = 0; g < {k // act}; ++g) lut_ctor_g4_int8_k0_b{bits}({act}, lut + g * {act * 4}, b + g * {act}, scales + g, biases + g);
}}
void gemv(uint8_t* a, int8_t* lut, float* w_scales, float* scales, float* biases, float* c, int threads) {{
  #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < {n * bits // bm}; ++t) {{
    alignas(32) {sums} sums[{bm}];
    {reset}({bm}, sums);
    for (int k = 0; k < {k // 4 // kfactor}; ++k) {update};
    for (int r = 0; r < {rows}; ++r) {{
      float v = {total};
      c[t * {rows} + r] = ({final}) * {factor};
    }}
  }}
}}
}}
"""


class Layers:
    """Products of ``layers`` matrices one after another, square ones each with the result of the one before.

    ``q`` uint8 [n, k] with the zero point ``2 ** (bits - 1)``; ``scales`` f32 [n, k / group], or [1] for one of all.
    """

    def __init__(self, root: Path, q: Array, scales: Array, bits: int, layers: int, threads: int, act: int, bm: int, kfactor: int) -> None:
        n, k = q.shape
        unified = scales.size == 1
        group = k if unified else k // scales.shape[1]
        spec = importlib.util.spec_from_file_location("tmac_weights", root / "python/t_mac/weights.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        a, s = module.preprocess_weights(q, scales.astype(np.float32), None, bits, 4, bm, kfactor, 16, 8)
        self.a = [np.ascontiguousarray(np.roll(a, i, 0)) for i in range(layers)]
        self.s = [np.ascontiguousarray(s if unified else np.roll(s, i, 0), np.float32) for i in range(layers)]
        self.lib = build(root, source(bits, n, k, group, act, bm, kfactor, unified), threads > 1)
        self.n, self.k, self.threads = n, k, threads
        self.lut = aligned(k * 4, np.int8)
        self.scales, self.biases = aligned(k // act, np.float32), aligned(k // act, np.float32)
        self.x = aligned(k, np.float32)
        self.y = [aligned(n, np.float32) for _ in range(layers)]
        self.bits = 8 * (a.nbytes + (s.nbytes / 2 if not unified else 4)) / (n * k)  # scales count as f16, which its ARM kernels read

    def run(self) -> None:
        x = self.x
        for a, s, y in zip(self.a, self.s, self.y, strict=True):
            self.lib.tables(p(x), p(self.lut), p(self.scales), p(self.biases))
            self.lib.gemv(p(a), p(self.lut), p(s), p(self.scales), p(self.biases), p(y), self.threads)
            x = y if self.n == self.k else x


def p(a: Array) -> C.c_void_p:
    return C.c_void_p(a.ctypes.data)


def aligned(count: int, dtype: Any) -> Array:
    raw = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + count * np.dtype(dtype).itemsize].view(dtype)


def build(root: Path, text: str, threads: bool) -> Any:
    """The loaded library. Raises FileNotFoundError without clang."""
    cc = clang()
    if cc is None:
        raise FileNotFoundError("T-MAC's kernels are built by clang, which is not installed")
    key = hashlib.sha256((text + str(threads)).encode()).hexdigest()[:16]
    made = Path("build/tmac") / f"{key}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as place:
            at = Path(place)
            (at / "kernels.cc").write_text(text)
            cmd = [cc, *FLAGS, *(["-fopenmp"] if threads else []), "-I", str(root / "python/t_mac/intrins"), str(at / "kernels.cc"), "-o", str(at / "k.so")]
            done = subprocess.run(cmd, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            (at / "k.so").rename(made)
    return C.CDLL(str(made.resolve()))


def fastest(root: Path, q: Array, scales: Array, bits: int, layers: int, threads: int, x: Array) -> Layers:
    """Of every ``bm`` and ``kfactor`` of T-MAC's space and every activation group the one with the least time."""
    n, k = q.shape
    unified = scales.size == 1
    group = k if unified else k // scales.shape[1]
    acts = [k] if unified else [g for g in (32, 64) if g <= group]
    best: tuple[float, Layers] | None = None
    for act, bm, kfactor in product(acts, TILES.get(bits, OTHER_TILES), (8, 16)):
        if n * bits % bm or bm % (bits * 8) or k % (kfactor * 4) or (not unified and ((kfactor * 4) % act or group % (kfactor * 4))):
            continue
        one = Layers(root, q, scales, bits, layers, threads, act, bm, kfactor)
        one.x[:] = x.reshape(-1)
        one.run()
        least = float("inf")
        for _ in range(5):
            t = time.perf_counter()
            one.run()
            least = min(least, time.perf_counter() - t)
        if best is None or least < best[0]:
            best = least, one
    if best is None:
        raise ValueError(f"T-MAC's tiles do not fit {n} x {k} at {bits} bits")
    return best[1]
