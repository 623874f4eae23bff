"""ONNX models (opsets 1 to the newest) to :class:`luthier.ir.graph.Graph`.

Nodes are brought to the newest operator form (:mod:`luthier.importers.onnx.upgrade`); operators without a registered Op are
replaced by their function body, of the model or of the ONNX standard; constant subexpressions are folded on the way, so
that shape arithmetic is known when types are inferred. ``onnx.checker`` and ``onnx.shape_inference`` are not used.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, ValueInfoProto

from luthier.importers.onnx import upgrade as onnx_upgrade
from luthier.importers.onnx import wire as onnx_wire
from luthier.importers.onnx.control import Body, close, import_if, import_loop
from luthier.importers.onnx.schema import check_bodies, check_node, check_opsets, check_texts
from luthier.importers.onnx.sequences import SEQUENCE_OPS, Any_, Form, Maybe, Steps, apply, form_of, type_proto
from luthier.importers.onnx.sequences import declared as declared_form
from luthier.importers.onnx.tensors import attribute_value, element_type, from_bytes, sparse_to_array, to_array
from luthier.ir.builder import Names, infer_node
from luthier.ir.dtypes import f32, u32
from luthier.ir.errors import InvalidModel, LuthierError, ShapeError, TypeMismatch, UnsupportedOperator
from luthier.ir.expr import Expr, as_expr, is_const, var
from luthier.ir.graph import Graph, Node, Structured, TensorType, Value
from luthier.ir.op import REGISTRY, lookup
from luthier.ir.ops.common import const_value
from luthier.ir.ops.control_flow import condition
from luthier.ir.ops.random_numbers import DECLARED
from luthier.ir.requirements import Requirement, collecting
from luthier.passes.graph.fold_constants import fold_node

Shapes = Mapping[str, Sequence[Any]]
Overridable = bool | Sequence[str] | None
OVERRIDABLE_BYTES = 1 << 16
_ANONYMOUS = re.compile(r"^(\?|unk__\?|-1|None|)$")


def import_onnx(
    model: Any, shapes: Shapes | None = None, edit: Callable[[ModelProto], None] | None = None, overridable: Overridable = None,
) -> Graph:
    """The graph of an ``onnx.ModelProto`` or of a file.

    ``shapes``: {input name: extents}; an integer pins a dimension (everywhere where its symbol occurs), None or -1 leaves it
    as the model declares it. ``overridable``: which initializers that the model lists among its inputs a call may replace; True all, None
    all when together they are no more than 64 KiB (larger ones are weights that an exporter listed). ``edit`` may change the model before it is read (a file's large weights are not in it). Raises InvalidModel, UnsupportedOperator, ShapeError or TypeMismatch."""
    folder: Path | None = None
    raws: dict[int, memoryview] = {}
    if not isinstance(model, ModelProto):
        path = os.fspath(model)
        folder = Path(path).resolve().parent
        model = ModelProto()
        try:
            small, raws = onnx_wire.split(path)
            model.ParseFromString(small)
        except OSError as e:
            raise InvalidModel(f"cannot read the model {path!r}: {e.strerror}") from None
        except Exception as e:  # ValueError, or google.protobuf's DecodeError, whichever protobuf is installed
            raise InvalidModel(f"{path!r} is no ONNX model: {e}") from None
        if not model.HasField("graph"):
            raise InvalidModel(f"{path!r} is no ONNX model: it holds no graph")
    if edit is not None:
        edit(model)
    graph = _Importer(model, folder, dict(shapes or {}), raws, overridable).run()
    onnx_wire.forget(raws)
    return graph


class _Scope:
    """Names visible in a graph or function: ONNX name to Value (None: an optional input that was left out)."""

    def __init__(self, parent: _Scope | None, opsets: Mapping[str, int], prefix: str, functions_above: tuple[str, ...] = ()) -> None:
        self.values: dict[str, Any_ | None] = {}
        self.parent, self.opsets, self.prefix, self.functions_above = parent, opsets, prefix, functions_above
        self.attrs: dict[str, AttributeProto] | None = parent.attrs if parent is not None else None

    def find(self, name: str) -> Any_ | None:
        s: _Scope | None = self
        while s is not None:
            if name in s.values:
                return s.values[name]
            s = s.parent
        raise KeyError(name)

    def constant(self, name: str) -> Value:
        """An initializer of this graph."""
        v = self.values[name]
        assert isinstance(v, Value)
        return v


def constant_data(v: Value | None) -> Any:
    """The array of a value that is known to be a constant."""
    assert v is not None and v.data is not None
    return v.data


def in_order(protos: Iterable[NodeProto]) -> list[NodeProto]:
    """The nodes, each behind those whose outputs it reads; the specification asks for that, but writers forget it. Nodes in a circle stay
    where they are."""
    nodes = list(protos)
    makers = {o: k for k, n in enumerate(nodes) for o in n.output if o}
    before = [{makers[i] for i in _reads(n) if i in makers} for n in nodes]
    if all(j < k for k, js in enumerate(before) for j in js):
        return nodes
    try:
        return [nodes[k] for k in TopologicalSorter(dict(enumerate(before))).static_order()]
    except CycleError:
        return nodes


def _reads(n: NodeProto) -> Iterator[str]:
    """Names that a node or a subgraph of it reads."""
    yield from n.input
    for a in n.attribute:
        for g in (a.g, *a.graphs):
            for m in g.node:
                yield from _reads(m)
            yield from (o.name for o in g.output)


def _label(n: NodeProto) -> str:
    """What messages call a node: its name, or that of its first output."""
    return n.name or next((o for o in n.output if o), n.op_type)


def _domain(d: str) -> str:
    return "" if d == "ai.onnx" else d


def _opsets(imports: Iterable[Any]) -> dict[str, int]:
    return {_domain(o.domain): int(o.version) for o in imports}


MAX_NODES = 200_000  # of a graph whose functions are expanded


class _Importer:
    def __init__(
        self, model: ModelProto, folder: Path | None, shapes: dict[str, Sequence[Any]], raws: dict[int, memoryview], overridable: Overridable = None,
    ) -> None:
        self.overridable = overridable
        self.model, self.folder, self.shapes, self.raws = model, folder, shapes, raws
        self.names = Names()
        self.nodes: list[Node] = []
        self.symbols: dict[str, Expr] = {}
        self.functions = {(_domain(f.domain), f.name, getattr(f, "overload", "")): f for f in model.functions}
        self.serial = 0
        self.requirements: list[Requirement] = []
        self.integral: dict[Value, Value] = {}  # floats that are casts of known integers
        self.random_key: Value | None = None  # what nodes without a seed draw from
        self.streams = 0  # how many of them there are
        self.rounds: list[Value | None] = []  # numbers of the rounds of the loops around; None: a Scan counts none

    # ---------------------------------------------------------------- graphs

    def run(self) -> Graph:
        lookup("")  # loads every operator family
        g = self.model.graph
        check_texts(*(t for f in self.model.functions for t in (f.name, f.domain, *f.input, *f.output, *f.attribute)))
        opsets = _opsets(self.model.opset_import) or {"": 1}
        newest = onnx.defs.onnx_opset_version()
        check_opsets([*opsets.items(), *((d, v) for f in self.model.functions for d, v in _opsets(f.opset_import).items())])
        if opsets.get("", 1) > newest:
            raise UnsupportedOperator(f"the model uses opset {opsets['']}, this version knows opsets up to {newest}")
        if self.functions and (total := self._expanded(g.node, {})) > MAX_NODES:
            raise InvalidModel(f"functions that call functions expand to {total} nodes, {MAX_NODES} at most are compiled", hint="export the model without nested functions")
        scope = _Scope(None, opsets, "")
        constants = self._initializers(g, scope)
        twice = sorted(n for n, count in Counter(i.name for i in g.input).items() if count > 1)
        if twice:
            raise InvalidModel(f"inputs of one name: {twice}")
        unknown = set(self.shapes) - {i.name for i in g.input}
        if unknown:
            raise ShapeError(f"shapes names no input of the model: {sorted(unknown)}; inputs are {[i.name for i in g.input if i.name not in constants]}")
        listed = {i.name for i in g.input} & constants
        replaceable = self._overridable(listed, scope)
        declared = [i for i in g.input if i.name not in constants] + [i for i in g.input if i.name in replaceable]
        pins = self._pins(declared)
        inputs = []
        structures: dict[str, Structured] = {}
        results: dict[str, Structured] = {}
        defaults: dict[str, Any] = {}
        for i in declared:
            try:
                form = declared_form(i.type, f"input {i.name!r}")
                if i.name in replaceable:  # the name is that of the constant, which nobody reads now
                    default = scope.constant(i.name)
                    v, values = self._input(i.name, self._default_type(i, pins, default), i.name)
                    defaults[i.name] = constant_data(default)
                else:
                    v, values = self._input(i.name, self._input_type(i, pins) if form is None else form)
            except LuthierError as e:
                user = next((n for n in g.node if i.name in n.input), None)
                raise e.at(node=i.name if user is None else _label(user), op="graph input" if user is None else _qualified(user)) from None
            scope.values[i.name] = v
            inputs += values
            if form is not None:
                structures[i.name] = Structured(tuple(v.name for v in values), form.tensor)
        self.import_nodes(g.node, scope)
        outputs, names = [], []
        for o, r in zip(g.output, self._outputs(g, scope), strict=True):
            if isinstance(r, Value):
                outputs.append(r)
                names.append(o.name)
                continue
            wanted = declared_form(o.type, f"output {o.name!r}") if o.type.WhichOneof("value") else form_of(r)
            tensor = wanted is None or wanted.tensor
            form = Form(r.dtype, form_of(r).dims, wanted is not None and wanted.optional, tensor)
            steps = self.steps(scope, NodeProto(name=o.name, output=[o.name]))
            outputs += steps.flatten(r, form)
            ports = (o.name, f"{o.name}.shapes", *([f"{o.name}.has"] if form.optional else []))
            names += ports
            results[o.name] = Structured(ports, form.tensor)
        if self.random_key is not None:
            inputs.append(self.random_key)
            defaults[self.random_key.name] = None
        return Graph(g.name or "model", inputs, outputs, self.nodes, {}, tuple(names), self.requirements, defaults, structures, results)

    def _overridable(self, listed: set[str], scope: _Scope) -> set[str]:
        """Initializers among the graph's inputs that calls may replace. Files of IR versions before 4 list all of them; they are constants."""
        asked = self.overridable
        if asked is None:
            size = sum(constant_data(scope.constant(n)).nbytes for n in listed)
            return listed if self.model.ir_version >= 4 and size <= OVERRIDABLE_BYTES else set()
        if isinstance(asked, bool):
            return listed if asked else set()
        unknown = sorted(set(asked) - listed)
        if unknown:
            raise InvalidModel(f"overridable names {unknown}, which the model does not list both as initializers and as inputs", hint=f"it lists {sorted(listed)}")
        return set(asked)

    def _default_type(self, i: ValueInfoProto, pins: Mapping[str, int], default: Value | None) -> TensorType:
        """The declared type of an input with an initializer, which must be one of that type."""
        assert default is not None
        t = self._input_type(i, pins) if i.type.tensor_type.HasField("shape") else default.type
        fits = t.rank == default.rank and all(a.op != "const" or a is b for a, b in zip(t.shape, default.shape, strict=False))
        if t.dtype is not default.dtype or not fits:
            raise InvalidModel(f"input {i.name!r} is declared as {t}, its initializer is {default.type}")
        return t

    def _draws(self, op: str, inputs: Sequence[Value | None], attrs: dict[str, Any]) -> Sequence[Value | None]:
        """The inputs of a node of random numbers with what it draws from: the key of the call unless it has a seed, and the numbers of
        the rounds of the loops around it."""
        first = DECLARED[op]
        if op == "Dropout" and (len(inputs) < 3 or inputs[2] is None or const_value(inputs[2]) == 0):
            return inputs
        if None in self.rounds:
            raise UnsupportedOperator("random numbers inside Scan are not supported", hint="write the loop with Loop")
        ins = [*inputs, *[None] * (first - len(inputs))]
        if attrs.get("seed") is None:
            if self.random_key is None:
                self.random_key = Value(self.names.fresh("luthier.random"), TensorType.of(u32, (2,)))
            ins.append(self.random_key)
            attrs["stream"] = self.streams
            self.streams += 1
        return [*ins, *self.rounds]

    def _input(self, name: str, t: TensorType | Form, own: str = "") -> tuple[Any_, list[Value]]:
        """An input, and the values that hold it. ``own``: the name that a tensor has for certain."""
        if isinstance(t, TensorType):
            v = Value(own or self.names.fresh(name), t)
            return v, [v]
        values = [Value(self.names.fresh(k), u) for k, u in t.types(name, lambda label: var(self.names.fresh(label), lo=0))]
        return t.build(values), values

    def _outputs(self, g: GraphProto, scope: _Scope) -> list[Any_]:
        out = []
        for o in g.output:
            try:
                v = scope.find(o.name)
            except KeyError:
                raise InvalidModel(f"graph {g.name!r} declares the output {o.name!r}, which no node produces") from None
            if v is None:
                raise InvalidModel(f"output {o.name!r} of graph {g.name!r} is an optional value that was left out")
            out.append(v)
        return out

    def _initializers(self, g: GraphProto, scope: _Scope) -> set[str]:
        check_texts(g.name, *(v.name for side in (g.input, g.output, g.initializer) for v in side), *(s.values.name for s in g.sparse_initializer))
        raws = self.raws if scope.parent is None else {}
        for k, t in enumerate(g.initializer):
            data = from_bytes(raws[k], t) if k in raws else to_array(t, self.folder)
            scope.values[t.name] = self._constant(data, t.name)
        for s in g.sparse_initializer:
            scope.values[s.values.name] = self._constant(sparse_to_array(s, self.folder), s.values.name)
        return set(scope.values)

    def open_body(self, g: GraphProto, outer: _Scope, inputs: Sequence[TensorType | Form | None] = (), op: str = "") -> Body:
        """A branch or loop body of ``op``; ``inputs``: their types where the operator knows better than the declaration."""
        saved, self.nodes = self.nodes, []
        assumed, self.requirements = self.requirements, []
        scope = self._inner(g, outer)
        ins: list[Value] = []
        try:
            for k, i in enumerate(g.input):
                known = inputs[k] if k < len(inputs) else None
                v, values = self._input(scope.prefix + i.name, known if known is not None else self._input_type(i, {}))
                scope.values[i.name] = v
                ins += values
            counted: dict[str, list[Value | None]] = {"Loop": [*ins[:1]], "Scan": [None]}
            with self._counted(counted.get(op, [])):
                self.import_nodes(g.node, scope)
            return Body(scope.prefix.rstrip("/"), ins, self._outputs(g, scope), self.nodes, self.requirements)
        finally:
            self.nodes, self.requirements = saved, assumed

    def inline(self, g: GraphProto, outer: _Scope, inputs: Sequence[Any_] = ()) -> list[Any_]:
        """What a branch, or a round of a Loop, gives, its nodes among those of the graph around it."""
        inner = self._inner(g, outer)
        inner.values.update(zip((i.name for i in g.input), inputs, strict=False))
        with self._counted(list(inputs[:1])):  # type: ignore[arg-type]
            self.import_nodes(g.node, inner)
        return self._outputs(g, inner)

    @contextmanager
    def _counted(self, rounds: list[Value | None]) -> Iterator[None]:
        """Random numbers that are drawn meanwhile differ from round to round."""
        self.rounds += rounds
        try:
            yield
        finally:
            del self.rounds[len(self.rounds) - len(rounds) :]

    def _inner(self, g: GraphProto, outer: _Scope) -> _Scope:
        self.serial += 1
        scope = _Scope(outer, outer.opsets, f"{outer.prefix}{g.name or 'body'}.{self.serial}/")
        self._initializers(g, scope)
        return scope

    def steps(self, scope: _Scope, n: NodeProto) -> Steps:
        return Steps(self._emitter(scope, n), lambda a: self._constant(a, scope.prefix + "const"))

    # ---------------------------------------------------------------- inputs

    def _dim_label(self, d: Any) -> str | None:
        check_texts(d.dim_param)
        return d.dim_param if d.HasField("dim_param") and not _ANONYMOUS.match(d.dim_param) else None

    def _pins(self, declared: list[ValueInfoProto]) -> dict[str, int]:
        """{dimension name: extent} from ``shapes``. Raises ShapeError on contradictions."""
        pins: dict[str, int] = {}
        for i in declared:
            want = self.shapes.get(i.name)
            if want is None:
                continue
            dims = list(i.type.tensor_type.shape.dim)
            if i.type.tensor_type.HasField("shape") and len(want) != len(dims):
                raise ShapeError(f"input {i.name!r} has rank {len(dims)}, shapes gives {list(want)}")
            for d, w in zip(dims, want, strict=False):
                label = self._dim_label(d)
                if w is None or (isinstance(w, int) and w < 0) or isinstance(w, str):
                    continue
                if d.HasField("dim_value") and d.dim_value >= 0 and d.dim_value != w:
                    raise ShapeError(f"input {i.name!r} declares {d.dim_value} where shapes gives {w}", shapes={i.name: tuple(want)})
                if label is not None and pins.setdefault(label, int(w)) != int(w):
                    raise ShapeError(f"dimension {label!r} is pinned to {pins[label]} and to {w}", hint="give it one extent")
        return pins

    def _input_type(self, i: ValueInfoProto, pins: Mapping[str, int]) -> TensorType:
        kind = i.type.WhichOneof("value")
        if kind != "tensor_type":
            raise UnsupportedOperator(f"input {i.name!r} is a {(kind or 'untyped value').removesuffix('_type')}; only tensors are supported here")
        t = i.type.tensor_type
        dtype = element_type(t.elem_type, f"input {i.name!r}")
        if dtype.kind == "s":
            raise UnsupportedOperator(f"input {i.name!r} holds strings; no target computes with them", hint="tokenise before the model")
        want = self.shapes.get(i.name)
        if not t.HasField("shape"):
            if want is None:
                raise ShapeError(f"input {i.name!r} declares no rank", hint=f"give it with shapes={{{i.name!r}: (...)}}")
            return TensorType(dtype, tuple(self._dim(i.name, k, None, w, pins) for k, w in enumerate(want)))
        dims = list(t.shape.dim)
        if math.prod(d.dim_value for d in dims if d.dim_value > 0) >= 1 << 48:
            raise ShapeError(f"input {i.name!r} is declared with more elements than any memory holds", shapes={i.name: tuple(d.dim_value for d in dims)})
        return TensorType(dtype, tuple(self._dim(i.name, k, d, None if want is None else want[k], pins) for k, d in enumerate(dims)))

    def _dim(self, name: str, axis: int, d: Any, want: Any, pins: Mapping[str, int]) -> Expr:
        if d is not None and d.HasField("dim_value") and d.dim_value >= 0:
            return as_expr(int(d.dim_value))
        label = None if d is None else self._dim_label(d)
        if label is not None and label in pins:
            return as_expr(pins[label])
        if isinstance(want, int) and want >= 0:
            return as_expr(want)
        if isinstance(want, str):
            label = want
        return self._symbol(label or f"{name}.{axis}")

    def _symbol(self, label: str) -> Expr:
        s = self.symbols.get(label)
        if s is None:
            base = re.sub(r"[^\w.]", "_", label)
            s = self.symbols[label] = var(self.names.fresh(base if not base[:1].isdigit() else f"d{base}"))
        return s

    # ---------------------------------------------------------------- nodes

    def _constant(self, data: Any, name: str) -> Value:
        data = np.asarray(data)
        try:
            return Value.const(self.names.fresh(name or "const"), data)
        except TypeError as e:
            raise UnsupportedOperator(f"constant {name!r}: {e}") from None

    def import_nodes(self, protos: Iterable[NodeProto], scope: _Scope) -> None:
        for n in in_order(protos):
            check_texts(n.name, n.op_type, n.domain, *n.input, *n.output, *(t for a in n.attribute for t in (a.name, a.ref_attr_name)))
            try:
                self._node(n, scope)
            except LuthierError as e:
                raise e.at(node=scope.prefix + _label(n), op=_qualified(n)) from None

    def _node(self, n: NodeProto, scope: _Scope) -> None:
        domain = _domain(n.domain)
        if n.op_type == "Constant" and domain == "":
            check_node(n, domain, scope.opsets.get(domain, 1), (), self._given(n, scope))
            scope.values[n.output[0]] = self._constant(self._constant_data(n, scope), scope.prefix + n.output[0])
            return
        given: list[Any_ | None] = []
        for name in n.input:
            if not name:
                given.append(None)
                continue
            try:
                given.append(scope.find(name))
            except KeyError:
                raise InvalidModel(f"input {name!r} is produced by no earlier node") from None
        while given and given[-1] is None:
            given.pop()
        for v in given:
            if v is not None and v.dtype.kind == "s":
                raise UnsupportedOperator("strings are not supported: no target computes with them")
        least = check_node(n, domain, scope.opsets.get(domain, 1), given, self._given(n, scope))
        if self._expand_function(n, given, scope):
            return
        attrs, graphs = self._attributes(n, scope)
        op = _qualified(n)
        check_bodies(n, len(given), graphs, attrs, scope.opsets.get(domain, 1))
        if op in SEQUENCE_OPS:
            scope.values[n.output[0]] = apply(op, self.steps(scope, n), given, attrs)
            return
        if op == "Identity" and given and not isinstance(given[0], (Value, type(None))):
            scope.values[n.output[0]] = given[0]
            return
        if op == "Loop" and "body" in graphs:
            scope.values.update((o, v) for o, v in zip(n.output, import_loop(self, n, graphs["body"], given, scope), strict=False) if o)
            return
        inputs = [self._as_tensor(v, op, scope, n) for v in given]
        if op == "If" and {"then_branch", "else_branch"} <= graphs.keys() and inputs and inputs[0] is not None:
            self._if(n, inputs[0], graphs, scope)
            return
        for key, proto in graphs.items():
            body = self.open_body(proto, scope, _body_types(op, inputs, attrs), op)
            attrs[key] = close(body, [self._as_tensor(v, op, scope, n) for v in body.results])  # type: ignore[misc]
        outs = list(n.output)
        while outs and not outs[-1]:
            outs.pop()
        outs += [""] * (least - len(outs))
        if graphs:  # one for every result of the bodies, used or not
            outs += [""] * (min(len(attrs[k].outputs) for k in graphs) - int(op == "Loop") - len(outs))
        old = onnx_upgrade.Old(
            op, inputs, attrs, len(outs), scope.opsets.get(_domain(n.domain), 1), self._emitter(scope, n), lambda a: self._constant(a, scope.prefix + "const"),
            scope.prefix + (n.name or outs[0]), self.integral,
        )
        values = onnx_upgrade.apply(old) if _domain(n.domain) == "" else None
        if values is None:
            values = self.emit_node(old.op, old.inputs, old.attrs, [scope.prefix + o if o else "" for o in outs[: old.outputs]], scope.prefix + n.name, n)
        for o, v in zip(outs, values, strict=False):
            if o:
                scope.values[o] = v

    def _as_tensor(self, v: Any_ | None, op: str, scope: _Scope, n: NodeProto) -> Value | None:
        """An operand of an operator on tensors: what an optional holds is one, sequences are refused."""
        if v is None or isinstance(v, Value):
            return v
        if not (isinstance(v, Maybe) and v.tensor):
            raise UnsupportedOperator(f"{op} takes tensors here, the model gives it {form_of(v)}")
        steps = self.steps(scope, n)
        out = steps.checked(steps.element(v))
        assert isinstance(out, Value)
        return out

    def _if(self, n: NodeProto, cond: Value, graphs: Mapping[str, GraphProto], scope: _Scope) -> None:
        if _known(cond) is not None:
            self._inline_branch(n, graphs["then_branch" if _known(cond) else "else_branch"], scope)
            return
        bodies: dict[str, Body] = {}
        misfits: dict[str, LuthierError] = {}
        for key in ("then_branch", "else_branch"):
            try:
                bodies[key] = self.open_body(graphs[key], scope)
            except (ShapeError, TypeMismatch) as e:
                if misfits:
                    raise
                misfits[key] = e
        if misfits:
            taken = "else_branch" if "then_branch" in misfits else "then_branch"
            self._assume(n, graphs[taken], (condition(cond), as_expr(int(taken == "then_branch"))), scope)
            return
        then, other = bodies["then_branch"], bodies["else_branch"]
        equal = _equality(cond)
        if equal is not None and any(isinstance(a, Value) and isinstance(b, Value) and a.rank != b.rank for a, b in zip(then.results, other.results, strict=False)):
            self._assume(n, graphs["then_branch"], equal, scope)
            return
        scope.values.update((o, v) for o, v in zip(n.output, import_if(self, n, cond, then, other, scope), strict=False) if o)

    def _emitter(self, scope: _Scope, n: NodeProto) -> Any:
        def emit(op: str, inputs: list[Value | None], attrs: dict[str, Any], outputs: int = 1) -> tuple[Value, ...]:
            base = scope.prefix + (n.output[0] if n.output else n.name)
            return self.emit_node(op, inputs, attrs, [f"{base}.{op.lower()}" for _ in range(outputs)], base, n)

        return emit

    def emit_node(self, op: str, inputs: Sequence[Value | None], attrs: dict[str, Any], outs: list[str], name: str, proto: NodeProto) -> tuple[Value, ...]:
        """Add a node (or the constants it folds to); its outputs."""
        if op in DECLARED:
            inputs = self._draws(op, inputs, attrs)
        values = tuple(Value(self.names.fresh(o or f"{name}.unused"), TensorType(f32, ())) for o in outs)
        node = Node(op, tuple(inputs), values, attrs, name or values[0].name, proto.name)
        while node.inputs and node.inputs[-1] is None:
            node.inputs = node.inputs[:-1]
        if lookup(op) is None:
            raise _unsupported(op)
        with collecting(f'node "{node.name}" ({op})') as assumed:
            infer_node(node)
        self.requirements += assumed
        if op == "Cast" and values[0].dtype.is_float and inputs[0] is not None and inputs[0].dtype.is_int:
            self.integral[values[0]] = inputs[0]
        folded = fold_node(node)
        if folded is not None:
            for v, a in zip(values, folded, strict=False):
                v.data, v.type = a, Value.const(v.name, a).type
            return values
        self.nodes.append(node)
        return values

    def _inline_branch(self, n: NodeProto, g: GraphProto, scope: _Scope) -> None:
        scope.values.update(zip(n.output, self.inline(g, scope), strict=False))

    def _assume(self, n: NodeProto, g: GraphProto, equal: tuple[Expr, Expr], scope: _Scope) -> None:
        """Take one branch of an If, on the condition that two index expressions are equal in every run.

        For ``If(extent == k) then Squeeze(x) else x``: a rank cannot change from run to run, so the branch that the rest of the model
        was made for is taken. And for a branch that does not fit the (pinned) shapes: it could only fail."""
        self._inline_branch(n, g, scope)
        for o in n.output:
            v = scope.values[o]
            if not isinstance(v, Value):
                continue
            attrs = {"got": equal[0], "want": equal[1], "what": f"the condition of {n.name or o}"}
            scope.values[o] = self.emit_node("luthier::Require", [v], attrs, [scope.prefix + o + ".checked"], scope.prefix + n.name, n)[0]

    def _given(self, n: NodeProto, scope: _Scope) -> dict[str, AttributeProto]:
        """The node's attributes by name, references to those of the enclosing function resolved. Raises InvalidModel."""
        out: dict[str, AttributeProto] = {}
        for a in n.attribute:
            if a.name in out:
                raise InvalidModel(f"the attribute {a.name!r} is there twice")
            if not a.ref_attr_name:
                out[a.name] = a
            elif scope.attrs is not None and a.ref_attr_name in scope.attrs:
                out[a.name] = scope.attrs[a.ref_attr_name]
        return out

    def _attributes(self, n: NodeProto, scope: _Scope) -> tuple[dict[str, Any], dict[str, GraphProto]]:
        attrs: dict[str, Any] = {}
        graphs: dict[str, GraphProto] = {}
        for name, a in self._given(n, scope).items():
            if a.type == AttributeProto.GRAPH:
                graphs[name] = a.g
            else:
                attrs[name] = attribute_value(a, self.folder)
        return attrs, graphs

    def _constant_data(self, n: NodeProto, scope: _Scope) -> Any:
        attrs, _ = self._attributes(n, scope)
        for key in ("value", "sparse_value"):
            if key in attrs:
                return attrs[key]
        for key, dtype in (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32), ("value_floats", np.float32)):
            if key in attrs:
                return np.array(attrs[key], dtype)
        if "value_string" in attrs or "value_strings" in attrs:
            return np.array(attrs.get("value_string", attrs.get("value_strings")), object)
        raise InvalidModel("a Constant without a value")

    # ---------------------------------------------------------------- functions

    def _expanded(self, nodes: Iterable[NodeProto], known: dict[Any, int]) -> int:
        """How many nodes these are with the model's functions expanded; ``known``: of functions counted before."""
        total = 0
        for n in nodes:
            key = (_domain(n.domain), n.op_type, getattr(n, "overload", ""))
            if key in self.functions and key not in known:
                known[key] = 0  # one that calls itself is refused when it is expanded
                known[key] = self._expanded(self.functions[key].node, known)
            total += 1 + known.get(key, 0) + sum(self._expanded(g.node, known) for a in n.attribute for g in (a.g, *a.graphs))
        return total

    def _expand_function(self, n: NodeProto, inputs: list[Any_ | None], scope: _Scope) -> bool:
        """Inline the function that defines ``n``; False when ``n`` has an Op of its own."""
        domain = _domain(n.domain)
        op = _qualified(n)
        if op in REGISTRY or op in SEQUENCE_OPS or (domain == "" and op in onnx_upgrade.UPGRADES and onnx_upgrade_target(op) in REGISTRY):
            return False
        body = self.functions.get((domain, n.op_type, getattr(n, "overload", "")))
        defaults: dict[str, AttributeProto] = {}
        if body is None:
            body, defaults = self._standard_function(n, inputs, scope)
        if body is None:
            raise _unsupported(op)
        key = f"{op}:{getattr(n, 'overload', '')}"
        if key in scope.functions_above:
            raise InvalidModel(f"function {op} calls itself")
        self.serial += 1
        inner = _Scope(None, _opsets(body.opset_import) or scope.opsets, f"{scope.prefix}{n.name or n.op_type}.{self.serial}/", (*scope.functions_above, key))
        given = {}
        for a in n.attribute:
            if a.ref_attr_name:
                if scope.attrs is not None and a.ref_attr_name in scope.attrs:
                    b = AttributeProto()
                    b.CopyFrom(scope.attrs[a.ref_attr_name])
                    b.name = a.name
                    given[a.name] = b
            else:
                given[a.name] = a
        inner.attrs = defaults | {a.name: a for a in body.attribute_proto} | given
        for k, name in enumerate(body.input):
            inner.values[name] = inputs[k] if k < len(inputs) else None
        self.import_nodes(body.node, inner)
        for name, o in zip(body.output, n.output, strict=False):
            if o:
                try:
                    scope.values[o] = inner.find(name)
                except KeyError:
                    raise InvalidModel(f"function {op} does not produce its output {name!r}") from None
        return True

    def _standard_function(self, n: NodeProto, inputs: list[Any_ | None], scope: _Scope) -> tuple[FunctionProto | None, dict[str, AttributeProto]]:
        """The body that the ONNX standard gives for ``n``, for the version that the model imports."""
        opset = scope.opsets.get(_domain(n.domain), 1)
        try:
            schema = onnx.defs.get_schema(n.op_type, opset, _domain(n.domain))
        except onnx.defs.SchemaError:
            return None, {}
        body: FunctionProto | None = None
        if schema.has_context_dependent_function:
            versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset] or list(schema.context_dependent_function_opset_versions)
            types = [type_proto(v).SerializeToString() for v in inputs]
            node = self._resolved(n, scope).SerializeToString()
            try:
                raw = schema.get_context_dependent_function_with_opset_version(max(versions), node, types)
            except (ValueError, RuntimeError) as e:  # for inputs and attributes that the standard's definition does not fit
                raise InvalidModel(f"the standard's definition of {n.op_type} does not fit the node: {e}") from None
            body = FunctionProto()
            body.ParseFromString(raw)
        elif schema.has_function:
            versions = [v for v in schema.function_opset_versions if v <= opset] or list(schema.function_opset_versions)
            body = FunctionProto()
            body.ParseFromString(schema.get_function_with_opset_version(max(versions)))
        if body is None or not body.node:
            return None, {}
        if not any(_domain(o.domain) == "" for o in body.opset_import):
            same = opset if _domain(n.domain) == "" else onnx.defs.onnx_opset_version()
            body.opset_import.add(domain="", version=scope.opsets.get("", same))
        defaults = {k: a.default_value for k, a in schema.attributes.items() if a.default_value.name}
        return body, defaults

    def _resolved(self, n: NodeProto, scope: _Scope) -> NodeProto:
        """``n`` with attribute references of the enclosing function replaced by their values."""
        if not any(a.ref_attr_name for a in n.attribute):
            return n
        out = NodeProto()
        out.CopyFrom(n)
        del out.attribute[:]
        for a in n.attribute:
            b = AttributeProto()
            if a.ref_attr_name:
                if scope.attrs is None or a.ref_attr_name not in scope.attrs:
                    continue
                b.CopyFrom(scope.attrs[a.ref_attr_name])
                b.name = a.name
            else:
                b.CopyFrom(a)
            out.attribute.append(b)
        return out


