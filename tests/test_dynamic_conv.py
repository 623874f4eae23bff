"""Convolutions over run-time heights and widths: padded copies of symbolic extents, at sizes around tiles, against onnxruntime; bounds checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest

import luthier

ort = pytest.importorskip("onnxruntime")

CASES = {
    "winograd": ((32, 16, 3, 3), "pads = [1, 1, 1, 1]"),
    "winograd_odd_pads": ((16, 32, 3, 3), "pads = [0, 1, 2, 1]"),
    "3x3": ((8, 5, 3, 3), "pads = [1, 1, 1, 1]"),
    "stride": ((24, 3, 3, 3), "pads = [1, 1, 1, 1], strides = [2, 2]"),
    "depthwise": ((16, 1, 5, 5), "pads = [2, 2, 2, 2], group = 16"),
    "dilated": ((8, 4, 3, 3), "pads = [2, 2, 2, 2], dilations = [2, 2]"),
    "odd_pads": ((8, 4, 2, 3), "pads = [0, 1, 2, 1]"),
    "grouped": ((8, 2, 3, 3), "pads = [1, 1, 1, 1], group = 4"),
}


def parsed(weight: tuple[int, ...], attributes: str, op: str = "Conv") -> tuple[Any, int]:
    group = int(attributes.split("group = ")[1].split(",")[0]) if "group" in attributes else 1
    channels = weight[0] if op == "ConvTranspose" else weight[1] * group
    m = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 20]>\ng (float[N, {channels}, H, W] x) => (float[N, C, P, Q] y) {{ c = {op}<{attributes}>(x, w)  y = Relu(c) }}'
    )
    w = np.random.default_rng(0).standard_normal(weight).astype(np.float32)
    m.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    return m, channels


def compare(m: Any, channels: int, debug: str | None) -> None:
    module = luthier.compile(m, threads=1, debug=debug)
    session = ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
    for n, h, w in ((1, 5, 5), (1, 6, 17), (2, 9, 8), (1, 31, 24), (1, 7, 64)):
        x = np.random.default_rng(h * w).standard_normal((n, channels, h, w)).astype(np.float32)
        (want,) = session.run(None, {"x": x})
        got = module.run({"x": x})["y"]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("debug", [None, "bounds"])
@pytest.mark.parametrize("name", CASES)
def test_conv(name: str, debug: str | None) -> None:
    weight, attributes = CASES[name]
    compare(*parsed(weight, attributes), debug)


@pytest.mark.parametrize("attributes", ["strides = [2, 2]", "pads = [1, 1, 1, 1]", "strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]"])
def test_transposed(attributes: str) -> None:
    compare(*parsed((4, 6, 3, 3), attributes, "ConvTranspose"), "bounds")


def test_no_mask_in_the_inner_loop() -> None:
    """What the padded copy is for: the sum of products reads without conditions."""
    from luthier.codegen.targets.target import parse_target
    from luthier.importers.onnx.importer import import_onnx
    from luthier.pipeline import compile_program

    m, _ = parsed((8, 16, 3, 3), "pads = [1, 1, 1, 1], strides = [2, 2]")
    kernels = compile_program(import_onnx(m), parse_target("cpu:x86-64-v3").caps).kernels
    product = next(str(f) for n, f in kernels.items() if n.startswith("conv") and "pad" not in n.split("_")[-1])
    inner = [line for line in product.splitlines() if ".pad[" in line]
    assert inner and not any(";" in line.split(".pad[")[1].split("]")[0] for line in inner)


def test_winograd_of_open_extents() -> None:
    """Tiles are counted by the run; three kernels, as for known extents."""
    from luthier.codegen.targets.target import parse_target
    from luthier.importers.onnx.importer import import_onnx
    from luthier.pipeline import compile_program

    m, _ = parsed((64, 64, 3, 3), "pads = [1, 1, 1, 1]")
    names = compile_program(import_onnx(m), parse_target("cpu:x86-64-v3").caps).kernels
    assert any("wino_v" in n for n in names) and any("wino_z" in n for n in names)
