"""What a Program's ``main`` does, step by step, for every printer whose program is one function that all threads execute.

``steps(layout)`` turns the body into a list of :data:`Step`: kernels with a parallel loop are shared by chunks, everything else runs
on thread 0, and a wait or a barrier stands only where a thread could see or destroy what another one still works on. Reads and
writes are followed per piece of memory (:class:`~luthier.codegen.program.sharing.Hazards`).

Before: ``call a(x -> t); call b(t -> y)``. After: ``Run(a, shared), Wait, Run(b, shared)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.codegen.program.sharing import Hazards, KernelWork, parallel_loop
from luthier.ir.dtypes import DType
from luthier.ir.errors import CompilationError, UnsupportedOperator
from luthier.ir.expr import Expr, as_expr, bounds, const, free_vars, loads, substitute
from luthier.ir.loop import Buffer, Call, For, If, Let, Stmt, Store, While, exprs_of, stmts_of, walk_stmts
from luthier.ir.program import Program
from luthier.passes.loop.lower_subbyte import is_subbyte, pack_array
from luthier.passes.program.plan_memory import ALIGN, Plan, plan_memory, roots

MAX_RANK = 8
DEFAULT = "default "  # before the name of an input: the constant that it is when a call leaves it out

# Codes of element types in the ABI, those of ONNX.
DTYPE_CODES = {
    "f32": 1, "u8": 2, "i8": 3, "u16": 4, "i16": 5, "i32": 6, "i64": 7, "bool": 9, "f16": 10, "f64": 11, "u32": 12, "u64": 13,
    "bf16": 16, "f8e4m3fn": 17, "f8e4m3fnuz": 18, "f8e5m2": 19, "f8e5m2fnuz": 20, "u4": 21, "i4": 22, "f4e2m1": 23, "f8e8m0": 24, "u2": 25, "i2": 26,
}  # fmt: skip


# ---------------------------------------------------------------- where things are


@dataclass(slots=True)
class Weights:
    """``arrays``: {constant: its bytes, flat uint8, sub-byte elements packed}; ``offsets``: {constant: byte offset}, multiples of 64;
    ``size``: bytes of all."""

    arrays: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def add(self, name: str, a: np.ndarray[Any, Any]) -> None:
        self.arrays[name] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        self.offsets[name] = self.size
        self.size += -(-self.arrays[name].size // ALIGN) * ALIGN


def lay_out(program: Program) -> Weights:
    """Bytes of every constant, sub-byte elements packed."""
    w = Weights()
    owner = roots(program)
    dtypes = {owner.get(b.name, b.name): b.dtype for s in walk_stmts(program.body) for b in _mentioned(s)}
    for name, a in program.constants.items():
        d = dtypes.get(name)
        w.add(name, _packed(a, d))
    for b in program.inputs:
        a = program.defaults.get(b.name)
        if a is not None:
            w.add(DEFAULT + b.name, _packed(a, b.dtype))
    return w


def _packed(a: np.ndarray[Any, Any], d: DType | None) -> np.ndarray[Any, Any]:
    return pack_array(a, d) if d is not None and is_subbyte(d) and a.dtype != np.uint8 else a


def _mentioned(s: Stmt) -> list[Buffer]:
    out = [e.attr[0] for x in exprs_of(s) for e in loads(x)]
    if isinstance(s, Store):
        out.append(s.buf)
    elif isinstance(s, Call):
        out += [a if isinstance(a, Buffer) else a[0] for a in s.args if not isinstance(a, Expr)]
    return out


class Layout:
    """What every printer of a Program asks: memory, weights, the program's table of words, its kernels' loops and work.

    ``table``: {buffer: number of the word with its address}, dims come first; a dynamic buffer's capacity is in the word after.
    ``dynamic_outputs``: outputs whose extents only the run knows. ``used``: variables whose values ``main`` needs.
    Raises CompilationError for what the ABI cannot carry."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.plan: Plan = plan_memory(program)
        self.weights = lay_out(program)
        dims = set(program.dims)
        self.dynamic_outputs = {j for j, b in enumerate(program.outputs) if not b.symbols() <= dims}
        k = len(program.dims)
        self.table: dict[str, int] = {}
        for n in (*(b.name for b in program.inputs), *(b.name for b in program.outputs), *self.plan.slot_of):
            self.table[n] = k
            k += 1
        self.dyn_first = k
        for n in self.plan.dynamic:
            self.table[n] = k
            k += 2
        self.random_word = k  # two words, for inputs that are random bits when they are left out
        self.words = k + 2 * any(program.defaults.get(b.name, k) is None for b in program.inputs)
        self.used: set[Expr] = set().union(*(free_vars(e) for s in walk_stmts(program.body) for e in exprs_of(s)), set())
        for e in (*self.plan.dynamic.values(), *(e for b in program.outputs for e in b.shape), *(o for _, o in program.views.values())):
            self.used |= free_vars(e)
        self.loops: dict[str, tuple[For, Expr] | None] = {}
        self.work: dict[str, KernelWork] = {}
        called = {s.callee for s in walk_stmts(program.body) if isinstance(s, Call)}
        for name in sorted(called & set(program.kernels)):
            f = program.kernels[name]
            self.loops[name] = found = parallel_loop(f)
            self.work[name] = KernelWork.of(f, found[0] if found else None)
        for what, bs in (("input", program.inputs), ("output", program.outputs)):
            for b in bs:
                if b.rank > MAX_RANK:
                    raise UnsupportedOperator(f"{what} {b.name} has rank {b.rank}, a module takes and gives at most {MAX_RANK}", hint="reshape it inside of the model")
                if b.dtype.name not in DTYPE_CODES:
                    raise CompilationError(f"{what} {b.name}: elements of type {b.dtype} cannot cross the ABI")

    def public(self, b: Buffer) -> str:
        """The name that callers know."""
        return self.program.output_names.get(b.name, b.name)

    def origin(self, name: str) -> tuple[str, list[Expr]]:
        """The buffer that owns the memory behind ``name``, and the element offsets to add."""
        parts: list[Expr] = []
        while name in self.program.views:
            name, offset = self.program.views[name]
            parts.append(offset)
        if name not in self.weights.offsets and name not in self.table:
            raise CompilationError(f"program {self.program.name}: buffer {name} has no memory")
        return name, [e for e in parts if not (e.op == "const" and e.attr == 0)]


