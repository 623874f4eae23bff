"""llama.cpp's kernels and its language model runtime, driven through ctypes.

The shared libraries are those that npm's ``@node-llama-cpp/linux-x64`` ships (``npm pack @node-llama-cpp/linux-x64``, unpacked):
``LUTHIER_GGML`` names the folder that holds ``libggml-base.so``, and ``libggml-cpu-*.so``, of which the best for this machine is
loaded. Only used by benchmarks.
"""

from __future__ import annotations

import ctypes as C
import os
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TYPES = {
    "f32": 0, "f16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13,
    "Q6_K": 14, "TQ1_0": 34, "TQ2_0": 35,
}  # fmt: skip
_P, _L, _S = C.c_void_p, C.c_int64, C.c_size_t


class _Init(C.Structure):
    _fields_ = [("mem_size", _S), ("mem_buffer", _P), ("no_alloc", C.c_bool)]


def folder() -> Path | None:
    """The folder of the libraries, or None when they are not there."""
    p = Path(os.environ.get("LUTHIER_GGML", "build/ggml"))
    return p if (p / "libggml-base.so").exists() else None


class Ggml:
    """The libraries with their signatures. Raises FileNotFoundError when ``LUTHIER_GGML`` does not name them."""

    def __init__(self) -> None:
        root = folder()
        if root is None:
            raise FileNotFoundError("LUTHIER_GGML must name the folder with libggml-base.so")
        self.base = C.CDLL(str(root / "libggml-base.so"), mode=C.RTLD_GLOBAL)
        self.main = C.CDLL(str(next(root.glob("libggml.*so*"))), mode=C.RTLD_GLOBAL)
        flags = Path("/proc/cpuinfo").read_text()
        which = "zen4" if "avx512_bf16" in flags else "icelake" if "avx512_vnni" in flags else "haswell"
        self.cpu = C.CDLL(str(root / f"libggml-cpu-{which}.so"), mode=C.RTLD_GLOBAL)
        self.variant = which

        def sig(lib: Any, name: str, res: Any, *args: Any) -> Any:
            f = getattr(lib, name)
            f.restype, f.argtypes = res, list(args)
            return f

        b, c = self.base, self.cpu
        self.init = sig(b, "ggml_init", _P, _Init)
        self.free = sig(b, "ggml_free", None, _P)
        self.tensor = sig(b, "ggml_new_tensor_2d", _P, _P, C.c_int, _L, _L)
        self.mul_mat = sig(b, "ggml_mul_mat", _P, _P, _P, _P)
        self.graph = sig(b, "ggml_new_graph", _P, _P)
        self.expand = sig(b, "ggml_build_forward_expand", None, _P, _P)
        self.quantize = sig(b, "ggml_quantize_chunk", _S, C.c_int, _P, _P, _L, _L, _L, _P)
        self.row_size = sig(b, "ggml_row_size", _S, C.c_int, _L)
        self.alloc = sig(b, "ggml_backend_alloc_ctx_tensors", _P, _P, _P)
        self.alloc_buft = sig(b, "ggml_backend_alloc_ctx_tensors_from_buft", _P, _P, _P)
        self.put = sig(b, "ggml_backend_tensor_set", None, _P, _P, _S, _S)
        self.get = sig(b, "ggml_backend_tensor_get", None, _P, _P, _S, _S)
        self.compute = sig(b, "ggml_backend_graph_compute", C.c_int, _P, _P)
        self.free_buffer = sig(b, "ggml_backend_buffer_free", None, _P)
        self.free_backend = sig(b, "ggml_backend_free", None, _P)
        self.cpu_init = sig(c, "ggml_backend_cpu_init", _P)
        self.threads = sig(c, "ggml_backend_cpu_set_n_threads", None, _P, C.c_int)
        self.repack = sig(c, "_Z35ggml_backend_cpu_repack_buffer_typev", _P)

    def quantized(self, kind: str, w: Array) -> bytes:
        """Rows of f32 as blocks of ``kind``."""
        w = np.ascontiguousarray(w, np.float32)
        out = C.create_string_buffer(self.row_size(TYPES[kind], w.shape[1]) * w.shape[0])
        self.quantize(TYPES[kind], w.ctypes.data, C.addressof(out), 0, w.shape[0], w.shape[1], None)
        return out.raw


