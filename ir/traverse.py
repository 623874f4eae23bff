"""Walks and rewrites of expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from luthier.ir.construct import FOLDING, binary, bitcast, cast, compare, extract, load, ramp, select, shuffle, unary, vreduce
from luthier.ir.dtypes import index
from luthier.ir.index_algebra import Poly, from_linear, is_atom, linear, mul_linear
from luthier.ir.node import BINARY, COMPARE, UNARY, Expr, bcast, free_vars, make_node


def rebuild(e: Expr, args: tuple[Expr, ...]) -> Expr:
    """``e`` with other operands, through the folding constructors."""
    op, a = e.op, e.attr
    if op in BINARY:
        x, y = args
        if x.dtype is y.dtype and x.dtype.is_float and x.op not in FOLDING and y.op not in FOLDING:
            return make_node(op, x.dtype, args)
        return binary(op, x, y)
    if op in COMPARE:
        return compare(op, *args)
    if op in UNARY:
        return unary(op, args[0])
    if op == "load":
        buf, masked = a
        if masked:
            return load(buf, args[:-2], args[-2], args[-1])
        if all([x.dtype is y.dtype for x, y in zip(args, e.args, strict=True)]):
            return make_node("load", e.dtype, args, a)
        return load(buf, args)
    if op == "select":
        return select(*args)
    if op == "cast":
        return cast(args[0], e.dtype.scalar if args[0].dtype.lanes > 1 else e.dtype)
    if op in ("ramp", "bcast") and args[0].dtype is e.args[0].dtype:
        return make_node(op, e.dtype, args, a)
    if op == "ramp":
        return ramp(args[0], a[0], e.dtype.lanes)
    if op == "bcast":
        return bcast(args[0], e.dtype.lanes)
    if op == "shuffle":
        return shuffle(args, a)
    if op == "extract":
        return extract(args[0], a)
    if op == "vreduce":
        return vreduce(a, args[0])
    if op == "bitcast":  # as many bits as before, or more where the operand was vectorised
        return bitcast(args[0], e.dtype.scalar.vec(args[0].dtype.bits * args[0].dtype.lanes // e.dtype.bits))
    lanes = max((x.dtype.lanes for x in args), default=1)
    d = e.dtype
    if lanes != d.lanes == 1 and lanes != max((x.dtype.lanes for x in e.args), default=1):  # operands were vectorised
        args = tuple(bcast(x, lanes) for x in args)
        d = d.vec(lanes)
    return make_node(op, d, args, a)


def rewrite(e: Expr, fn: Callable[[Expr], Expr | None], memo: dict[Expr, Expr] | None = None) -> Expr:
    """Bottom-up: ``fn`` sees each node after its operands were rewritten and returns a replacement or None."""
    if memo is None:
        memo = {}
    hit = memo.get(e)
    if hit is not None:
        return hit
    n = e
    if e.args:
        args = tuple([rewrite(a, fn, memo) for a in e.args])
        if args != e.args:
            n = rebuild(e, args)
    r = fn(n)
    out = n if r is None else r
    memo[e] = out
    return out


def rewrite_loads(e: Expr, fn: Callable[[Expr], Expr | None], memo: dict[Expr, Expr] | None = None) -> Expr:
    """:func:`rewrite` for an ``fn`` that changes nothing but loads: what has none is not looked at."""
    if not e.loading:
        return e
    if memo is None:
        memo = {}
    hit = memo.get(e)
    if hit is not None:
        return hit
    args = tuple([rewrite_loads(a, fn, memo) if a.loading else a for a in e.args])
    n = rebuild(e, args) if args != e.args else e
    if n.op == "load":
        r = fn(n)
        n = n if r is None else r
    memo[e] = n
    return n


def substitute(e: Expr, env: Mapping[Expr, Expr], memo: dict[Expr, Expr] | None = None) -> Expr:
    """Variables (or any nodes) replaced simultaneously. ``memo``: results so far for this very ``env``."""
    if not env:
        return e
    if memo is None:
        memo = {}
    keys = {k for k in env if k.op == "var"}
    plain = len(keys) == len(env)

    def go(x: Expr) -> Expr:
        r = env.get(x)
        if r is not None:
            return r
        if not x.args and x.op != "reduce":
            return x
        if plain and x.op != "load" and not keys & free_vars(x):
            return x
        r = memo.get(x)
        if r is None and x.dtype is index and x.op in ("add", "sub", "mul") and not is_atom(x):  # in one step, without the sums in between
            p: Poly = {}
            for m, c in linear(x).items():
                if len(m) == 1:
                    b = go(m[0])
                    t: Poly = {m: c} if b is m[0] else {k: v * c for k, v in linear(b).items()}
                else:
                    t = {(): c}
                    for a in m:
                        b = go(a)
                        t = mul_linear(t, {(b,): 1} if b is a else linear(b))
                for k, v in t.items():
                    v += p.get(k, 0)
                    if v:
                        p[k] = v
                    else:
                        p.pop(k, None)
            r = memo[x] = from_linear(p)
        if r is None:
            args = tuple([go(a) for a in x.args])
            r = rebuild(x, args) if args != x.args else x
            memo[x] = r
        return r

    return go(e)


def walk(*es: Expr) -> Iterator[Expr]:
    """Every distinct node once, operands first."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(e, False) for e in reversed(es)]
    while stack:
        e, done = stack.pop()
        if done:
            yield e
        elif e not in seen:
            seen.add(e)
            stack.append((e, True))
            stack.extend((a, False) for a in e.args if a not in seen)


def loads(*es: Expr) -> list[Expr]:
    """Every distinct load once, those in its indices before it."""
    out: list[Expr] = []
    seen: set[Expr] = set()
    stack = [(e, False) for e in reversed(es) if e.loading]
    while stack:
        e, done = stack.pop()
        if done:
            out.append(e)
        elif e not in seen:
            seen.add(e)
            if e.op == "load":
                stack.append((e, True))
            stack.extend([(a, False) for a in e.args if a.loading and a not in seen])
    return out


def vars_outside_loads(e: Expr) -> set[Expr]:
    """Variables whose value ``e`` uses, and not only to find an element: those outside of the indices of its loads."""
    out: set[Expr] = set()
    seen: set[Expr] = set()
    stack = [e]
    while stack:
        x = stack.pop()
        if x.op == "var":
            out.add(x)
        elif x not in seen:
            seen.add(x)
            stack.extend(x.args[len(load_parts(x)[1]) :] if x.op == "load" else x.args)
    return out


def load_parts(e: Expr) -> tuple[Any, tuple[Expr, ...], Expr | None, Expr | None]:
    """(buffer, indices, mask, other) of a load."""
    buf, masked = e.attr
    return (buf, e.args[:-2], e.args[-2], e.args[-1]) if masked else (buf, e.args, None, None)
