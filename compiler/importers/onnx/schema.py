"""Nodes against the operators' declarations: required attributes and their kinds, numbers and types of inputs and outputs.

The declarations are ONNX's own (``onnx.defs``); those of ``com.microsoft`` are the table at the end. What is checked here, no operator needs
to check again; an operator without a declaration is not checked.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from luthier.importers.onnx.sequences import Any_, name_of, type_text
from luthier.importers.onnx.tensors import ELEMENT
from luthier.ir.errors import InvalidModel, TypeMismatch
from luthier.ir.graph import Value

__all__ = ["check_bodies", "check_node", "check_opsets", "check_texts"]

MANY = (1 << 31) - 1
_TYPES = {d: f"tensor({TensorProto.DataType.Name(code).lower()})" for code, d in ELEMENT.items()}
_KIND = AttributeProto.AttributeType.Name


@dataclass(frozen=True, slots=True)
class _Input:
    """``variable``: name of the type parameter, or the type itself; inputs that share one have equal types."""

    name: str
    required: bool
    variable: str
    types: frozenset[str]
    alike: bool = True  # of a variadic input: all of one type


@dataclass(frozen=True, slots=True)
class _Declaration:
    """``inputs``: the last one stands for all that follow when ``inputs_most`` says that there may be more."""

    attributes: Mapping[str, int]
    required: tuple[str, ...]
    inputs: tuple[_Input, ...]
    inputs_least: int
    inputs_most: int
    outputs_least: int
    outputs_most: int


@functools.cache
def _declared(op: str, domain: str, opset: int) -> _Declaration | None:
    if domain == "com.microsoft":
        return _contributed(op)
    try:
        s = onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    inputs = tuple(_Input(i.name, i.option == single, i.type_str, frozenset(i.types), i.is_homogeneous) for i in s.inputs)
    attributes = {k: int(a.type.value) for k, a in s.attributes.items()}
    # the schema counts optional inputs before a variadic one that may be empty (Loop): a blank at the end is as good as nothing
    least = s.min_input if s.min_input >= len(s.inputs) else max((k for k, i in enumerate(inputs, 1) if i.required), default=0)
    return _Declaration(attributes, tuple(k for k, a in s.attributes.items() if a.required), inputs, least, s.max_input, s.min_output, s.max_output)


@functools.cache
def _newest(op: str, domain: str) -> _Declaration | None:
    return _declared(op, domain, onnx.defs.onnx_opset_version()) if domain == "" else None


def check_texts(*texts: Any) -> None:
    """Protobuf hands out a text that is not UTF-8 as bytes. Raises InvalidModel for one."""
    for t in texts:
        if not isinstance(t, str):
            raise InvalidModel(f"the model holds a text that is not UTF-8: {t[:40]!r}")


def check_opsets(opsets: Iterable[tuple[str, int]]) -> None:
    """Raises InvalidModel for a version that is none."""
    for domain, version in opsets:
        check_texts(domain)
        if not 1 <= version < MANY:
            raise InvalidModel(f"the model imports version {version} of the operators of {domain or 'ai.onnx'!r}")


def check_node(n: NodeProto, domain: str, opset: int, inputs: Sequence[Any_ | None], attributes: Mapping[str, AttributeProto]) -> int:
    """How many outputs the operator always has. ``attributes``: those of the node, references to a function's resolved. Raises InvalidModel
    or TypeMismatch."""
    if not any(n.output):
        raise InvalidModel("none of its outputs has a name")
    newest = _newest(n.op_type, domain)
    d = _declared(n.op_type, domain, opset) or newest
    if d is None:
        return 1
    for name in d.required:
        if name not in attributes:
            raise InvalidModel(f"the attribute {name!r} is missing")
    for name, a in attributes.items():
        want = d.attributes.get(name) or (newest.attributes.get(name) if newest is not None else None)
        if want is not None and a.type != want:
            kind = _KIND(a.type) if a.type in AttributeProto.AttributeType.values() else a.type
            raise InvalidModel(f"the attribute {name!r} is of the kind {kind}, it should be {_KIND(want)}")
    if not d.inputs_least <= len(inputs) <= d.inputs_most:
        least = d.inputs_least
        expected = f"{least}" if least == d.inputs_most else f"at least {least}" if d.inputs_most >= MANY else f"{least} to {d.inputs_most}"
        raise InvalidModel(f"it has {len(inputs)} inputs, {n.op_type} takes {expected}")
    for i, v in zip(d.inputs, inputs, strict=False):
        if i.required and v is None:
            raise InvalidModel(f"its input {i.name!r} is missing")
    if len(n.output) > d.outputs_most:
        raise InvalidModel(f"it has {len(n.output)} outputs, {n.op_type} gives at most {d.outputs_most}")
    wrong = _type_error(d, inputs)
    if wrong and (newest is None or newest is d or _type_error(newest, inputs)):  # a type that only newer versions allow is no harm
        raise TypeMismatch(wrong)
    return d.outputs_least


def _type_error(d: _Declaration, inputs: Sequence[Any_ | None]) -> str:
    """Why the types of ``inputs`` do not fit, empty when they do."""
    bound: dict[str, tuple[str, str]] = {}
    for k, v in enumerate(inputs):
        if v is None or not d.inputs:
            continue
        i = d.inputs[min(k, len(d.inputs) - 1)]
        have = type_text(v, _TYPES.get(v.dtype, ""))
        if i.types and have not in i.types:
            few = ", ".join(sorted(t.removeprefix("tensor(").removesuffix(")") for t in i.types)[:12])
            return f"input {k} ({name_of(v)}) is {v.dtype if isinstance(v, Value) else have}, it may be {few}"
        other, first = bound.setdefault(i.variable, (have, name_of(v))) if i.alike else (have, "")
        if other != have:
            return f"input {k} ({name_of(v)}) is {v.dtype if isinstance(v, Value) else have}, it should be of the same type as {first}, {other.removeprefix('tensor(').removesuffix(')')}"
    return ""


def check_bodies(n: NodeProto, inputs: int, bodies: Mapping[str, GraphProto], attrs: Mapping[str, Any], opset: int) -> None:
    """Subgraphs of If, Loop and Scan against the node's ``inputs`` and outputs. Raises InvalidModel."""
    for g in bodies.values():
        given, results = len(g.input), len(g.output)
        if n.op_type == "If":
            need_in, need_out, most_out = 0, len(n.output), MANY
        elif n.op_type == "Loop":
            need_in, need_out, most_out = max(inputs, 2), max(inputs - 1, len(n.output) + 1), MANY
        elif n.op_type == "Scan":
            sequences = int(attrs["num_scan_inputs"])
            inputs -= opset < 9  # the first one was the lengths
            if not 1 <= sequences <= inputs:
                raise InvalidModel(f"the attribute 'num_scan_inputs' is {sequences}, the node has {inputs} inputs")
            need_in, need_out, most_out = inputs, max(inputs - sequences, len(n.output)), MANY
            for key, count in (("scan_input_axes", sequences), ("scan_input_directions", sequences), ("scan_output_axes", results - inputs + sequences),
                               ("scan_output_directions", results - inputs + sequences)):  # fmt: skip
                if key in attrs and len(attrs[key]) != count:
                    raise InvalidModel(f"the attribute {key!r} has {len(attrs[key])} elements, it should have {count}")
        else:
            return
        if given != need_in or not need_out <= results <= most_out:
            raise InvalidModel(f"its subgraph {g.name!r} has {given} inputs and {results} outputs, it should have {need_in} and at least {need_out}")


