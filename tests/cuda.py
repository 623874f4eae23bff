"""One CUDA kernel on numpy arrays, emulated on this processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from luthier.backends.cuda_emulate import Emulator, build, compiler, translation_unit
from luthier.backends.host_run import element
from luthier.codegen.gpu.cuda import CudaKernel
from luthier.codegen.gpu.cuda_program import pipeline_of
from luthier.errors import TargetError
from luthier.ir.expr import Expr, free_vars
from luthier.ir.interpret.loops import evaluate_expr


def need_compiler() -> None:
    """Skips the test on a machine without a C++ compiler."""
    try:
        compiler()
    except TargetError as e:
        pytest.skip(str(e))


def run_cuda(k: CudaKernel, arrays: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
    """One launch on arrays (by buffer name, with the bytes of the buffer before legalisation), changed in place."""

    def value(e: Expr) -> int:
        return int(evaluate_expr(e, {v: scalars[v.attr[0]] for v in free_vars(e)}))

    source = translation_unit([k.emulated])
    device = Emulator(build(source), source)
    entry = pipeline_of(k, [])
    bound = []
    for b in k.buffers:
        raw = np.ascontiguousarray(arrays[b.name]).tobytes()
        size = value(b.size()) * b.dtype.bits * b.dtype.lanes // 8
        memory = device.allocate(max(16, size, len(raw)))
        device.upload(memory, 0, raw)
        bound.append((memory, 0, value(b.size())))
    words = [element(scalars[v.attr[0]], "i64" if v.dtype.is_index else v.dtype.name) for v in k.scalars]
    grid = value(k.grid[0]), value(k.grid[1]), value(k.grid[2])
    if min(grid) > 0:
        device.launch(entry, bound, words, grid)
    for b, (memory, _, _) in zip(k.buffers, bound, strict=True):
        if b.writable:
            a = arrays[b.name]
            a[...] = memory[: a.nbytes].view(a.dtype).reshape(a.shape)
