"""FX graphs of ATen operators, as ``torch.export`` and AOTAutograd give them, to graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx

from luthier.importers.torch import composed, elementwise, indexing, linalg, nn, reductions, shapes, special
from luthier.importers.torch.emitter import (
    ALIASES,
    DECOMPOSITIONS,
    VIEWS,
    WRITERS,
    Emitter,
    Ref,
    array,
    call_rule,
    dtype_of,
    find_rule,
)
from luthier.importers.torch.symbols import Symbols
from luthier.ir.dtypes import f64, i64
from luthier.ir.errors import InvalidModel, LuthierError, UnsupportedOperator
from luthier.ir.expr import Expr
from luthier.ir.graph import Graph, Node, Value, content_or_symbols

__all__ = ["Program", "import_graph", "missing_operators", "RULE_FILES"]

RULE_FILES = (composed, elementwise, indexing, linalg, nn, reductions, shapes, special)
# statements about sizes that torch proved or that the index expressions carry themselves; singular matrices give inf and NaN, not an error
ASSERTIONS = {
    "aten::_assert_scalar", "aten::_assert_async", "aten::sym_constrain_range", "aten::sym_constrain_range_for_size", "aten::_assert_tensor_metadata",
    "aten::_functional_assert_async", "aten::_functional_sym_constrain_range", "aten::_functional_sym_constrain_range_for_size",
    "aten::_linalg_check_errors",
}  # fmt: skip
_FLOATS = {operator.truediv: "Div", operator.mul: "Mul", operator.add: "Add", operator.sub: "Sub", operator.pow: "Pow"}


@dataclass
class Program:
    """``graph``; for each result of the FX graph the number of the graph's output, or a constant; ``updates``: {input that calls change: the
    output that it becomes}; ``in_place``: inputs whose own memory a call changes."""

    graph: Graph
    results: list[int | Any] = field(default_factory=list)
    is_output: list[bool] = field(default_factory=list)
    updates: dict[str, str] = field(default_factory=dict)
    in_place: set[str] = field(default_factory=set)

    @property
    def changed(self) -> set[str]:
        """All inputs that a call changes."""
        return self.in_place | self.updates.keys()


def import_graph(
    graph_module: fx.GraphModule, name: str, given: dict[str, Any], ranges: dict[Any, Any] | None = None, states: Iterable[str] = (),
    becomes: Mapping[int, str] | None = None,
) -> Program:
    """``given``: {placeholder: its tensor} of constants; ``states``: those of them that are inputs all the same, since calls write to them;
    ``becomes``: {number of a result: the placeholder that has it as its new value}, which are no results of the program.

    Raises UnsupportedOperator naming all operators that have no rule, ShapeError, TypeMismatch."""
    missing = missing_operators(graph_module)
    if missing:
        listed = "; ".join(f"{op} ({where})" if where else op for op, where in missing.items())
        raise UnsupportedOperator(f"{len(missing)} operators have no rule: {listed}", op=next(iter(missing)), hint="decompose them before the export, or write them with others")
    kept = set(states)
    for _ in range(2):
        walk = _Walk(graph_module, name, given, Symbols(ranges), kept)
        program = walk.run(becomes or {})
        late = walk.constants_written()
        if not late:
            return program
        kept |= late
    raise InvalidModel("constants of the program are written to")


def missing_operators(graph_module: fx.GraphModule) -> dict[str, str]:
    """{operator without a rule or a decomposition: the user's line}."""
    out: dict[str, str] = {}
    for sub in graph_module.modules():
        if not isinstance(sub, fx.GraphModule):
            continue
        for n in sub.graph.nodes:
            t = n.target
            if n.op == "call_function" and isinstance(t, torch._ops.OpOverload) and not _known(t):
                parts = parts_of(n)
                inner = {str(t): ""} if parts is None else missing_operators(parts)
                for name in inner:
                    out.setdefault(name if name == str(t) else f"{name} of {t}", source_line(n))
            elif n.op == "call_function" and isinstance(t, torch._ops.HigherOrderOperator):
                out.setdefault(t.name(), source_line(n))
            elif n.op in ("call_module", "call_method"):
                out.setdefault(f"{n.op} {t}", source_line(n))
    return out


def _known(t: Any) -> bool:
    packet = t.name().partition(".")[0]
    return packet in ASSERTIONS or packet.startswith("aten::sym_") or t.name() == "aten::_local_scalar_dense" or packet == "aten::item" or find_rule(t)[0] is not None


def _decomposition(t: Any) -> Callable[..., Any] | None:
    own = DECOMPOSITIONS.get(find_rule(t)[1])
    if own is not None:
        return own
    if t in decomposition_table:
        return decomposition_table[t]  # type: ignore[no-any-return]
    if t._can_decompose():
        return lambda *a, **k: t.decompose(*a, **k)
    return None


def source_line(n: fx.Node) -> str:
    """``file:line`` of the user's code that a node came from, innermost."""
    lines = [s.strip() for s in (n.meta.get("stack_trace") or "").splitlines() if s.strip().startswith("File ")]
    if not lines:
        return ""
    parts = lines[-1].split(", ")
    return f"{parts[0][6:-1]}:{parts[1].removeprefix('line ')}"


class _Walk:
    def __init__(self, gm: fx.GraphModule, name: str, given: dict[str, Any], symbols: Symbols, states: set[str]) -> None:
        self.gm, self.given, self.states = gm, given, states
        self.e = Emitter(name, symbols)
        self.env: dict[fx.Node, Any] = {}
        self.inputs: dict[str, Ref] = {}
        self.constants: dict[str, Ref] = {}
        self.attributes: dict[str, Ref] = {}

    def run(self, becomes: Mapping[int, str]) -> Program:
        for n in self.gm.graph.nodes:
            if n.op == "placeholder":
                self.placeholder(n)
        results = self.body(self.gm)
        e, program = self.e, Program(None)  # type: ignore[arg-type]
        for k, name in becomes.items():
            if results[k] is not self.inputs[name]:
                self.inputs[name].write(e, results[k].read())
        for k, r in enumerate(results):
            if k in becomes:
                continue
            if isinstance(r, Ref):
                r = r.read()
            elif isinstance(r, Expr) and r.op != "const":
                r = e.number(r, i64)
            program.is_output.append(isinstance(r, Value))
            program.results.append(len(e.outputs) if isinstance(r, Value) else r.attr if isinstance(r, Expr) else r)
            if isinstance(r, Value):
                e.output(f"output_{k}", r)
        changed = {name: e.expand(ref.read(), ref.example.shape) for name, ref in self.inputs.items() if ref.version}
        for name, new in changed.items():
            if self.written_here(name, new, changed):
                program.in_place.add(name)
            else:
                program.updates[name] = f"{name}.next"
                e.output(f"{name}.next", new, alias=name)
        program.graph = e.graph()
        return program

    def written_here(self, name: str, new: Value, changed: Mapping[str, Value]) -> bool:
        """Whether rows are written into the input's own memory: where its old value is used for nothing but that, and the new one by what
        the results need."""
        old = next(v for v in self.e.inputs if v.name == name)
        makers = {v: n for n in self.e.nodes for v in n.outputs}
        writer = makers.get(new)
        users = [n for n in self.e.nodes for v in n.inputs if v is old]
        if writer is None or writer.op != "luthier::IndexCopy" or writer.inputs[0] is not old or users != [writer]:
            return False
        if any(v is old for _, v in self.e.outputs):
            return False
        needed, seen = [v for _, v in self.e.outputs] + [v for k, v in changed.items() if k != name], set()
        while needed:
            n = makers.get(needed.pop())
            if n is not None and id(n) not in seen:
                seen.add(id(n))
                needed += [v for v in n.inputs if v is not None]
        if not any(id(n) in seen and new in n.inputs for n in self.e.nodes):
            return False
        writer.attrs["in_place"] = 1
        return True

    def constants_written(self) -> set[str]:
        return {n for n, r in self.constants.items() if r.version}

    def placeholder(self, n: fx.Node) -> None:
        e, val = self.e, n.meta.get("val")
        if n.name in self.given and n.name not in self.states:
            t = self.given[n.name]
            if isinstance(t, torch.Tensor):
                self.env[n] = self.constants[n.name] = Ref(e.const(n.name, array(t)))
            else:
                self.env[n] = t
        elif isinstance(val, torch.Tensor):
            for s in val.shape:
                self.open(s)
            v = e.input(n.name, dtype_of(val.dtype), e.symbols.dims(val.shape))
            self.env[n] = self.inputs[n.name] = Ref(v, example=val)
        elif isinstance(val, torch.SymInt):
            v = e.input(n.name, i64, ())
            known = e.symbols.known.get(val.node.expr)
            self.env[n] = known if known is not None else content_or_symbols(Node("Reshape", (v, v), (v,)), 1)[0]
            e.symbols.known.setdefault(val.node.expr, self.env[n])
        elif isinstance(val, torch.SymFloat):
            self.env[n] = e.input(n.name, f64, ())
        else:
            self.env[n] = val if val is not None else self.given.get(n.name)

    def open(self, s: Any) -> None:
        """A variable for each symbol of an input's size."""
        if isinstance(s, torch.SymInt):
            for symbol in sorted(s.node.expr.free_symbols, key=str):
                if symbol not in self.e.symbols.known:
                    self.e.symbols.open(symbol)

    # ------------------------------------------------------------ nodes

    def body(self, gm: fx.GraphModule) -> Sequence[Any]:
        """The results of a graph whose placeholders are in the environment."""
        results: Sequence[Any] = ()
        for n in gm.graph.nodes:
            if n.op == "get_attr":
                self.env[n] = self.attribute(gm, n.target)
            elif n.op == "call_function":
                try:
                    self.env[n] = self.call(n)
                except LuthierError as error:
                    raise error.at(node=source_line(n) or n.name, op=str(n.target)) from None
            elif n.op == "output":
                out = n.args[0]
                results = self.look(list(out) if isinstance(out, (tuple, list)) else [out])
        return results

    def attribute(self, gm: fx.GraphModule, path: str) -> Any:
        at: Any = gm
        for part in path.split("."):
            at = getattr(at, part)
        if not isinstance(at, torch.Tensor):
            return at
        key = f"{id(gm)}.{path}"
        if key not in self.attributes:
            self.attributes[key] = Ref(self.e.const(path, array(at)))
        return self.attributes[key]

    def look(self, a: Any) -> Any:
        """Arguments with nodes replaced by what they are."""
        return fx.node.map_aggregate(a, lambda x: self.env[x] if isinstance(x, fx.Node) else x)

    def read(self, a: Any) -> Any:
        """The same with the present values of tensors, and sizes as index expressions."""
        def one(x: Any) -> Any:
            x = self.env[x] if isinstance(x, fx.Node) else x
            if isinstance(x, Expr) and x.op == "const":
                return x.attr
            return x.read() if isinstance(x, Ref) else self.e.symbols.expr(x) if isinstance(x, torch.SymInt) else [one(y) for y in x] if isinstance(x, list) and x and isinstance(x[0], Ref) else x

        return fx.node.map_aggregate(a, one)

    def call(self, n: fx.Node) -> Any:
        e, t, val = self.e, n.target, n.meta.get("val")
        e.where, e.label = source_line(n), n.name
        if t is operator.getitem:
            return self.look(n.args[0])[n.args[1]]
        if not isinstance(t, torch._ops.OpOverload):
            return self.scalar(n, val)
        packet = t.name().partition(".")[0]
        if packet in ASSERTIONS:
            return None
        if packet in ("aten::item", "aten::_local_scalar_dense"):
            return self.item(n, val)
        if isinstance(val, (torch.SymInt, int, bool, torch.SymBool)) and not isinstance(val, torch.Tensor):
            return e.symbols.expr(val) if not isinstance(val, (bool, int)) else val
        return self.operator(n, t, n.args, n.kwargs, val)

    def operator(self, n: fx.Node, t: Any, args: Any, kwargs: Any, val: Any) -> Any:
        e = self.e
        rule, name = find_rule(t)
        written = [a.name for a in t._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        refs = {a.name: r for a, r in zip(t._schema.arguments, self.look(list(args)), strict=False)} | dict(self.look(dict(kwargs)))
        if rule is None:
            result = self.decomposed(n)
            for r, v in zip(*(list(x) if isinstance(x, (tuple, list)) else [x] for x in (result, val)), strict=False):
                if isinstance(r, Ref) and isinstance(v, torch.Tensor):
                    e.symbols.bind(v.shape, r.read().shape)
            if written and name in DECOMPOSITIONS:
                refs[written[0]].write(e, result.read())
                return refs[written[0]]
            return result
        e.out, e.refs = val, refs
        if written:
            ref = refs[written[0]]
            if name == "detach":
                return ref
            if name in VIEWS and isinstance(ref, Ref):
                view = self.views(n, t, name, call_rule(e, t, self.read(args), dict(self.read(dict(kwargs)))), ref.behind(), val)
                ref.become(view)
                return ref
            if rule in WRITERS:
                return self.wrap(call_rule(e, t, self.read(args), dict(self.read(dict(kwargs)))), val)
            if len(written) > 1 or not isinstance(ref, Ref):
                raise UnsupportedOperator(f"{t} changes several tensors", hint="use the form that gives new ones")
            before = ref.read()
            new = call_rule(e, t, self.read(args), dict(self.read(dict(kwargs))))
            ref.write(e, e.expand(e.cast(new, before.dtype), before.shape))
            return ref
        result = call_rule(e, t, self.read(args), dict(self.read(dict(kwargs))))
        self.check(t, result, val)
        base = next((r for r in refs.values() if isinstance(r, Ref)), None)
        if ALIASES.get(name, name) in VIEWS and base is not None and next(iter(refs.values()), None) is base:
            assert isinstance(base, Ref)
            return self.views(n, t, name, result, base, val)
        return self.wrap(result, val)

    def views(self, n: fx.Node, t: Any, name: str, result: Any, base: Ref, val: Any) -> Any:
        e, args, kwargs = self.e, self.read(n.args), dict(self.read(dict(n.kwargs)))

        def again(b: Value, k: int | None = None) -> Any:
            saved = e.out
            e.out = val
            try:
                out = call_rule(e, t, (b, *args[1:]), kwargs)
            finally:
                e.out = saved
            return out if k is None else out[k]

        if isinstance(result, (tuple, list)):
            return [Ref(v, base, partial(again, k=k)) for k, v in enumerate(result)]
        given = {("x" if a.name in ("self", "input") else a.name): v for a, v in zip(t._schema.arguments, args, strict=False)} | kwargs
        defaults = {a.name: a.default_value for a in t._schema.arguments if a.has_default_value()}
        again.inverse = shapes.inverse_of(name, e, defaults | given)  # type: ignore[attr-defined]
        return Ref(result, base, again)

    def wrap(self, result: Any, val: Any) -> Any:
        if isinstance(result, Value):
            return Ref(result)
        if isinstance(result, (tuple, list)):
            return [self.wrap(r, None) for r in result]
        return result

    def check(self, t: Any, result: Any, val: Any) -> None:
        """A rule's result is of the type and shape that torch says. Data-dependent sizes are bound."""
        for r, v in zip(result if isinstance(result, (tuple, list)) else (result,), val if isinstance(val, (tuple, list)) else (val,), strict=False):
            if not isinstance(r, Value) or not isinstance(v, torch.Tensor):
                continue
            if r.dtype is not dtype_of(v.dtype) or r.rank != v.dim():
                raise UnsupportedOperator(f"the rule of {t} gives {r.type} where torch gives {v.dtype}{list(v.shape)}")
            self.e.symbols.bind(v.shape, r.shape)
            for a, b in zip(r.shape, v.shape, strict=True):
                if a.op == "const" and isinstance(b, int) and a.attr != b:
                    raise UnsupportedOperator(f"the rule of {t} gives {r.type} where torch gives {list(v.shape)}")

    def scalar(self, n: fx.Node, val: Any) -> Any:
        """Arithmetic on sizes."""
        e = self.e
        if isinstance(val, (torch.SymInt, torch.SymBool)):
            return e.symbols.expr(val)
        if isinstance(val, (int, float, bool)) or val is None:
            return val
        args = [e.number(a, f64) for a in self.read(n.args)]
        if n.target in _FLOATS:
            return e.op(_FLOATS[n.target], *args)
        if n.target is torch.sym_float:
            return args[0]
        name = getattr(n.target, "__name__", "").removeprefix("_sym_").removeprefix("sym_")
        if name in ("sqrt", "cos", "sin", "tanh", "exp", "log"):
            return e.op(name.capitalize(), args[0])
        raise UnsupportedOperator(f"arithmetic on sizes by {n.target} is not supported")

    def item(self, n: fx.Node, val: Any) -> Any:
        """An element read as a number: a symbol that the run reads, or a scalar tensor where it is a float."""
        v = self.e.reshape(self.read(n.args[0]), [])
        if isinstance(val, (int, float, bool)):
            return val
        if isinstance(val, torch.SymFloat):
            return self.e.cast(v, f64)
        whole = self.e.cast(v, i64)
        known = whole.content or content_or_symbols(Node("Reshape", (whole, whole), (whole,)), 1)
        self.e.symbols.known.setdefault(val.node.expr, known[0])
        return known[0]

    def decomposed(self, n: fx.Node) -> Any:
        """An operator without a rule, by torch's own decomposition of it, in place."""
        gm = parts_of(n)
        assert gm is not None
        for p, m in zip([p for p in gm.graph.nodes if p.op == "placeholder"], n.all_input_nodes, strict=True):
            self.env[p] = self.env[m]
        for p in gm.graph.nodes:
            p.meta.setdefault("stack_trace", n.meta.get("stack_trace"))
        results = list(self.body(gm))
        return results if isinstance(n.meta.get("val"), (tuple, list)) else results[0]


def parts_of(n: fx.Node) -> fx.GraphModule | None:
    """torch's decomposition of a node's operator, traced for its operands once; None where there is none, or it fails."""
    if "parts" not in n.meta:
        n.meta["parts"] = None
        fn, flat = _decomposition(n.target), list(n.all_input_nodes)
        examples = [m.meta.get("val") for m in flat]

        def traced(*xs: Any) -> Any:
            at = dict(zip(flat, xs, strict=True))
            args, kwargs = (fx.node.map_aggregate(a, lambda x: at[x] if isinstance(x, fx.Node) else x) for a in (n.args, dict(n.kwargs)))
            assert fn is not None
            return fn(*plain(args), **plain(kwargs))

        mode = next((x.fake_mode for x in examples if hasattr(x, "fake_mode")), None)
        with suppress(Exception), mode or nullcontext():  # whatever a decomposition raises, the operator has none
            n.meta["parts"] = make_fx(traced, tracing_mode="real" if mode else "fake")(*examples) if fn is not None else None
    return n.meta["parts"]  # type: ignore[no-any-return]


def plain(a: Any) -> Any:
    """fx's immutable lists and dictionaries as Python's own."""
    if isinstance(a, (list, tuple)):
        return type(a)(map(plain, a)) if type(a) in (list, tuple) else [plain(x) for x in a]
    return {k: plain(v) for k, v in a.items()} if isinstance(a, dict) else a
