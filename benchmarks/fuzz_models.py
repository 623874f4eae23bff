"""Small models for :mod:`benchmarks.fuzz` to damage: each compiles in milliseconds, together they use most of what an importer reads."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
F, I, B = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
WEIGHTS_FILE = "weights.bin"
node = helper.make_node


def weights_file() -> bytes:
    """What the external tensors of the models lie in."""
    return np.linspace(-1, 1, 64, dtype=np.float32).tobytes()


def _model(nodes: Sequence[Any], inputs: Mapping[str, tuple[int, Sequence[Any]]], outputs: Mapping[str, int], **weights: Any) -> onnx.ModelProto:
    """``inputs``: (element type, extents) by name; ``outputs``: element types; ``weights``: initializers."""
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(n, t, None) for n, t in outputs.items()], [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _normal(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _ints(*values: int) -> Any:
    return np.array(values, np.int64)


def _perceptron() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w", "b"], ["h"], transB=1, alpha=0.5), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["m"]),
        node("LayerNormalization", ["m", "g"], ["n"], axis=-1, epsilon=1e-5), node("Softmax", ["n"], ["y"], axis=1),
    ]  # fmt: skip
    return _model(nodes, {"x": (F, ["n", 8])}, {"y": F}, w=_normal(6, 8), b=_normal(6), v=_normal(6, 4), g=_normal(4))


def _convolution() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], strides=[1, 1], kernel_shape=[3, 3], group=1),
        node("BatchNormalization", ["c", "s", "o", "m", "v"], ["n"], epsilon=1e-3),
        node("MaxPool", ["n"], ["p"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=0), node("GlobalAveragePool", ["p"], ["g"]),
        node("Flatten", ["g"], ["y"], axis=1),
    ]  # fmt: skip
    return _model(
        nodes, {"x": (F, [1, 2, 8, 8])}, {"y": F}, w=_normal(4, 2, 3, 3), b=_normal(4), s=_normal(4), o=_normal(4), m=_normal(4), v=np.abs(_normal(4)) + 1
    )


def _shapes() -> onnx.ModelProto:
    nodes = [
        node("Shape", ["x"], ["s"], start=0), node("Gather", ["s", "one"], ["d"], axis=0), node("Concat", ["d", "rest"], ["t"], axis=0),
        node("Reshape", ["x", "t"], ["r"], allowzero=0), node("Transpose", ["r"], ["q"], perm=[1, 0, 2]),
        node("Slice", ["q", "from", "to", "axes", "steps"], ["c"]), node("Unsqueeze", ["c", "axes"], ["u"]), node("Expand", ["u", "big"], ["e"]),
        node("Squeeze", ["e", "one"], ["z"]), node("Tile", ["z", "reps"], ["y"]),
    ]  # fmt: skip
    return _model(
        nodes, {"x": (F, [2, "n", 6])}, {"y": F}, one=_ints(1), rest=_ints(3, -1), axes=_ints(1), steps=_ints(1), to=_ints(2), big=_ints(1, 1, 1, 1),
        reps=_ints(1, 1, 2), **{"from": _ints(0)},
    )  # fmt: skip


def _recurrent() -> onnx.ModelProto:
    nodes = [
        node("LSTM", ["x", "w", "r", "b"], ["l", "lh", "lc"], hidden_size=3, direction="forward"), node("Squeeze", ["l", "one"], ["s"]),
        node("GRU", ["s", "gw", "gr"], ["g"], hidden_size=3, linear_before_reset=1), node("Squeeze", ["g", "one"], ["t"]),
        node("RNN", ["t", "rw", "rr"], ["y"], hidden_size=2, activations=["Tanh"]),
    ]  # fmt: skip
    return _model(
        nodes, {"x": (F, [3, 2, 4])}, {"y": F}, w=_normal(1, 12, 4), r=_normal(1, 12, 3), b=_normal(1, 24), one=_ints(1), gw=_normal(1, 9, 3),
        gr=_normal(1, 9, 3), rw=_normal(1, 2, 3), rr=_normal(1, 2, 2),
    )  # fmt: skip


def _graph(nodes: Sequence[Any], inputs: Mapping[str, int], outputs: Mapping[str, int]) -> Any:
    values = [[helper.make_tensor_value_info(n, t, [] if t in (I, B) else [3]) for n, t in side.items()] for side in (inputs, outputs)]
    return helper.make_graph(nodes, "body", *values)


def _loops() -> onnx.ModelProto:
    body = _graph(
        [node("Add", ["s", "x"], ["s2"]), node("Identity", ["c"], ["c2"]), node("Tanh", ["s2"], ["row"])], {"i": I, "c": B, "s": F}, {"c2": B, "s2": F, "row": F}
    )
    scan = _graph([node("Add", ["a", "e"], ["a2"]), node("Mul", ["a2", "e"], ["o"])], {"a": F, "e": F}, {"a2": F, "o": F})
    nodes = [
        node("Loop", ["rounds", "go", "x"], ["last", "rows"], body=body), node("Scan", ["last", "rows"], ["end", "y"], body=scan, num_scan_inputs=1),
    ]  # fmt: skip
    return _model(nodes, {"x": (F, [3])}, {"y": F, "end": F}, rounds=np.array(4, np.int64), go=np.array(True))


def _branches() -> onnx.ModelProto:
    then, other = (helper.make_graph([node(op, ["x"], [out])], out, [], [helper.make_tensor_value_info(out, F, ["n"])]) for op, out in (("Exp", "a"), ("Neg", "b")))
    nodes = [
        node("ReduceSum", ["x", "axes"], ["s"], keepdims=0), node("Greater", ["s", "limit"], ["c"]), node("If", ["c"], ["z"], then_branch=then, else_branch=other),
        node("Where", ["mask", "z", "x"], ["w"]), node("Clip", ["w", "low"], ["y"]),
    ]  # fmt: skip
    return _model(nodes, {"x": (F, ["n"]), "mask": (B, ["n"])}, {"y": F}, axes=_ints(0), limit=np.float32(0.5), low=np.float32(-0.5))


def _quantized() -> onnx.ModelProto:
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=1), node("QLinearMatMul", ["q", "scale", "zero", "w", "ws", "wz", "scale", "zero"], ["m"]),
        node("DequantizeLinear", ["m", "scale", "zero"], ["d"]), node("DynamicQuantizeLinear", ["d"], ["p", "ps", "pz"]),
        node("MatMulInteger", ["p", "v", "pz"], ["i"]), node("Cast", ["i"], ["f"], to=F), node("Mul", ["f", "ps"], ["y"]),
    ]  # fmt: skip
    rng = np.random.default_rng(1)
    return _model(
        nodes, {"x": (F, [3, 8])}, {"y": F}, scale=np.float32(0.02), zero=np.uint8(128), w=rng.integers(-20, 20, (8, 4)).astype(np.int8), ws=np.float32(0.0937),
        wz=np.int8(0), v=rng.integers(-20, 20, (4, 5)).astype(np.int8),
    )  # fmt: skip


def _selection() -> onnx.ModelProto:
    nodes = [
        node("TopK", ["x", "k"], ["t", "at"], axis=-1, largest=1), node("ArgMax", ["t"], ["a"], axis=1, keepdims=0), node("OneHot", ["a", "depth", "pair"], ["o"], axis=-1),
        node("CumSum", ["o", "axis"], ["c"]), node("GatherND", ["c", "points"], ["g"]), node("ScatterND", ["c", "points", "g"], ["s"], reduction="add"),
        node("NonZero", ["s"], ["z"]), node("GatherElements", ["x", "at"], ["e"], axis=1), node("ReduceMean", ["e", "both"], ["y"]),
    ]  # fmt: skip
    return _model(
        nodes, {"x": (F, [4, 6])}, {"y": F, "z": I}, k=_ints(3), depth=np.array(3, np.int64), pair=np.array([0, 1], np.float32), axis=np.array(1, np.int64),
        points=np.array([[0, 1], [2, 2]], np.int64), both=_ints(0, 1),
    )  # fmt: skip


def _images() -> onnx.ModelProto:
    nodes = [
        node("DepthToSpace", ["x"], ["d"], blocksize=2, mode="DCR"), node("Resize", ["d", "", "scales"], ["r"], mode="linear"),
        node("Pad", ["r", "pads", "value"], ["p"], mode="constant"), node("AveragePool", ["p"], ["a"], kernel_shape=[3, 3], auto_pad="SAME_UPPER"),
        node("GridSample", ["a", "grid"], ["g"], mode="linear", align_corners=0), node("ConvTranspose", ["g", "w"], ["y"], strides=[2, 2]),
    ]  # fmt: skip
    return _model(
        nodes, {"x": (F, [1, 4, 3, 3])}, {"y": F}, scales=np.array([1, 1, 1.5, 2], np.float32), pads=_ints(0, 0, 1, 0, 0, 0, 0, 2), value=np.float32(0.5),
        grid=np.clip(_normal(1, 2, 3, 2), -1, 1), w=_normal(1, 2, 2, 2),
    )  # fmt: skip


def _contributed() -> onnx.ModelProto:
    nodes = [
        node("MatMulNBits", ["x", "q", "s"], ["m"], domain="com.microsoft", K=32, N=8, bits=4, block_size=32),
        node("SkipLayerNormalization", ["m", "m", "g"], ["n"], domain="com.microsoft", epsilon=1e-5),
        node("FusedMatMul", ["n", "v"], ["f"], domain="com.microsoft", transB=1, alpha=2.0), node("QuickGelu", ["f"], ["y"], domain="com.microsoft", alpha=1.5),
    ]  # fmt: skip
    m = _model(
        nodes, {"x": (F, [2, 3, 32])}, {"y": F}, q=np.random.default_rng(2).integers(0, 256, (8, 1, 16)).astype(np.uint8), s=np.abs(_normal(8)) / 8, g=_normal(8), v=_normal(5, 8)
    )
    m.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return m


def _functions() -> onnx.ModelProto:
    scale = helper.make_node("Elu", ["a"], ["b"])
    scale.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    f = helper.make_function("own", "Twice", ["a"], ["c"], [scale, node("Add", ["a", "b"], ["c"])], [helper.make_opsetid("", OPSET)], ["slope"])
    nodes = [
        node("Constant", [], ["k"], value=numpy_helper.from_array(_normal(4))), node("Twice", ["x"], ["t"], domain="own", slope=0.5), node("Mul", ["t", "k"], ["m"]),
        node("HardSwish", ["m"], ["w"]), node("Celu", ["w"], ["e"], alpha=0.5), node("Einsum", ["e", "e"], ["y"], equation="ij,kj->ik"),
    ]  # fmt: skip
    m = _model(nodes, {"x": (F, ["n", 4])}, {"y": F})
    m.functions.append(f)
    m.opset_import.append(helper.make_opsetid("own", 1))
    return m


def _external() -> onnx.ModelProto:
    nodes = [node("MatMul", ["x", "far"], ["m"]), node("Add", ["m", "near"], ["a"]), node("Mul", ["a", "thin"], ["y"])]
    m = _model(nodes, {"x": (F, ["n", 4])}, {"y": F}, near=_normal(5))
    far = m.graph.initializer.add(name="far", data_type=F, dims=[4, 5], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", WEIGHTS_FILE), ("offset", "16"), ("length", "80")):
        far.external_data.add(key=key, value=value)
    thin = helper.make_sparse_tensor(numpy_helper.from_array(np.array([1, 2], np.float32), "thin"), numpy_helper.from_array(_ints(0, 3)), [5])
    m.graph.sparse_initializer.append(thin)
    return m


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "perceptron": _perceptron, "convolution": _convolution, "shapes": _shapes, "recurrent": _recurrent, "loops": _loops, "branches": _branches,
    "quantized": _quantized, "selection": _selection, "images": _images, "contributed": _contributed, "functions": _functions, "external": _external,
}  # fmt: skip


@functools.cache
def suite_models() -> tuple[tuple[str, bytes], ...]:
    """(name, model) of the ONNX suite's node tests, as onnx itself generates them: those below 4 kB."""
    import warnings

    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow in the generators' casts
        cases = [(c.name, c.model.SerializeToString()) for c in load_model_tests(kind="node")]
    return tuple(sorted(c for c in cases if len(c[1]) < 4096))


