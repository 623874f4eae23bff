"""Matrix instructions (``mma.sync``, ``ldmatrix``): products of 16-bit floats on the emulator, which has PTX's fragments; what
the compiler makes of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

import luthier
from luthier.backends.cuda_module import CudaModule
from luthier.codegen.gpu.nvrtc import library
from luthier.codegen.targets.target import parse_target
from luthier.errors import TargetError
from luthier.importers.onnx.importer import import_onnx
from luthier.ir.interpret.programs import run_program
from luthier.pipeline import compile_program
from tests.cuda import need_compiler

Array = np.ndarray[Any, Any]
KINDS = {"f16": (np.dtype(np.float16), T.FLOAT16), "bf16": (np.dtype(ml_dtypes.bfloat16), T.BFLOAT16)}


def product(
    kind: str, m: int, k: int, n: int, batch: int = 0, transposed: bool = False, constant: bool = True, rows: int | str = "m"
) -> tuple[Any, dict[str, Array], Array]:
    """A model ``y = x @ w``, feeds, and the sums in f32."""
    d, t = KINDS[kind]
    rng = np.random.default_rng(m + k + n)
    lead = [batch] if batch else []
    x, w = rng.standard_normal((*lead, m, k)).astype(d), rng.standard_normal((n, k) if transposed else (k, n)).astype(d)
    nodes = [h.make_node("Transpose", ["w"], ["wt"], perm=[1, 0])] if transposed else []
    nodes.append(h.make_node("MatMul", ["x", "wt" if transposed else "w"], ["y"]))
    ins = [h.make_tensor_value_info("x", t, [*lead, rows, k])] + (
        [] if constant else [h.make_tensor_value_info("w", t, list(w.shape))]
    )
    g = h.make_graph(
        nodes, "g", ins, [h.make_tensor_value_info("y", t, None)], [numpy_helper.from_array(w, "w")] if constant else []
    )
    feeds = {"x": x} if constant else {"x": x, "w": w}
    return (
        h.make_model(g, opset_imports=[h.make_opsetid("", 21)], ir_version=10),
        feeds,
        x.astype(np.float32) @ (w.T if transposed else w).astype(np.float32),
    )


CASES = {
    "whole": ("f16", 128, 64, 64), "ragged": ("f16", 77, 50, 43), "few": ("f16", 20, 33, 130), "long": ("f16", 16, 1000, 16), "batch": ("f16", 33, 40, 24, 3),
    "transposed": ("f16", 40, 96, 64, 0, True), "both given": ("f16", 40, 96, 64, 0, False, False), "bf16": ("bf16", 77, 50, 43),
    **{f"{m} rows": ("f16", m, 32, 40, 0, False, True, m) for m in (16, 17, 33, 70, 97, 130)},
}  # fmt: skip


@pytest.mark.parametrize("checks", ["orders", "races"])
@pytest.mark.parametrize("name", CASES)
def test_emulated(name: str, checks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_compiler()
    monkeypatch.setenv("LUTHIER_CUDA_CHECKS", checks)
    model, feeds, want = product(*CASES[name])  # type: ignore[arg-type]
    m = luthier.compile(model, target="cuda:emulate")
    assert isinstance(m, CudaModule) and f"matrix_{CASES[name][0]}<" in m.source
    got = m.run(feeds)["y"].astype(np.float32)
    step = 2.0**-10 if CASES[name][0] == "f16" else 2.0**-7
    np.testing.assert_allclose(got, want, rtol=step, atol=step)


@pytest.mark.parametrize("name", ["whole", "ragged", "bf16", "70 rows"])
def test_interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the schedule means, without the instruction: threads one by one, each with all of the accumulator."""
    monkeypatch.setattr("luthier.schedules.select.privatize_threads", lambda f: f)
    model, feeds, want = product(*CASES[name])  # type: ignore[arg-type]
    got = run_program(compile_program(import_onnx(model), parse_target("cuda").caps), feeds)["y"].astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2)


def test_convolution() -> None:
    need_compiler()
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 16, 12, 12)).astype(np.float16), rng.standard_normal((32, 16, 3, 3)).astype(np.float16)
    g = h.make_graph(
        [h.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)], "g", [h.make_tensor_value_info("x", T.FLOAT16, x.shape)],
        [h.make_tensor_value_info("y", T.FLOAT16, None)], [numpy_helper.from_array(w, "w")],
    )  # fmt: skip
    m = luthier.compile(h.make_model(g, opset_imports=[h.make_opsetid("", 21)], ir_version=10), target="cuda:emulate")
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x.astype(np.float32), ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3)
    )
    assert isinstance(m, CudaModule) and "matrix_f16<" in m.source
    np.testing.assert_allclose(
        m.run({"x": x})["y"].astype(np.float32),
        np.einsum("nchwij,ocij->nohw", windows, w.astype(np.float32)),
        rtol=2e-3,
        atol=2e-3,
    )


def test_rows_of_a_tile_lie_in_different_banks() -> None:
    """An instruction loads eight rows of 16 bytes: they must take all 32 banks."""
    model, _, _ = product(*CASES["whole"])  # type: ignore[arg-type]
    p = compile_program(import_onnx(model), parse_target("cuda").caps)
    text = "\n".join(map(str, p.kernels.values()))
    pitches = [int(x.attr) for f in p.kernels.values() for x in _pitches(f)]
    assert "mma.m16n8k16.f16" in text and len(pitches) >= 2
    for pitch in pitches:
        assert pitch % 8 == 0 and len({row * pitch * 2 // 16 % 8 for row in range(8)}) == 8


def _pitches(f: Any) -> list[Any]:
    from luthier.ir.loop import Call, walk_stmts
    from luthier.passes.gpu.use_matrix import MMA

    return [e for s in walk_stmts(f.body) if isinstance(s, Call) and s.callee in MMA.values() for e in (s.args[4], s.args[7])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles(arch: str, kind: str) -> None:
    try:
        library()
    except TargetError as e:
        pytest.skip(str(e))
    m: Any = luthier.compile(product(kind, 512, 256, 256)[0], target=f"cuda:{arch}")
    text = b"".join(m.images("ptx").values())
    assert text.count(b"mma.sync.aligned.m16n8k16") >= 32 and b"ldmatrix" in text
    assert all(not r["spills"] and not r["stack"] for r in m.manifest["resources"].values())
