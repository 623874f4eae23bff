"""Running a WebAssembly kernel under wasmtime (the extra ``luthier[web]``): for tests and for measuring off the browser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from luthier.codegen.wasm.printer import const_data, print_module
from luthier.ir.errors import KernelError, TargetError
from luthier.ir.loop import Func

PAGE = 65536
STACK = 1 << 20


class WasmKernel:
    """One kernel in an instance of its own. ``relaxed_simd`` as in :func:`~luthier.codegen.wasm.printer.print_module`.

    Raises TargetError when wasmtime is not installed."""

    def __init__(self, func: Func, relaxed_simd: bool = True) -> None:
        try:
            import wasmtime
        except ImportError as e:
            raise TargetError("running WebAssembly needs wasmtime", hint="pip install 'luthier[web]'") from e
        self.func = func
        self.binary = print_module([func], relaxed_simd)
        cfg = wasmtime.Config()
        cfg.wasm_relaxed_simd = True
        self.store = wasmtime.Store(wasmtime.Engine(cfg))
        self.wt = wasmtime
        self.module = wasmtime.Module(self.store.engine, self.binary)
        self.memory = wasmtime.Memory(self.store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
        i32 = wasmtime.ValType.i32()
        self.sp = wasmtime.Global(self.store, wasmtime.GlobalType(i32, True), wasmtime.Val.i32(0))
        _, _, size = const_data([func])
        self.heap = 64 + (size + 63) // 64 * 64
        data = wasmtime.Global(self.store, wasmtime.GlobalType(i32, False), wasmtime.Val.i32(64))
        self.reserve(self.heap)
        self.instance: Any = wasmtime.Instance(self.store, self.module, [self.memory, self.sp, data])
        self.call_: Any = self.instance.exports(self.store)[func.name]
        self.range_: Any = self.instance.exports(self.store)[f"{func.name}.range"]

    def reserve(self, n: int) -> None:
        have = self.memory.size(self.store) * PAGE
        if have < n:
            self.memory.grow(self.store, (n - have + PAGE - 1) // PAGE)

    def bind(self, arrays: Mapping[str, Any], scalars: Mapping[str, Any]) -> list[Any]:
        """Copies the arrays into linear memory; returns the arguments of a call."""
        at = self.heap
        args: list[Any] = []
        self.where: dict[str, tuple[int, int]] = {}
        for b in self.func.buffers:
            a = arrays[b.name]
            self.where[b.name] = (at, a.nbytes)
            args.append(at)
            at += (a.nbytes + 63) // 64 * 64 + 64
        self.reserve(at + STACK)
        self.sp.set_value(self.store, self.wt.Val.i32(at + STACK))
        for b in self.func.buffers:
            raw = np.ascontiguousarray(arrays[b.name]).tobytes()
            self.memory.write(self.store, raw, self.where[b.name][0])
        for v in self.func.scalars:
            x = scalars[v.attr[0]]
            args.append(float(x) if v.dtype.is_float else int(x))
        return args

    def run(self, arrays: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
        """One call; written arrays are copied back. Raises KernelError on a trap."""
        args = self.bind(arrays, scalars)
        try:
            self.call_(self.store, *args, 0, self.range_(self.store, *args))
        except self.wt.Trap as e:
            raise KernelError(f"trap: {e.message.splitlines()[-1]}", op=self.func.name) from e
        for b in self.func.buffers:
            if b.writable:
                at, n = self.where[b.name]
                a = arrays[b.name]
                a[...] = np.frombuffer(bytes(self.memory.read(self.store, at, at + n)), a.dtype).reshape(a.shape)


def run_wasm(func: Func, arrays: Mapping[str, Any], scalars: Mapping[str, Any] | None = None, relaxed_simd: bool = True) -> None:
    """Print, instantiate and run one printable kernel on numpy arrays (by buffer name), changing the written ones in place."""
    WasmKernel(func, relaxed_simd).run(arrays, scalars or {})