def onnx_upgrade_target(op: str) -> str:
    """What an operator that exists only in old opsets becomes."""
    return {"Upsample": "Resize", "Scatter": "ScatterElements"}.get(op, op)


# com.microsoft operators that are the standard's under another name or with more types
SAME = {
    "QuantizeLinear": "QuantizeLinear", "DequantizeLinear": "DequantizeLinear", "Trilu": "Trilu", "GatherND": "GatherND", "Range": "Range",
    "ExpandDims": "Unsqueeze", "TransposeMatMul": "com.microsoft::FusedMatMul", "Pad": "Pad",
}  # fmt: skip


def _qualified(n: NodeProto) -> str:
    d = _domain(n.domain)
    if d == "com.microsoft" and n.op_type in SAME:
        return SAME[n.op_type]
    return f"{d}::{n.op_type}" if d else n.op_type


def _known(v: Value) -> bool | None:
    """A condition's value when it is known at compile time."""
    c = v.content
    return bool(c[0].attr) if c is not None and len(c) == 1 and c[0].op == "const" else None


def _equality(v: Value) -> tuple[Expr, Expr] | None:
    """(a, b) when the condition ``v`` is known to be a == b over extents."""
    c = v.content
    if c is None or len(c) != 1:
        return None
    e = c[0]
    while e.op in ("cast", "select"):
        if e.op == "select" and not (is_const(e.args[1], 1) and is_const(e.args[2], 0)):
            return None
        e = e.args[0]
    return (e.args[0], e.args[1]) if e.op == "eq" and e.args[0].dtype.is_index else None


def _unsupported(op: str) -> UnsupportedOperator:
    near = difflib.get_close_matches(op, REGISTRY, 1, 0.8)
    hint = "write it with luthier.op, or export the model without it" + (f"; did you mean {near[0]}?" if near else "")
    return UnsupportedOperator(f"operator {op} is not implemented and has no function body", op=op, hint=hint)


def _body_types(op: str, inputs: Sequence[Value | None], attrs: dict[str, Any]) -> list[TensorType | None]:
    """Types of a loop body's inputs, from the node's own inputs."""
    if op == "Scan":
        m = int(attrs["num_scan_inputs"])
        states = len(inputs) - m
        axes = attrs.get("scan_input_axes", (0,) * m)
        out: list[TensorType | None] = [None if v is None else v.type for v in inputs[:states]]
        for v, a in zip(inputs[states:], axes, strict=False):
            if v is None:
                out.append(None)
                continue
            if not -v.rank <= a < v.rank:
                raise InvalidModel(f"scan_input_axes: {a} is out of range for {v.name} of rank {v.rank}")
            a = a + v.rank if a < 0 else a
            out.append(TensorType(v.dtype, v.shape[:a] + v.shape[a + 1 :]))
        return out
    return []
