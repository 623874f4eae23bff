"""Tables along the innermost axis: what is computed once a row position is not computed again for every row; values are equal."""

from __future__ import annotations

import numpy as np
import pytest

import luthier

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


def session(text: str) -> tuple[object, object]:
    m = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]>\n{text}')
    return m, ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])


CASES = {
    "linear": "g (float[1, 9, H, W] x) => (float[a, b, c, d] y) <float[4] s = {1, 1, 1.5, 2.5}> { y = Resize<mode = \"linear\">(x, , s) }",
    "cubic": "g (float[1, 9, H, W] x) => (float[a, b, c, d] y) <float[4] s = {1, 1, 2, 2}> { y = Resize<mode = \"cubic\">(x, , s) }",
    "nearest": "g (float[1, 9, H, W] x) => (float[a, b, c, d] y) <float[4] s = {1, 1, 1, 1.7}> { y = Resize<mode = \"nearest\">(x, , s) }",
    "down": "g (float[1, 9, H, W] x) => (float[a, b, c, d] y) <float[4] s = {1, 1, 0.5, 0.4}> { y = Resize<mode = \"linear\">(x, , s) }",
    "reflect": "g (float[1, 9, H, W] x) => (float[a, b, c, d] y) <int64[8] p = {0, 0, 1, 3, 0, 0, 2, 5}> { y = Pad<mode = \"reflect\">(x, p) }",
    "edge": "g (float[1, 9, H, W] x) => (float[a, b, c, d] y) <int64[8] p = {0, 0, 1, 3, 0, 0, 2, 5}> { y = Pad<mode = \"edge\">(x, p) }",
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_onnxruntime(name: str) -> None:
    m, other = session(CASES[name])
    module = luthier.compile(m, threads=1)
    for h, w in ((7, 9), (16, 40), (5, 64)):
        x = np.random.default_rng(h).standard_normal((1, 9, h, w)).astype(np.float32)
        got, (want,) = module.run({"x": x})["y"], other.run(None, {"x": x})  # type: ignore[attr-defined]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_tables_are_made_once() -> None:
    """The kernel of a resized image has no rounding of coordinates in it."""
    from luthier.codegen.targets.target import parse_target
    from luthier.importers.onnx.importer import import_onnx
    from luthier.pipeline import compile_program

    m, _ = session(CASES["linear"].replace("H", "32").replace("W", "32"))
    kernels = compile_program(import_onnx(m), parse_target("cpu:x86-64-v3").caps).kernels
    assert any("tab" in n for n in kernels)
    (main,) = (str(f) for n, f in kernels.items() if n.endswith("o0"))
    assert main.count("floor(") <= 2  # of rows, once each
