"""From kernels to machine code: text, objects, a library in this process or a shared library on disk.

Only LLVM's code generator runs, no middle-end passes: the shared loop passes have done their work. Objects are identified by the
hash of their text and the target, so identical kernels are compiled once, in a model and across models.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from luthier import settings
from luthier.at_fork import whole
from luthier.codegen.llvm.printer import print_kernels
from luthier.codegen.program.compile_ahead import Workers
from luthier.codegen.targets.target import Target, host, usable_cores
from luthier.errors import CompilationError, TargetError
from luthier.ir.loop import Func

OPT_LEVEL = 2


class Cache(Protocol):
    """Objects by key; :class:`luthier.cache.ObjectCache` is one."""

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, data: bytes) -> None: ...


_machines: dict[str, Any] = {}


def machine(target: Target, opt: int = OPT_LEVEL) -> Any:
    """LLVM's target machine, made once. Raises TargetError when this LLVM has no such backend."""
    key = f"{target.key}|{opt}"
    tm = _machines.get(key)
    if tm is None:
        with whole:
            import llvmlite.binding as llvm

            if target.triple.split("-")[0] == host().triple.split("-")[0]:
                llvm.initialize_native_target()
                llvm.initialize_native_asmprinter()
                llvm.initialize_native_asmparser()
            else:
                llvm.initialize_all_targets()
                llvm.initialize_all_asmprinters()
            try:
                t = llvm.Target.from_triple(target.triple)
            except RuntimeError as e:
                raise TargetError(f"LLVM has no backend for {target.triple}: {e}") from e
            tm = t.create_target_machine(target.cpu, target.features, opt, "pic", "small")
            _machines[key] = tm
    return tm


# What we ask of the code generator while it works for us. Machine sinking moves whole tiles of multiplications behind the
# conditions of their stores and leaves the loads where they are: every loaded vector is spilled (3x3 convolutions ran at half).
FLAGS = ("disable-machine-sink",)


@contextlib.contextmanager
def _flags() -> Iterator[None]:
    """LLVM's options are global to the process: ours are set for the time of one compilation."""
    import llvmlite.binding as llvm

    with whole:
        for f in FLAGS:
            llvm.set_option("luthier", f"-{f}")
        try:
            yield
        finally:
            for f in FLAGS:
                llvm.set_option("luthier", f"-{f}=false")


def compile_text(text: str, target: Target, opt: int = OPT_LEVEL) -> bytes:
    """An object file from LLVM text. Raises CompilationError with LLVM's message for malformed text."""
    import llvmlite.binding as llvm

    tm = machine(target, opt)
    try:
        m = llvm.parse_assembly(text)
    except RuntimeError as e:
        raise CompilationError(f"LLVM refuses the generated text: {e}") from e
    with _flags():
        return bytes(tm.emit_object(m))


def assembly(text: str, target: Target, opt: int = OPT_LEVEL) -> str:
    """Assembly for people to read."""
    import llvmlite.binding as llvm

    tm, m = machine(target, opt), llvm.parse_assembly(text)
    with _flags():
        return str(tm.emit_assembly(m))


def text_key(text: str, target: Target, opt: int = OPT_LEVEL) -> str:
    import llvmlite

    return hashlib.sha256(f"{llvmlite.__version__}|{target.key}|{opt}|{FLAGS}\n{text}".encode()).hexdigest()


_SYMBOL = "lt.k.symbol"


def kernel_text(f: Func, target: Target, exclusive: bool = True) -> tuple[str, str]:
    """(symbol, LLVM module): the symbol is the hash of the kernel's text, so equal kernels share it. ``exclusive``: no argument
    shares memory with another one that is written. Raises CompilationError for what the printer has no instruction for."""
    text = print_kernels([(_SYMBOL, f)], target, exclusive)
    sym = "lt_k_" + hashlib.sha256(text.encode()).hexdigest()[:20]
    return sym, text.replace(_SYMBOL, sym).replace("lt.data.lt_k_symbol", f"lt.data.{sym}")


