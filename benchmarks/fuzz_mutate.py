"""Mutations of ONNX and GGUF files. An edit is a number: the generator that it seeds chooses what to change, so a mutant is a model and
a short list of numbers, and shrinking is leaving numbers out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from benchmarks.fuzz_models import MODELS, WEIGHTS_FILE, gguf_parts, suite_models, write_gguf

Rng = np.random.Generator
INTEGERS = (0, 1, -1, 2, 3, -2, 7, 64, 1000, 2**31 - 1, -(2**31), 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (b"", b"x", b"NOTSET", b"linear", b"forward", b"\xff\xfe\x00", b"a" * 5000, b"\x1b[31m", "\u202ehtap".encode(), b"../x", b"a\x00b", b"1.5", b"abc", b"-1", b"1" * 5000)
KINDS = tuple(k for k in AttributeProto.AttributeType.values() if k)
ELEMENTS = tuple(TensorProto.DataType.values())


def pick(rng: Rng, choices: Sequence[Any]) -> Any:
    """One of them, or None when there is none (numpy's own ``choice`` would make arrays of them)."""
    return choices[int(rng.integers(len(choices)))] if len(choices) else None


# ---------------------------------------------------------------- ONNX


def graphs(g: GraphProto) -> Iterator[GraphProto]:
    yield g
    for n in g.node:
        for a in n.attribute:
            if a.type == AttributeProto.GRAPH:
                yield from graphs(a.g)


def _owner(rng: Rng, m: ModelProto) -> Any:
    """A graph or function."""
    return pick(rng, [*graphs(m.graph), *m.functions])


def _node(rng: Rng, m: ModelProto) -> NodeProto | None:
    return pick(rng, _owner(rng, m).node)


def _attribute(rng: Rng, m: ModelProto) -> tuple[NodeProto, AttributeProto] | None:
    return pick(rng, [(n, a) for g in (*graphs(m.graph), *m.functions) for n in g.node for a in n.attribute])


def _tensor(rng: Rng, m: ModelProto) -> TensorProto | None:
    found = [t for g in graphs(m.graph) for t in g.initializer] + [t for g in graphs(m.graph) for s in g.sparse_initializer for t in (s.values, s.indices)]
    return pick(rng, found + [a.t for g in (*graphs(m.graph), *m.functions) for n in g.node for a in n.attribute if a.type == AttributeProto.TENSOR])


def _set(rng: Rng, a: AttributeProto, kind: int) -> None:
    """A new value of ``kind``."""
    name, ref = a.name, a.ref_attr_name
    if kind in (AttributeProto.GRAPH, AttributeProto.TENSOR) and a.type == kind:
        return
    a.Clear()
    a.name, a.ref_attr_name, a.type = name, ref, kind
    count = int(rng.integers(4))
    if kind == AttributeProto.INT:
        a.i = pick(rng, INTEGERS)
    elif kind == AttributeProto.FLOAT:
        a.f = pick(rng, FLOATS)
    elif kind == AttributeProto.STRING:
        a.s = pick(rng, TEXTS)
    elif kind == AttributeProto.INTS:
        a.ints.extend(pick(rng, INTEGERS) for _ in range(count))
    elif kind == AttributeProto.FLOATS:
        a.floats.extend(pick(rng, FLOATS) for _ in range(count))
    elif kind == AttributeProto.STRINGS:
        a.strings.extend(pick(rng, TEXTS) for _ in range(count))
    elif kind == AttributeProto.TENSOR:
        a.t.CopyFrom(onnx.numpy_helper.from_array(np.zeros(count, np.float32)))


def attribute_dropped(rng: Rng, m: ModelProto) -> None:
    found = _attribute(rng, m)
    if found:
        found[0].attribute.remove(found[1])


def attribute_changed(rng: Rng, m: ModelProto) -> None:
    found = _attribute(rng, m)
    if found:
        _set(rng, found[1], found[1].type)


def attribute_of_another_kind(rng: Rng, m: ModelProto) -> None:
    found = _attribute(rng, m)
    if found:
        _set(rng, found[1], pick(rng, KINDS))


def attribute_added(rng: Rng, m: ModelProto) -> None:
    n = _node(rng, m)
    if n is None:
        return
    try:
        known = sorted(onnx.defs.get_schema(n.op_type, n.domain).attributes.items())
    except onnx.defs.SchemaError:
        return
    free = [(k, s) for k, s in known if k not in {a.name for a in n.attribute}]
    if free:
        name, schema = pick(rng, free)
        _set(rng, n.attribute.add(name=name), int(schema.type.value))


def one_integer(rng: Rng, m: ModelProto) -> None:
    """One element of a list of integers: the likeliest slip of all."""
    found = [a for g in (*graphs(m.graph), *m.functions) for n in g.node for a in n.attribute if a.ints]
    if found:
        a = pick(rng, found)
        a.ints[int(rng.integers(len(a.ints)))] = pick(rng, INTEGERS)


def input_dropped(rng: Rng, m: ModelProto) -> None:
    n = _node(rng, m)
    if n is not None and n.input:
        del n.input[int(rng.integers(len(n.input)))]


def input_blank(rng: Rng, m: ModelProto) -> None:
    n = _node(rng, m)
    if n is not None and n.input:
        n.input[int(rng.integers(len(n.input)))] = ""


def input_replaced(rng: Rng, m: ModelProto) -> None:
    g = _owner(rng, m)
    n = pick(rng, g.node)
    if n is not None and n.input:
        names = [o for k in g.node for o in k.output] + [t.name for t in m.graph.initializer] + [i.name for i in m.graph.input] + ["nothing"]
        n.input[int(rng.integers(len(n.input)))] = pick(rng, names)


def input_added(rng: Rng, m: ModelProto) -> None:
    n = _node(rng, m)
    if n is not None:
        n.input.append(pick(rng, ["", *n.input, *(t.name for t in m.graph.initializer)]))


def outputs_changed(rng: Rng, m: ModelProto) -> None:
    n = _node(rng, m)
    if n is None or not n.output:
        return
    k, how = int(rng.integers(len(n.output))), int(rng.integers(4))
    if how == 0:
        del n.output[k]
    elif how == 1:
        n.output[k] = ""
    elif how == 2:
        del n.output[:]
    else:
        n.output.append("" if rng.integers(2) else "more")


def node_moved(rng: Rng, m: ModelProto) -> None:
    g = _owner(rng, m)
    if not g.node:
        return
    k, how = int(rng.integers(len(g.node))), int(rng.integers(3))
    copy = NodeProto()
    copy.CopyFrom(g.node[k])
    if how < 2:
        del g.node[k]
    if how:
        g.node.insert(int(rng.integers(len(g.node) + 1)), copy)


def operator_changed(rng: Rng, m: ModelProto) -> None:
    n = _node(rng, m)
    if n is not None:
        n.op_type = pick(rng, sorted({s.name for s in onnx.defs.get_all_schemas() if s.domain == ""}))
        if rng.integers(8) == 0:
            n.domain = pick(rng, ("", "com.microsoft", "ai.onnx.ml", "own"))


def dims_changed(rng: Rng, m: ModelProto) -> None:
    t = _tensor(rng, m)
    if t is None:
        return
    if t.dims and rng.integers(3):
        t.dims[int(rng.integers(len(t.dims)))] = pick(rng, INTEGERS)
    elif t.dims and rng.integers(2):
        del t.dims[-1]
    else:
        t.dims.extend([1] * int(rng.integers(1, 12)))


def element_type_changed(rng: Rng, m: ModelProto) -> None:
    t = _tensor(rng, m)
    if t is not None:
        t.data_type = pick(rng, ELEMENTS)


def data_changed(rng: Rng, m: ModelProto) -> None:
    """Other values of the same type and shape, or bytes more or less."""
    t = _tensor(rng, m)
    if t is None or t.data_location == TensorProto.EXTERNAL:
        return
    try:
        a = onnx.numpy_helper.to_array(t).copy()
    except (ValueError, TypeError):
        return
    how = int(rng.integers(4))
    if how == 0:
        t.raw_data = t.raw_data[: int(rng.integers(len(t.raw_data) + 1))] + bytes(int(rng.integers(3)))
        return
    if a.dtype.kind not in "iuf" or not a.size:
        return
    flat = a.reshape(-1)
    with np.errstate(all="ignore"):
        values = np.array([pick(rng, INTEGERS if a.dtype.kind in "iu" else FLOATS) for _ in range(flat.size)], object)
        if a.dtype.kind in "iu":
            values = np.array([int(v) & (2 ** (8 * a.itemsize) - 1) for v in values], f"u{a.itemsize}").view(f"i{a.itemsize}")
        where = slice(None) if how == 1 else int(rng.integers(flat.size))
        flat[where] = values.astype(a.dtype)[where]
    name = t.name
    t.CopyFrom(onnx.numpy_helper.from_array(a, name))


def made_external(rng: Rng, m: ModelProto) -> None:
    t = _tensor(rng, m)
    if t is None:
        return
    if t.data_location != TensorProto.EXTERNAL:
        t.data_location = TensorProto.EXTERNAL
        t.ClearField("raw_data")
        t.external_data.add(key="location", value=WEIGHTS_FILE)
    key = pick(rng, ("location", "offset", "length", "checksum"))
    value = pick(rng, ("abc", "", "1.5", "9" * 5000, "a\x00b", "-1", "0", "4", "../weights.bin", "/etc/passwd", ".", "x" * 300, WEIGHTS_FILE, str(2**64)))
    for e in [e for e in t.external_data if e.key == key]:
        t.external_data.remove(e)
    if rng.integers(6):
        t.external_data.add(key=key, value=value)


def interface_changed(rng: Rng, m: ModelProto) -> None:
    """A declared type of an input or output of some graph."""
    g = pick(rng, list(graphs(m.graph)))
    v = pick(rng, [*g.input, *g.output])
    if v is None:
        return
    t, how = v.type.tensor_type, int(rng.integers(7))
    if how == 0:
        t.elem_type = pick(rng, ELEMENTS)
    elif how == 1:
        t.ClearField("shape")
    elif how == 2 and t.shape.dim:
        t.shape.dim[int(rng.integers(len(t.shape.dim)))].dim_value = pick(rng, INTEGERS)
    elif how == 3 and t.shape.dim:
        t.shape.dim[int(rng.integers(len(t.shape.dim)))].dim_param = pick(rng, ("n", "n + 1", "", "-1", "1x", "\u202e", "a b"))
    elif how == 4 and t.shape.dim:
        del t.shape.dim[-1]
    elif how == 5:
        t.shape.dim.add().dim_value = int(rng.integers(1, 4))
    else:
        v.ClearField("type")


def interface_resized(rng: Rng, m: ModelProto) -> None:
    """An input or output of some graph more, less or renamed; an initializer that is an input as well."""
    g = pick(rng, list(graphs(m.graph)))
    side, how = (g.input if rng.integers(2) else g.output), int(rng.integers(4))
    if how == 0 and side:
        del side[int(rng.integers(len(side)))]
    elif how == 1 and side:
        side.add().CopyFrom(pick(rng, side))
    elif how == 2 and side:
        pick(rng, side).name = pick(rng, ("", "x", "other", "\x1b[2J"))
    elif g.initializer:
        t = pick(rng, g.initializer)
        g.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))


