"""A GPU through CUDA's driver API, by ctypes: memory, kernels, launches. Needs neither ``onnx`` nor ``luthier.ir``, nor any
package of NVIDIA's."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luthier.errors import ArtifactError, KernelError, LuthierError, OutOfMemoryError, TargetError

LIBRARIES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
OUT_OF_MEMORY, NO_BINARY, BAD_IMAGE, BAD_PTX, NEW_PTX = 2, 209, 200, 218, 222
DEAD = frozenset({700, 702, 709, 714, 715, 716, 717, 718, 719})  # after these errors the context answers nothing any more
MAJOR, MINOR = 75, 76  # attributes of a device


@functools.lru_cache(maxsize=1)
def driver() -> Any:
    """The driver's library, initialised. Raises TargetError without a driver or a GPU."""
    for name in LIBRARIES:
        try:
            lib = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise TargetError(
            "running CUDA modules needs NVIDIA's driver", hint="install it, or compile for cuda:emulate, which needs no GPU"
        )
    rc = lib.cuInit(0)
    count = ctypes.c_int()
    if rc == 0:
        rc = lib.cuDeviceGetCount(ctypes.byref(count))
    if rc or not count.value:
        why = message(lib, rc) if rc else "it finds no GPU"
        raise TargetError(
            f"NVIDIA's driver is there, but cannot be used: {why}", hint="compile for cuda:emulate, which needs no GPU"
        )
    return lib


def message(lib: Any, rc: int) -> str:
    """The driver's words for an error."""
    text = ctypes.c_char_p()
    if lib.cuGetErrorString(rc, ctypes.byref(text)) or text.value is None:
        return f"error {rc}"
    return f"{text.value.decode(errors='replace')} (error {rc})"


class Memory:
    """Bytes on the device, freed with the object."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self.address, self.free = ctypes.c_uint64(), gpu.lib.cuMemFree_v2
        gpu.check(gpu.lib.cuMemAlloc_v2(ctypes.byref(self.address), ctypes.c_size_t(size)), f"a buffer of {size} bytes")

    def __del__(self) -> None:
        if self.address.value:
            self.free(self.address)

    def at(self, offset: int) -> ctypes.c_uint64:
        return ctypes.c_uint64(self.address.value + offset)


class Gpu:
    """The first device, for :class:`luthier.backends.cuda_device.Runner`. ``images``: {symbol: cubin}; ``ptx``: {symbol: text}
    for architectures that no cubin is for; ``arch``: what the cubins are for. Raises TargetError, ArtifactError."""

    def __init__(self, images: Mapping[str, bytes], ptx: Mapping[str, bytes], arch: str) -> None:
        self.lib = lib = driver()
        self.images, self.ptx, self.arch = images, ptx, arch
        self.dead: str | None = None
        device, self.context = ctypes.c_int(), ctypes.c_void_p()
        self.check(lib.cuDeviceGet(ctypes.byref(device), 0), "the device")
        self.check(lib.cuDevicePrimaryCtxRetain(ctypes.byref(self.context), device), "the device's context")
        self.check(lib.cuCtxSetCurrent(self.context), "the device's context")
        numbers = []
        for attribute in (MAJOR, MINOR):
            n = ctypes.c_int()
            self.check(lib.cuDeviceGetAttribute(ctypes.byref(n), attribute, device), "the device")
            numbers.append(n.value)
        self.capability = numbers[0], numbers[1]
        self.functions: dict[str, Any] = {}

    def check(self, rc: int, what: str, op: str | None = None, node: str | None = None) -> None:
        """Raises what an answer of the driver means."""
        if rc == 0:
            return
        text = message(self.lib, rc)
        if rc == OUT_OF_MEMORY:
            raise OutOfMemoryError(f"the GPU has no memory for {what}: {text}", op=op, node=node, hint="use smaller inputs")
        if rc in DEAD:
            self.dead = text
            raise KernelError(
                f"{what}: {text}; the GPU's context is lost",
                op=op,
                node=node,
                hint="start the process again; cuda:emulate says which access it was",
            )
        raise KernelError(f"{what}: {text}", op=op, node=node)

    def function(self, symbol: str) -> Any:
        """A kernel, loaded on first use: its cubin where it is for this device, else its PTX."""
        hit = self.functions.get(symbol)
        if hit is not None:
            return hit
        module, f = ctypes.c_void_p(), ctypes.c_void_p()
        rc = self.lib.cuModuleLoadData(ctypes.byref(module), self.images[symbol])
        if rc in (NO_BINARY, BAD_IMAGE) and symbol in self.ptx:
            rc = self.lib.cuModuleLoadData(ctypes.byref(module), self.ptx[symbol] + b"\0")
        if rc in (NO_BINARY, BAD_IMAGE, BAD_PTX, NEW_PTX):
            raise ArtifactError(
                f"kernel {symbol} is for {self.arch}, this GPU is sm_{self.capability[0]}{self.capability[1]}: "
                f"{message(self.lib, rc)}",
                hint="compile for this architecture, or update NVIDIA's driver",
            )
        self.check(rc, f"loading kernel {symbol}")
        self.check(self.lib.cuModuleGetFunction(ctypes.byref(f), module, symbol.encode()), f"loading kernel {symbol}")
        self.functions[symbol] = f
        return f

    def current(self) -> None:
        """This thread uses the device's context. Raises KernelError after an error that has lost it."""
        if self.dead is not None:
            raise KernelError(f"the GPU's context is lost: {self.dead}", hint="start the process again")
        self.check(self.lib.cuCtxSetCurrent(self.context), "the device's context")

    def allocate(self, size: int) -> Memory:
        self.current()
        return Memory(self, size)

    def upload(self, to: Memory, offset: int, data: Any) -> None:
        raw = np.frombuffer(data, np.uint8)
        if raw.size:
            self.current()
            self.check(
                self.lib.cuMemcpyHtoD_v2(to.at(offset), ctypes.c_void_p(raw.ctypes.data), ctypes.c_size_t(raw.size)),
                "a copy to the GPU",
            )

    def copy(self, src: Memory, so: int, dst: Memory, do: int, n: int) -> None:
        if n:
            self.check(self.lib.cuMemcpyDtoD_v2(dst.at(do), src.at(so), ctypes.c_size_t(n)), "a copy on the GPU")

    def download(self, src: Memory, offset: int, n: int) -> bytes:
        """Waits for all launches before it."""
        out = ctypes.create_string_buffer(max(n, 1))
        if n:
            self.current()
            self.check(self.lib.cuMemcpyDtoH_v2(out, src.at(offset), ctypes.c_size_t(n)), "a copy from the GPU")
        return out.raw[:n]

    def launch(
        self, p: Mapping[str, Any], bound: Sequence[tuple[Memory, int, int]], scalars: Sequence[bytes], grid: tuple[int, int, int]
    ) -> None:
        """As the emulator's; errors of the kernel itself show in what is called next."""
        values = [m.at(at) for m, at, _ in bound] + [ctypes.create_string_buffer(s, 8) for s in scalars]
        params = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(v) for v in values))
        node = ", ".join(p["nodes"]) or None
        try:
            f = self.function(p["symbol"])
        except LuthierError as e:
            raise e.at(node=node) from None
        self.check(
            self.lib.cuLaunchKernel(f, *grid, *p["group"], 0, None, params, None), f"launching {p['symbol']}", p["symbol"], node
        )

    def wait(self) -> None:
        """Until all launches are over."""
        self.check(self.lib.cuCtxSynchronize(), "the GPU")
