"""The building blocks of `blocks.py`: small ONNX graphs with random weights, each with what it computes and moves at least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]
Extent = int | tuple[str, int]  # a number, or an open extent's name and what the benchmark takes for it


@dataclass
class Net:
    """A graph under construction: inputs with the arrays of one call (drawn from ``data``), weights scaled by fan-in (from ``rng``), nodes in
    order."""

    rng: np.random.Generator
    data: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)
    named: list[onnx.ValueInfoProto] = field(default_factory=list)

    def input(self, *shape: Extent, high: int = 0, kind: Any = np.float32) -> str:
        """An input of normal numbers, or of integers below ``high``."""
        name = f"x{len(self.inputs)}"
        sizes = [d if isinstance(d, int) else d[1] for d in shape]
        made = self.data.integers(0, high, sizes) if high else self.data.standard_normal(sizes)
        self.inputs[name] = np.asarray(made, np.int64 if high and kind is np.float32 else kind)
        self.named.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.inputs[name].dtype), [d if isinstance(d, int) else d[0] for d in shape]))
        return name

    def const(self, value: Any, kind: Any = np.int64) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.asarray(value, kind)
        return name

    def weight(self, *shape: int, fan: int = 0) -> str:
        return self.const(self.rng.standard_normal(shape) / math.sqrt(fan or math.prod(shape[1:]) or 1), np.float32)

    def outs(self, kind: str, count: int, *ins: str, **attributes: Any) -> list[str]:
        names = [f"t{len(self.nodes)}_{k}" for k in range(count)]
        self.nodes.append(helper.make_node(kind, list(ins), names, **attributes))
        return names

    def __call__(self, kind: str, *ins: str, **attributes: Any) -> str:
        return self.outs(kind, 1, *ins, **attributes)[0]

    def conv(self, x: str, c: int, m: int, k: int = 3, stride: int = 1, group: int = 1, dilation: int = 1, rank: int = 2, pad: int | None = None) -> str:
        """A convolution with bias; padded so that stride 1 keeps the extents."""
        p = dilation * (k // 2) if pad is None else pad
        return self("Conv", x, self.weight(m, c // group, *[k] * rank), self.weight(m), strides=[stride] * rank, pads=[p] * 2 * rank, group=group, dilations=[dilation] * rank)

    def up(self, x: str, c: int, m: int, k: int, stride: int, pad: int, rank: int = 2) -> str:
        """A transposed convolution with bias."""
        return self("ConvTranspose", x, self.weight(c, m, *[k] * rank, fan=c * k**rank), self.weight(m), strides=[stride] * rank, pads=[pad] * 2 * rank)

    def linear(self, x: str, c: int, m: int) -> str:
        return self("Add", self("MatMul", x, self.weight(c, m, fan=c)), self.weight(m))

    def silu(self, x: str) -> str:
        return self("Mul", x, self("Sigmoid", x))

    def norm(self, x: str, c: int) -> str:
        return self("LayerNormalization", x, self.weight(c), self.weight(c), axis=-1)

    def batch_norm(self, x: str, c: int) -> str:
        return self("BatchNormalization", x, self.weight(c), self.weight(c), self.weight(c), self.const(np.full(c, 0.9), np.float32))

    def attend(self, q: str, k: str, v: str, d: int, mask: str | None = None) -> str:
        s = self("Mul", self("MatMul", q, self("Transpose", k, perm=[0, 1, 3, 2])), self.const(1 / math.sqrt(d), np.float32))
        return self("MatMul", self("Softmax", s if mask is None else self("Add", s, mask), axis=-1), v)

    def recurrent(self, kind: str, x: str, c: int, h: int, gates: int, directions: int = 1) -> str:
        ws = [self.const(self.rng.standard_normal((directions, gates * h, n)) / math.sqrt(h), np.float32) for n in (c, h)]
        more = {"direction": "bidirectional"} if directions == 2 else {}
        more |= {"linear_before_reset": 1} if kind == "GRU" else {}
        return self(kind, x, *ws, self.weight(directions, 2 * gates * h, fan=h), hidden_size=h, **more)

    def model(self, outputs: Sequence[str]) -> onnx.ModelProto:
        outs = [helper.make_empty_tensor_value_info(n) for n in outputs]
        graph = helper.make_graph(self.nodes, "block", self.named, outs, [numpy_helper.from_array(a, n) for n, a in self.weights.items()])
        return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), data_prop=True)


def causal(n: int) -> Array:
    return np.where(np.tril(np.ones((n, n), bool)), 0.0, -1e9).astype(np.float32)


def _res(n: Net, x: str, c: int) -> str:
    return n("Relu", n("Add", x, n.conv(n("Relu", n.conv(x, c, c)), c, c)))


def _bottleneck(n: Net) -> str:
    x = n.input(1, 256, 28, 28)
    return n("Relu", n("Add", x, n.conv(n("Relu", n.conv(n("Relu", n.conv(x, 256, 64, 1)), 64, 64)), 64, 256, 1)))


def _mbconv(n: Net) -> str:
    x, six = n.input(1, 32, 28, 28), [n.const(0.0, np.float32), n.const(6.0, np.float32)]
    return n("Add", x, n.conv(n("Clip", n.conv(n("Clip", n.conv(x, 32, 192, 1), *six), 192, 192, group=192), *six), 192, 32, 1))


def _squeeze(n: Net) -> str:
    x = n.input(1, 96, 28, 28)
    return n("Mul", x, n("Sigmoid", n.conv(n("Relu", n.conv(n("GlobalAveragePool", x), 96, 24, 1)), 24, 96, 1)))


def _convnext(n: Net) -> str:
    x = n.input(1, 96, 56, 56)
    y = n.norm(n("Transpose", n.conv(x, 96, 96, 7, group=96), perm=[0, 2, 3, 1]), 96)
    return n("Add", x, n("Transpose", n.linear(n("Gelu", n.linear(y, 96, 384)), 384, 96), perm=[0, 3, 1, 2]))


def _c2f(n: Net, x: str, c: int) -> str:
    """YOLOv8's: a split, a chain of bottlenecks, everything concatenated."""
    a, b = n.outs("Split", 2, n.silu(n.conv(x, c, c, 1)), axis=1, num_outputs=2)
    y = n("Add", b, n.silu(n.conv(n.silu(n.conv(b, c // 2, c // 2)), c // 2, c // 2)))
    return n.silu(n.conv(n("Concat", a, b, y, axis=1), c * 3 // 2, c, 1))


def _sppf(n: Net) -> str:
    y = [n.silu(n.conv(n.input(1, 256, 20, 20), 256, 128, 1))]
    for _ in range(3):
        y.append(n("MaxPool", y[-1], kernel_shape=[5, 5], pads=[2] * 4, strides=[1, 1]))
    return n.silu(n.conv(n("Concat", *y, axis=1), 512, 256, 1))


def _fpn(n: Net) -> str:
    x = n("Resize", n.input(1, 128, 20, 20), "", n.const([1, 1, 2, 2], np.float32), mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    return n.conv(n("Add", x, n.conv(n.input(1, 64, 40, 40), 64, 128, 1)), 128, 128)


def _unet_up(n: Net) -> str:
    return n("Relu", n.conv(n("Concat", n.up(n.input(1, 64, 32, 32), 64, 32, 2, 2, 0), n.input(1, 32, 64, 64), axis=1), 64, 32))


def _groupnorm(n: Net, c: int = 128) -> str:
    x = n.input(1, c, 32, 32)
    y = n("InstanceNormalization", n("Reshape", x, n.const([0, 32, -1])), n.const(np.ones(32), np.float32), n.const(np.zeros(32), np.float32))
    y = n("Reshape", y, n.const([1, c, 32, 32]))
    return n.conv(n.silu(n("Add", n("Mul", y, n.weight(c, 1, 1)), n.weight(c, 1, 1))), c, c)


def _dilated(n: Net, x: str, c: int, k: int = 3, dilations: Sequence[int] = (1, 3, 5)) -> str:
    """HiFi-GAN's residual block."""
    for d in dilations:
        y = n.conv(n("LeakyRelu", x, alpha=0.1), c, c, k, dilation=d, rank=1)
        x = n("Add", x, n.conv(n("LeakyRelu", y, alpha=0.1), c, c, k, rank=1))
    return x


def _gated(n: Net) -> str:
    """A layer of WaveNet: a dilated convolution, tanh times sigmoid, a projection."""
    x = n.input(1, 192, 400)
    a, b = n.outs("Split", 2, n.conv(x, 192, 384, 5, rank=1), axis=1, num_outputs=2)
    return n("Add", x, n.conv(n("Mul", n("Tanh", a), n("Sigmoid", b)), 192, 192, 1, rank=1))


def _swiglu(n: Net) -> str:
    x = n.input(1, 64, 512)
    h = n("Mul", x, n("Reciprocal", n("Sqrt", n("Add", n("ReduceMean", n("Mul", x, x), n.const([-1])), n.const(1e-6, np.float32)))))
    a, b = (n("MatMul", h, n.weight(512, 1376, fan=512)) for _ in range(2))
    return n("MatMul", n("Mul", n.silu(a), b), n.weight(1376, 512, fan=1376))


def _encoder(n: Net, length: Extent) -> str:
    """A layer of a transformer, 384 wide with 6 heads."""
    x = n.input(1, length, 384)
    heads = [n("Transpose", n("Reshape", n.linear(x, 384, 384), n.const([0, 0, 6, 64])), perm=[0, 2, 1, 3]) for _ in range(3)]
    y = n("Reshape", n("Transpose", n.attend(*heads, 64), perm=[0, 2, 1, 3]), n.const([0, 0, 384]))
    x = n.norm(n("Add", x, n.linear(y, 384, 384)), 384)
    return n.norm(n("Add", x, n.linear(n("Gelu", n.linear(x, 384, 1536)), 1536, 384)), 384)


def _step(n: Net, past: Extent) -> list[str]:
    """One token of a decoder: keys and values grow by one."""
    q, k, v = (n.input(1, 12, 1, 64) for _ in range(3))
    keys, values = (n("Concat", n.input(1, 12, past, 64), new, axis=2) for new in (k, v))
    return [n.attend(q, keys, values, 64), keys, values]


def _einsum(n: Net) -> str:
    q, k, v = (n.input(1, 4, 64, 256) for _ in range(3))
    p = n("Softmax", n("Einsum", q, k, equation="bhcn,bhcm->bhnm"), axis=-1)
    return n("Einsum", p, v, equation="bhnm,bhcm->bhcn")


def _grid(n: Net) -> str:
    grid = n("Tanh", n.input(1, 64, 64, 2))
    return n("GridSample", n.input(1, 32, 64, 64), grid, mode="linear")


def _resize(n: Net, x: str, scale: float, mode: str = "linear", how: str = "half_pixel") -> str:
    more = {"nearest_mode": "floor"} if mode == "nearest" else {}
    return n("Resize", x, "", n.const([1, 1, scale, scale], np.float32), mode=mode, coordinate_transformation_mode=how, **more)


def _variance(n: Net) -> str:
    x = n.input(512, 2048)
    d = n("Sub", x, n("ReduceMean", x, n.const([1])))
    return n("ReduceMean", n("Mul", d, d), n.const([1]), keepdims=0)


def _window(n: Net) -> str:
    """Swin's windows: a roll, then tiles of 7 x 7."""
    x = n.input(1, 56, 56, 96)
    for axis in (1, 2):
        parts = [n("Slice", x, n.const([a]), n.const([b]), n.const([axis])) for a, b in ((3, 56), (0, 3))]
        x = n("Concat", *parts, axis=axis)
    return n("Reshape", n("Transpose", n("Reshape", x, n.const([8, 7, 8, 7, 96])), perm=[0, 2, 1, 3, 4]), n.const([64, 49, 96]))


def _patches(n: Net) -> str:
    return n("Transpose", n("Reshape", n.conv(n.input(1, 3, 224, 224), 3, 192, 16, 16, pad=0), n.const([1, 192, 196])), perm=[0, 2, 1])


BLOCKS: dict[str, Callable[[Net], str | list[str]]] = {
    # products
    "mlp-1": lambda n: n.linear(n("Relu", n.linear(n.input(1, 512), 512, 2048)), 2048, 512),
    "mlp-32": lambda n: n.linear(n("Gelu", n.linear(n.input(32, 512), 512, 2048)), 2048, 512),
    "mlp-1024": lambda n: n.linear(n("Relu", n.linear(n.input(1024, 256), 256, 1024)), 1024, 256),
    "mlp-tiny": lambda n: n.linear(n("Relu", n.linear(n.input(1, 16), 16, 32)), 32, 4),
    "matmul-384": lambda n: n("MatMul", n.input(384, 384), n.input(384, 384)),
    "matmul-transposed": lambda n: n("MatMul", n.input(256, 384), n("Transpose", n.input(256, 384), perm=[1, 0])),
    "matmul-open": lambda n: n.linear(n.input(1, ("length", 77), 512), 512, 512),
    "bmm-12x128x64": lambda n: n("MatMul", n.input(12, 128, 128), n.input(12, 128, 64)),
    "gemv-4096": lambda n: n("MatMul", n.input(1, 4096), n.weight(4096, 4096, fan=4096)),
    "rmsnorm-swiglu": _swiglu,
    # attention
    "attention-128": lambda n: n.attend(n.input(1, 12, 128, 64), n.input(1, 12, 128, 64), n.input(1, 12, 128, 64), 64),
    "attention-causal-512": lambda n: n.attend(n.input(1, 8, 512, 64), n.input(1, 8, 512, 64), n.input(1, 8, 512, 64), 64, n.const(causal(512), np.float32)),
    "attention-1024": lambda n: n.attend(n.input(1, 4, 1024, 64), n.input(1, 4, 1024, 64), n.input(1, 4, 1024, 64), 64),
    "attention-einsum": _einsum,
    "attention-step": lambda n: _step(n, 256),
    "attention-step-open": lambda n: _step(n, ("past", 256)),
    "encoder-128": lambda n: _encoder(n, 128),
    "encoder-open": lambda n: _encoder(n, ("length", 100)),
    # recurrent
    "lstm-200": lambda n: n.recurrent("LSTM", n.input(200, 1, 128), 128, 256, 4),
    "lstm-two-ways-16": lambda n: n.recurrent("LSTM", n.input(50, 16, 128), 128, 128, 4, 2),
    "gru-200": lambda n: n.recurrent("GRU", n.input(200, 1, 128), 128, 256, 3),
    # convolutions
    "conv3x3-64-56": lambda n: n.conv(n.input(1, 64, 56, 56), 64, 64),
    "conv3x3-256-14": lambda n: n.conv(n.input(1, 256, 14, 14), 256, 256),
    "conv3x3-512-7": lambda n: n.conv(n.input(1, 512, 7, 7), 512, 512),
    "conv3x3-16-160": lambda n: n.conv(n.input(1, 16, 160, 160), 16, 16),
    "conv3x3-64-open": lambda n: n.conv(n.input(("n", 1), 64, ("h", 40), ("w", 40)), 64, 64),
    "conv3x3-s2-open": lambda n: n.conv(n.input(("n", 1), 32, ("h", 80), ("w", 80)), 32, 64, 3, 2),
    "conv3x3-s2-32-80": lambda n: n.conv(n.input(1, 32, 80, 80), 32, 64, 3, 2),
    "conv3x3-dilated": lambda n: n.conv(n.input(1, 64, 40, 40), 64, 64, dilation=2),
    "conv3x3-groups-32": lambda n: n.conv(n.input(1, 128, 28, 28), 128, 128, group=32),
    "conv3x3-batch-8": lambda n: n.conv(n.input(8, 64, 14, 14), 64, 64),
    "conv1x1-256-28": lambda n: n.conv(n.input(1, 256, 28, 28), 256, 256, 1),
    "conv1x1-64-56": lambda n: n.conv(n.input(1, 64, 56, 56), 64, 64, 1),
    "conv1x1-s2-256": lambda n: n.conv(n.input(1, 256, 28, 28), 256, 512, 1, 2),
    "conv1x1-open": lambda n: n.conv(n.input(("n", 1), 128, ("h", 20), ("w", 20)), 128, 128, 1),
    "conv5x5-32-28": lambda n: n.conv(n.input(1, 32, 28, 28), 32, 64, 5),
    "conv7x7-s2-224": lambda n: n.conv(n.input(1, 3, 224, 224), 3, 64, 7, 2),
    "conv3d-16": lambda n: n.conv(n.input(1, 16, 16, 28, 28), 16, 32, rank=3),
    "patches-16": _patches,
    "dwconv3x3-56": lambda n: n.conv(n.input(1, 96, 56, 56), 96, 96, group=96),
    "dwconv3x3-s2-112": lambda n: n.conv(n.input(1, 96, 112, 112), 96, 96, 3, 2, group=96),
    "dwconv5x5-s2-28": lambda n: n.conv(n.input(1, 120, 28, 28), 120, 120, 5, 2, group=120),
    "dwconv7x7-56": lambda n: n.conv(n.input(1, 96, 56, 56), 96, 96, 7, group=96),
    "dwconv1d-open": lambda n: n.conv(n.input(1, 192, ("time", 400)), 192, 192, 3, group=192, dilation=3, rank=1),
    "res-block": lambda n: _res(n, n.input(1, 128, 28, 28), 128),
    "bottleneck": _bottleneck,
    "mbconv": _mbconv,
    "squeeze-excite": _squeeze,
    "convnext-block": _convnext,
    "c2f-64": lambda n: _c2f(n, n.input(1, 64, 40, 40), 64),
    "c2f-64-open": lambda n: _c2f(n, n.input(("n", 1), 64, ("h", 40), ("w", 40)), 64),
    "sppf": _sppf,
    "fpn": _fpn,
    "unet-up": _unet_up,
    "groupnorm-silu-conv": _groupnorm,
    # one dimension
    "conv1d-stack": lambda n: n("Relu", n.conv(n("Relu", n.conv(n.input(1, 64, 4000), 64, 128, 9, rank=1)), 128, 128, 3, dilation=9, rank=1)),
    "conv1d-wide-kernel": lambda n: n.conv(n.input(1, 1, 16000), 1, 256, 400, 160, rank=1, pad=0),
    "conv1d-to-wave": lambda n: n("Tanh", n.conv(n.input(1, 32, 12800), 32, 1, 7, rank=1)),
    "dilated-residual-64": lambda n: _dilated(n, n.input(1, 64, 2000), 64),
    "dilated-residual-open": lambda n: _dilated(n, n.input(1, 32, ("time", 4000)), 32),
    "gated-residual": _gated,
    "upsample1d-8": lambda n: n.up(n.input(1, 128, 400), 128, 64, 16, 8, 4, rank=1),
    "upsample1d-8-open": lambda n: n.up(n.input(1, 128, ("time", 400)), 128, 64, 16, 8, 4, rank=1),
    "upsample1d-2": lambda n: n.up(n.input(1, 64, 3200), 64, 32, 4, 2, 1, rank=1),
    "upsample2d-4x4-s2": lambda n: n.up(n.input(1, 64, 64, 64), 64, 32, 4, 2, 1),
    "upsample2d-2x2-s2": lambda n: n.up(n.input(1, 64, 64, 64), 64, 32, 2, 2, 0),
    # normalisation and softmax
    "layernorm-768": lambda n: n.norm(n.input(1, 512, 768), 768),
    "layernorm-64": lambda n: n.norm(n.input(1, 1024, 64), 64),
    "instance-norm": lambda n: n("InstanceNormalization", n.input(1, 64, 128, 128), n.weight(64), n.weight(64)),
    "batchnorm-relu": lambda n: n("Relu", n.batch_norm(n.input(1, 64, 112, 112), 64)),
    "softmax-32000": lambda n: n("Softmax", n.input(8, 32000), axis=-1),
    "softmax-128": lambda n: n("Softmax", n.input(12, 128, 128), axis=-1),
    "softmax-axis-1": lambda n: n("Softmax", n.input(1, 21, 128, 128), axis=1),
    "log-softmax-10": lambda n: n("LogSoftmax", n.input(256, 10), axis=-1),
    "log-softmax-50000": lambda n: n("LogSoftmax", n.input(4, 50000), axis=-1),
    # pooling, resizing
    "maxpool-3x3-s2": lambda n: n("MaxPool", n.input(1, 64, 112, 112), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    "maxpool-2x2-s2": lambda n: n("MaxPool", n.input(1, 64, 56, 56), kernel_shape=[2, 2], strides=[2, 2]),
    "maxpool-5x5": lambda n: n("MaxPool", n.input(1, 128, 20, 20), kernel_shape=[5, 5], strides=[1, 1], pads=[2] * 4),
    "avgpool-3x3": lambda n: n("AveragePool", n.input(1, 64, 56, 56), kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4, count_include_pad=1),
    "global-average": lambda n: n("GlobalAveragePool", n.input(1, 1280, 7, 7)),
    "global-average-large": lambda n: n("GlobalAveragePool", n.input(1, 64, 112, 112)),
    "resize-linear-2": lambda n: _resize(n, n.input(1, 64, 64, 64), 2),
    "resize-linear-odd": lambda n: _resize(n, n.input(1, 3, 240, 320), 1.5),
    "resize-nearest-2": lambda n: _resize(n, n.input(1, 64, 64, 64), 2, "nearest", "asymmetric"),
    "resize-cubic-2": lambda n: _resize(n, n.input(1, 3, 128, 128), 2, "cubic"),
    "grid-sample": _grid,
    "pixel-shuffle": lambda n: n("DepthToSpace", n.input(1, 128, 64, 64), blocksize=2, mode="CRD"),
    # movement
    "transpose-to-last": lambda n: n("Add", n("Transpose", n.input(1, 64, 112, 112), perm=[0, 2, 3, 1]), n.const(1.0, np.float32)),
    "transpose-1024": lambda n: n("Transpose", n.input(1024, 1024), perm=[1, 0]),
    "transpose-heads": lambda n: n("Transpose", n.input(1, 128, 12, 64), perm=[0, 2, 1, 3]),
    "concat-channels": lambda n: n("Concat", n.input(1, 64, 56, 56), n.input(1, 64, 56, 56), axis=1),
    "concat-last": lambda n: n("Concat", n.input(784, 64), n.input(784, 32), n.input(784, 128), axis=1),
    "split-last": lambda n: n.outs("Split", 3, n.input(512, 1152), axis=1, num_outputs=3),
    "slice-middle": lambda n: n("Slice", n.input(1, 64, 112, 112), n.const([8, 8]), n.const([104, 104]), n.const([2, 3])),
    "pad-zero": lambda n: n("Pad", n.input(1, 64, 56, 56), n.const([0, 0, 1, 1, 0, 0, 1, 1])),
    "pad-reflect": lambda n: n("Pad", n.input(1, 32, 64, 64), n.const([0, 0, 3, 3, 0, 0, 3, 3]), mode="reflect"),
    "window-partition": _window,
    "embedding-512": lambda n: n("Gather", n.weight(30000, 384), n.input(1, 512, high=30000)),
    "gather-columns": lambda n: n("Gather", n.input(256, 1024), n.const(np.arange(0, 1024, 3)), axis=1),
    "expand-add": lambda n: n("Add", n.input(1, 128, 56, 56), n.input(1, 128, 1, 1)),
    "where-mask": lambda n: n("Where", n("Greater", n.input(512, 1024), n.const(0.0, np.float32)), n.input(512, 1024), n.const(-1.0, np.float32)),
    "one-hot": lambda n: n("OneHot", n.input(512, high=1000), n.const(1000), n.const([0.0, 1.0], np.float32)),
    # elementwise
    "add-mul-chain": lambda n: (lambda x, y: n("Sub", n("Mul", n("Tanh", n("Add", n("Mul", x, y), x)), n("Sigmoid", y)), x))(n.input(1000, 1000), n.input(1000, 1000)),
    "exp-log-pow": lambda n: (lambda x: n("Add", n("Log", n("Add", n("Exp", x), n.const(1.0, np.float32))), n("Pow", n("Abs", x), n.const(1.5, np.float32))))(n.input(500, 1000)),
    "gelu": lambda n: n("Gelu", n.input(512, 1536)),
    "erf": lambda n: n("Erf", n.input(512, 1536)),
    "pixels-to-float": lambda n: n("Div", n("Sub", n("Cast", n.input(1, 3, 224, 224, high=256, kind=np.uint8), to=1), n.weight(3, 1, 1)), n.const([[[58.0]], [[57.0]], [[57.4]]], np.float32)),
    # reductions
    "reduce-last": lambda n: (lambda x: n("Add", n("ReduceSum", x, n.const([1])), n("ReduceMax", x, n.const([1]))))(n.input(1000, 1000)),
    "reduce-first": lambda n: n("ReduceMean", n.input(1000, 1000), n.const([0])),
    "reduce-all": lambda n: (lambda x: n("ReduceMean", n("Mul", x, x), keepdims=0))(n.input(1000, 1000)),
    "reduce-middle": lambda n: n("ReduceMax", n.input(16, 256, 196), n.const([1])),
    "variance": _variance,
    "argmax-50000": lambda n: n("ArgMax", n.input(16, 50000), axis=-1),
    "topk-100": lambda n: n.outs("TopK", 2, n.input(1, 8400), n.const([100])),
    "cumsum": lambda n: n("CumSum", n.input(256, 4096), n.const(1)),
    "cumsum-first": lambda n: n("CumSum", n.input(4096, 256), n.const(0)),
}  # fmt: skip


@dataclass
class Block:
    """``flops``: of products and convolutions, an addition and a multiplication counting as two; ``moved``: bytes of inputs, outputs and
    weights, each once, of a table the rows that are read."""

    model: onnx.ModelProto
    inputs: dict[str, Array]
    flops: float
    moved: float


def build(name: str, seed: int = 0) -> Block:
    """The block of this name with the inputs of a call, the same whatever others are built. Raises KeyError for an unknown one."""
    key = list(name.encode())
    net = Net(np.random.default_rng(key), np.random.default_rng([*key, seed]))
    out = BLOCKS[name](net)
    model = net.model([out] if isinstance(out, str) else out)
    return Block(model, net.inputs, *work(model, net))


def work(model: onnx.ModelProto, net: Net) -> tuple[float, float]:
    """(float operations, bytes) that no way of computing the block with direct sums does without."""
    sizes = {d.dim_param: n for v in net.named for d, n in zip(v.type.tensor_type.shape.dim, net.inputs[v.name].shape, strict=True) if d.dim_param}
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for v in fixed.graph.input:
        for d in v.type.tensor_type.shape.dim:
            if d.dim_param in sizes:
                d.dim_value = sizes[d.dim_param]
    del fixed.graph.value_info[:]
    for o in fixed.graph.output:
        o.type.Clear()
    fixed = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    shapes = {n: a.shape for n, a in (*net.inputs.items(), *net.weights.items())}
    moved = float(sum(a.nbytes for a in (*net.inputs.values(), *net.weights.values())))
    for v in (*fixed.graph.value_info, *fixed.graph.output):
        shapes[v.name] = tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
    for o in fixed.graph.output:
        moved += math.prod(shapes[o.name]) * helper.tensor_dtype_to_np_dtype(o.type.tensor_type.elem_type).itemsize
    flops = 0.0
    for node in fixed.graph.node:
        a, out = [shapes.get(n, ()) for n in node.input], shapes.get(node.output[0], ())
        if node.op_type == "Conv":
            flops += 2 * math.prod(out) * math.prod(a[1][1:])
        elif node.op_type == "ConvTranspose":
            flops += 2 * math.prod(a[0]) * math.prod(a[1][1:])
        elif node.op_type == "MatMul":
            flops += 2 * math.prod(out) * a[0][-1]
        elif node.op_type == "Einsum":
            flops += 2 * math.prod(out) * a[0][-2 if node.output[0] != fixed.graph.output[0].name else -1]
        elif node.op_type in ("LSTM", "GRU"):
            flops += 2 * a[0][0] * a[0][1] * (math.prod(a[1]) + math.prod(a[2]))
        elif node.op_type == "Gather" and node.input[0] in net.weights:
            moved += math.prod(out) * 4 - net.weights[node.input[0]].nbytes
    return flops, moved
