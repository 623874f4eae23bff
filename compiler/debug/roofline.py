"""The roofline of a model: what each kernel does, moves and takes, against what this machine was measured to be capable of.

A kernel's ideal time is the largest of its float operations at the FMA peak, its integer operations at the peak of the fastest
integer dot product, and its bytes at the bandwidth of the place where they lie: weights where all weights of the model fit, everything
else where the kernel's own tensors fit. Where no dot product was measured, integer kernels are judged by their bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.codegen.targets.ceilings import Ceilings, measure

if TYPE_CHECKING:
    from luthier.ir.program import Program

__all__ = ["KernelRow", "Roofline", "analyse", "draw"]


@dataclass
class KernelRow:
    """One kernel call. ``bytes``: weights and tensors that it touches, each once. ``ideal_ms``: no run can be faster than that."""

    kernel: str
    nodes: tuple[str, ...]
    flops: float
    integers: float
    bytes: float
    weights: float
    ms: float
    ideal_ms: float
    bound: str

    @property
    def operations(self) -> float:
        return self.flops + self.integers

    @property
    def intensity(self) -> float:
        return self.operations / self.bytes if self.bytes else 0.0

    @property
    def gops(self) -> float:
        """Thousands of millions of operations a second, of floats and integers."""
        return self.operations / self.ms / 1e6 if self.ms else 0.0

    @property
    def fraction(self) -> float:
        """Of the ceiling; 1 is perfect."""
        return self.ideal_ms / self.ms if self.ms else 0.0


@dataclass
class Roofline:
    """``run_ms``: median of whole runs; ``rows``: kernels in order, whose times are those of a profile (all threads meet after each)."""

    model: str
    target: str
    ceilings: Ceilings
    run_ms: float
    rows: list[KernelRow] = field(default_factory=list)

    @property
    def ideal_ms(self) -> float:
        return sum(r.ideal_ms for r in self.rows)

    @property
    def profile_ms(self) -> float:
        return sum(r.ms for r in self.rows)

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(r), "intensity": r.intensity, "gops": r.gops, "fraction": r.fraction} for r in self.rows]
        return {"model": self.model, "target": self.target, "run_ms": self.run_ms, "profile_ms": self.profile_ms, "ideal_ms": self.ideal_ms, "ceilings": asdict(self.ceilings), "kernels": rows}


def analyse(
    model: Any, feeds: Mapping[str, Any] | None = None, target: str = "cpu", shapes: Mapping[str, Sequence[Any]] | None = None, threads: int | None = None,
    runs: int = 30, ceilings: Ceilings | None = None, seed: int = 0,
) -> Roofline:
    """Compile ``model``, run it on ``feeds`` (default: random), count and time its kernels. ``ceilings``: measured now when not given.

    Raises what ``luthier.compile`` raises, and TargetError for a target whose ceilings cannot be measured here."""
    from luthier.codegen.targets.target import parse_target
    from luthier.errors import TargetError
    from luthier.feeds import random_inputs
    from luthier.importers.onnx.importer import import_onnx
    from luthier.module import Module
    from luthier.pipeline import compile_program

    chosen = parse_target(target)
    if not chosen.backend.measures_ceilings or chosen.missing_here():
        raise TargetError(f"the ceilings of {target} cannot be measured on this machine", hint="name a cpu target that runs here")
    program = compile_program(import_onnx(model, shapes), chosen.caps)
    module = Module.from_program(program, chosen, threads)
    given = dict(feeds) if feeds is not None else random_inputs(module.inputs, {k: v for k, v in (shapes or {}).items()}, seed)
    outputs = module.run(given)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        module.run(given, out=outputs)
        times.append((time.perf_counter() - start) * 1e3)
    profile = module.profile(given, max(3, runs // 3))
    roof = ceilings if ceilings is not None else measure(module.threads or 1)
    name = Path(model).stem if isinstance(model, (str, Path)) else program.name
    out = Roofline(name, target, roof, statistics.median(times))
    weights = float(module.manifest["weights_bytes"])
    for row, work in zip(profile, work_of_calls(program, given), strict=True):
        out.rows.append(judge(row, work, weights, roof))
    return out


def work_of_calls(program: Program, feeds: Mapping[str, Any]) -> list[tuple[float, float, float, float]]:
    """(float operations, integer operations, bytes of weights, bytes of other tensors) of each kernel call for these inputs.

    An extent that only the run finds counts as 1."""
    import numpy as np

    from luthier.debug.work import count_work, value
    from luthier.ir.expr import Expr
    from luthier.ir.loop import Buffer, Call, walk_stmts

    env: dict[Expr, int | None] = {v: int(np.shape(feeds[program.inputs[i].name])[axis]) for v, (i, axis) in program.dims.items()}
    seen: dict[Any, Any] = {}
    out = []
    for s in walk_stmts(program.body):
        if not isinstance(s, Call) or s.callee not in program.kernels:
            continue
        f = program.kernels[s.callee]
        scalars = {p: (value(a, env) or 1) for p, a in zip(f.params, s.args, strict=True) if isinstance(p, Expr) and isinstance(a, Expr)}
        arrays = {p.name: program.constants.get((a if isinstance(a, Buffer) else a[0]).name) for p, a in zip(f.params, s.args, strict=True) if isinstance(p, Buffer)}
        tables = {n: a for n, a in arrays.items() if a is not None and a.dtype == np.int32}
        key = (s.callee, tuple(sorted((p.key, n) for p, n in scalars.items())), tuple(id(a) for a in tables.values()))
        if key not in seen:
            seen[key] = count_work(f, scalars, tables)
        work = seen[key]
        weights = others = 0.0
        for p, a in zip(f.params, s.args, strict=True):
            if not isinstance(p, Buffer):
                continue
            arg = a if isinstance(a, Buffer) else a[0]
            item = p.dtype.bits / 8 if not p.dtype.is_bool else 1.0
            size = value(p.size(), scalars) or 1
            touched = sum(min(float(size), side.get(p.name, 0.0)) for side in (work.reads, work.writes))
            if arg.name in program.constants:
                weights += touched * item
            else:
                others += touched * item
        out.append((work.floats, work.integers, weights, others))
    return out


def judge(row: Mapping[str, Any], work: tuple[float, float, float, float], model_weights: float, roof: Ceilings) -> KernelRow:
    """A profile's row against the ceilings."""
    flops, integers, weights, others = work
    floats, whole = flops / roof.flops / 1e6, integers / roof.integers / 1e6 if roof.integers else 0.0
    compute = max(floats, whole)
    near, far = roof.level(others), roof.level(model_weights)
    moves = {near: others / roof.reads[near] / 1e6}
    moves[far] = moves.get(far, 0.0) + weights / roof.reads[far] / 1e6
    memory = sum(moves.values())
    bound = ("compute" if floats >= whole else "integers") if compute >= memory else max(moves, key=lambda k: moves[k])
    return KernelRow(str(row["kernel"]), tuple(row["nodes"]), flops, integers, weights + others, weights, float(row["ms"]), max(compute, memory), bound)


