"""The process that tries mutants for :mod:`benchmarks.fuzz`: one JSON line in, two out. The first says what luthier did and is written before
onnxruntime gets the file, which may well die of it; the second says what onnxruntime did and whether the answers agree."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from luthier import settings
from luthier.build_graph import build_graph
from luthier.codegen.targets.target import parse_target
from luthier.debug.repro import USER_ERRORS, signature
from luthier.errors import InputError, KernelError, LuthierError
from luthier.feeds import random_inputs
from luthier.importers.onnx.importer import import_onnx
from luthier.module import Module

ELEMENTS = 1 << 22  # inputs larger than that are not fed
EXTENT = 2  # of a dimension that the model leaves open
REFUSALS = (*USER_ERRORS, KernelError)
Answers = dict[str, Any]
BY_DATA = ("gather", "scatter", "onehot", "nonzero")  # kernels whose indices are data: to be outside is no fault of the compiler


OUTSIDE = re.compile("kernel .*: index .* is outside its extent")


def compiled(path: Path, checked: bool = False) -> Module:
    """``checked``: every access of every kernel is, and a KernelError says so."""
    if path.suffix == ".gguf":
        from luthier.llm import compile_gguf

        return compile_gguf(path, "cpu", {}, 1, None)
    return build_graph(lambda: import_onnx(path), parse_target("cpu"), 1, checked)


def feeds_of(module: Module) -> dict[str, Any] | None:
    """Random inputs; None where they would be too large, or the name of an extent is a formula."""
    shapes = {s.name: tuple(d if isinstance(d, int) else EXTENT for d in s.shape) for s in module.inputs}
    if sum(int(np.prod(s, dtype=object)) for s in shapes.values()) > ELEMENTS:
        return None
    return random_inputs(module.inputs, shapes)


def where(error: BaseException) -> str:
    """The innermost place in this package that an error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "luthier" in f.filename or "site-packages" not in f.filename]
    last = frames[-1] if frames else None
    return f"{Path(last.filename).name}:{last.name}:{last.lineno}" if last else "?"


def attempt(path: Path, checked: bool) -> tuple[dict[str, Any], tuple[Answers, Answers] | None]:
    """(what happened, (feeds, outputs) when it ran)."""
    stage = "compile"
    try:
        module = compiled(path, checked)
        stage = "run"
        feeds = feeds_of(module)
        if feeds is None:
            return {"outcome": "compiled", "detail": "inputs too large to feed"}, None
        outputs = module.run(feeds)
    except REFUSALS as e:
        if isinstance(e, KernelError) and OUTSIDE.search(str(e)) and not any(n in str(e) for n in BY_DATA):
            return {"outcome": "internal", "detail": str(e)[:300], "signature": f"{stage} {signature(e)}", "kind": "outside"}, None
        return {"outcome": "refused", "detail": str(e)[:300], "signature": f"{stage} {signature(e)}", "error": type(e).__name__}, None
    except (Exception, RecursionError) as e:
        kind = "ill-formed error" if isinstance(e, LuthierError) else "internal error"
        return {"outcome": "internal", "detail": f"{type(e).__name__}: {e}"[:300], "signature": f"{stage} {where(e)} {signature(e)}", "kind": kind}, None
    return {"outcome": "ran"}, (feeds, outputs)


def differences(outputs: Answers, expected: list[Any], names: list[str]) -> str:
    """The first output that differs, empty for none. Integers of quantized models may be one off."""
    for name, want in zip(names, expected, strict=True):
        got = outputs.get(name)
        if got is None or isinstance(want, list) or want is None or np.asarray(got).dtype.kind == "V":
            continue  # sequences; types that onnxruntime hands out as bytes
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"{name}: {got.dtype}{list(got.shape)} against {want.dtype}{list(want.shape)}"
        if not want.size:
            continue
        if want.dtype.kind in "iu" and want.dtype.itemsize == 1:
            close = np.abs(got.astype(np.int64) - want.astype(np.int64)) <= 1
        elif want.dtype.kind in "iub":
            close = got == want
        else:
            a, b = got.astype(np.float64), want.astype(np.float64)
            finite = np.abs(b[np.isfinite(b)])
            close = np.isclose(a, b, 2e-3, max(2e-3 * float(finite.max(initial=0)), 1e-6), equal_nan=True)
        if not close.all():
            k = int(np.argmin(close.reshape(-1)))
            return f"{name}: {got.reshape(-1)[k]} against {want.reshape(-1)[k]}, {int((~close).sum())} of {close.size}"
    return ""


def peer(path: Path, ran: tuple[Answers, Answers] | None) -> dict[str, Any]:
    """What onnxruntime makes of the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        if ran is None:
            return {"peer": "loads"}
        feeds, outputs = ran
        names = [o.name for o in session.get_outputs()]
        wanted = {i.name for i in session.get_inputs()}
        expected = session.run(None, {k: v for k, v in feeds.items() if k in wanted})
    except Exception as e:  # its errors have no common base
        return {"peer": "refuses", "peer_detail": str(e)[:200]}
    text = differences(outputs, expected, names)
    return {"peer": "differs", "peer_detail": text} if text else {"peer": "agrees"}


def main() -> None:
    """``argv``: megabytes of memory."""
    limit = int(sys.argv[1]) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    with settings.repro_dir.temporarily(os.devnull), contextlib.suppress(BrokenPipeError, InputError):
        for line in sys.stdin:
            job = json.loads(line)
            path = Path(job["path"])
            result, ran = attempt(path, job["checked"])
            answers.write(json.dumps(result) + "\n")
            answers.write(json.dumps(peer(path, ran) if job["peer"] and path.suffix == ".onnx" else {}) + "\n")


if __name__ == "__main__":
    main()