def opset_changed(rng: Rng, m: ModelProto) -> None:
    if m.opset_import and rng.integers(5):
        pick(rng, m.opset_import).version = int(rng.integers(1, onnx.defs.onnx_opset_version() + 2)) if rng.integers(4) else pick(rng, INTEGERS)
    elif m.opset_import:
        del m.opset_import[0]


def initializer_gone(rng: Rng, m: ModelProto) -> None:
    """Missing, or an input that the caller gives."""
    if m.graph.initializer:
        t = pick(rng, m.graph.initializer)
        if rng.integers(3):
            m.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, [d if 0 <= d < 2**31 else 1 for d in t.dims]))
        m.graph.initializer.remove(t)


Edit = Callable[[Rng, ModelProto], None]
ONNX_EDITS: tuple[Edit, ...] = (
    attribute_dropped, attribute_changed, attribute_changed, attribute_of_another_kind, attribute_added, one_integer, input_dropped, input_blank, input_replaced,
    input_added, outputs_changed, node_moved, operator_changed, dims_changed, element_type_changed, data_changed, data_changed, made_external, interface_changed,
    interface_resized, opset_changed, initializer_gone,
)  # fmt: skip


# ---------------------------------------------------------------- GGUF


def _gguf(edits: Sequence[int]) -> bytes:
    metadata, tensors = gguf_parts()
    for edit in edits:
        rng = np.random.default_rng(edit)
        how = int(rng.integers(8))
        key = pick(rng, sorted(metadata))
        k = int(rng.integers(len(tensors))) if tensors else 0
        if how == 0 and metadata:
            del metadata[key]
        elif how in (1, 2) and metadata:
            kind = metadata[key][0] if how == 1 else pick(rng, (0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12))
            if kind == 8:
                value: Any = pick(rng, TEXTS)
            elif kind == 9:
                value = pick(rng, ([], [b"a"], [b""] * 300, (), (1, -1, 7), (1,) * 16))
            elif kind in (6, 12):
                value = pick(rng, FLOATS) if kind == 12 else float(np.float32(pick(rng, FLOATS)))
            elif kind == 7:
                value = bool(rng.integers(2))
            else:
                bits, signed = {0: 8, 3: 16, 4: 32, 5: 32, 10: 64, 11: 64}[kind], kind in (3, 5, 11)
                value = int(pick(rng, INTEGERS)) & (2**bits - 1)
                value -= 2**bits if signed and value >> (bits - 1) else 0
            metadata[key] = kind, value
        elif how == 3 and tensors:
            del tensors[k]
        elif how == 4 and tensors:
            tensors.append((tensors[k][0] if rng.integers(2) else "blk.0.extra.weight", tensors[k][1]))
        elif how == 5 and tensors:
            name, (kind, shape, raw) = tensors[k]
            tensors[k] = name, (pick(rng, (0, 1, 2, 3, 8, 12, 28, 30, 34, 39, 200, 2**32 - 1)), shape, raw)
        elif how == 6 and tensors:
            name, (kind, shape, raw) = tensors[k]
            sizes = [pick(rng, (0, 1, 8, 16, 32, 64, 2**32, 2**63)) for _ in range(int(rng.integers(6)))]
            tensors[k] = name, (kind, tuple(sizes) if rng.integers(2) else shape[::-1], raw)
        elif tensors:
            name, (kind, shape, raw) = tensors[k]
            tensors[k] = name, (kind, shape, raw[: int(rng.integers(len(raw) + 1))] if rng.integers(2) else rng.bytes(len(raw)))
    return write_gguf(metadata, tensors)


