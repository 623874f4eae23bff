"""ONNX decoders (with past and present, or without) as the function that :class:`luthier.llm.model.LanguageModel` calls.

Of the export's inputs, those that follow from the tokens and their number are computed in the graph: ``input_ids`` from ``tokens`` i64 [S],
``attention_mask`` (all ones) and ``position_ids`` from S and P, the number of earlier tokens, which is the extent of the input ``past`` u8 [P]. Then

* ``Concat(past_key_values.N.key, rows)`` on the axis of the positions becomes rows appended in place to a cache ``cache.N`` of fixed
  capacity and a read of its first P + S positions (``luthier::AppendToCache``, ``luthier::FilledCache``): nothing is copied. Where one past
  is used in another way, all stay inputs and outputs, and the caller feeds each ``present`` back;
* only the row ``last`` of the final hidden state is multiplied with the output matrix.

Names: those of Hugging Face's Optimum (``past_key_values.N.key`` -> ``present.N.key``) and onnxruntime's (``past_key_N``, ``past_N`` of rank 5).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from luthier.errors import InvalidModel
from luthier.importers.onnx.importer import import_onnx
from luthier.importers.onnx.tensors import ELEMENT
from luthier.ir.builder import Names, infer_node, make_node
from luthier.ir.dtypes import f32, i64
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.passes.graph.canonicalize import canonicalize
from luthier.passes.graph.eliminate_dead import eliminate_dead
from luthier.passes.graph.legalize_operators import legalize_operators
from luthier.passes.graph.materialize_contents import materialize_contents

__all__ = ["Decoder", "decoder_graph"]

_TOKENS = ("input_ids", "decoder_input_ids", "tokens")
_MASK, _POSITIONS, _BRANCH = ("attention_mask", "decoder_attention_mask"), ("position_ids",), ("use_cache_branch",)
# what lies between the final hidden state and the logits: rows do not meet in any of it
_ROWWISE = frozenset({"Cast", "Identity", "Mul", "Div", "Add", "Tanh", "MatMul", "com.microsoft::MatMulNBits"})


@dataclass(slots=True)
class Decoder:
    """``by``: how a call learns of the earlier tokens: ``past`` (the extent of that input; caches in place), ``present`` (outputs are fed
    back), ``whole`` (the export has no past: every call gets the whole sequence). ``fed``: (past, its present, axis of the positions) of
    the second way; ``given``: inputs that the caller has to supply."""

    graph: Graph
    by: str
    vocabulary: int
    state: list[str] = field(default_factory=list)
    fed: list[tuple[str, str, int]] = field(default_factory=list)
    given: list[str] = field(default_factory=list)


def _past_names(inputs: Sequence[str], outputs: Sequence[str], path: str) -> dict[str, str]:
    """{past input: present output}. Raises InvalidModel."""
    pasts = [n for n in inputs if re.match(r"past[._]|past_key_values", n) and n != "past_sequence_length"]
    presents = [n for n in outputs if n.startswith("present")]
    out = {}
    for n in pasts:
        m = next((c for c in (n.replace("past_key_values", "present"), n.replace("past", "present")) if c in presents), None)
        if m is None and len(pasts) == len(presents):
            m = presents[pasts.index(n)]
        if m is None:
            hint = "export the decoder of a decoder-only model; keys and values of an encoder cannot be carried" if "encoder" in n else "present.N.key is expected for past_key_values.N.key"
            raise InvalidModel(f"{path}: no output belongs to the input {n!r}", hint=hint)
        out[n] = m
    return out


class _Edit:
    """Changes the model before it is imported; notes what it found."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.past: dict[str, str] = {}
        self.axes: dict[str, int] = {}
        self.given: list[str] = []
        self.tokens, self.marker = "tokens", "past"

    def __call__(self, model: ModelProto) -> None:
        g = model.graph
        fixed = {t.name for t in g.initializer}
        inputs = {i.name: i for i in g.input if i.name not in fixed}
        tokens = next((n for n in _TOKENS if n in inputs), None)
        outputs = [o.name for o in g.output]
        if tokens is None or "logits" not in outputs:
            raise InvalidModel(
                f"{self.path} is no language model: it has the inputs {', '.join(inputs)} and the outputs {', '.join(outputs)}",
                hint="an export with input_ids and logits is expected, past_key_values.N.key and present.N.key beside them",
            )
        self.past = _past_names(list(inputs), outputs, self.path)
        taken = {v for n in g.node for v in (*n.input, *n.output)} | set(inputs) | fixed
        self.tokens, self.marker = (_free(n, taken) for n in ("tokens", "past"))
        s, p = "tokens.length", "past.length"
        new = [helper.make_tensor_value_info(self.tokens, TensorProto.INT64, [s])]
        if self.past:
            new.append(helper.make_tensor_value_info(self.marker, TensorProto.UINT8, [p]))
        nodes: list[Any] = []
        axes = 0

        def ints(*values: int) -> str:
            nonlocal axes
            axes += 1
            name = _free(f"luthier.ints.{axes}", taken)
            g.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
            return name

        def add(op: str, ins: list[str], out: str = "", **attrs: Any) -> str:
            out = out or _free(f"luthier.{op.lower()}.{len(nodes)}", taken)
            nodes.append(helper.make_node(op, ins, [out], **attrs))
            return out

        def scalar(vector: str) -> str:
            return add("Reshape", [vector, ints()])

        length = add("Shape", [self.tokens])
        before = add("Shape", [self.marker]) if self.past else ints(0)
        total = add("Add", [before, length])
        # typed initial ValueInfo of what stays an input
        keep = []
        for name, i in inputs.items():
            kind = i.type.tensor_type.elem_type
            dims = i.type.tensor_type.shape.dim
            if name == tokens:
                add("Cast", [add("Reshape", [self.tokens, ints(1, -1)])], name, to=kind)
            elif name in _MASK:
                ones = add("Expand", [ints(1), add("Concat", [ints(1), total], axis=0)])
                add("Cast", [ones], name, to=kind)
            elif name in _POSITIONS:
                steps = add("Range", [scalar(before), scalar(total), scalar(ints(1))])
                add("Cast", [add("Reshape", [steps, ints(1, -1)])], name, to=kind)
            elif name in _BRANCH:
                add("Cast", [ints(*[1] * (len(dims) and 1))], name, to=kind)
            elif name in self.past:
                if len(dims) not in (4, 5):
                    raise InvalidModel(f"{self.path}: {name} has rank {len(dims)}; keys and values are [batch, heads, positions, head]")
                self.axes[name] = axis = len(dims) - 2
                for k, d in enumerate(dims):
                    if k == axis:
                        d.Clear()
                        d.dim_param = p
                    elif k == axis - 2:
                        d.Clear()
                        d.dim_value = 1
                    elif not d.HasField("dim_value"):
                        raise InvalidModel(f"{self.path}: axis {k} of {name} has no fixed extent", hint="heads and head size must be numbers in the model's inputs")
                keep.append(i)
            else:
                if dims and not dims[0].HasField("dim_value"):
                    dims[0].Clear()
                    dims[0].dim_value = 1
                self.given.append(name)
                keep.append(i)
        kept: list[ValueInfoProto] = []
        for i in (*(i for i in g.input if i.name in fixed), *keep, *new):
            v = ValueInfoProto()
            v.CopyFrom(i)
            kept.append(v)
        old = list(g.node)
        copies = []
        for n in (*nodes, *old):
            c = type(n)()
            c.CopyFrom(n)
            copies.append(c)
        del g.input[:], g.node[:]
        g.input.extend(kept)
        g.node.extend(copies)


