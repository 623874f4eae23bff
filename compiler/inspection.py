"""What ``luthier inspect`` and ``luthier ops`` print."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier import settings

__all__ = ["operator_matrix", "stages"]


def stages(model: Path, target: str, shapes: Mapping[str, Any], threads: int | None) -> list[tuple[str, str]]:
    """(name, text) of everything a compile writes with ``LUTHIER_DUMP``, in order: the graph after each pass that changed it, the
    program with its kernels as loop IR, and what the backend adds (its source).

    Raises what ``luthier.compile`` raises."""
    import luthier

    name = settings.dump.name
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="luthier-inspect-") as folder:
        os.environ[name] = folder
        try:
            luthier.compile(model, target=target, shapes=dict(shapes) or None, threads=threads)
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
        files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        return [(str(p.relative_to(folder).with_suffix("")), p.read_text(encoding="utf-8", errors="replace")) for p in files]


def operator_matrix(missing: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of operator x target, from the registry of operators and the list of targets.

    A target compiles every operator that the registry holds, because all print the same loop IR. With ``missing``, the ONNX
    operators of the default domain that have no entry follow: ``by its definition`` where the ONNX standard defines them by
    others (the importer expands those), ``no`` where not."""
    from luthier.ir.op import REGISTRY, load_all

    load_all()
    header = ["operator", "kind", "cpu"]
    rows = [[name, op.kind, "yes"] for name, op in sorted(REGISTRY.items())]
    if missing:
        import onnx

        newest = {s.name: s for s in onnx.defs.get_all_schemas() if s.domain == "" and not s.deprecated}
        for name, schema in sorted(newest.items()):
            if name not in REGISTRY:
                expanded = schema.has_function or schema.has_context_dependent_function
                rows.append([name, "", "by its definition" if expanded else "no"])
    return header, rows