# ---------------------------------------------------------------- com.microsoft

# inputs in order, ``?`` for one that may be missing, ``...`` for any number more; attributes with their kinds, ``!`` for required ones
_I, _F, _S = AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING
_KINDS = {"i": _I, "f": _F, "s": _S, "I": AttributeProto.INTS, "F": AttributeProto.FLOATS}
_CONTRIBUTED: dict[str, tuple[str, str]] = {
    "Attention": ("input weights bias? mask_index? past? attention_bias? past_sequence_length?", "num_heads:i! unidirectional:i scale:f mask_filter_value:f qkv_hidden_sizes:I do_rotary:i"),
    "BiasGelu": ("A B", ""),
    "CDist": ("A B", "metric:s"),
    "DynamicQuantizeLSTM": (
        "X W R B? sequence_lens? initial_h? initial_c? P? W_scale W_zero_point? R_scale R_zero_point?",
        "hidden_size:i direction:s clip:f input_forget:i activation_alpha:F activation_beta:F",
    ),
    "FusedConv": ("X W B? Z?", "activation:s activation_params:F auto_pad:s group:i kernel_shape:I dilations:I pads:I strides:I"),
    "FusedGemm": ("A B C?", "alpha:f beta:f transA:i transB:i activation:s activation_alpha:f activation_beta:f activation_gamma:f"),
    "GatherBlockQuantized": ("data indices scales zero_points?", "gather_axis:i quantize_axis:i block_size:i bits:i"),
    "GridSample": ("X Grid", "mode:s padding_mode:s align_corners:i"),
    "NhwcMaxPool": ("x", "kernel_shape:I! auto_pad:s ceil_mode:i dilations:I pads:I strides:I"),
    "QAttention": (
        "input weight bias input_scale weight_scale mask_index? input_zero_point? weight_zero_point? past?",
        "num_heads:i! unidirectional:i scale:f mask_filter_value:f do_rotary:i",
    ),
    "QLinearAveragePool": (
        "X x_scale x_zero_point? y_scale y_zero_point?",
        "kernel_shape:I! auto_pad:s pads:I strides:I ceil_mode:i count_include_pad:i channels_last:i",
    ),
    "QLinearConv": (
        "x x_scale x_zero_point w w_scale w_zero_point y_scale y_zero_point B?",
        "channels_last:i auto_pad:s group:i kernel_shape:I dilations:I pads:I strides:I",
    ),
    "QLinearSoftmax": ("X X_scale x_zero_point? y_scale y_zero_point?", "axis:i opset:i"),
    "QLinearWhere": ("condition X x_scale x_zero_point? Y y_scale y_zero_point? z_scale z_zero_point?", ""),
    "DynamicQuantizeMatMul": ("A B b_scale b_zero_point? bias?", ""),
    "EmbedLayerNormalization": (
        "input_ids segment_ids? word_embedding position_embedding segment_embedding? gamma beta mask? position_ids?", "epsilon:f mask_index_type:i",
    ),
    "FastGelu": ("X bias?", ""),
    "FusedMatMul": ("A B", "alpha:f transA:i transB:i transBatchA:i transBatchB:i"),
    "Gelu": ("X", ""),
    "GroupQueryAttention": (
        "query key? value? past_key? past_value? seqlens_k total_sequence_length cos_cache? sin_cache? position_ids? attention_bias? head_sink? ...", "num_heads:i! kv_num_heads:i! scale:f do_rotary:i rotary_interleaved:i local_window_size:i softcap:f smooth_softmax:i",
    ),
    "MatMulIntegerToFloat": ("A B a_scale b_scale a_zero_point? b_zero_point? bias?", ""),
    "MatMulNBits": ("A B scales zero_points? g_idx? bias? ...", "K:i! N:i! block_size:i! bits:i accuracy_level:i"),
    "MoE": ("input router_probs fc1_experts_weights ...", "k:i activation_type:s normalize_routing_weights:i use_sparse_mixer:i"),
    "MultiHeadAttention": ("query key? value? bias? ...", "num_heads:i! scale:f mask_filter_value:f unidirectional:i"),
    "QGemm": ("A a_scale a_zero_point B b_scale b_zero_point C? y_scale? y_zero_point?", "alpha:f transA:i transB:i"),
    "QLinearAdd": ("A A_scale A_zero_point? B B_scale B_zero_point? C_scale C_zero_point?", ""),
    "QLinearConcat": ("Y_scale Y_zero_point inputs ...", "axis:i!"),
    "QLinearGlobalAveragePool": ("X x_scale x_zero_point y_scale y_zero_point", "channels_last:i"),
    "QLinearLeakyRelu": ("X X_scale X_zero_point? Y_scale Y_zero_point?", "alpha:f"),
    "QLinearMul": ("A A_scale A_zero_point? B B_scale B_zero_point? C_scale C_zero_point?", ""),
    "QLinearSigmoid": ("X X_scale X_zero_point? Y_scale Y_zero_point?", ""),
    "QMoE": ("input router_probs fc1_experts_weights ...", "k:i activation_type:s expert_weight_bits:i block_size:i normalize_routing_weights:i"),
    "QuickGelu": ("X", "alpha:f"),
    "RotaryEmbedding": ("input position_ids cos_cache sin_cache", "interleaved:i num_heads:i rotary_embedding_dim:i scale:f is_packed_batching:i"),
    "SkipLayerNormalization": ("input skip gamma beta? bias?", "epsilon:f"),
    "SkipSimplifiedLayerNormalization": ("input skip gamma bias?", "epsilon:f"),
}  # fmt: skip


def _contributed(op: str) -> _Declaration | None:
    if op not in _CONTRIBUTED:
        return None
    inputs, attributes = _CONTRIBUTED[op]
    words = [w for w in inputs.split() if w != "..."]
    ins = tuple(_Input(w.rstrip("?"), not w.endswith("?"), w, frozenset(), False) for w in words)  # the operators check types themselves
    least = max(k for k, i in enumerate(ins) if i.required) + 1
    kinds = dict(w.split(":") for w in attributes.split())
    required = tuple(k for k, v in kinds.items() if v.endswith("!"))
    return _Declaration({k: _KINDS[v[0]] for k, v in kinds.items()}, required, ins, least, MANY if "..." in inputs else len(ins), 1, MANY)