# ---------------------------------------------------------------- drawing


WIDTH, HEIGHT, LEFT, TOP = 960.0, 560.0, 70.0, 30.0


def draw(report: Roofline, path: Path) -> None:
    """An SVG, or an HTML page with the drawing and the table, by the file's ending. Raises InputError for another one."""
    from jinja2 import Environment, PackageLoader

    from luthier.errors import InputError

    if path.suffix not in (".svg", ".html"):
        raise InputError(f"{path} is neither .svg nor .html")
    env = Environment(loader=PackageLoader("luthier", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    path.write_text(env.get_template(f"roofline{path.suffix}.j2").render(report=report, plot=_plot(report)), encoding="utf-8")


def _plot(report: Roofline) -> dict[str, Any]:
    """Positions of everything drawn; both axes are logarithmic."""
    import math

    rows = [r for r in report.rows if r.operations > 0 and r.bytes > 0 and r.ms > 0]
    roof = report.ceilings
    x0 = min([0.05, *(r.intensity / 2 for r in rows)])
    x1 = max([100.0, *(r.intensity * 2 for r in rows)])
    whole = roof.integers if any(r.integers > r.flops for r in rows) else 0.0
    top = max(roof.flops, whole)
    y1 = top * 2
    y0 = min([roof.flops / 1000, *(r.gops / 2 for r in rows)])

    def px(v: float) -> float:
        return round(LEFT + WIDTH * math.log(v / x0) / math.log(x1 / x0), 1)

    def py(v: float) -> float:
        return round(TOP + HEIGHT - HEIGHT * math.log(v / y0) / math.log(y1 / y0), 1)

    def ticks(lo: float, hi: float) -> list[float]:
        return [10.0**k for k in range(math.ceil(math.log10(lo)), math.floor(math.log10(hi)) + 1)]

    lines = []
    for name, rate in roof.reads.items():
        knee = top / rate
        start = max(x0, y0 / rate)
        if start < knee:
            lines.append({"name": f"{name} {rate:.0f} GB/s", "x1": px(start), "y1": py(start * rate), "x2": px(min(knee, x1)), "y2": py(min(knee, x1) * rate)})
    left = px(max(x0, roof.flops / max(roof.reads.values())))
    peaks = [{"x1": left, "x2": LEFT + WIDTH, "y": py(roof.flops), "name": f"{roof.flops:.0f} GFLOP/s f32 FMA"}]
    if whole:
        peaks.append({"x1": px(max(x0, whole / max(roof.reads.values()))), "x2": LEFT + WIDTH, "y": py(whole), "name": f"{whole:.0f} Gop/s integer dot products"})
    total = report.profile_ms or 1.0
    points = []
    shown = sorted(rows, key=lambda r: -r.ms)
    for k, r in enumerate(shown):
        points.append({
            "x": px(r.intensity), "y": py(r.gops), "r": round(3 + 40 * math.sqrt(r.ms / total), 1), "bound": r.bound, "label": ", ".join(r.nodes)[:40] if k < 8 else "",
            "title": f"{r.kernel}: {r.ms:.3f} ms, ideal {r.ideal_ms:.3f} ms ({100 * r.fraction:.0f} %), {r.gops:.1f} Gop/s, {r.intensity:.2f} op/byte; {', '.join(r.nodes)[:200]}",
        })  # fmt: skip
    return {
        "width": WIDTH + LEFT + 30, "height": HEIGHT + TOP + 50, "left": LEFT, "top": TOP, "right": LEFT + WIDTH, "bottom": TOP + HEIGHT, "lines": lines,
        "peaks": peaks,
        "xticks": [{"at": px(v), "text": f"{v:g}"} for v in ticks(x0, x1)], "yticks": [{"at": py(v), "text": f"{v:g}"} for v in ticks(y0, y1)], "points": points,
    }  # fmt: skip
