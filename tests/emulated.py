"""Kernels for processors that are not this machine: their machine code, run in an emulator.

AArch64 runs under qemu's user mode. AVX-512 runs in bochs, a whole machine: a boot sector switches to 64 bits and loads the kernels, which
read their buffers from the disk and write them back to it. Both need a C compiler; what is missing is named by ``missing``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import luthier.pipeline as pipeline
import luthier.schedules.select as select
from luthier.codegen.llvm.backend import compile_text, kernel_text
from luthier.codegen.llvm.printer import legalize_llvm
from luthier.codegen.program.sharing import parallel_loop
from luthier.codegen.targets.target import Target
from luthier.ir.graph import Graph
from luthier.ir.interpret.loops import evaluate_expr
from luthier.ir.loop import Buffer
from luthier.schedules.select import Kernels

Array = np.ndarray[Any, Any]
HERE = Path(__file__).resolve().parent
BIOS = Path("/usr/share/bochs/BIOS-bochs-latest"), Path("/usr/share/bochs/VGABIOS-lgpl-latest")
SECTOR, LOAD, MEMORY = 512, 0x10000, 128 << 20


def missing(target: Target) -> str:
    """The tools that running code for ``target`` lacks here; empty if none."""
    arm = target.triple.startswith("aarch64")
    tools = ("qemu-aarch64", "aarch64-linux-gnu-gcc") if arm else ("bochs", "gcc", "ld")
    lacking = [t for t in tools if shutil.which(t) is None] + [str(p) for p in BIOS if not arm and not p.exists()]
    return f"needs {' and '.join(lacking)}" if lacking else ""


def kernels_of(graph: Graph, target: Target, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Kernels]:
    """The Compute of a graph of one product and its kernels."""
    found: list[tuple[Any, Kernels]] = []
    original = select.build

    def record(c: Any, caps: Any, consts: Any = None, *rest: Any, **knobs: Any) -> Kernels:
        k = original(c, caps, consts)
        found.append((c, k))
        return k

    monkeypatch.setattr(select, "build", record)
    pipeline.compile_program(graph, target.caps)
    return found[-1]


def arrays(k: Kernels, x: Array, out: str, rows: int) -> dict[str, Array]:
    """Contents of every buffer of the kernels, outputs and temporaries zero."""
    given: dict[str, Array] = dict(k.packed)
    for f in k.funcs:
        for b in f.buffers:
            if b.name not in given:
                n = int(evaluate_expr(b.size(), {}))
                given[b.name] = x.copy() if n == x.size and not b.writable else np.zeros(n, b.dtype.scalar.numpy)
    return given


def run_emulated(k: Kernels, memory: dict[str, Array], target: Target, folder: Path) -> dict[str, Array]:
    """Kernels one after another; the buffers afterwards."""
    objects, calls, declared = [], [], []
    names = list(memory)
    for n, f in enumerate(k.funcs):
        symbol, text = kernel_text(legalize_llvm(f), target)
        (folder / f"k{n}.o").write_bytes(compile_text(text.replace("define hidden", "define"), target))
        objects.append(str(folder / f"k{n}.o"))
        args = [f"b[{names.index(p.name)}]" for p in f.params if isinstance(p, Buffer)]
        loop = parallel_loop(f)
        hi = int(evaluate_expr(loop[1], {})) if loop else 0
        declared.append(f"void {symbol}({', '.join(['void *'] * len(args))}, long, long);")
        calls.append(f"{symbol}({', '.join(args)}, 0, {hi});")
    head = "\n".join(declared) + '\nconst char lt_zero[4096] __asm__("lt.zero") = {0};\n'
    run = _qemu if target.triple.startswith("aarch64") else _bochs
    return run(memory, head, "\n".join(calls), objects, folder)


def _qemu(memory: Mapping[str, Array], head: str, calls: str, objects: list[str], folder: Path) -> dict[str, Array]:
    sizes = ", ".join(str(a.nbytes) for a in memory.values())
    n = len(memory)
    (folder / "main.c").write_text(
        f"#include <stdio.h>\n#include <stdlib.h>\n{head}int main(void) {{ long s[] = {{{sizes}}}; void *b[{n}];\n"
        f"for (int i = 0; i < {n}; i++) {{ b[i] = aligned_alloc(64, (s[i] + 8191) / 64 * 64); if (fread(b[i], 1, s[i], stdin) != s[i]) return 1; }}\n"
        f"{calls}\nfor (int i = 0; i < {n}; i++) fwrite(b[i], 1, s[i], stdout);\nreturn 0; }}\n"
    )  # fmt: skip
    program = str(folder / "main")
    subprocess.run(["aarch64-linux-gnu-gcc", "-static", "-O1", "-o", program, str(folder / "main.c"), *objects, "-lm"], check=True)
    raw = b"".join(np.ascontiguousarray(a).tobytes() for a in memory.values())
    got = subprocess.run(["qemu-aarch64", "-cpu", "max", program], input=raw, stdout=subprocess.PIPE, check=True).stdout
    out, at = {}, 0
    for name, a in memory.items():
        out[name] = np.frombuffer(got, a.dtype, a.size, at)
        at += a.nbytes
    return out


BOOT = r"""
.code16
.globl _start
_start:
  cli
  xor %ax, %ax
  mov %ax, %ds
  mov %ax, %es
  mov %ax, %ss
  mov $0x7c00, %sp
  mov %dl, drive
  mov $SECTORS, %cx
