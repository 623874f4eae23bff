"""From a Compute to kernels: the template whose pattern fits schedules it, lowering and the shared loop passes follow.

A template is one file of this folder with ``match(compute, caps) -> bool`` and ``apply(schedule, caps, constants, **knobs) ->
Schedule``; ``TEMPLATES`` (``GPU_TEMPLATES`` where a grid and groups take the place of threads and lanes) is the order in which
they are tried. The last one fits everything.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from luthier.at_fork import whole
from luthier.ir.compute import Compute, LetStmt, Pull, buffers_of, defined, let_exprs, map_let
from luthier.ir.expr import Expr, load, load_parts, loads, rewrite
from luthier.ir.loop import Buffer, Func
from luthier.passes.gpu.privatize_threads import privatize_threads
from luthier.passes.gpu.use_matrix import pad_tiles, use_matrix
from luthier.passes.loop.expand_math import expand_math
from luthier.passes.loop.flatten import flatten
from luthier.passes.loop.load_spans import load_spans
from luthier.passes.loop.place_barriers import place_barriers
from luthier.passes.loop.place_lets import place_lets
from luthier.passes.loop.promote_locals import promote_locals
from luthier.passes.loop.split_vectors import split_vectors
from luthier.passes.loop.transpose_blocks import transpose_blocks
from luthier.passes.loop.unroll import unroll
from luthier.passes.loop.vectorize import vectorize
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import check
from luthier.schedules.base.lower import lower
from luthier.schedules.base.schedule import Schedule, ScheduleError, schedule
from luthier.schedules.base.simplify_axes import drop_units
from luthier.schedules.base.split_arg import split_arg
from luthier.schedules.base.split_long import split_long, split_single
from luthier.schedules.base.split_scan import split_scan
from luthier.schedules.lowbit.rivals import RIVALS, defaults, rivals

TEMPLATES = ("sparse_gemv", "two_of_four", "lut_gemv", "quantized_gemv", "winograd_integer", "byte_products", "contract_integer", "contract_half", "winograd", "pool", "contract", "attention", "rowwise", "scan", "elementwise")
GPU_TEMPLATES = ("gpu_attention", "gpu_contract", "gpu_gemv", "gpu_scan", "gpu_rowwise", "gpu_elementwise")

ROOMS = {"lowbit": ("sparse_gemv", "two_of_four", "lut_gemv", "lut_wide", "quantized_gemv", "byte_products")}  # the others: gpu_* in gpu, cpu


def template_module(name: str) -> Any:
    """The file of a template, imported when it is first tried."""
    room = "gpu" if name.startswith("gpu_") else next((r for r, names in ROOMS.items() if name in names), "cpu")
    return importlib.import_module(f"luthier.schedules.{room}.{name.removeprefix('gpu_')}")


@dataclass(slots=True)
class Kernels:
    """``funcs``: in order of execution, parameters named like the Compute's tensors; ``temps``: tensors that pass between them;
    ``packed``: {name: array} constants repacked now; ``template``, ``schedule``: what made them, for inspection."""

    funcs: tuple[Func, ...]
    temps: tuple[Buffer, ...] = ()
    packed: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    template: str = ""
    trace: tuple[tuple[Any, ...], ...] = ()
    packings: dict[str, Any] = field(default_factory=dict)  # {name in packed: the Packing that made it}, to repack other weights
    reusable: bool = True  # whether an equal Compute with other constants may have the same kernels


def loop_passes(caps: Capabilities) -> list[Callable[[Func], Func]]:
    """The shared passes between a schedule and every printer, in order."""
    group = [privatize_threads, place_barriers, pad_tiles] if caps.gpu else []
    matrix = [use_matrix] if caps.gpu else []
    narrow = [functools.partial(split_vectors, bits=caps.vector_bits)] if caps.whole_registers else []
    blocks: list[Callable[[Func], Func]] = [transpose_blocks, load_spans] if caps.shuffles else []
    return [*group, flatten, *matrix, vectorize, unroll, *blocks, promote_locals, functools.partial(expand_math, native=caps.native), *narrow, place_lets]


def build_kernel(f: Func, caps: Capabilities) -> Func:
    """A loop-IR function in the form that printers take."""
    for p in loop_passes(caps):
        f = p(f)
    return f


# Templates whose tiles depend on the number of registers
TILED = frozenset({"winograd_integer", "byte_products", "contract_integer", "contract_half", "winograd", "contract", "attention"})


Constants = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Point:
    """A template with values of its knobs, those that differ from its own choice: a place in the space of a tuner."""

    template: str
    knobs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return " ".join([self.template, *(f"{n}={v}" for n, v in self.knobs)])


@dataclass
class Record:
    """The Computes whose tiles depend on the number of registers (``everything``: all), with the constants and what was made of them.
    ``choose``: picks among the kernels of templates that fit one pattern (:mod:`luthier.tuner.choose`); ``tuned``: the point of a Compute
    that was found before (:mod:`luthier.tuner.tune`), None for the default."""

    choose: Callable[[Sequence[Kernels]], Kernels] | None = None
    tuned: Callable[[Compute, Constants], Point | None] | None = None
    everything: bool = False
    made: list[tuple[Compute, Constants, Kernels]] = field(default_factory=list)

    def note(self, compute: Compute, constants: Constants, k: Kernels) -> Kernels:
        if self.everything or k.template in TILED:
            self.made.append((compute, constants, k))
        return k

    def retile(self, kernels: Mapping[str, Func], caps: Capabilities) -> dict[str, Func]:
        """The kernels of a program for another number of registers. Where new tiles would change parameters, temporaries or the layout
        of packed weights, the old kernel stays."""
        other: dict[int, Func] = {}
        for compute, constants, old in self.made:
            new = build(compute, caps, constants, template=old.template)
            if _interface(new) == _interface(old):
                other |= {id(f.body): g for f, g in zip(old.funcs, new.funcs, strict=True)}
        return {n: replace(other[id(f.body)], name=n) if id(f.body) in other else f for n, f in kernels.items()}


def _interface(k: Kernels) -> Any:
    return [f.params for f in k.funcs], k.temps, k.packed.keys(), k.packings


def build(
    compute: Compute, caps: Capabilities, constants: Constants | None = None, record: Record | None = None, *, pieces: bool = True, **knobs: Any
) -> Kernels:
    """Schedules, lowers and prepares ``compute`` for printing. ``constants``: contents of parameters known now; ``record``: notes what
    register tiles decide.

    ``pieces``: a long reduction may be cut. ``knobs`` go to the templates that declare them (``template="name"`` forces one). Raises
    ScheduleError for a knob that none declares, and where a template that was asked for does not fit."""
    return _build(split_scan(compute) if caps.gpu else compute, caps, constants or {}, record or Record(), pieces, knobs)


def _build(compute: Compute, caps: Capabilities, consts: Constants, record: Record, pieces: bool, knobs: dict[str, Any]) -> Kernels:
    slim = drop_units(split_arg(compute, anywhere=caps.gpu))
    s0 = schedule(slim)
    forced = knobs.pop("template", None)
    names = (forced,) if forced else GPU_TEMPLATES if caps.gpu else TEMPLATES
    if knobs:
        check(forced or "any", tuple(k for n in names for k in template_module(n).KNOBS), knobs)
    point = record.tuned(compute, consts) if record.tuned is not None and not forced and not knobs else None
    if point is not None:
        with contextlib.suppress(ScheduleError):  # not for what the point was found on: the default
            return record.note(compute, consts, _build(compute, caps, consts, Record(), pieces, {"template": point.template, **dict(point.knobs)}))

    def parts(groups: list[list[LetStmt]]) -> Kernels:
        numbers = [[sum(map(len, groups[:i])) + j for j in range(len(g))] for i, g in enumerate(groups)]
        whole = replace(slim, lets=tuple(x for g in groups for x in g))
        return join_kernels([_build(p, caps, consts, record, pieces and long is None, {}) for p in cut(whole, numbers)], compute)

    long = split_long(slim) if pieces and not forced and not caps.gpu else None
    if long is not None:
        return parts(long)
    for name in names:
        if name in RIVALS and not forced and not knobs and record.choose is not None and len(found := rivals(s0, caps, consts)) > 1:
            return record.note(compute, consts, record.choose(found))
        with whole:
            t = template_module(name)
        own = {k.name: knobs[k.name] for k in t.KNOBS if k.name in knobs}
        s = t.apply(s0, caps, consts, **(own or defaults(name, caps)))
        if s is None and name in ("attention", "rowwise") and slim is not compute:  # a single row is still a row
            s = t.apply(schedule(compute), caps, consts, **own)
        if isinstance(s, Kernels):  # a template whose loops are no schedule of the Compute's own
            return record.note(compute, consts, s)
        if s is not None:
            return record.note(compute, consts, finish(s, caps, consts, name))
        if name in ("rowwise", "gpu_rowwise"):
            cuts = partition(s0.compute)
            if len(cuts) > 1:
                return join_kernels([_build(p, caps, consts, record, True, {}) for p in cuts], compute)
            single = split_single(slim) if name == "rowwise" and pieces else None
            if single is not None:
                return parts(single)
    if forced:
        raise ScheduleError(f"{compute.name} is no pattern of template {forced}")
    raise AssertionError("the elementwise template fits everything")


def partition(c: Compute) -> list[Compute]:
    """A Compute that no template takes as a whole, cut into pieces that one takes: each reduction with the elementwise tensor that
    is its only reader, every other tensor by itself."""
    lets = list(c.lets)
    if not any(isinstance(x, Pull) and _reduces(x) for x in lets) or len(lets) < 2:
        return [c]
    readers: dict[str, list[int]] = {}
    for i, x in enumerate(lets):
        for n in {ld.attr[0].name for ld in loads(*let_exprs(x))}:
            readers.setdefault(n, []).append(i)
    groups: list[list[int]] = []
    home: dict[int, int] = {}
    for i, x in enumerate(lets):
        if isinstance(x, Pull) and not _reduces(x):
            src = [j for j in range(i) if isinstance(lets[j], Pull) and readers.get(lets[j].name) == [i] and _reduces(lets[j])]  # type: ignore[union-attr, arg-type]
            if len(src) == 1 and lets[src[0]].name not in c.outs and groups[home[src[0]]] == src:
                groups[home[src[0]]].append(i)
                home[i] = home[src[0]]
                continue
        home[i] = len(groups)
        groups.append([i])
    order = sorted(groups, key=lambda g: g[-1])
    return [c] if len(order) == 1 else cut(c, order)


def cut(c: Compute, groups: list[list[int]]) -> list[Compute]:
    """One Compute for each group of lets (by number); what other groups read of a group is an output of it."""
    lets = list(c.lets)
    readers: dict[str, list[int]] = {}
    for i, x in enumerate(lets):
        for n in {ld.attr[0].name for ld in loads(*let_exprs(x))}:
            readers.setdefault(n, []).append(i)
    made = {b.name: b for x in lets for b in buffers_of(x)}
    out: list[Compute] = []
    for g in groups:
        inner = {n for i in g for n in defined(lets[i])}
        read = [ld.attr[0] for i in g for ld in loads(*let_exprs(lets[i]))]
        params = {b.name: b for b in c.params if any(r.name == b.name for r in read)}
        params |= {r.name: replace(r, scope="param") for r in read if r.name in made and r.name not in inner}
        env = {n: b for n, b in params.items() if n in made}

        def fix(e: Expr, env: dict[str, Buffer] = env) -> Expr | None:
            if e.op == "load" and e.attr[0].name in env:
                _, idx, m, o = load_parts(e)
                return load(env[e.attr[0].name], idx, m, o)
            return None

        body = tuple(map_let(lets[i], lambda e: rewrite(e, fix)) for i in g)
        outs = tuple(n for i in g for n in defined(lets[i]) if n in c.outs or any(j not in g for j in readers.get(n, [])))
        out.append(Compute(f"{c.name}.{len(out)}", tuple(params.values()), c.dims, body, outs))
    return out


def _reduces(p: Pull) -> bool:
    return p.expr.op == "reduce" or (p.expr.op == "proj" and p.expr.args[0].op == "reduce")


def join_kernels(parts: list[Kernels], c: Compute) -> Kernels:
    temps: dict[str, Buffer] = {}
    for k in parts:
        for b in k.temps:
            temps[b.name] = b
        for f in k.funcs:
            for b in f.buffers:
                if b.writable and b.name not in c.outs:
                    temps.setdefault(b.name, replace(b, scope="global"))
    packed = {n: a for k in parts for n, a in k.packed.items()}
    return Kernels(tuple(f for k in parts for f in k.funcs), tuple(temps.values()), packed, "+".join(k.template for k in parts), tuple(t for k in parts for t in k.trace), {n: q for k in parts for n, q in k.packings.items()})


def finish(s: Schedule, caps: Capabilities, consts: Mapping[str, np.ndarray[Any, Any]], template: str = "") -> Kernels:
    """Lowering, run-time packing kernels, loop passes."""
    packed: dict[str, np.ndarray[Any, Any]] = {}
    packings: dict[str, Any] = {}
    pre: list[Func] = []
    temps: list[Buffer] = []
    for n, p in s.packed.items():
        if p.param in consts:
            packed[n] = p.apply(consts[p.param])
            packings[n] = p
        else:
            k = build(p.job, caps)
            pre += k.funcs
            temps.append(replace(p.buf, scope="global", writable=True))
    funcs = []
    written: dict[str, Buffer] = {}
    for f in lower(s):
        f = replace(f, attrs={**f.attrs, "template": template})
        funcs.append(build_kernel(f, caps))
        for b in f.buffers:
            if b.writable:
                written.setdefault(b.name, b)
    outs = set(s.compute.outs)
    temps += [replace(b, scope="global") for n, b in written.items() if n not in outs]
    return Kernels((*pre, *funcs), tuple(temps), packed, template, s.trace, packings)