# ---------------------------------------------------------------- bytes


def _bytes(data: bytes, edits: Sequence[int]) -> bytes:
    out = bytearray(data)
    for edit in edits:
        rng = np.random.default_rng(edit)
        at, how = int(rng.integers(len(out) + 1)), int(rng.integers(5))
        if how == 0 and at < len(out):
            out[at] ^= 1 << int(rng.integers(8))
        elif how == 1 and at < len(out):
            out[at] = pick(rng, (0, 1, 127, 128, 255))
        elif how == 2:
            del out[at : at + int(rng.integers(1, 16))]
        elif how == 3:
            out[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            start = int(rng.integers(len(out) + 1))
            out[at:at] = out[start : start + int(rng.integers(1, 64))]
    return bytes(out)


# ---------------------------------------------------------------- mutants


def mutant(seed: int, number: int) -> tuple[str, str, list[int]]:
    """(base, kind of edits, edits) of mutant ``number``: ``kind`` is ``structure`` or ``bytes``; a base with ``.gguf`` is a GGUF file."""
    rng = np.random.default_rng([seed, number])
    family = rng.integers(20)
    base = "llama.gguf" if family == 0 else pick(rng, list(MODELS)) if family < 14 else f"suite/{rng.integers(1 << 30)}"
    kind = "bytes" if rng.integers(4) == 0 else "structure"
    return base, kind, [int(e) for e in rng.integers(1 << 31, size=rng.integers(1, 4))]


def base_bytes(base: str) -> bytes:
    if base.endswith(".gguf"):
        return write_gguf(*gguf_parts())
    if base.startswith("suite/"):
        models = suite_models()
        return models[int(base[6:]) % len(models)][1]
    return MODELS[base]().SerializeToString(deterministic=True)


def apply(base: str, kind: str, edits: Sequence[int]) -> tuple[bytes, list[str]]:
    """The mutant's file and what was done to it."""
    if kind == "bytes":
        return _bytes(base_bytes(base), edits), ["bytes"] * len(edits)
    if base.endswith(".gguf"):
        return _gguf(edits), ["gguf"] * len(edits)
    m = ModelProto.FromString(base_bytes(base))
    done = []
    for edit in edits:
        rng = np.random.default_rng(edit)
        change = pick(rng, ONNX_EDITS)
        done.append(change.__name__)
        change(rng, m)
    return m.SerializeToString(), done
