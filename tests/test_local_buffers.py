"""Templates size local buffers after the caches of the processor; what a thread's stack holds limits them whatever the caches are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from luthier.codegen.targets.target import parse_target
from luthier.importers.onnx.importer import import_onnx
from luthier.ir.loop import Alloc, walk_stmts
from luthier.pipeline import compile_program
from luthier.schedules.base.capabilities import LOCAL_BYTES

F = TensorProto.FLOAT


def conv(c: int, k: int, size: int, kernel: int, group: int = 1, stride: int = 1):
    w = numpy_helper.from_array(np.zeros((k, c // group, kernel, kernel), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=group, pads=[kernel // 2] * 4, strides=[stride] * 2)
    return node, {"x": [1, c, size, size]}, [w]


def pool(op: str, c: int, size: int, kernel: int):
    return helper.make_node(op, ["x"], ["y"], kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4), {"x": [1, c, size, size]}, []


def rows(op: str, *shape: int):
    return helper.make_node(op, ["x"], ["y"]), {"x": list(shape)}, []


CASES = {
    "winograd, few channels": conv(64, 64, 224, 3),
    "winograd, one block": conv(128, 256, 112, 3),
    "groups of four": conv(128, 128, 56, 3, 32),
    "groups with a stride": conv(1024, 1024, 28, 3, 32, 2),
    "groups, wide kernel": conv(64, 128, 112, 7, 4),
    "depthwise, wide rows": conv(96, 96, 512, 7, 96),
    "depthwise of one row": conv(32, 32, 4096, 3, 32),
    "max pool": pool("MaxPool", 64, 1024, 5),
    "average pool": pool("AveragePool", 16, 2048, 3),
    "long rows": rows("Softmax", 4, 500_000),
    "long rows, log": rows("LogSoftmax", 4, 500_000),
}


@pytest.mark.parametrize("l2", [256 << 10, 1 << 20, 2 << 20, 16 << 20])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level", ["cpu:x86-64-v3", "cpu:x86-64-v4"])
def test_local_buffers_fit_a_stack(case: str, level: str, l2: int) -> None:
    node, inputs, weights = CASES[case]
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info(n, F, s) for n, s in inputs.items()],
                              [helper.make_tensor_value_info("y", F, None)], weights)  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    caps = replace(parse_target(level).caps, l2=l2)
    program = compile_program(import_onnx(model), caps)
    local = [s.buf for f in program.kernels.values() for s in walk_stmts(f.body) if isinstance(s, Alloc) and s.buf.scope == "local"]
    sizes = {b.name: b.dtype.itemsize * int(np.prod([e.attr for e in b.shape])) for b in local if all(e.op == "const" for e in b.shape)}
    assert not {n: v for n, v in sizes.items() if v > LOCAL_BYTES}