def _free(name: str, taken: set[str]) -> str:
    k, out = 0, name
    while out in taken:
        k += 1
        out = f"{name}.{k}"
    taken.add(out)
    return out


def decoder_graph(path: str | Path, capacity: int, all_logits: bool = False) -> Decoder:
    """An ONNX export as a graph with the inputs [cache.N ..,] ``tokens``, [``past``,] [``last``,] ... and the output ``logits`` f32 [1 (or S),
    vocabulary]. Raises InvalidModel when it is no decoder, and the importer's errors."""
    edit = _Edit(str(path))
    graph = import_onnx(path, None, edit)
    for p in (legalize_operators, materialize_contents, eliminate_dead, canonicalize):
        p(graph)
    names = Names(graph)
    results = dict(graph.results())
    ins = {v.name: v for v in graph.inputs}
    tokens = ins[edit.tokens]
    logits = results["logits"]
    if logits.rank != 3 or logits.shape[2].op != "const" or not logits.dtype.is_float:
        raise InvalidModel(f"{path}: logits are {logits.type}, expected floats [batch, tokens, vocabulary]")
    inputs = [tokens, *(ins[n] for n in edit.given)]
    if not all_logits:
        last = Value(names.fresh("last"), TensorType.of(i64, [1]))
        inputs.insert(1, last)
        logits = _last_row(graph, logits, last, names)
    logits = _float_rows(graph, logits, names)
    out = Decoder(graph, "whole", int(logits.shape[1].attr), given=edit.given)
    graph.outputs, graph.output_names = [logits], ("logits",)
    if edit.past:
        state = _in_place(graph, [(ins[a], results[b], edit.axes[a]) for a, b in edit.past.items()], ins[edit.marker], capacity, names)
        if state is not None:
            out.by, out.state = "past", [v.name for v in state]
            inputs = [*state, *inputs, ins[edit.marker]]
        else:
            out.by, out.fed = "present", [(a, b, edit.axes[a]) for a, b in edit.past.items()]
            inputs += [ins[a] for a in edit.past] + [ins[edit.marker]]
            graph.outputs += [results[b] for b in edit.past.values()]
            graph.output_names = ("logits", *edit.past.values())
    graph.inputs = inputs
    eliminate_dead(graph)
    return out