next:                     # the image behind this sector, to 64 KB
  push %cx
  mov $packet, %si
  mov $0x42, %ah
  mov drive, %dl
  int $0x13
  pop %cx
  addw $0x20, segment
  incl sector
  loop next
  in $0x92, %al           # line A20
  or $2, %al
  out %al, $0x92
  mov $0x1000, %edi       # 4 GB mapped to themselves in pages of 2 MB
  mov %edi, %cr3
  xor %eax, %eax
  mov $0x1800, %ecx
  rep stosl
  movl $0x2003, 0x1000
  movl $0x3003, 0x2000
  movl $0x4003, 0x2008
  movl $0x5003, 0x2010
  movl $0x6003, 0x2018
  mov $0x3000, %edi
  mov $0x83, %eax
  mov $2048, %ecx
fill:
  mov %eax, (%edi)
  add $0x200000, %eax
  add $8, %edi
  loop fill
  mov %cr4, %eax
  or $0x40620, %eax       # PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
  mov %eax, %cr4
  xor %ecx, %ecx
  mov $0xe7, %eax         # the state of x87, SSE, AVX and AVX-512
  xor %edx, %edx
  xsetbv
  mov $0xc0000080, %ecx   # long mode
  rdmsr
  or $0x100, %eax
  wrmsr
  mov %cr0, %eax
  and $0xfffffffb, %eax
  or $0x80000003, %eax
  mov %eax, %cr0
  lgdt gdtr
  ljmp $8, $long
.code64
long:
  mov $16, %ax
  mov %ax, %ds
  mov %ax, %es
  mov %ax, %ss
  mov $STACK, %rsp
  mov $0x10000, %rax
  call *%rax
drive: .byte 0
.align 4
packet: .byte 16, 0
  .word 1, 0
segment: .word 0x1000
sector: .long 1, 0
.align 8
gdt: .quad 0, 0x00209a0000000000, 0x0000920000000000
gdtr: .word 23
  .long gdt
