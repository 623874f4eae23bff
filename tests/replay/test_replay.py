"""Replay: every kernel of a few fixed models, kept as loop IR text.

A refactor shows zero difference here; a change of a template shows which kernels it touches. ``pytest tests/replay
--update-golden`` rewrites the texts after the difference has been read. One file a model: the program as comments, then its kernels.
"""

from __future__ import annotations

import gzip
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from luthier.codegen.llvm.backend import compile_text
from luthier.codegen.llvm.printer import legalize_llvm, print_kernels
from luthier.codegen.targets.target import parse_target
from luthier.importers.onnx.importer import import_onnx
from luthier.ir.loop import Buffer
from luthier.ir.parser import parse_funcs
from luthier.ir.printer import const_buffers, format_func, format_stmt
from luthier.ir.program import Program
from luthier.ir.verify import verify
from luthier.pipeline import compile_program
from tests.replay.models import MODELS, model

KEPT = Path(__file__).resolve().parent / "kept"
TARGET = "cpu:x86-64-v3"
SHOWN = 8  # kernels in a summary


def replay_text(program: Program) -> str:
    """The program's calls as comments, then its kernels, in the order in which they were made."""
    main = "\n".join(f"# {line}" for line in format_stmt(program.body))
    return "\n".join([main, "", *(format_func(f) for f in program.kernels.values())])


def sections(text: str) -> dict[str, list[str]]:
    """{"main" or the kernel's name: its lines}."""
    out: dict[str, list[str]] = {"main": []}
    name = "main"
    for line in text.splitlines():
        if line.startswith("func "):
            name = line[5 : line.index("(")]
            out[name] = []
        if line.strip():
            out[name].append(line)
    return out


def first_difference(old: list[str], new: list[str]) -> str:
    for k, (a, b) in enumerate(zip_longest(old, new)):
        if a != b:
            return f"line {k + 1}:\n      kept: {'(end)' if a is None else a.strip()[:200]}\n      now:  {'(end)' if b is None else b.strip()[:200]}"
    return "no difference"


def summary(old: str, new: str) -> str:
    """Which kernels came, went and changed, with the first line that differs; empty for equal texts."""
    a, b = sections(old), sections(new)
    gone, fresh = [n for n in a if n not in b], [n for n in b if n not in a]
    changed = [n for n in a if n in b and a[n] != b[n]]
    same = sum(1 for n in a if n in b and a[n] == b[n])
    if not gone and not fresh and not changed:
        return ""
    out = [f"{len(changed)} kernels changed, {len(fresh)} new, {len(gone)} gone, {same} the same"]
    out += [f"  gone: {', '.join(gone)}"] * bool(gone) + [f"  new:  {', '.join(fresh)}"] * bool(fresh)
    for n in changed[:SHOWN]:
        out.append(f"  {n} ({len(a[n])} -> {len(b[n])} lines), {first_difference(a[n], b[n])}")
    if len(changed) > SHOWN:
        out.append(f"  and {len(changed) - SHOWN} more: {', '.join(changed[SHOWN:])}")
    return "\n".join(out)


def kept(name: str) -> Path:
    return KEPT / f"{name}.txt.gz"


@pytest.mark.parametrize("name", MODELS)
def test_kernels_are_the_same(name: str, request: pytest.FixtureRequest) -> None:
    text = replay_text(compile_program(import_onnx(model(name)), parse_target(TARGET).caps))
    path = kept(name)
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or gzip.decompress(path.read_bytes()).decode() != text:
            path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        return
    assert path.exists(), f"{path} is missing: run pytest tests/replay --update-golden"
    found = summary(gzip.decompress(path.read_bytes()).decode(), text)
    assert not found, f"kernels of {name} differ from {path.name}; if that is meant, run pytest tests/replay --update-golden\n{found}"


@pytest.mark.parametrize("name", MODELS)
def test_kept_texts_parse_print_and_compile(name: str) -> None:
    """The text is the kernel: read back it prints the same, passes the verifier and compiles."""
    text = gzip.decompress(kept(name).read_bytes()).decode()
    target = parse_target(TARGET)
    funcs = list(parse_funcs(text).values())
    assert [f.name for f in funcs] == [n for n in sections(text) if n != "main"]
    for f in funcs:
        assert format_func(f).splitlines() == sections(text)[f.name]
        verify(f)
        f.data.update({b.name: np.zeros([int(e.attr) for e in b.shape], np.uint8).repeat(_bytes(b)) for b in const_buffers(f.body)})
    printed = print_kernels([(f"k{k}", legalize_llvm(f)) for k, f in enumerate(funcs)], target)
    assert len(compile_text(printed, target, 0)) > 1000


def _bytes(b: Buffer) -> int:
    return max(1, b.dtype.bits // 8)


def test_texts_are_small() -> None:
    assert sum(p.stat().st_size for p in KEPT.iterdir()) < 300_000


def test_compiling_twice_gives_the_same_text() -> None:
    """Nothing of a kernel depends on what was compiled before it or on hash order."""
    first = [replay_text(compile_program(import_onnx(model(n)), parse_target(TARGET).caps)) for n in ("mlp", "quantized")]
    again = [replay_text(compile_program(import_onnx(model(n)), parse_target(TARGET).caps)) for n in ("quantized", "mlp")]
    assert first == again[::-1]


OLD = "# call a()\n\nfunc a(x: f32[4]):\n  x[0] = 1.0:f32\n\nfunc b(x: f32[4]):\n  x[0] = 1.0:f32\n"


@pytest.mark.parametrize(
    ("new", "wanted"),
    [
        (OLD, []),
        (OLD.replace("func b", "func c"), ["0 kernels changed, 1 new, 1 gone, 2 the same", "gone: b", "new:  c"]),
        (OLD.replace("x[0] = 1.0:f32\n\n", "x[1] = 1.0:f32\n\n"), ["1 kernels changed", "a (2 -> 2 lines), line 2:", "kept: x[0] = 1.0:f32", "now:  x[1] = 1.0:f32"]),
        (OLD + "  x[1] = 2.0:f32\n", ["b (2 -> 3 lines), line 3:", "kept: (end)", "now:  x[1] = 2.0:f32"]),
        (OLD.replace("# call a()", "# call b()"), ["1 kernels changed", "main (1 -> 1 lines)"]),
    ],
)
def test_summary_says_what_changed(new: str, wanted: list[str]) -> None:
    found = summary(OLD, new)
    assert bool(found) == bool(wanted)
    assert all(w in found for w in wanted), found