def _in_place(graph: Graph, pairs: list[tuple[Value, Value, int]], past: Value, capacity: int, names: Names) -> list[Value] | None:
    """Every Concat(past, rows) to a cache in place; the caches, or None (and nothing changed) where one is used in another way."""
    makers, users = graph.producers(), graph.users()
    found: list[tuple[Value, Node]] = []
    for old, present, axis in pairs:
        n = makers.get(present)
        if n is None or n.op != "Concat" or len(n.inputs) != 2 or n.inputs[0] is not old or n.inputs[1] is None or axis != 2:
            return None
        if int(n.attrs["axis"]) % old.rank != axis or users[old] != [n]:
            return None
        found.append((old, n))
    state = []
    for k, (old, n) in enumerate(found):
        cache = Value(names.fresh(f"cache.{k}"), TensorType.of(old.dtype, [*old.shape[:2], capacity, old.shape[3]]))
        append = make_node("luthier::AppendToCache", [cache, n.inputs[1], past], names=names, name=names.fresh(f"{n.name}.append"), source=n.source)
        whole = infer_node(Node("luthier::FilledCache", (append.outputs[0], n.inputs[1], past), n.outputs, {}, n.name, n.source))
        at = graph.nodes.index(n)
        graph.nodes[at : at + 1] = [append, whole]
        state.append(cache)
    return state


def _last_row(graph: Graph, logits: Value, last: Value, names: Names) -> Value:
    """``logits`` of one row, taken from the earliest value of which rows become logits one by one."""
    makers, users = graph.producers(), graph.users()
    chain: list[Node] = []
    v = logits
    while True:
        n = makers.get(v)
        if n is None or n.op not in _ROWWISE or len(users.get(v, ())) != (1 if chain else 0):
            break
        x = n.inputs[0]
        if x is None or x.data is not None or any(w is not None and w.data is None for w in n.inputs[1:]):
            break
        if x.rank != 3 or n.op in ("Add", "Mul", "Div") and any(w is not None and w.data is not None and w.data.size != w.data.shape[-1:][0] for w in n.inputs[1:] if w is not None and w.rank):
            break
        chain.insert(0, n)
        v = x
    row = make_node("Gather", [v, last], {"axis": 1}, names=names, name="last_row")
    if not chain:
        graph.nodes.append(row)
        return row.outputs[0]
    graph.nodes.insert(graph.nodes.index(chain[0]), row)
    chain[0].inputs = (row.outputs[0], *chain[0].inputs[1:])
    for n in chain:
        infer_node(n)
    return logits


def _float_rows(graph: Graph, logits: Value, names: Names) -> Value:
    """[1, S, vocabulary] of any float to f32 [S, vocabulary]."""
    if logits.dtype is not f32:
        cast = make_node("Cast", [logits], {"to": next(c for c, d in ELEMENT.items() if d is f32)}, names=names, name="logits.f32")
        graph.nodes.append(cast)
        logits = cast.outputs[0]
    shape = Value.const(names.fresh("logits.shape"), np.array([-1, int(logits.shape[2].attr)], np.int64))
    flat = make_node("Reshape", [logits, shape], names=names, name="logits.rows")
    graph.nodes.append(flat)
    return flat.outputs[0]