# ---------------------------------------------------------------- steps


@dataclass(frozen=True, slots=True)
class Wait:
    """All work before this place is complete."""


@dataclass(frozen=True, slots=True)
class Meet:
    """All threads arrive."""


@dataclass(frozen=True, slots=True)
class Bind:
    """Every thread computes the value of a variable."""

    var: Expr
    value: Expr


@dataclass(frozen=True, slots=True)
class Put:
    """Thread 0 stores a scalar."""

    store: Store


@dataclass(frozen=True, slots=True)
class Check:
    """The run fails unless ``low <= got <= high`` (None: no bound). Every thread sees the same values, so all leave.

    ``kind``: ``equal`` (low is high: two extents that must fit), ``extent`` (of dimension ``axis`` of tensor ``what``, not negative),
    ``value`` (what memory holds, within what the variable promises: all that is proved about indices rests on it)."""

    kind: str
    what: str
    got: Expr
    low: Expr | None
    high: Expr | None
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Thread 0 finds memory for buffers (name, bytes) and outputs (number, buffer) whose extents are now known; all threads meet
    and leave if there is none. A Meet stands before it."""

    buffers: tuple[tuple[str, Expr], ...]
    outputs: tuple[tuple[int, Buffer], ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Kernel call ``number``. ``shared``: chunks of at least ``grain`` iterations for all threads, else thread 0 runs it whole.
    ``extent``: iterations of the parallel loop, None when there is none."""

    call: Call
    number: int
    shared: bool
    extent: Expr | None
    grain: Expr | None


@dataclass(frozen=True, slots=True)
class Branch:
    cond: Expr
    then: tuple[Step, ...]
    orelse: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """While ``cond``: ``body``. All threads meet before the condition is evaluated."""

    cond: Expr
    body: tuple[Step, ...]


Step = Wait | Meet | Bind | Put | Check | Place | Run | Branch | Repeat


@dataclass(frozen=True, slots=True)
class Steps:
    """``body``: in order; ``calls``: the kernel of each Run, by number; ``shared_work``: operations of each shared Run."""

    body: tuple[Step, ...]
    calls: tuple[str, ...]
    shared_work: tuple[Expr, ...]


def steps(layout: Layout) -> Steps:
    """The steps of a program. Raises CompilationError for calls that do not fit the kernels."""
    w = _Walk(layout)
    body = w.block(layout.program.body)
    return Steps(body, tuple(w.calls), tuple(w.shared_work))


def written_by(body: Stmt) -> set[str]:
    """Names of the buffers that a kernel stores into."""
    return {s.buf.name for s in walk_stmts(body) if isinstance(s, Store)}


