"""CUDA kernels: what a compiler makes of them, and, where there is a GPU, how fast they are.

    python benchmarks/cuda.py kernels [--tools FOLDER]   # no GPU: registers, spills, shared memory, occupancy, instructions;
    cuda_kernels.md python benchmarks/cuda.py run                        # a GPU: every kernel against numpy and against torch's;
    cuda_run.md; without one, what it would do

``--tools``: where ``cuobjdump`` and ``nvdisasm`` are (packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm), if not on the
path; instructions are counted only with them. Nothing is fetched. Times are medians of 20 calls after 3, inputs and outputs on
the host left out of torch's only.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import luthier  # noqa: E402
from luthier.errors import TargetError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
# of one multiprocessor: threads, registers, bytes of shared memory, blocks
PROCESSORS = {
    "sm_80": (2048, 65536, 164 << 10, 32),
    "sm_90": (2048, 65536, 228 << 10, 32),
    "sm_100": (2048, 65536, 228 << 10, 32),
}


@dataclass(frozen=True)
class Kernel:
    """Nodes, their inputs and constants; ``want``: numpy's result; ``torch``: the same for torch's tensors in the order of
    both."""

    name: str
    nodes: list[Any]
    inputs: dict[str, np.ndarray[Any, Any]]
    weights: dict[str, np.ndarray[Any, Any]]
    want: Callable[..., np.ndarray[Any, Any]]
    torch: str
    tolerance: float = 1e-4

    def model(self) -> Any:
        ins = [helper.make_tensor_value_info(n, KINDS[a.dtype.name], list(a.shape)) for n, a in self.inputs.items()]
        out = helper.make_tensor_value_info("y", next(iter(KINDS[a.dtype.name] for a in self.inputs.values())), None)
        g = helper.make_graph(self.nodes, "g", ins, [out], [numpy_helper.from_array(a, n) for n, a in self.weights.items()])
        return helper.make_model(g, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)], ir_version=11)


def normal(*shape: int, kind: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(kind)


def softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b


def half_product(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (x.astype(np.float32) @ w.astype(np.float32)).astype(np.float16)


def four_bits(n: int) -> Kernel:
    """A product of a row and a matrix of 4 bits in blocks of 32, zero point 8."""
    rng = np.random.default_rng(n)
    w, scales = rng.integers(0, 256, (n, n // 32, 16)).astype(np.uint8), rng.standard_normal(n * n // 32).astype(np.float32)
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=n, N=n, bits=4, block_size=32)

    def want(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any], s: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        values = np.stack([w & 15, w >> 4], -1).reshape(n, n // 32, 32).astype(np.float32) - 8
        return x @ (values * s.reshape(n, -1, 1)).reshape(n, n).T

    return Kernel("4-bit matrix-vector", [node], {"x": normal(1, n)}, {"w": w, "s": scales}, want, "", 1e-2)


def kernels(n: int = 1024) -> list[Kernel]:
    """``n``: extent of the square ones."""
    make, half = helper.make_node, np.float16
    q = {k: normal(1, 8, n // 2, 64) for k in "qkv"}
    attention = [
        make("Transpose", ["k"], ["t"], perm=[0, 1, 3, 2]), make("MatMul", ["q", "t"], ["s"]), make("Constant", [], ["c"], value_float=0.125),
        make("Mul", ["s", "c"], ["z"]), make("Softmax", ["z"], ["p"]), make("MatMul", ["p", "v"], ["y"]),
    ]  # fmt: skip
    return [
        Kernel("elementwise", [make("Sigmoid", ["x"], ["y"])], {"x": normal(n, n)}, {}, lambda x: 1 / (1 + np.exp(-x)), "torch.sigmoid(a)"),
        Kernel("softmax", [make("Softmax", ["x"], ["y"])], {"x": normal(n, n)}, {}, softmax, "torch.softmax(a, -1)"),
        Kernel("layer norm", [make("LayerNormalization", ["x", "w", "b"], ["y"])], {"x": normal(n, n)}, {"w": normal(n), "b": normal(n)}, norm, "F.layer_norm(a, b.shape, b, c)"),
        Kernel("f32 product", [make("MatMul", ["x", "w"], ["y"])], {"x": normal(n, n)}, {"w": normal(n, n)}, lambda x, w: x @ w, "a @ b", 1e-2),
        Kernel("f16 product", [make("MatMul", ["x", "w"], ["y"])], {"x": normal(n, n, kind=half)}, {"w": normal(n, n, kind=half)}, half_product, "a @ b", 1e-1),
        Kernel("f32 matrix-vector", [make("MatMul", ["x", "w"], ["y"])], {"x": normal(1, 4 * n)}, {"w": normal(4 * n, 4 * n)}, lambda x, w: x @ w, "a @ b", 1e-2),
        Kernel("attention", attention, q, {}, lambda q, k, v: softmax(q @ k.transpose(0, 1, 3, 2) / 8) @ v, "F.scaled_dot_product_attention(a, b, c)"),
        four_bits(4 * n),
    ]  # fmt: skip


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's threads that blocks of one kernel can fill. Registers are given out in units of 256 a
    warp."""
    most, file, memory, blocks = PROCESSORS[arch]
    warps = -(-threads // 32)
    fits = min(blocks, most // (32 * warps), file // (-(-registers * 32 // 256) * 256 * warps), memory // (shared + 1024))
    return fits * 32 * warps / most


def tool(name: str, folder: Path | None) -> str | None:
    return shutil.which(name, path=str(folder)) if folder else shutil.which(name)


def instructions(cubin: bytes, folder: Path | None) -> Counter[str] | None:
    """How often each instruction stands in a kernel; None without nvdisasm."""
    program = tool("nvdisasm", folder)
    if program is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run([program, "-c", f.name], capture_output=True, text=True, check=True).stdout
    return Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9.]*)", text, re.M))


