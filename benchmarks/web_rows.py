"""The rows of `benchmarks/web.py`: ONNX models, inputs, and the operator as TF.js and jax-js have it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "web" / "rows"
Array = np.ndarray[Any, Any]


@dataclass
class RowSpec:
    """`model`: an ONNX file with static shapes. `inputs`: of a call; `constants`: weights in the model, for runtimes that get tensors.
    `operator`: what those runtimes call (empty: they cannot run it). `macs`: multiply-adds of a call."""

    name: str
    model: Path
    inputs: dict[str, Array]
    constants: dict[str, Array] = field(default_factory=dict)
    operator: str = ""
    macs: float = 0.0


def _single(name: str, op: str, inputs: dict[str, Array], constants: dict[str, Array], out: tuple[int, ...], operator: str, macs: float = 0, domain: str = "", **attributes: Any) -> RowSpec:
    import onnx
    from onnx import helper

    kinds = {np.dtype(np.float32): onnx.TensorProto.FLOAT}
    node = helper.make_node(op, [*inputs, *constants], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node], name, [helper.make_tensor_value_info(n, kinds[a.dtype], a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, out)], [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()],
    )  # fmt: skip
    domains = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=9), str(path))
    return RowSpec(name, path, inputs, constants, operator, macs)


def unread(spec: RowSpec) -> int:
    """Bytes of constant tables that a call binds whole and of which a Gather reads the indexed rows only (each index another row)."""
    from luthier.importers.onnx.importer import import_onnx

    graph = import_onnx(str(spec.model), {n: a.shape for n, a in spec.inputs.items()})
    out = 0
    for n in graph.nodes:
        if n.op == "Gather" and n.inputs[0] is not None and n.inputs[0].data is not None and n.inputs[1] is not None and not n.attrs.get("axis", 0):
            table, indices = n.inputs[0].data, n.inputs[1].shape
            if table.ndim > 1 and all(e.op == "const" for e in indices):
                count = int(np.prod([e.attr for e in indices]))
                out += max(0, table.shape[0] - count) * table[0].nbytes
    return out


def rows(names: list[str]) -> list[RowSpec]:
    """The rows of these names, their models written. Weights are constants of the models, as in inference."""
    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    out = []
    for name in names:
        rng = np.random.default_rng(list(name.encode()))  # the same whatever other rows are made
        if name in ("matmul-512", "matmul-1024"):
            n = int(name[7:])
            out.append(_single(name, "MatMul", {"x": normal(n, n)}, {"w": normal(n, n)}, (n, n), "matmul", n**3))
        elif name == "gemv-4096":
            out.append(_single(name, "MatMul", {"x": normal(1, 4096)}, {"w": normal(4096, 4096)}, (1, 4096), "matmul", 4096**2))
        elif name == "softmax":
            out.append(_single(name, "Softmax", {"x": normal(1024, 1024)}, {}, (1024, 1024), "softmax", axis=-1))
        elif name == "layernorm":
            out.append(_single(name, "LayerNormalization", {"x": normal(1024, 1024)}, {"s": normal(1024), "b": normal(1024)}, (1024, 1024), "layernorm", axis=-1))
        elif match := re.fullmatch(r"gemv-(\d+)(?:x(\d+))?-q(\d)(?:g(\d+))?(a8)?", name):  # q4: 4 bits, activations exact; q4g64a8: groups of 64, activations rounded to 8 bits
            k, n = int(match[1]), int(match[2] or match[1])
            bits, group, rounded = match[3], int(match[4] or 32), match[5]
            packed = rng.integers(0, 256, (n, k // group, group // 8 * int(bits)), dtype=np.uint8)
            scales = (rng.random((n, k // group)).astype(np.float32) + 0.5) / 64
            out.append(_single(
                name, "MatMulNBits", {"x": normal(1, k)}, {"q": packed, "scales": scales.reshape(-1)}, (1, n), "", k * n,
                domain="com.microsoft", K=k, N=n, bits=int(bits), block_size=group, **({"accuracy_level": 4} if rounded else {}),
            ))  # fmt: skip
        else:
            sys.path[:] = [p for p in sys.path if p not in ("", str(ROOT))] + [str(ROOT)]
            from benchmarks.models import get
            from benchmarks.peers_driver import pinned_model

            case = get(name)
            out.append(RowSpec(name, pinned_model(case), case.make_inputs(0)))
    return out