class Objects:
    """Objects for texts: from the cache, or compiled by several processes while more texts are still to come (``add``)."""

    def __init__(self, target: Target, cache: Cache | None = None, opt: int = OPT_LEVEL) -> None:
        self.target, self.cache, self.opt = target, cache, opt
        self.known: dict[str, bytes] = {}
        self.keys: dict[str, str] = {}
        self.workers = Workers(lambda t: compile_text(t, target, opt), lambda: machine(target, opt), usable_cores())

    def __enter__(self) -> Objects:
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.close()

    def add(self, text: str) -> None:
        """``text`` will be asked for."""
        if text in self.keys:
            return
        key = self.keys[text] = text_key(text, self.target, self.opt)
        data = self.cache.get(key) if self.cache is not None else None
        if data is None:
            self.workers.submit(text)
        else:
            self.known[text] = data

    def get(self, texts: Sequence[str]) -> list[bytes]:
        """One object per module text, in order. Raises CompilationError when LLVM refuses a text or dies on it."""
        for t in texts:
            self.add(t)
        for t, data in self.workers.objects().items():
            if self.cache is not None and t not in self.known:
                self.cache.put(self.keys[t], data)
            self.known[t] = data
        return [self.known[t] for t in texts]


def compile_texts(texts: Sequence[str], target: Target, cache: Cache | None = None, opt: int = OPT_LEVEL) -> list[bytes]:
    """One object per module text, in order; from the cache where it has them.

    Raises CompilationError when LLVM refuses a text or dies on it."""
    with Objects(target, cache, opt) as o:
        return o.get(texts)


# ---------------------------------------------------------------- a library in this process

_jit: list[Any] = []
_numbers = itertools.count()


class Library:
    """Objects linked into this process; ``address(symbol)``. Code lives as long as this object."""

    def __init__(self, objects: Sequence[bytes], exports: Sequence[str]) -> None:
        import llvmlite.binding as llvm

        machine(host())
        if not _jit:
            with whole:
                if not _jit:
                    h = host()
                    tm = llvm.Target.from_triple(h.triple).create_target_machine(h.cpu, h.features, OPT_LEVEL, "pic", "small", jit=True)
                    _jit.append(llvm.create_lljit_compiler(tm))
        b = llvm.JITLibraryBuilder().add_current_process()
        for o in objects:
            b.add_object_img(o)
        for e in exports:
            b.export_symbol(e)
        try:
            self._tracker = b.link(_jit[0], f"luthier.{next(_numbers)}")
        except RuntimeError as e:
            raise CompilationError(f"linking in memory failed: {e}") from e
        self._addresses = {e: int(self._tracker[e]) for e in exports}

    def address(self, symbol: str) -> int:
        return self._addresses[symbol]


# ---------------------------------------------------------------- a shared library on disk


def find_linker() -> list[str]:
    """The command that links a shared library. Raises TargetError when there is none."""
    given = settings.toolchain.get()
    names = [given] if given else ["ld.lld", "lld", "ld", "cc", "clang", "gcc"]
    for n in names:
        path = shutil.which(n)
        if path:
            base = os.path.basename(path)
            if base == "lld":
                return [path, "-flavor", "gnu"]
            return [path] if base.endswith("ld") or base.startswith(("ld", "mold")) or "ld." in base else [path, "-nostdlib"]
    raise TargetError(
        "no linker found to write a shared library" if not given else f"the linker {given!r} (LUTHIER_CC) was not found",
        hint="install binutils or a C compiler, or set LUTHIER_CC; compile-and-run needs none",
    )


def link_shared(objects: Sequence[bytes], out: Path, target: Target) -> None:
    """Write the shared library ``out``. Raises TargetError without a linker, CompilationError when it fails."""
    cmd = find_linker()
    compiler = "-nostdlib" in cmd
    if target.triple.split("-")[0] != host().triple.split("-")[0] and "lld" not in cmd[0]:
        cross = shutil.which(f"{target.triple.split('-')[0]}-linux-gnu-ld") or shutil.which("ld.lld")
        if cross is None:
            raise TargetError(f"no linker for {target.triple}", hint="install lld or the binutils of that architecture")
        cmd, compiler = [cross], False
    with tempfile.TemporaryDirectory() as d:
        files = []
        for i, o in enumerate(objects):
            p = os.path.join(d, f"{i}.o")
            with open(p, "wb") as f:
                f.write(o)
            files.append(p)
        flags = ["-z", "noexecstack", "-z", "now", "-soname", "model.so", "--hash-style=both", "--build-id=none"]
        if compiler:
            flags = ["-Wl," + ",".join(flags)]
        r = subprocess.run([*cmd, "-shared", *flags, "-o", str(out), *files], capture_output=True, text=True, check=False)
    if r.returncode != 0:
        raise CompilationError(f"{cmd[0]} failed: {(r.stderr or r.stdout).strip()[:500]}")