.org 510
.word 0xaa55
"""
MACHINE = r"""
typedef unsigned char u8;
static void out8(unsigned short p, u8 v) { __asm__ volatile("outb %0, %1" ::"a"(v), "Nd"(p)); }
static u8 in8(unsigned short p) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(p)); return v; }
void *memset(void *d, int v, unsigned long n) { __asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(v) : "memory"); return d; }
void *memcpy(void *d, const void *s, unsigned long n) { void *r = d; __asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n)::"memory"); return r; }
static void disk(long at, long sectors, char *m, int write) {
    for (long i = 0; i < sectors; i++, at++, m += 512) {
        while (in8(0x1f7) & 0x80) {}
        out8(0x1f6, 0xe0 | at >> 24); out8(0x1f2, 1); out8(0x1f3, at); out8(0x1f4, at >> 8); out8(0x1f5, at >> 16);
        out8(0x1f7, write ? 0x30 : 0x20);
        while ((in8(0x1f7) & 0x88) != 8) {}
        long n = 256; char *p = m;
        if (write) __asm__ volatile("rep outsw" : "+S"(p), "+c"(n) : "d"(0x1f0) : "memory");
        else __asm__ volatile("rep insw" : "+D"(p), "+c"(n) : "d"(0x1f0) : "memory");
    }
}
"""


def _bochs(memory: Mapping[str, Array], head: str, calls: str, objects: list[str], folder: Path) -> dict[str, Array]:
    starts, at = {}, 0
    for name, a in memory.items():  # with room behind each for what a kernel may read there
        starts[name] = at
        at = (at + a.nbytes + 8191) // 4096 * 4096
    blob = bytearray(at)
    for name, a in memory.items():
        blob[starts[name] : starts[name] + a.nbytes] = np.ascontiguousarray(a).tobytes()
    base, sectors, first = 16 << 20, len(blob) // SECTOR, 2048
    assert base + len(blob) < MEMORY - (1 << 20)
    (folder / "main.c").write_text(
        f'{MACHINE}{head}__attribute__((section(".text.start"))) void start(void) {{ char *m = (char *){base}; void *b[] = {{{", ".join(f"m + {s}" for s in starts.values())}}};\n'
        f'disk({first}, {sectors}, m, 0);\n{calls}\ndisk({first}, {sectors}, m, 1);\n'
        'for (const char *s = "Shutdown"; *s; s++) out8(0x8900, *s);\nfor (;;) __asm__("hlt"); }\n'
    )  # fmt: skip
    (folder / "boot.S").write_text(BOOT)

    def tool(*words: str | Path) -> None:
        subprocess.run([str(w) for w in words], check=True, cwd=folder)

    tool("gcc", "-O1", "-ffreestanding", "-fno-pic", "-mno-red-zone", "-mno-sse", "-fno-tree-loop-distribute-patterns", "-fno-stack-protector", "-c", "main.c")
    (folder / "image.ld").write_text(
        f"ENTRY(start) SECTIONS {{ . = {LOAD}; .text : {{ *(.text.start) *(.text*) }} .rest : {{ *(.rodata* .data* .ldata* .lrodata* .got* .bss* COMMON) BYTE(0) }} /DISCARD/ : {{ *(.eh_frame* .note* .comment) }} }}"
    )
    tool("ld", "-static", "-nostdlib", "-z", "noexecstack", "-T", "image.ld", "--oformat", "binary", "main.o", *objects, "-o", "image.bin")
    image = (folder / "image.bin").read_bytes()
    count = -(-len(image) // SECTOR)
    assert LOAD + len(image) < 0x90000 and count < first
    tool("gcc", "-c", f"-Wa,--defsym,SECTORS={count},--defsym,STACK={MEMORY - (1 << 16)}", "boot.S")
    tool("ld", "-Ttext", "0x7c00", "--oformat", "binary", "boot.o", "-o", "boot.bin")
    cylinders = -(-(first + sectors) // (16 * 63))
    disk = bytearray(cylinders * 16 * 63 * SECTOR)
    disk[:SECTOR] = (folder / "boot.bin").read_bytes()
    disk[SECTOR : SECTOR + len(image)] = image
    disk[first * SECTOR : first * SECTOR + len(blob)] = blob
    (folder / "disk.img").write_bytes(disk)
    (folder / "bochsrc").write_text(
        f"cpu: model=corei7_icelake_u, ips=100000000\nmemory: guest={MEMORY >> 20}, host={MEMORY >> 20}\nromimage: file={BIOS[0]}\nvgaromimage: file={BIOS[1]}\n"
        f"ata0-master: type=disk, path=disk.img, mode=flat, cylinders={cylinders}, heads=16, spt=63\nboot: disk\nlog: bochs.log\npanic: action=fatal\ndisplay_library: term\n"
    )
    # its debugger waits for a command; it leaves with 1 when the machine is switched off
    subprocess.run(["bochs", "-q", "-f", "bochsrc"], cwd=folder, input=b"c\nq\n", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120, env={"TERM": "linux", "PATH": "/usr/bin:/bin"})
    log = (folder / "bochs.log").read_text(errors="replace")
    assert "shutdown requested" in log, log[-2000:]
    got = (folder / "disk.img").read_bytes()[first * SECTOR :]
    return {n: np.frombuffer(got, a.dtype, a.size, starts[n]) for n, a in memory.items()}
