"""Kernels and models of the wasm target under Chromium, Node (both V8) and wasmtime, one thread and two.

    python benchmarks/wasm_speed.py build                    # artifacts into build/wasm-speed
    python benchmarks/wasm_speed.py run [--runs 20] [NAME..] # a table; nothing else should run on the machine
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from wasm_chromium import measure
from web_rows import rows as row_specs

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "wasm-speed"
FLOPS = {"matmul-512": 2 * 512**3, "matmul-1024": 2 * 1024**3, "gemv-4096": 2 * 4096**2, "minilm-128": 2.87e9}


def graphs() -> dict[str, tuple[Any, dict[str, Any]]]:
    """{name: (model or path, inputs)}."""
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    f32 = TensorProto.FLOAT

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    def model(nodes: list[Any], ins: dict[str, tuple[int, ...]], out: tuple[int, ...], consts: dict[str, Any]) -> Any:
        g = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info(n, f32, s) for n, s in ins.items()], [helper.make_tensor_value_info("y", f32, out)],
            [helper.make_tensor(n, f32, a.shape, a.tobytes(), raw=True) for n, a in consts.items()],
        )  # fmt: skip
        return helper.make_model(g, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)

    out: dict[str, tuple[Any, dict[str, Any]]] = {}
    for n in (512, 1024):
        out[f"matmul-{n}"] = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (n, n)}, (n, n), {"w": normal(n, n)}), {"x": normal(n, n)}
        out[f"matmul-{n}-two-inputs"] = (
            model([helper.make_node("MatMul", ["x", "z"], ["y"])], {"x": (n, n), "z": (n, n)}, (n, n), {}), {"x": normal(n, n), "z": normal(n, n)},
        )  # fmt: skip
    out["gemv-4096"] = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (1, 4096)}, (1, 4096), {"w": normal(4096, 4096)}), {"x": normal(1, 4096)}
    out["softmax"] = model([helper.make_node("Softmax", ["x"], ["y"], axis=-1)], {"x": (1024, 1024)}, (1024, 1024), {}), {"x": normal(1024, 1024)}
    out["layernorm"] = (
        model([helper.make_node("LayerNormalization", ["x", "s", "b"], ["y"], axis=-1)], {"x": (1024, 1024)}, (1024, 1024), {"s": normal(1024), "b": normal(1024)}),
        {"x": normal(1024, 1024)},
    )  # fmt: skip
    for spec in row_specs([f"gemv-4096{shape}-q{bits}" for shape in ("", "x11008") for bits in ("8a8", "4", "4a8", "2", "2a8", "2g64", "2g64a8")]):
        out[spec.name] = str(spec.model), spec.inputs
    path = ROOT / "build" / "models" / "minilm.onnx"
    if path.exists():
        ids = rng.integers(1000, 20000, (1, 128))
        ones = np.ones((1, 128), np.int64)
        out["minilm-128"] = str(path), {"input_ids": ids, "attention_mask": ones, "token_type_ids": 0 * ones}
    return out


def build(names: list[str]) -> None:
    import luthier

    for name, (model, inputs) in graphs().items():
        if names and name not in names:
            continue
        start = time.perf_counter()
        module = luthier.compile(model, target="wasm", shapes={n: a.shape for n, a in inputs.items()})
        took = time.perf_counter() - start
        folder = module.save(OUT / name)
        want = luthier.compile(model).run(inputs)
        got = module.run(inputs)
        worst = max(float(np.max(np.abs(want[n] - got[n]))) for n in want)
        (folder / "shapes.json").write_text(json.dumps({n: list(a.shape) for n, a in inputs.items()}))
        module.weights.tofile(folder / "weights.bin")  # type: ignore[attr-defined]
        np.ascontiguousarray(want[module.outputs[0].name]).tofile(folder / "output-0.bin")
        for j, spec in enumerate(module.inputs):
            np.ascontiguousarray(inputs[spec.name]).tofile(folder / f"input-{j}.bin")
        print(f"{name}: {took:.2f} s, {len(module.binary('relaxed'))} bytes of code, differs from the CPU target by {worst:.2g}")  # type: ignore[attr-defined]


def node(names: list[str], variant: str, runs: int) -> dict[str, dict[str, float]]:
    command = ["node", str(ROOT / "benchmarks" / "wasm_node.mjs"), str(runs), variant, *(str(OUT / n) for n in names)]
    r = subprocess.run(command, capture_output=True, text=True, check=False)
    if r.returncode:
        print(r.stderr[-1500:], file=sys.stderr)
    return {Path(d["folder"]).name: d for d in map(json.loads, r.stdout.split("\n")[:-1])}


def wasmtime(names: list[str], variant: str, runs: int) -> dict[str, dict[str, float]]:
    import luthier
    from luthier.backends.wasm_module import Instance, WasmModule

    out = {}
    for n in names:
        m = luthier.load(OUT / n, threads=1)
        assert isinstance(m, WasmModule)
        m.variant = variant
        shapes = json.loads((OUT / n / "shapes.json").read_text())
        feeds = {s.name: np.fromfile(OUT / n / f"input-{j}.bin", s.dtype).reshape(shapes[s.name]) for j, s in enumerate(m.inputs)}
        inst = Instance(m, 1)
        m._pool.append(inst)
        m.run(feeds)
        times = []
        for _ in range(runs):
            t0 = time.perf_counter()
            inst.call(inst.run_, 1, 1)
            times.append((time.perf_counter() - t0) * 1e3)
        out[n] = {"least": min(times), "middle": sorted(times)[len(times) // 2]}
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed of the wasm target under Node and wasmtime.")
    parser.add_argument("what", choices=("build", "run"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--engines", default="chromium:simd,chromium:relaxed,wasmtime:relaxed", help="of ENGINE:VARIANT or ENGINE:VARIANT/THREADS")
    options = parser.parse_args()
    if options.what == "build":
        build(options.names)
        return 0
    names = options.names or sorted(p.name for p in OUT.iterdir() if (p / "shapes.json").exists())
    for engine in options.engines.split(","):
        kind, _, variant = engine.partition(":")
        if kind == "chromium":
            v, _, t = variant.partition("/")
            rows = measure(OUT, names, v, int(t or 1), options.runs)
        else:
            rows = node(names, variant.replace("/", ","), options.runs) if kind == "node" else wasmtime(names, variant, options.runs)
        for n in names:
            if "error" in rows.get(n, {}):
                print(f"{engine:24} {n:24} {rows[n]['error']}")
            elif n in rows:
                r = rows[n]
                rate = f"{FLOPS[n] / r['least'] / 1e6:8.1f} GFLOP/s" if n in FLOPS else ""
                print(f"{engine:24} {n:24} least {r['least']:9.3f} ms  middle {r['middle']:9.3f} ms {rate}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