def notable(found: Counter[str] | None) -> str:
    """Counts of what decides a kernel's speed, and of what should not be there (LDL, STL: memory of a thread)."""
    if found is None:
        return ""
    rows = {
        k: sum(n for name, n in found.items() if name.split(".")[0] == k)
        for k in ("HMMA", "IMMA", "LDSM", "LDGSTS", "FFMA", "LDL", "STL")
    }
    rows["LDG.128"] = sum(n for name, n in found.items() if name.startswith("LDG") and "128" in name)
    rows["LDS.128"] = sum(n for name, n in found.items() if name.startswith("LDS.") and "128" in name)
    return ", ".join(f"{k} {n}" for k, n in rows.items() if n) + f"; {sum(found.values())} in all"


def table(folder: Path | None) -> list[str]:
    from luthier.codegen.gpu.nvrtc import version

    lines = [
        "# CUDA kernels as NVRTC compiles them", "", f"`python benchmarks/cuda.py kernels`, NVRTC {version()}; no GPU was there. Extents of 1024 (attention: 8 heads of 64, 512 keys).",
        "Occupancy is what registers, shared memory and blocks allow; instructions are counted in the whole kernel.", "",
        "| family | kernel | architecture | threads | registers | spilled bytes | shared bytes | occupancy | instructions |", "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for k in kernels():
        for arch in ARCHITECTURES:
            m: Any = luthier.compile(k.model(), target=f"cuda:{arch}")
            cubins = m.images("cubin")
            for p in {p["symbol"]: p for p in m.host["pipelines"]}.values():
                r, threads = m.manifest["resources"][p["symbol"]], int(np.prod(p["group"]))
                share = occupancy(arch, threads, r["registers"], r["shared"])
                name = p["symbol"].removeprefix("kernel_").rsplit("_", 1)[0]
                lines.append(
                    f"| {k.name} | {name} | {arch} | {threads} | {r['registers']} | {r['spills']} | {r['shared']} | {share:.0%} | {notable(instructions(cubins[p['symbol']], folder))} |"
                )
    return lines


def measure(call: Callable[[], Any]) -> float:
    """Median milliseconds."""
    times = []
    for k in range(23):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
        if k == 2:
            times.clear()
    return statistics.median(times)


def run() -> list[str]:
    """Every kernel on the GPU, right and timed. Raises TargetError without one."""
    from luthier.backends.cuda_driver import driver

    driver()
    lines = ["# CUDA kernels on this GPU", "", "| family | largest difference | kernels, ms | torch, ms |", "|---|---|---|---|"]
    for k in kernels():
        m: Any = luthier.compile(k.model(), target="cuda:sm_80")
        got = m.run(k.inputs)["y"]
        off = float(np.abs(got.astype(np.float64) - k.want(*k.inputs.values(), *k.weights.values())).max())
        ms = sum(row["ms"] for row in m.profile(k.inputs))
        lines.append(f"| {k.name} | {off:.1e}{'' if off <= k.tolerance else ' WRONG'} | {ms:.4f} | {beside(k)} |")
    return lines


def beside(k: Kernel) -> str:
    """torch's time, empty where it is not installed for this GPU."""
    try:
        import torch
        from torch.nn import functional
    except ImportError:
        return ""
    if not torch.cuda.is_available() or not k.torch:
        return ""
    values = dict(zip("abc", (torch.from_numpy(a).cuda() for a in (*k.inputs.values(), *k.weights.values())), strict=False))

    def call() -> None:
        eval(k.torch, {"torch": torch, "F": functional, **values})
        torch.cuda.synchronize()

    return f"{measure(call):.4f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="CUDA kernels, compiled and timed")
    parser.add_argument("what", choices=("kernels", "run"))
    parser.add_argument("--tools", type=Path, help="folder of nvdisasm")
    options = parser.parse_args()
    os.environ.setdefault("LUTHIER_CUDA_CHECKS", "none")
    try:
        lines = table(options.tools) if options.what == "kernels" else run()
    except TargetError as e:
        print(f"{e}\nWith it this would check and time: {', '.join(k.name for k in kernels(64))}.")
        return 0
    out = RESULTS / f"cuda_{options.what}.md"
    out.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))
    return 1 if any("WRONG" in line for line in lines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
