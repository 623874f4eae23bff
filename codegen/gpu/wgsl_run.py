"""Running WGSL through wgpu-native (naga) on any Vulkan adapter, a software one included: for tests and measurements."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from luthier.codegen.gpu.webgpu_features import NATIVE
from luthier.codegen.gpu.wgsl import Shader
from luthier.ir.errors import CompilationError, TargetError
from luthier.ir.expr import free_vars
from luthier.ir.interpret.loops import evaluate_expr


@lru_cache(maxsize=1)
def device() -> Any:
    """The default device. Raises TargetError when wgpu or an adapter is missing."""
    try:
        import wgpu
    except ImportError as e:
        raise TargetError("running WGSL needs wgpu", hint="pip install wgpu") from e
    try:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
        return adapter.request_device_sync(required_features=NATIVE.device_features(adapter.features))
    except Exception as e:
        raise TargetError(f"no WebGPU adapter: {e}", hint="install a Vulkan driver, such as mesa-vulkan-drivers") from e


@lru_cache(maxsize=1)
def features() -> tuple[str, ...]:
    """Optional features of the default device, in WebGPU's names."""
    import wgpu

    d = device()

    def accepts(text: str) -> bool:
        try:
            d.create_shader_module(code=text)
        except wgpu.GPUError:
            return False
        return True

    return NATIVE.usable(d.features, accepts)


def pipeline(sh: Shader) -> Any:
    """The compiled shader. Raises CompilationError with naga's message when it is refused."""
    import wgpu

    d = device()
    try:
        module = d.create_shader_module(code=sh.text(NATIVE))
        return d.create_compute_pipeline(layout="auto", compute={"module": module, "entry_point": "main"})
    except wgpu.GPUError as e:
        raise CompilationError(f"WGSL refused: {e}", op=sh.name) from e


def _bytes(a: Any) -> bytes:
    raw = np.ascontiguousarray(a).tobytes()
    return raw + bytes(-len(raw) % 4) if raw else bytes(4)


def run_wgsl(sh: Shader, arrays: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
    """One dispatch on numpy arrays (by buffer name, with the bytes of the buffer before legalisation), changed in place."""
    import wgpu

    d = device()
    p = pipeline(sh)
    used = [b for b in sh.buffers]
    bufs = []
    for b in used:
        usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
        bufs.append(d.create_buffer_with_data(data=_bytes(arrays[b.name]), usage=usage))
    entries = [{"binding": k, "resource": {"buffer": x, "offset": 0, "size": x.size}} for k, x in enumerate(bufs)]
    if sh.scalars:
        words = [np.float32(scalars[v.attr[0]]).view(np.uint32) if v.dtype.is_float else np.int64(scalars[v.attr[0]]).astype(np.uint32) for v in sh.scalars]
        raw = np.array(words, np.uint32).tobytes()
        raw += bytes(-len(raw) % 16)
        u = d.create_buffer_with_data(data=raw, usage=wgpu.BufferUsage.UNIFORM)
        entries.append({"binding": len(bufs), "resource": {"buffer": u, "offset": 0, "size": u.size}})
    grid = [int(evaluate_expr(e, {v: scalars[v.attr[0]] for v in free_vars(e)})) for e in sh.grid]
    if min(grid) > 0:
        layout = p.get_bind_group_layout(0)
        group = d.create_bind_group(layout=layout, entries=entries)
        enc = d.create_command_encoder()
        cp = enc.begin_compute_pass()
        cp.set_pipeline(p)
        cp.set_bind_group(0, group)
        cp.dispatch_workgroups(*grid)
        cp.end()
        d.queue.submit([enc.finish()])
    for b, x in zip(used, bufs, strict=True):
        if b.writable:
            a = arrays[b.name]
            raw = bytes(d.queue.read_buffer(x))[: a.nbytes]
            a[...] = np.frombuffer(raw, a.dtype).reshape(a.shape)
