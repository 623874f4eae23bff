"""Matrix-vector products with low-bit weights beside onnxruntime, OpenVINO, torch, llama.cpp and T-MAC.

    python -m benchmarks.lowbit [--shape 4096x4096] [--threads 1] [--batch 1] [--place dram|l3] [--only luthier,ggml] [--tables]

Prints billions of weights a second (best of interleaved rounds), the stored bits a weight and the NMSE of one product against f64
with the very weights of the kernel. ``dram``: eight layers in rotation; ``l3``: one layer that stays in the cache. ``--tables``: look-up
against dot-product kernels of this project for every width (:mod:`benchmarks.lut_tables`). ``--wait``: reads a line from standard input before measuring. Peers that
are not installed are left out; llama.cpp's libraries: :mod:`benchmarks.peer_ggml`; T-MAC's checkout:
:mod:`benchmarks.peer_tmac`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
WIDTHS: dict[str, tuple[int, int]] = {"8": (8, 32), "4": (4, 32), "3": (3, 64), "2": (2, 64), "1.58": (0, 256), "1": (1, 128)}  # name: bits, group
GGML = ("Q8_0", "Q4_0", "Q4_0 repacked", "Q4_K repacked", "Q3_K", "Q2_K", "TQ2_0", "TQ1_0")


@dataclass
class Candidate:
    """``run``: all layers once. ``nmse``: of the first layer's product."""

    name: str
    width: str
    bits: float
    run: Callable[[], Any]
    nmse: float
    best: float = float("inf")


def nmse(y: Array, r: Array) -> float:
    return float(((y - r) ** 2).sum() / (r**2).sum())


def first(result: Any) -> Array:
    """The only output of a module's call."""
    if isinstance(result, dict):
        return np.asarray(next(iter(result.values())))
    return np.asarray(result[0] if isinstance(result, (list, tuple)) else result)


