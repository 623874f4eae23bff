"""Shrinks what fails: graph nodes of a model, statements of a kernel in loop IR text, as long as the failure stays the same.

Every attempt runs in a forked process, so that one which dies or hangs is a result like any other. A failure is known by its
class and its message without names and numbers (:func:`luthier.debug.repro.signature`), by the signal that ended the process, or by the
exit status of a command of the user's.
"""

from __future__ import annotations

import os
import pickle
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from luthier.debug.repro import signature
from luthier.errors import InputError, LuthierError
from luthier.ir.expr import const, free_vars, loads
from luthier.ir.loop import (
    EMPTY,
    Alloc,
    Block,
    Buffer,
    Call,
    For,
    Func,
    If,
    Stmt,
    Store,
    While,
    block,
    exprs_of,
    map_children,
    substitute_stmt,
    walk_stmts,
)

__all__ = ["Check", "kernel_check", "model_check", "outcome", "reduce_kernel", "reduce_model"]

T = TypeVar("T")
Check = Callable[[T], "str | None"]  # what fails and how, None for success


# ---------------------------------------------------------------- attempts


def outcome(attempt: Callable[[], object], timeout: float = 60.0) -> str | None:
    """None when ``attempt`` succeeds in a process of its own, else what it failed with."""
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(r)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            try:
                attempt()
                result = None
            except BaseException as e:
                result = signature(e)
            with os.fdopen(w, "wb") as f:
                f.write(pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(w)
    data = b""
    late = False
    with os.fdopen(r, "rb", buffering=0) as f:
        end = time.monotonic() + timeout
        while True:
            ready, _, _ = select.select([f], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                late = True
                os.kill(pid, signal.SIGKILL)
                break
            part = f.read(65536)
            if not part:
                break
            data += part
    _, status = os.waitpid(pid, 0)
    if late:
        return "timeout"
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return pickle.loads(data) if data else "no result"  # type: ignore[no-any-return]


def command_check(command: str, suffix: str, write: Callable[[Any, Path], None], timeout: float) -> Check[Any]:
    """Interesting is what ``command`` (``{}`` is the file) ends on with a status other than 0."""

    def check(x: Any) -> str | None:
        with tempfile.TemporaryDirectory() as d:
            path = Path(d) / f"case{suffix}"
            write(x, path)
            words = [w.replace("{}", str(path)) for w in shlex.split(command)]
            try:
                done = subprocess.run(words, capture_output=True, timeout=timeout, check=False)
            except subprocess.TimeoutExpired:
                return "timeout"
            except OSError as e:
                raise InputError(f"cannot run {words[0]!r}: {e}") from e
            return None if done.returncode == 0 else f"exit status {done.returncode}"

    return check


def model_check(options: dict[str, Any], timeout: float = 60.0) -> Check[Any]:
    """Whether a model compiles."""
    import luthier
    from luthier import settings

    shapes = {k: tuple(v) for k, v in (options.get("shapes") or {}).items()}

    def check(model: Any) -> str | None:
        names = {i.name for i in model.graph.input}
        pins = {k: v for k, v in shapes.items() if k in names}

        def attempt() -> None:
            with settings.repro_dir.temporarily(os.devnull):  # no bundle of every attempt
                luthier.compile(model, target=options.get("target") or "cpu", shapes=pins or None, threads=options.get("threads"), debug=options.get("debug"))

        return outcome(attempt, timeout)

    return check


def kernel_check(target: str = "cpu", timeout: float = 20.0) -> Check[Func]:
    """Whether a kernel in loop IR becomes an object."""

    def check(f: Func) -> str | None:
        def attempt() -> None:
            from luthier.codegen.llvm.backend import compile_text
            from luthier.codegen.llvm.printer import legalize_llvm, print_kernels
            from luthier.codegen.targets.target import parse_target

            t = parse_target(target)
            compile_text(print_kernels([(f.name, legalize_llvm(f))], t), t)

        return outcome(attempt, timeout)

    return check


# ---------------------------------------------------------------- models


def _wanted(check: Check[T], x: T, what: str) -> str:
    want = check(x)
    if want is None:
        raise InputError(f"{what} does not fail here, there is nothing to reduce", hint="--check names a command that fails on it")
    return want


def reduce_model(model: Any, check: Check[Any], progress: Callable[[str], None] = lambda text: None) -> Any:
    """The smallest part of ``model`` found that fails in the same way: nodes are left out in ever smaller groups; what they gave
    to others becomes an input. Raises InputError when the model does not fail."""
    want = _wanted(check, model, "the model")
    types = _types(model)
    keep = list(range(len(model.graph.node)))
    best = model

    def attempt(nodes: Sequence[int]) -> bool:
        nonlocal best
        small = _extract(model, nodes, types)
        if small is None or check(small) != want:
            return False
        best = small
        return True

    if keep and attempt(keep):  # outputs that nobody needs and unused weights go at once
        progress(f"{len(keep)} nodes fail with: {want}")
    size = max(1, len(keep) // 2)
    while keep:
        removed = False
        at = 0
        while at < len(keep) and len(keep) > 1:
            rest = keep[:at] + keep[at + size :]
            if rest and attempt(rest):
                keep, removed = rest, True
                progress(f"{len(keep)} nodes")
            else:
                at += size
        if size == 1 and not removed:
            break
        size = max(1, size // 2) if not removed or size > 1 else 1
    return best


def _types(model: Any) -> dict[str, Any]:
    """Types of values by name, from the importer and from ONNX's shape inference, whichever knows."""
    import onnx

    out = {v.name: v for v in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
    try:
        full = onnx.shape_inference.infer_shapes(model)
        out |= {v.name: v for v in full.graph.value_info}
    except Exception as e:  # an invalid model is a reason to reduce it: what is known must do
        out.setdefault("", onnx.helper.make_tensor_value_info(str(e)[:80], 1, None))
    return {n: v for n, v in out.items() if n and v.type.tensor_type.elem_type}


def _reads(n: Any) -> set[str]:
    """Names that a node reads, its subgraphs' captures included."""
    out = {i for i in n.input if i}
    for a in n.attribute:
        for g in [a.g, *a.graphs]:
            made = {i.name for i in g.input} | {t.name for t in g.initializer} | {o for m in g.node for o in m.output}
            inner = {o.name for o in g.output}.union(*(_reads(m) for m in g.node)) if g.node else {o.name for o in g.output}
            out |= inner - made
    return out - {""}


def _extract(model: Any, nodes: Sequence[int], types: dict[str, Any]) -> Any | None:
    """The nodes as a model of their own; None when the type of a value at its border is not known."""
    import onnx

    chosen = [model.graph.node[k] for k in nodes]
    made = {o for n in chosen for o in n.output if o}
    weights = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    reads = set().union(*(_reads(n) for n in chosen)) if chosen else set()
    ins = sorted(reads - made - weights)
    named = {o.name for o in model.graph.output}
    outs = [o for n in chosen for o in n.output if o and (o in named or o not in reads)]
    if not outs or any(i not in types for i in ins):
        return None
    small = onnx.ModelProto()
    small.CopyFrom(model)
    g = small.graph
    for field in (g.node, g.input, g.output, g.value_info):
        del field[:]
    g.node.extend(chosen)
    g.input.extend(types[i] for i in ins)
    for o in outs:
        v = g.output.add()
        v.name = o
        if o in types:
            v.CopyFrom(types[o])
    for kept in (g.initializer, g.sparse_initializer):
        rest = [t for t in kept if (t.name if hasattr(t, "raw_data") else t.values.name) in reads]
        del kept[:]
        kept.extend(rest)
    return small


# ---------------------------------------------------------------- kernels


def reduce_kernel(f: Func, check: Check[Func], progress: Callable[[str], None] = lambda text: None) -> Func:
    """The smallest form of ``f`` found that fails in the same way: statements go, loops become their first round, conditions one
    side, stored values 0; parameters that nobody uses go last. Raises InputError when the kernel does not fail."""
    want = _wanted(check, f, f"kernel {f.name}")
    again = True
    while again:
        again = False
        k = 0
        while k < sum(1 for _ in walk_stmts(f.body)):
            for body in _simpler(f.body, k):
                g = _well_formed(f.with_body(body))
                if g is not None and check(g) == want:
                    f, again = g, True
                    progress(f"{sum(1 for _ in walk_stmts(f.body))} statements")
                    break
            else:
                k += 1
    used = {v for s in walk_stmts(f.body) for e in exprs_of(s) for v in free_vars(e)}
    names = {s.buf.name for s in walk_stmts(f.body) if isinstance(s, Store)} | {e.attr[0].name for s in walk_stmts(f.body) for x in exprs_of(s) for e in loads(x)}
    names |= {(a[0] if isinstance(a, tuple) else a).name for s in walk_stmts(f.body) if isinstance(s, Call) for a in s.args if isinstance(a, (Buffer, tuple))}
    bufs = [p for p in f.buffers if p.name in names]
    used |= {v for b in bufs for e in b.shape for v in free_vars(e)}
    slim = replace(f, params=tuple(p for p in f.params if p in bufs or (not isinstance(p, Buffer) and p in used)))
    return slim if _well_formed(slim) is not None and check(slim) == want else f


def _well_formed(f: Func) -> Func | None:
    """``f`` as read back from its text, None when it breaks a rule."""
    from luthier.ir.parser import parse_func
    from luthier.ir.verify import verify

    try:
        return verify(parse_func(str(f), f.data))
    except LuthierError:
        return None


def _simpler(body: Stmt, k: int) -> Iterator[Stmt]:
    """Bodies in which statement ``k`` (outside in) is gone or simpler."""
    target = next(s for i, s in enumerate(walk_stmts(body)) if i == k)
    for new in _forms(target):
        yield _replace(body, target, new)


def _forms(s: Stmt) -> Iterator[Stmt]:
    yield EMPTY
    if isinstance(s, For):
        yield substitute_stmt(s.body, {s.var: s.lo})
        if s.kind != "serial":
            yield replace(s, kind="serial")
    elif isinstance(s, While):
        yield s.body
    elif isinstance(s, If):
        yield s.then
        if s.orelse is not None:
            yield s.orelse
    elif isinstance(s, Alloc):
        yield s.body
    elif isinstance(s, Store):
        d = s.value.dtype
        if d.lanes == 1 and s.value.op != "const":
            yield replace(s, value=const(False if d.is_bool else 0, d))
        for a in s.value.args:
            if a.dtype is d:
                yield replace(s, value=a)
        if s.mask is not None:
            yield replace(s, mask=None)
    elif isinstance(s, Block) and len(s.stmts) > 3:
        h = len(s.stmts) // 2
        yield block(*s.stmts[:h])
        yield block(*s.stmts[h:])


def _replace(s: Stmt, target: Stmt, new: Stmt) -> Stmt:
    if s is target:
        return new
    return map_children(s, lambda c: _replace(c, target, new))