# ---------------------------------------------------------------- GGUF

Metadata = dict[str, tuple[int, Any]]  # (type of the value as GGUF numbers it, value)
Tensors = dict[str, tuple[int, tuple[int, ...], bytes]]  # (type, rows first, bytes)
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def gguf_value(kind: int, value: Any) -> bytes:
    """One value of the metadata; a list is an array of texts, a tuple an array of 32-bit integers."""
    if kind == 8:
        return struct.pack("<Q", len(value)) + bytes(value)
    if kind == 9:
        return struct.pack("<IQ", *((8, len(value)) if isinstance(value, list) else (5, len(value)))) + b"".join(gguf_value(8 if isinstance(value, list) else 5, v) for v in value)
    return struct.pack(_FORMATS[kind], value)


def write_gguf(metadata: Metadata, tensors: Sequence[tuple[str, tuple[int, tuple[int, ...], bytes]]]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        head += gguf_value(8, key.encode()) + struct.pack("<I", kind) + gguf_value(kind, value)
    data = b""
    for name, (kind, shape, raw) in tensors:
        head += gguf_value(8, name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    return head + b"\0" * (-len(head) % 32) + data


def gguf_parts() -> tuple[Metadata, list[tuple[str, tuple[int, tuple[int, ...], bytes]]]]:
    """A Llama of one layer: an f32 embedding tied to the output, Q8_0 matrices."""
    rng = np.random.default_rng(5)
    width, hidden, heads, kv, vocabulary = 32, 32, 4, 2, 16

    def matrix(rows: int, columns: int) -> tuple[int, tuple[int, ...], bytes]:
        blocks = np.empty((rows * columns // 32, 34), np.uint8)
        blocks[:, :2] = np.full(len(blocks), 0.01, np.float16).view(np.uint8).reshape(-1, 2)
        blocks[:, 2:] = rng.integers(0, 256, (len(blocks), 32))
        return 8, (rows, columns), blocks.tobytes()

    def plain(*shape: int) -> tuple[int, tuple[int, ...], bytes]:
        return 0, shape, rng.uniform(0.5, 1.5, shape).astype("<f4").tobytes()

    metadata: Metadata = {"general.architecture": (8, b"llama"), "general.alignment": (4, 32)}
    for key, value in (("block_count", 1), ("embedding_length", width), ("feed_forward_length", hidden), ("attention.head_count", heads), ("attention.head_count_kv", kv),
                       ("context_length", 16), ("rope.dimension_count", 8)):  # fmt: skip
        metadata[f"llama.{key}"] = 4, value
    metadata |= {"llama.attention.layer_norm_rms_epsilon": (6, 1e-5), "llama.rope.freq_base": (6, 1e4), "tokenizer.ggml.model": (8, b"gpt2")}
    metadata["tokenizer.ggml.tokens"] = 9, [bytes([97 + k]) for k in range(vocabulary)]
    metadata["tokenizer.ggml.token_type"] = 9, (1,) * vocabulary
    metadata["tokenizer.ggml.merges"] = 9, []
    tensors = [("token_embd.weight", plain(vocabulary, width)), ("output_norm.weight", plain(width))]
    for name, rows, columns in (("attn_q", width, width), ("attn_k", kv * 8, width), ("attn_v", kv * 8, width), ("attn_output", width, width), ("ffn_gate", hidden, width),
                                ("ffn_up", hidden, width), ("ffn_down", width, hidden)):  # fmt: skip
        tensors.append((f"blk.0.{name}.weight", matrix(rows, columns)))
    tensors += [("blk.0.attn_norm.weight", plain(width)), ("blk.0.ffn_norm.weight", plain(width))]
    return metadata, tensors