class Chain:
    """``layers`` products in a row with weights [n, k] (n = k when there are several) given as raw blocks of ``kind``."""

    def __init__(self, g: Ggml, kind: str, raws: list[bytes], n: int, k: int, m: int, threads: int, repack: bool = True) -> None:
        self.g, self.n, self.k, self.m = g, n, k, m
        self.backend = g.cpu_init()
        g.threads(self.backend, threads)
        self.wctx = g.init(_Init(1 << 20, None, True))
        ws = [g.tensor(self.wctx, TYPES[kind], k, n) for _ in raws]
        self.wbuf = g.alloc_buft(self.wctx, g.repack()) if repack else g.alloc(self.wctx, self.backend)
        for t, raw in zip(ws, raws, strict=True):
            g.put(t, C.cast(C.c_char_p(raw), _P), 0, len(raw))
        self.ctx = g.init(_Init(1 << 20, None, True))
        self.x = g.tensor(self.ctx, 0, k, m)
        self.heads = []
        y = self.x
        for t in ws:
            y = g.mul_mat(self.ctx, t, y if n == k else self.x)
            self.heads.append(y)
        self.y = y
        self.gf = g.graph(self.ctx)
        for h in self.heads:
            g.expand(self.gf, h)
        self.buf = g.alloc(self.ctx, self.backend)

    def set(self, x: Array) -> None:
        x = np.ascontiguousarray(x, np.float32)
        self.g.put(self.x, x.ctypes.data, 0, x.nbytes)

    def run(self) -> None:
        self.g.compute(self.backend, self.gf)

    def result(self) -> Array:
        y = np.empty((self.m, self.n), np.float32)
        self.g.get(self.y, y.ctypes.data, 0, y.nbytes)
        return y

    def close(self) -> None:
        self.g.free_buffer(self.buf)
        self.g.free_buffer(self.wbuf)
        self.g.free(self.ctx)
        self.g.free(self.wctx)
        self.g.free_backend(self.backend)


class _Batch(C.Structure):
    _fields_ = [("n", C.c_int32), ("token", _P), ("embd", _P), ("pos", _P), ("n_seq", _P), ("seq", _P), ("logits", _P)]


class _Blob(C.Structure):
    """A parameter structure whose fields are not looked at, larger than any version's."""

    _fields_ = [("words", C.c_uint32 * 128)]


class Llama:
    """A model in llama.cpp with one sequence. Raises RuntimeError when it cannot be loaded."""

    def __init__(self, path: str, threads: int, context: int = 2048) -> None:
        root = folder()
        if root is None:
            raise FileNotFoundError("LUTHIER_GGML must name the folder with libllama")
        self.g = Ggml()
        lib = C.CDLL(str(next(root.glob("libllama.*so*"))), mode=C.RTLD_GLOBAL)
        self.lib = lib
        quiet = C.CFUNCTYPE(None, C.c_int, C.c_char_p, _P)
        self._log = quiet(lambda level, text, data: None)
        lib.llama_log_set(self._log, None)
        self.g.main.ggml_backend_load_all_from_path(str(root).encode())
        lib.llama_backend_init()
        lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = _Blob
        lib.llama_model_load_from_file.restype, lib.llama_model_load_from_file.argtypes = _P, [C.c_char_p, _Blob]
        lib.llama_init_from_model.restype, lib.llama_init_from_model.argtypes = _P, [_P, _Blob]
        lib.llama_decode.argtypes = [_P, _Batch]
        lib.llama_get_logits_ith.restype, lib.llama_get_logits_ith.argtypes = _P, [_P, C.c_int32]
        lib.llama_set_n_threads.argtypes = [_P, C.c_int32, C.c_int32]
        lib.llama_get_memory.restype, lib.llama_get_memory.argtypes = _P, [_P]
        lib.llama_memory_clear.argtypes = [_P, C.c_bool]
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        if params.words[0] != 512 or params.words[1] != 2048:
            raise RuntimeError("the context parameters of this llama.cpp look different")
        params.words[0] = context
        self.ctx = lib.llama_init_from_model(self.model, params)
        lib.llama_set_n_threads(self.ctx, threads, threads)
        self.length = 0

    def reset(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.ctx), True)
        self.length = 0

    def feed(self, tokens: list[int], vocabulary: int, every: bool = False) -> Array:
        """Logits [vocabulary] after the last token, or [n, vocabulary] of every one."""
        n = len(tokens)
        tok, pos = np.array(tokens, np.int32), np.arange(self.length, self.length + n, dtype=np.int32)
        one, zero = np.ones(n, np.int32), np.zeros(1, np.int32)
        seqs = np.full(n, zero.ctypes.data, np.uint64)
        want = np.ones(n, np.int8) if every else np.zeros(n, np.int8)
        want[-1] = 1
        b = _Batch(n, tok.ctypes.data, None, pos.ctypes.data, one.ctypes.data, seqs.ctypes.data, want.ctypes.data)
        if self.lib.llama_decode(self.ctx, b):
            raise RuntimeError("llama_decode failed")
        self.length += n

        def row(i: int) -> Array:
            p = self.lib.llama_get_logits_ith(self.ctx, i)
            return np.ctypeslib.as_array(C.cast(p, C.POINTER(C.c_float)), (vocabulary,)).copy()

        return np.stack([row(i) for i in range(n)]) if every else row(n - 1)
