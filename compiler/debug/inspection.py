"""What ``luthier inspect`` and ``luthier ops`` print."""

from __future__ import annotations

import importlib.resources
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier import settings

__all__ = ["conformance", "knob_table", "operator_matrix", "stages"]


def stages(model: Path, target: str, shapes: Mapping[str, Any], threads: int | None) -> list[tuple[str, str]]:
    """(name, text) of everything a compile writes with ``LUTHIER_DUMP``, in order: the graph after each pass that changed it, the
    program with its kernels as loop IR, and what the backend adds (its source).

    Raises what ``luthier.compile`` raises."""
    import luthier

    with tempfile.TemporaryDirectory(prefix="luthier-inspect-") as folder:
        with settings.dump.temporarily(folder):
            luthier.compile(model, target=target, shapes=dict(shapes) or None, threads=threads)
        files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        return [(str(p.relative_to(folder).with_suffix("")), p.read_text(encoding="utf-8", errors="replace")) for p in files]


def knob_table(model: Path, target: str, shapes: Mapping[str, Any]) -> list[str]:
    """Lines: each template that makes kernels of ``model``, these kernels, its knobs with what they mean and the values that a tuner tries,
    and the number of points. Raises what ``luthier.compile`` raises."""
    from luthier.codegen.targets.target import parse_target
    from luthier.importers.onnx.importer import import_onnx
    from luthier.ir.op import load_all
    from luthier.pipeline import compile_program
    from luthier.schedules.select import Record, template_module
    from luthier.tuner.space import lite

    load_all()
    caps = parse_target(target).caps
    record = Record(everything=True)
    compile_program(import_onnx(str(model), dict(shapes) or None), caps, record=record)
    made: dict[str, list[Any]] = {}
    for compute, constants, kernels in record.made:
        if "+" not in kernels.template:
            made.setdefault(kernels.template, []).append((compute, constants))
    lines = []
    for template, computes in sorted(made.items()):
        points = {len(lite(template, c, caps, constants)) for c, constants in computes}
        count = str(min(points)) if len(points) == 1 else f"{min(points)} to {max(points)}"
        lines.append(f"{template}: {len(computes)} kernels ({', '.join(dict.fromkeys(c.name for c, _ in computes))}), {count} points")
        for k in template_module(template).KNOBS:
            default, *values = k.worth(caps, computes[0][0])
            lines.append(f"  {k.name} = {default if default is not None else 'its own choice'}; {', '.join(map(str, values)) or 'nothing else is tried'}: {k.about}")
    return lines


def operator_matrix(missing: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of operator x target: operators of the registry, targets of :mod:`luthier.targets`.

    A cell is what was measured: ``12/12`` are tests of the ONNX backend suite for this operator alone that pass and that there are,
    from the saved artifact in a fresh process (``benchmarks/conformance.py``, kept in ``conformance.json``); ``untested``: the
    target builds modules, and no such test was run. With ``missing``, the ONNX operators of the default
    domain that have no entry follow: ``by its definition`` where the standard defines them by others (the importer expands
    those), or ``no``."""
    from luthier.ir.op import REGISTRY, load_all
    from luthier.targets import BUILDERS

    load_all()
    measured = conformance()["targets"]
    targets = [*BUILDERS]

    def cell(op: str, target: str) -> str:
        counts = measured.get(target, {}).get(op)
        return "untested" if counts is None else f"{counts[0]}/{counts[1]}"

    rows = [[name, op.kind, *(cell(name, t) for t in targets)] for name, op in sorted(REGISTRY.items())]
    if missing:
        import onnx

        newest = {s.name: s for s in onnx.defs.get_all_schemas() if s.domain == "" and not s.deprecated}
        for name, schema in sorted(newest.items()):
            if name not in REGISTRY:
                expanded = schema.has_function or schema.has_context_dependent_function
                how = "by its definition" if expanded else "no"
                tested = [cell(name, t) for t in targets]
                rows.append([name, how, *(c if "/" in c else "untested" if expanded and c != "no" else "no" for c in tested)])
    return ["operator", "kind", *targets], rows


def conformance() -> dict[str, Any]:
    """What was measured with the ONNX suite: {"onnx": version, "targets": {target: {operator: [passed, run]}}}."""
    data: dict[str, Any] = json.loads(importlib.resources.files("luthier").joinpath("conformance.json").read_text(encoding="utf-8"))
    return data
