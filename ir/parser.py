"""Loop IR from its text: the inverse of :mod:`luthier.ir.printer`.

Nodes are built exactly as written, without simplification, so that ``parse_func(str(f))`` is ``f`` again, statement by
statement (``Func.attrs`` and the contents of const buffers are not part of the text; pass ``data``). A kernel can be
overridden from a file and a failing one cut down by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from luthier.ir.dtypes import DType, boolean, index, parse_dtype
from luthier.ir.errors import VerificationError
from luthier.ir.expr import BINARY, COMPARE, UNARY, Expr, const, make_node
from luthier.ir.loop import (
    EMPTY,
    SCOPES,
    Alloc,
    Barrier,
    Buffer,
    Call,
    For,
    Func,
    If,
    Let,
    Stmt,
    Store,
    While,
    block,
)
from luthier.ir.printer import INFIX, loop_bounds

_TOKEN = re.compile(
    r"\s*(?:(?P<num>(?:\d+\.(?!\.)\d*|\d+)(?:e[+-]?\d+)?)(?P<type>:[a-z]\w*)?"
    r"|(?P<special>(?:inf|nan):(?P<stype>[a-z]\w*))|(?P<name>[A-Za-z_][\w'^#]*(?:\.[\w'^#]+)*)"
    r"|(?P<str>\"(?:[^\"\\]|\\.)*\")|(?P<sym>\.\.|//|<<|>>|<=|==|!=|[-+*/%&|^<>=\[\](){},;:@.]))"
)
_SYMBOLS = {sym: (op, p) for op, (sym, p) in INFIX.items()}


class _Line:
    """One line: its number, indentation and tokens (kind, text, type)."""

    def __init__(self, no: int, text: str) -> None:
        self.no, self.text = no, text
        body = text.lstrip(" ")
        self.depth = len(text) - len(body)
        self.toks: list[tuple[str, str, str | None]] = []
        self.at = pos = 0
        body = body.rstrip()
        while pos < len(body):
            m = _TOKEN.match(body, pos)
            if m is None or m.end() == pos:
                self.fail(f"unreadable text {body[pos:pos + 20]!r}")
            pos = m.end()
            if m["num"] is not None:
                self.toks.append(("num", m["num"], m["type"][1:] if m["type"] else None))
            elif m["special"] is not None:
                self.toks.append(("num", m["special"].split(":")[0], m["stype"]))
            elif m["name"] is not None:
                self.toks.append(("name", m["name"], None))
            elif m["str"] is not None:
                self.toks.append(("quoted", json.loads(m["str"]), None))
            else:
                self.toks.append(("sym", m["sym"], None))

    def fail(self, what: str) -> NoReturn:
        raise VerificationError(f"line {self.no}: {what}; in `{self.text.strip()}`")

    def peek(self, *texts: str) -> bool:
        t = self.toks[self.at] if self.at < len(self.toks) else ("end", "", None)
        return t[1] in texts and t[0] in ("sym", "name")

    def accept(self, text: str) -> bool:
        if self.peek(text):
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            found = self.toks[self.at][1] if self.at < len(self.toks) else "end of line"
            self.fail(f"expected {text!r}, found {found!r}")

    def name(self) -> str:
        if self.at < len(self.toks) and self.toks[self.at][0] in ("name", "quoted"):
            self.at += 1
            return self.toks[self.at - 1][1]
        self.fail("expected a name")

    def integer(self) -> int:
        neg = self.accept("-")
        if self.at < len(self.toks) and self.toks[self.at][0] == "num":
            self.at += 1
            return int(self.toks[self.at - 1][1]) * (-1 if neg else 1)
        self.fail("expected an integer")

    def end(self) -> None:
        if self.at != len(self.toks):
            self.fail(f"unexpected {self.toks[self.at][1]!r}")


class _Parser:
    def __init__(self, text: str) -> None:
        self.lines = [_Line(i + 1, t) for i, t in enumerate(text.splitlines()) if t.strip() and not t.lstrip().startswith("#")]
        self.pos = 0
        self.vars: dict[str, Expr] = {}
        self.bufs: dict[str, Buffer] = {}

    # -- expressions

    def expr(self, ln: _Line, prec: int = 0) -> Expr:
        a = self.postfix(ln)
        while ln.at < len(ln.toks) and ln.toks[ln.at][0] == "sym" and ln.toks[ln.at][1] in _SYMBOLS:
            op, p = _SYMBOLS[ln.toks[ln.at][1]]
            if p < max(prec, 1):
                break
            ln.at += 1
            a = self.make(ln, op, (a, self.expr(ln, p + 1)))
        return a

    def make(self, ln: _Line, op: str, args: tuple[Expr, ...]) -> Expr:
        want = 1 if op in UNARY else 3 if op == "select" else 2
        if len(args) != want:
            ln.fail(f"{op} takes {want} operands, got {len(args)}")
        d = args[-1].dtype
        if op in BINARY or op in COMPARE:
            if args[0].dtype is not args[1].dtype:
                ln.fail(f"{op} of {args[0].dtype} and {args[1].dtype}")
        if op in COMPARE or op in ("isnan", "isinf"):
            d = boolean.vec(d.lanes)
        return make_node(op, d, args)

    def postfix(self, ln: _Line) -> Expr:
        return self.atom(ln)

    def args(self, ln: _Line, close: str = ")") -> tuple[Expr, ...]:
        out: list[Expr] = []
        while not ln.peek(close):
            if out:
                ln.expect(",")
            out.append(self.expr(ln))
        ln.expect(close)
        return tuple(out)

    def atom(self, ln: _Line) -> Expr:
        if ln.accept("("):
            e = self.expr(ln)
            ln.expect(")")
            return e
        if ln.accept("@"):
            return self.intrinsic(ln)
        neg = ln.accept("-")
        if ln.at >= len(ln.toks):
            ln.fail("expression expected")
        kind, text, typ = ln.toks[ln.at]
        if kind == "num":
            ln.at += 1
            d = self.dtype(ln, typ) if typ else index
            v = float(text) if d.is_float else int(text)
            return const(-v if neg else v, d)
        if neg:
            ln.fail("a number expected after '-'")
        if kind == "sym":
            ln.fail(f"unexpected {text!r}")
        ln.at += 1
        if kind == "name" and text in ("true", "false"):
            return const(text == "true", boolean)
        if ln.accept("["):
            return self.load(ln, text)
        if kind == "name" and ln.peek("("):
            return self.function(ln, text)
        if text not in self.vars:
            ln.fail(f"variable {text} is not defined")
        return self.vars[text]

    def dtype(self, ln: _Line, name: str) -> DType:
        try:
            return parse_dtype(name)
        except (KeyError, ValueError):
            ln.fail(f"no type named {name!r}")

    def load(self, ln: _Line, name: str) -> Expr:
        if name not in self.bufs:
            ln.fail(f"buffer {name} is not in scope")
        buf = self.bufs[name]
        idx: list[Expr] = []
        while not ln.peek("]", ";"):
            if idx:
                ln.expect(",")
            idx.append(self.expr(ln))
        lanes, extra = max((i.dtype.lanes for i in idx), default=1), ()
        if ln.accept(";"):
            mask = self.expr(ln)
            ln.expect(";")
            extra = (mask, self.expr(ln))  # type: ignore[assignment]
            lanes = max(lanes, mask.dtype.lanes) if buf.dtype.lanes == 1 else lanes
        ln.expect("]")
        d = buf.dtype if lanes == 1 else buf.dtype.vec(lanes)
        return make_node("load", d, (*idx, *extra), (buf, bool(extra)))

    def function(self, ln: _Line, name: str) -> Expr:
        ln.expect("(")
        if name == "ramp":
            base = self.expr(ln)
            ln.expect(",")
            stride = ln.integer()
            ln.expect(",")
            n = ln.integer()
            ln.expect(")")
            return make_node("ramp", base.dtype.vec(n), (base,), (stride,))
        if name in ("bcast", "extract"):
            a = self.expr(ln)
            ln.expect(",")
            n = ln.integer()
            ln.expect(")")
            return make_node("bcast", a.dtype.vec(n), (a,)) if name == "bcast" else make_node("extract", a.dtype.scalar, (a,), n)
        if name == "shuffle":
            args = [self.expr(ln)]
            while ln.accept(","):
                args.append(self.expr(ln))
            ln.expect(";")
            perm = [ln.integer()]
            while ln.accept(","):
                perm.append(ln.integer())
            ln.expect(")")
            return make_node("shuffle", args[0].dtype.vec(len(perm)), tuple(args), tuple(perm))
        args_ = self.args(ln)
        head, _, tail = name.partition(".")
        if head == "vreduce":
            return make_node("vreduce", args_[0].dtype.scalar, args_, tail)
        if head == "bitcast":
            return make_node("bitcast", self.dtype(ln, tail), args_)
        if name in UNARY or name in BINARY or name in COMPARE or name == "select":
            return self.make(ln, name, args_)
        return make_node("cast", self.dtype(ln, name), args_)

    def intrinsic(self, ln: _Line) -> Expr:
        name = ln.name()
        attr: list[Any] = []
        if ln.accept("<"):
            while not ln.accept(">"):
                if attr:
                    ln.expect(",")
                attr.append(ln.name() if ln.toks[ln.at][0] in ("name", "quoted") else ln.integer())
            ln.expect(".")
            typ = ln.name()
        else:
            name, _, typ = name.rpartition(".")
        ln.expect("(")
        return make_node("call", self.dtype(ln, typ), self.args(ln), (name, tuple(attr)))

    # -- declarations

    def variable(self, ln: _Line, name: str, d: DType, default: tuple[Any, Any] = (0, None)) -> Expr:
        lo, hi = default
        if ln.accept("{"):
            lo = None if ln.peek("..") else ln.integer()
            ln.expect("..")
            hi = None if ln.peek("}") else self.expr(ln)
            ln.expect("}")
            if isinstance(hi, Expr) and hi.op == "const":
                hi = int(hi.attr)
        if not (d.is_index or d.is_int):
            lo = hi = None
        return make_node("var", d, (), (name, lo, hi))

    def buffer(self, ln: _Line, name: str, d: DType) -> Buffer:
        """After ``name: dtype``: ``[shape] scope readonly``."""
        ln.expect("[")
        shape = self.args(ln, "]")
        scope = "param"
        for s in SCOPES:
            if ln.accept(s):
                scope = s
        return Buffer(name, d, shape, scope, not ln.accept("readonly"))

    def params(self, ln: _Line) -> tuple[Any, ...]:
        """Two rounds, because shapes may name scalars that come later."""
        start = ln.at
        out: list[Any] = []
        for only_scalars in (True, False):
            ln.at, out = start, []
            while not ln.peek(")"):
                if out:
                    ln.expect(",")
                name = ln.name()
                ln.expect(":")
                d = self.dtype(ln, ln.name())
                if not ln.peek("["):
                    v = self.variable(ln, name, d)
                    self.vars[name] = v
                    out.append(v)
                elif only_scalars:
                    self.skip(ln)
                    out.append(None)
                else:
                    self.bufs[name] = self.buffer(ln, name, d)
                    out.append(self.bufs[name])
            end = ln.at
        ln.at = end
        ln.expect(")")
        return tuple(out)

    def skip(self, ln: _Line) -> None:
        depth = 0
        while ln.at < len(ln.toks):
            t = ln.toks[ln.at][1] if ln.toks[ln.at][0] == "sym" else ""
            if depth == 0 and t in (",", ")"):
                return
            depth += (t in ("[", "(", "{")) - (t in ("]", ")", "}"))
            ln.at += 1

    def func(self, data: Mapping[str, np.ndarray[Any, Any]]) -> Func:
        if self.pos >= len(self.lines):
            raise VerificationError("no function in this text")
        ln = self.lines[self.pos]
        self.pos += 1
        self.vars, self.bufs = {}, {}
        ln.expect("func")
        name = ln.name()
        ln.expect("(")
        params = self.params(ln)
        ln.expect(":")
        ln.end()
        while self.pos < len(self.lines) and self.lines[self.pos].peek("const"):
            c = self.lines[self.pos]
            self.pos += 1
            c.expect("const")
            n = c.name()
            c.expect(":")
            self.bufs[n] = self.buffer(c, n, self.dtype(c, c.name()))
            c.end()
        return Func(name, params, self.body(ln.depth), {}, dict(data))

    # -- statements

    def body(self, depth: int) -> Stmt:
        """Lines deeper than ``depth``; names defined inside end with it."""
        names, bufs = dict(self.vars), dict(self.bufs)
        out: list[Stmt] = []
        while self.pos < len(self.lines) and self.lines[self.pos].depth > depth:
            ln = self.lines[self.pos]
            self.pos += 1
            out.append(self.stmt(ln))
        self.vars, self.bufs = names, bufs
        return block(*out) if out else EMPTY

    def stmt(self, ln: _Line) -> Stmt:
        if ln.accept("pass"):
            return EMPTY
        if ln.accept("for"):
            return self.loop(ln)
        if ln.peek("while", "if"):
            word = ln.name()
            cond = self.expr(ln)
            self.colon(ln)
            body = self.body(ln.depth)
            if word == "while":
                return While(cond, body)
            if self.pos < len(self.lines) and self.lines[self.pos].depth == ln.depth and self.lines[self.pos].accept("else"):
                other = self.lines[self.pos]
                self.pos += 1
                self.colon(other)
                return If(cond, body, self.body(ln.depth))
            return If(cond, body)
        if ln.accept("let"):
            name = ln.name()
            ln.expect(":")
            v = self.variable(ln, name, self.dtype(ln, ln.name()))
            ln.expect("=")
            value = self.expr(ln)
            ln.end()
            self.vars[name] = v
            return Let(v, value)
        if ln.accept("alloc"):
            name = ln.name()
            ln.expect(":")
            b = self.buffer(ln, name, self.dtype(ln, ln.name()))
            self.colon(ln)
            old = dict(self.bufs)
            self.bufs[name] = b
            body = self.body(ln.depth)
            self.bufs = old
            return Alloc(b, body)
        if ln.accept("barrier"):
            return Barrier(ln.name())
        if ln.accept("call"):
            return self.call(ln)
        return self.store(ln)

    def colon(self, ln: _Line) -> None:
        ln.expect(":")
        ln.end()

    def loop(self, ln: _Line) -> Stmt:
        name = ln.name()
        at = ln.at
        if ln.peek("{"):
            self.skip_braces(ln)
        ln.expect("in")
        lo = self.expr(ln)
        ln.expect("..")
        hi = self.expr(ln)
        kind = "serial" if ln.peek(":") else ln.name()
        self.colon(ln)
        ln.at = at
        v = self.variable(ln, name, index, loop_bounds(hi))
        old = dict(self.vars)
        self.vars[name] = v
        body = self.body(ln.depth)
        self.vars = old
        return For(v, lo, hi, kind, body)

    def skip_braces(self, ln: _Line) -> None:
        while not ln.accept("}"):
            ln.at += 1
            if ln.at >= len(ln.toks):
                ln.fail("'}' missing")

    def call(self, ln: _Line) -> Stmt:
        callee = ln.name()
        ln.expect("(")
        args: list[Any] = []
        while not ln.peek(")"):
            if args:
                ln.expect(",")
            if ln.accept("&"):
                name = ln.name()
                if name not in self.bufs:
                    ln.fail(f"buffer {name} is not in scope")
                if ln.accept("["):
                    args.append((self.bufs[name], self.expr(ln)))
                    ln.expect("]")
                else:
                    args.append(self.bufs[name])
            else:
                args.append(self.expr(ln))
        ln.expect(")")
        attrs: list[tuple[str, Any]] = []
        if ln.accept("{"):
            while not ln.accept("}"):
                if attrs:
                    ln.expect(",")
                key = ln.name()
                ln.expect("=")
                attrs.append((key, ln.name() if ln.toks[ln.at][0] in ("name", "quoted") else ln.integer()))
        ln.end()
        return Call(callee, tuple(args), tuple(attrs))

    def store(self, ln: _Line) -> Stmt:
        name = ln.name()
        if name not in self.bufs:
            ln.fail(f"buffer {name} is not in scope")
        ln.expect("[")
        idx = self.args(ln, "]")
        ln.expect("=")
        value = self.expr(ln)
        mask = self.expr(ln) if ln.accept("if") else None
        ln.end()
        return Store(self.bufs[name], idx, value, mask)


def parse_func(text: str, data: Mapping[str, np.ndarray[Any, Any]] | None = None) -> Func:
    """The one function in ``text``. ``data``: contents of its const buffers. Raises VerificationError with the line number."""
    p = _Parser(text)
    f = p.func(data or {})
    if p.pos != len(p.lines):
        p.lines[p.pos].fail("text after the function")
    return f


def parse_funcs(text: str) -> dict[str, Func]:
    """Every function in ``text`` by name."""
    p = _Parser(text)
    out: dict[str, Func] = {}
    while p.pos < len(p.lines):
        f = p.func({})
        out[f.name] = f
    return out


__all__ = ["parse_func", "parse_funcs"]