class _Walk:
    def __init__(self, layout: Layout) -> None:
        self.m, self.p = layout, layout.program
        self.hazards = Hazards()
        self.known = set(self.p.dims)
        self.placed: set[str] = set()
        self.checked: set[Expr] = set()  # extents known to be no less than 0
        self.out: list[Step] = []
        self.calls: list[str] = []
        self.shared_work: list[Expr] = []

    def block(self, body: Stmt | None) -> tuple[Step, ...]:
        """Steps of a nested body; what it learns is forgotten afterwards."""
        outer, known, placed, checked = self.out, set(self.known), set(self.placed), set(self.checked)
        self.out = []
        for c in stmts_of(body):
            self.stmt(c)
        done = tuple(self.out)
        self.out, self.known, self.placed, self.checked = outer, known, placed, checked
        return done

    def memory(self, b: Buffer) -> Any:
        """What a barrier protects: a slot, an input, an output; None for constants, which nobody writes."""
        root = self.m.plan.root(b.name)
        if root in self.m.weights.offsets:
            return None
        return self.m.plan.slot_of.get(root, root)

    def meet(self) -> None:
        self.out.append(Meet())
        self.hazards = Hazards()

    def wait(self) -> None:
        self.out.append(Wait())
        self.hazards.waited()

    def access(self, reads: Iterable[Buffer], writes: Iterable[Buffer], shared: bool) -> None:
        r = {self.memory(b) for b in reads} - {None}
        w = {self.memory(b) for b in writes} - {None}
        if w & self.hazards.steering:
            self.meet()
        elif self.hazards.conflict(r, w, shared):
            self.wait()
        self.hazards.note(r, w, shared)

    def read_by_all(self, *es: Expr) -> None:
        """Values that ``main`` itself needs, on every thread."""
        memory = {self.memory(e.attr[0]) for e in loads(*es)} - {None}
        if self.hazards.conflict(memory, set(), True):
            self.wait()
        self.hazards.steering |= memory

    def stmt(self, s: Stmt) -> None:
        if isinstance(s, Let):
            self.read_by_all(s.value)
            self.out.append(Bind(s.var, s.value))
            self.known.add(s.var)
            self.check_value(s)
            self.place()
        elif isinstance(s, Store):
            self.access([e.attr[0] for x in exprs_of(s) for e in loads(x)], [s.buf], False)
            self.out.append(Put(s))
        elif isinstance(s, If):
            self.read_by_all(s.cond)
            before, ends, bodies = self.hazards.copy(), [], []
            for body in (s.then, s.orelse):
                self.hazards = before.copy()
                bodies.append(self.block(body))
                ends.append(self.hazards)
            self.hazards = ends[0]
            self.hazards.merge(ends[1])
            self.out.append(Branch(s.cond, bodies[0], bodies[1]))
        elif isinstance(s, While):
            self.hazards = Hazards()
            self.read_by_all(s.cond)
            after = self.hazards.copy()
            body = self.block(s.body)
            self.out.append(Repeat(s.cond, body))
            self.hazards = after
        elif isinstance(s, Call):
            if s.callee == "lt.check":
                got, want = s.args
                self.read_by_all(got, want)
                self.out.append(Check("equal", str(dict(s.attrs).get("what", "an extent")), got, want, want))
            else:
                self.run(s)
        else:
            raise CompilationError(f"program {self.p.name}: a program cannot hold {type(s).__name__}")

    def run(self, s: Call) -> None:
        f = self.p.kernels.get(s.callee)
        if f is None:
            raise CompilationError(f"program {self.p.name} calls the unknown kernel {s.callee}")
        if len(f.params) != len(s.args):
            raise CompilationError(f"kernel {s.callee} takes {len(f.params)} arguments, the program passes {len(s.args)}")
        written = written_by(f.body)
        reads: list[Buffer] = []
        writes: list[Buffer] = []
        for p, a in zip(f.params, s.args):
            if isinstance(p, Buffer):
                (writes if p.name in written else reads).append(a if isinstance(a, Buffer) else a[0])
        self.read_by_all(*(a if isinstance(a, Expr) else a[1] for a in s.args if not isinstance(a, Buffer)))
        self.check_extents((*reads, *writes))
        env = {p: a for p, a in zip(f.params, s.args) if isinstance(p, Expr)}
        loop, load = self.m.loops[s.callee], self.m.work[s.callee]
        shared = loop is not None and not load.small(env)
        self.access(reads, writes, shared)
        grain = None
        if shared:
            self.shared_work.append(substitute(load.total, env))
            grain = load.grain(env, int(f.attrs.get("grain", 1)))
        extent = None if loop is None else substitute(loop[1], env)
        self.out.append(Run(s, len(self.calls), shared, extent, grain))
        self.calls.append(s.callee)

    def check_extents(self, bufs: Iterable[Buffer]) -> None:
        """A kernel is not called for tensors of negative extents, which inputs that are too small give."""
        for b in bufs:
            for axis, e in enumerate(b.shape):
                low = bounds(e)[0]
                if (low is None or low < 0) and e not in self.checked and not loads(e):
                    self.checked.add(e)
                    self.out.append(Check("extent", self.m.public(b), e, const(0), None, axis))

    def check_value(self, s: Let) -> None:
        _, lo, hi = s.var.attr
        if not loads(s.value) or not s.var.dtype.is_index or (lo is None and hi is None):
            return
        if isinstance(hi, Expr) and not (free_vars(hi) <= self.known and not loads(hi)):
            hi = None
        low, high = (None if x is None else as_expr(x) for x in (lo, hi))
        self.out.append(Check("value", str(s.var.attr[0]), s.var, low, high))

    def place(self) -> None:
        """Memory of buffers and outputs whose last unknown extent was just read."""
        m = self.m
        names = [n for n, e in m.plan.dynamic.items() if n not in self.placed and free_vars(e) <= self.known]
        outs = [(j, b) for j, b in enumerate(self.p.outputs) if j in m.dynamic_outputs and b.name not in self.placed and b.symbols() <= self.known]
        if not names and not outs:
            return
        self.meet()
        self.out.append(Place(tuple((n, m.plan.dynamic[n]) for n in names), tuple(outs)))
        self.hazards = Hazards()
        self.placed |= {*names, *(b.name for _, b in outs)}