def weights(width: str, n: int, k: int, rng: np.random.Generator) -> tuple[Array, Array, float, Array]:
    """(q uint8 [n, k], scales f16 [n, k / group], zero, w f64) of random low-bit weights."""
    bits, group = WIDTHS[width]
    q = rng.integers(0, 3 if bits == 0 else 1 << bits, (n, k), dtype=np.uint8)
    s = (rng.uniform(0.5, 1.5, (n, k // group)) / np.sqrt(k) / max(1, (1 << bits) / 4)).astype(np.float16)
    zero = 1.0 if bits == 0 else 0.5 if bits == 1 else float(1 << (bits - 1))
    return q, s, zero, (q - zero) * np.repeat(s.astype(np.float64), group, 1)


def luthier_candidates(n: int, k: int, m: int, layers: int, threads: int, x: Array, widths: list[str], rng: np.random.Generator) -> list[Candidate]:
    from luthier.build_graph import compile_graph
    from luthier.importers.builder import GraphBuilder
    from luthier.ir.dtypes import f32
    from luthier.ir.ops.lowbit import pack_bits
    from luthier.ir.ops.lowbit_matmul import pack_trits

    out = []
    for width in widths:
        bits, group = WIDTHS[width]
        q, s, zero, w = weights(width, n, k, rng)
        raw = pack_bits(q, bits) if bits else pack_trits(q)
        attrs = {"K": k, "bits": bits, "group": group, "act_group": 32, "zero": zero}

        def build(count: int, raw: Array = raw, s: Array = s, attrs: dict[str, Any] = attrs) -> Any:
            b = GraphBuilder("gemv")
            v = b.input("x", f32, [m, k])
            for i in range(count):
                y = b.op("luthier::GroupedMatMul", v, b.const("w", np.roll(raw, i, 0)), b.const("s", np.roll(s, i, 0)), **attrs)
                if n == k:
                    v = y
                else:
                    b.output(f"y{i}", y)
            if n == k:
                b.output("y", v)
            return compile_graph(b.graph(), threads=threads)

        c = build(layers)
        one = build(1) if layers > 1 else c
        error = nmse(first(one(x)), x.astype(np.float64) @ w.T)
        stored = 8 * one._weights.nbytes / (n * k)
        out.append(Candidate("luthier", width, stored, lambda c=c: c(x), error))  # type: ignore[misc]
    return out


def onnx_candidates(n: int, k: int, m: int, layers: int, threads: int, x: Array, levels: list[int], rng: np.random.Generator) -> list[Candidate]:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    from luthier.ir.ops.lowbit import pack_bits

    out = []
    for width in ("8", "4", "2"):
        bits, group = WIDTHS[width][0], 32
        q, _, _, _ = weights(width, n, k, rng)
        s = (rng.uniform(0.5, 1.5, (n, k // group)) / np.sqrt(k) / max(1, (1 << bits) / 4)).astype(np.float32)
        w = (q - float(1 << (bits - 1))) * np.repeat(s.astype(np.float64), group, 1)
        raw = pack_bits(q.reshape(n, k // group, group), bits)
        for level in levels:
            sessions = []
            for count in {layers, 1}:
                nodes, inits, v = [], [], "x"
                outs = []
                for i in range(count):
                    inits += [numpy_helper.from_array(np.roll(raw, i, 0), f"b{i}"), numpy_helper.from_array(np.roll(s, i, 0), f"s{i}")]
                    y = f"y{i}"
                    nodes.append(helper.make_node("MatMulNBits", [v, f"b{i}", f"s{i}"], [y], domain="com.microsoft", K=k, N=n, bits=bits, block_size=group, accuracy_level=level))
                    if n == k:
                        v, outs = y, [y]
                    else:
                        outs.append(y)
                g = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])], [helper.make_tensor_value_info(o, TensorProto.FLOAT, [m, n]) for o in outs], inits)
                model = helper.make_model(g, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
                o = ort.SessionOptions()
                o.intra_op_num_threads = threads
                se = ort.InferenceSession(model.SerializeToString(), o, providers=["CPUExecutionProvider"])
                io = se.io_binding()
                io.bind_cpu_input("x", x)
                for name in outs:
                    io.bind_output(name)
                sessions.append((count, se, io))
            error = float("nan")
            for count, se, io in sessions:
                if count == 1:
                    se.run_with_iobinding(io)
                    error = nmse(io.copy_outputs_to_cpu()[0], x.astype(np.float64) @ w.T)
            _, se, io = next(t for t in sessions if t[0] == layers)
            out.append(Candidate(f"onnxruntime level {level}", width, bits + 32 / group, lambda se=se, io=io: se.run_with_iobinding(io), error))  # type: ignore[misc]
    return out


def ggml_candidates(n: int, k: int, m: int, layers: int, threads: int, x: Array, rng: np.random.Generator) -> list[Candidate]:
    from benchmarks.peer_ggml import Chain, Ggml
    from luthier.importers.gguf.blocks import BLOCKS, read_blocks

    g = Ggml()
    w = (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
    out = []
    raws: dict[str, bytes] = {}
    for name in GGML:
        kind = name.split()[0]
        raw = raws.setdefault(kind, g.quantized(kind, w))
        chain = Chain(g, kind, [raw] * layers, n, k, m, threads, "repacked" in name)
        chain.set(x)
        one = Chain(g, kind, [raw], n, k, m, threads, "repacked" in name)
        one.set(x)
        one.run()
        dq = read_blocks(kind, np.frombuffer(raw, np.uint8), n, k).dequantized().astype(np.float64)
        error = nmse(one.result(), x.astype(np.float64) @ dq.T)
        one.close()
        b = BLOCKS[kind]
        width = {"Q8": "8", "Q4": "4", "Q3": "3", "Q2": "2", "TQ": "1.58"}[name[:2]]
        out.append(Candidate(f"llama.cpp {name}", width, b.size * 8 / b.columns, chain.run, error))
    return out


def tmac_candidates(n: int, k: int, m: int, layers: int, threads: int, x: Array, widths: list[str], rng: np.random.Generator) -> list[Candidate]:
    """T-MAC at 4, 3, 2 and 1 bits, and ternary with one scale. It has kernels for one row of activations only."""
    from benchmarks.peer_tmac import fastest, folder

    root = folder()
    if root is None:
        raise FileNotFoundError("LUTHIER_TMAC must name a checkout of T-MAC")
    out: list[Candidate] = []
    for width in widths if m == 1 else ():
        if width == "8":
            continue
        q, s, _, _ = weights(width, n, k, rng)
        bits = WIDTHS[width][0] or 2
        if width == "1.58":
            q, s = q + np.uint8(1), s[:1, :1].reshape(1)
        layer = fastest(root, q, s, bits, layers, threads, x)
        layer.x[:] = x[0]
        layer.run()
        w = (q - float(1 << (bits - 1))) * (float(s[0]) if s.size == 1 else np.repeat(s.astype(np.float64), k // s.shape[1], 1))
        out.append(Candidate("T-MAC", width, layer.bits, layer.run, nmse(layer.y[0], x[0].astype(np.float64) @ w.T)))
    return out


def openvino_candidates(n: int, k: int, m: int, layers: int, threads: int, x: Array, rng: np.random.Generator) -> list[Candidate]:
    import openvino as ov
    from openvino import opset13 as o

    out = []
    for width in ("8", "4"):
        bits, group = WIDTHS[width][0], 32
        q, _, _, _ = weights(width, n, k, rng)
        s = (rng.uniform(0.5, 1.5, (n, k // group, 1)) / np.sqrt(k) / max(1, (1 << bits) / 4)).astype(np.float16)
        zero = 1 << (bits - 1)
        w = ((q.reshape(n, -1, group) - float(zero)) * s.astype(np.float64)).reshape(n, k)
        models = {}
        for count in {layers, 1}:
            p = o.parameter([m, k], np.float32, name="x")
            v, outs = p, []
            for i in range(count):
                data = np.roll(q, i, 0).reshape(n, k // group, group)
                if bits == 4:
                    low = (data.reshape(-1)[0::2] | (data.reshape(-1)[1::2] << 4)).astype(np.uint8)
                    c = o.constant(ov.Tensor(low, [n, k // group, group], ov.Type.u4))
                    z = o.constant(ov.Tensor(np.array([zero], np.uint8), [1], ov.Type.u4))
                else:
                    c, z = o.constant(data), o.constant(np.array([zero], np.uint8))
                f = o.multiply(o.subtract(o.convert(c, np.float16), o.convert(z, np.float16)), o.constant(np.roll(s, i, 0)))
                wf = o.convert(o.reshape(f, o.constant(np.array([n, k], np.int64)), False), np.float32)
                y = o.matmul(v, wf, False, True)
                if n == k:
                    v, outs = y, [y]
                else:
                    outs.append(y)
            core = ov.Core()
            cm = core.compile_model(ov.Model(outs, [p]), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads})
            r = cm.create_infer_request()
            r.set_input_tensor(0, ov.Tensor(x))
            r.infer()
            models[count] = r
        error = nmse(np.array(models[1].get_output_tensor(0).data), x.astype(np.float64) @ w.T)
        out.append(Candidate("OpenVINO", width, bits + 16 / group, models[layers].infer, error))
    return out


def torch_candidates(n: int, k: int, m: int, layers: int, threads: int, x: Array, rng: np.random.Generator) -> list[Candidate]:
    """torch's weight-only products: 8 bits with a scale for each row, 4 bits in groups of 32 with scales and zero points."""
    import torch

    torch.set_num_threads(threads)
    v, ops, out = torch.from_numpy(x), torch.ops.aten, []
    q8, q4 = rng.integers(-127, 128, (n, k), dtype=np.int8), rng.integers(0, 16, (n, k), dtype=np.int32)
    s8, s4 = (rng.uniform(0.5, 1.5, shape).astype(np.float32) / np.float32(np.sqrt(k) * most) for shape, most in (((n,), 64), ((n, k // 32), 4)))
    eight = [(torch.from_numpy(np.roll(q8, i, 0)), torch.from_numpy(np.roll(s8, i, 0))) for i in range(layers)]
    both = np.stack([s4.T, np.zeros_like(s4.T)], -1)
    four = [(ops._convert_weight_to_int4pack_for_cpu(torch.from_numpy(np.roll(q4, i, 0)), 1), torch.from_numpy(np.ascontiguousarray(np.roll(both, i, 1)))) for i in range(layers)]
    runs: list[tuple[str, float, Array, Callable[[int], Any]]] = [
        ("8", 8 + 32 / k, q8 * s8.astype(np.float64)[:, None], lambda i: ops._weight_int8pack_mm(v, *eight[i])),
        ("4", 4 + 64 / 32, (q4 - 8) * np.repeat(s4.astype(np.float64), 32, 1), lambda i: ops._weight_int4pack_mm_for_cpu(v, four[i][0], 32, four[i][1])),
    ]
    for width, bits, w, one in runs:
        error = nmse(one(0).numpy(), x.astype(np.float64) @ w.T)
        out.append(Candidate("torch", width, bits, lambda one=one: [one(i) for i in range(layers)], error))  # type: ignore[misc]
    return out


def measure(cands: list[Candidate], rounds: int, seconds: float) -> None:
    """Interleaved rounds; the best time of every candidate."""
    for _ in range(rounds):
        for c in cands:
            c.run()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                t = time.perf_counter()
                c.run()
                c.best = min(c.best, time.perf_counter() - t)


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--shape", default="4096x4096", help="columns x rows of the weights")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--batch", type=int, default=1)
    ap.add_argument("--place", choices=("dram", "l3"), default="dram")
    ap.add_argument("--only", default="luthier,onnxruntime,ggml,tmac,openvino,torch")
    ap.add_argument("--widths", default=",".join(WIDTHS))
    ap.add_argument("--levels", default="0,4", help="onnxruntime's accuracy levels")
    ap.add_argument("--tables", action="store_true")
    ap.add_argument("--targets", default="cpu", help="of --tables, with commas")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--seconds", type=float, default=0.12)
    ap.add_argument("--wait", action="store_true")
    ap.add_argument("--markdown", type=Path, help="write the table into its section of this file")
    a = ap.parse_args(argv)
    k, n = (int(v) for v in a.shape.split("x"))
    layers = 8 if a.place == "dram" else 1
    rng = np.random.default_rng(0)
    x = rng.standard_normal((a.batch, k)).astype(np.float32)
    only = a.only.split(",")
    common = (n, k, a.batch, layers, a.threads, x)
    cands: list[Candidate] = []
    if a.tables:
        from benchmarks.lut_tables import tables

        tables({w: WIDTHS[w] for w in a.widths.split(",")}, n, k, a.batch, a.threads, a.place, a.targets.split(","), a.wait, a.rounds)
        return
    if "luthier" in only:
        cands += luthier_candidates(*common, a.widths.split(","), rng)
    if "onnxruntime" in only and importlib.util.find_spec("onnxruntime"):
        cands += onnx_candidates(*common, [int(v) for v in a.levels.split(",")], rng)
    if "openvino" in only and importlib.util.find_spec("openvino"):
        cands += openvino_candidates(*common, rng)
    if "torch" in only and importlib.util.find_spec("torch"):
        cands += torch_candidates(*common, rng)
    if "ggml" in only:
        try:
            cands += ggml_candidates(*common, rng)
        except FileNotFoundError as e:
            print(f"without llama.cpp: {e}", file=sys.stderr)
    if "tmac" in only:
        try:
            cands += tmac_candidates(*common, a.widths.split(","), rng)
        except FileNotFoundError as e:
            print(f"without T-MAC: {e}", file=sys.stderr)
    if a.wait:
        print("ready", flush=True)
        sys.stdin.readline()
    measure(cands, a.rounds, a.seconds)
    title, rows = f"{a.shape}, batch {a.batch}, {a.threads} thread(s), {a.place}", []
    print(f"\n{title}: Gw/s, GB/s of weights, stored bits, NMSE")
    for c in sorted(cands, key=lambda c: (-float(c.width), c.best)):
        gw = n * k * layers * 1e-9 / c.best
        print(f"{c.width:>5} {c.name:28s} {gw:7.1f} {gw * c.bits / 8:6.1f} {c.bits:6.2f} {c.nmse:9.1e}")
        name = f"**{c.name}**" if c.name == "luthier" else c.name
        rows.append(f"| {c.width} | {name} | {gw:.1f} | {gw * c.bits / 8:.1f} | {c.bits:.2f} | {c.nmse:.1e} |")
    if a.markdown:
        replace_section(a.markdown, title, "| bits | kernel | Gw/s | GB/s | stored bits | NMSE |\n|---|---|---|---|---|---|\n" + "\n".join(rows))


def replace_section(path: Path, title: str, table: str) -> None:
    """The section ``## title`` of a file, or a new one at its end."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    head = f"## {title}\n"
    before, found, rest = text.partition(head)
    after = rest[rest.index("\n## ") + 1 :] if "\n## " in rest else ""
    if not found:
        before = before.rstrip() + "\n\n"
    path.write_text(f"{before}{head}\n{table}\n" + (f"\n{after}" if after else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
