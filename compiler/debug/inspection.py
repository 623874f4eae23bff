"""What ``luthier inspect`` and ``luthier ops`` print."""

from __future__ import annotations

import importlib.resources
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier import settings

__all__ = ["conformance", "operator_matrix", "stages"]


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
