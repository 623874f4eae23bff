"""The single-operator models of the onnx backend suite, imported and evaluated node by node through their Computes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import f16
from luthier.ir.interpret.loops import storage
from tests.ops.check import run_graph

_ = f16


@functools.cache
def cases() -> dict[str, Any]:
    """{name: TestCase}; loading takes about ten seconds."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {c.name: c for c in collect_testcases(None)}


def expected(w: Any) -> np.ndarray[Any, Any]:
    from onnx import TensorProto, numpy_helper

    return numpy_helper.to_array(w) if isinstance(w, TensorProto) else np.asarray(w)


def run_case(case: Any, atol: float = 0.0) -> None:
    """``atol``: more absolute tolerance, where the expected values carry rounding noise of their own. Raises AssertionError on a wrong result, LuthierError on a refusal."""
    from luthier.importers.onnx.importer import import_onnx

    graph = import_onnx(case.model)
    assert not graph.structured_inputs and not graph.structured_outputs, "lists of tensors: tests/conformance gives and takes them"
    for ins, outs in case.data_sets:
        feeds = {name: np.zeros(2, np.uint32) if a is None else a for name, a in graph.defaults.items()}
        feeds |= {v.name: expected(a) for v, a in zip(case.model.graph.input, ins, strict=False)}
        got = run_graph(graph, {v.name: feeds[v.name].astype(storage(v.dtype), copy=False) for v in graph.inputs})
        for k, (g, w) in enumerate(zip(got, [expected(o) for o in outs], strict=True)):
            what = f"{case.name} output {k}"
            assert g.shape == w.shape, f"{what}: shape {g.shape}, expected {w.shape}"
            if w.dtype.kind == "f" or g.dtype.kind == "V" and not g.dtype.name.startswith(("int", "uint")):
                np.testing.assert_allclose(g.astype(np.float64), w.astype(np.float64), rtol=max(case.rtol or 0, 1e-3), atol=max(case.atol or 0, atol, 1e-7), err_msg=what)
            else:
                np.testing.assert_array_equal(g.astype(np.int64) if g.dtype.kind == "V" else g, w.astype(np.int64) if w.dtype.kind == "V" else w, err_msg=what)


def select(prefixes: Sequence[str]) -> list[str]:
    return [n for n in cases() if n.startswith(tuple(prefixes))]
