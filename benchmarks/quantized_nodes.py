"""Where runtimes part ways on a quantized model: every quantized tensor against onnxruntime without optimisations.

``python benchmarks/quantized_nodes.py MODEL [PICTURE]``: for each tensor the share of elements that differ and the largest difference
in steps of its scale, for onnxruntime as it comes, onnxruntime with ``session.x64quantprecision`` (no 16-bit saturation in its
AVX2 kernels) and Luthier. ``--outputs`` compares only the outputs of the model. One thread each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parent))
import models

import luthier

Arrays = dict[str, np.ndarray[Any, Any]]


def reference(model: onnx.ModelProto, inputs: Arrays, optimise: bool, config: dict[str, str] | None = None) -> Arrays:
    """Outputs by onnxruntime."""
    o = ort.SessionOptions()
    o.intra_op_num_threads = 1
    o.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimise else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for k, v in (config or {}).items():
        o.add_session_config_entry(k, v)
    s = ort.InferenceSession(model.SerializeToString(), o, providers=["CPUExecutionProvider"])
    return dict(zip((x.name for x in s.get_outputs()), s.run(None, inputs), strict=True))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("picture", nargs="?", type=int, default=0, help="seed of the input")
    p.add_argument("--outputs", action="store_true")
    a = p.parse_args()
    case = models.get(a.model)
    inputs = case.make_inputs(a.picture)
    model = onnx.load(case.path)
    names = [] if a.outputs else [n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    if names:
        infos = {v.name: v for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
        names = [n for n in names if n in infos]
        model.graph.output.extend(infos[n] for n in names)
    names += [o.name for o in model.graph.output if o.name not in names]
    literal = reference(model, inputs, False)
    runs = {"onnxruntime": reference(model, inputs, True), "precise": reference(model, inputs, True, {"session.x64quantprecision": "1"})}
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "model.onnx"
        onnx.save(model, path)
        runs["luthier"] = luthier.compile(path, shapes={k: v.shape for k, v in inputs.items()}, threads=1).run(inputs)
    print(f"{'tensor':42s} {'elements':>9s}  " + "  ".join(f"{r:>20s}" for r in runs))
    for n in names:
        want = literal[n].astype(np.float64)
        cells = []
        for got in runs.values():
            d = np.abs(got[n].astype(np.float64) - want)
            cells.append(f"{(d > 0).mean():9.2e} /{d.max():9.3g}" if d.size else "")
        print(f"{n[:42]:42s} {want.size:9d}  " + "  ".join(f"{c:>20s}" for c in cells))
    for o in model.graph.output[: len(model.graph.output) if a.outputs else 0]:
        d = np.abs(runs["luthier"][o.name].astype(np.float64) - runs["precise"][o.name].astype(np.float64)).max(initial=0)
        print(f"{o.name}: Luthier against precise {d:.2e}, largest value {np.abs(literal[o.name]).max(initial=0):.3g}")


if __name__ == "__main__":
    main()
