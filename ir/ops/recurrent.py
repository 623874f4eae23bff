"""Recurrent networks: RNN, GRU, LSTM as Folds over time; the product of all inputs with W stands in front of the loop.

Inputs X [T, B, I] (``layout`` 1: [B, T, I]), W [D, G * H, I], R [D, G * H, H], bias [D, 2 * G * H], sequence_lens [B], initial_h
[D, B, H] and, for LSTM, initial_c and peepholes P [D, 3 * H]; D directions. Outputs Y [T, D, B, H], Y_h (and Y_c) [D, B, H]. Past
the length of a sequence the state stays and Y is 0. Narrow floats are computed in f32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, Fold, LetStmt, Pull, State, axis, pull, sum_
from luthier.ir.dtypes import index
from luthier.ir.expr import Expr, as_expr, cast, const, load, maximum, minimum, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Indexed, Op, op
from luthier.ir.ops.common import (
    Array,
    define,
    differ,
    expect_shape,
    get,
    make,
    must,
    need,
    padded,
    shape_error,
    static,
    unsupported,
    widen,
)

# name: (default alpha, default beta, function of x, alpha, beta)
ACTIVATIONS: dict[str, tuple[float | None, float | None, Callable[[Expr, float, float], Expr]]] = {
    "relu": (None, None, lambda x, a, b: maximum(const(0.0, x.dtype), x)),
    "tanh": (None, None, lambda x, a, b: unary("tanh", x)),
    "sigmoid": (None, None, lambda x, a, b: unary("sigmoid", x)),
    "affine": (1.0, 0.0, lambda x, a, b: x * a + b),
    "leakyrelu": (0.01, None, lambda x, a, b: select(x < 0.0, x * a, x)),
    "thresholdedrelu": (1.0, None, lambda x, a, b: select(x <= a, const(0.0, x.dtype), x)),
    "scaledtanh": (1.0, 1.0, lambda x, a, b: unary("tanh", x * b) * a),
    "hardsigmoid": (0.2, 0.5, lambda x, a, b: minimum(const(1.0, x.dtype), maximum(const(0.0, x.dtype), x * a + b))),
    "elu": (1.0, None, lambda x, a, b: select(x < 0.0, (unary("exp", x) - 1.0) * a, x)),
    "softsign": (None, None, lambda x, a, b: x / (unary("abs", x) + 1.0)),
    "softplus": (None, None, lambda x, a, b: unary("log1p", unary("exp", x))),
}
NUMPY: dict[str, Callable[[Array, float, float], Array]] = {
    "relu": lambda x, a, b: np.maximum(x, 0),
    "tanh": lambda x, a, b: np.tanh(x),
    "sigmoid": lambda x, a, b: 1 / (1 + np.exp(-x)),
    "affine": lambda x, a, b: x * a + b,
    "leakyrelu": lambda x, a, b: np.where(x < 0, x * a, x),
    "thresholdedrelu": lambda x, a, b: np.where(x <= a, 0, x),
    "scaledtanh": lambda x, a, b: np.tanh(x * b) * a,
    "hardsigmoid": lambda x, a, b: np.clip(x * a + b, 0, 1),
    "elu": lambda x, a, b: np.where(x < 0, a * (np.exp(x) - 1), x),
    "softsign": lambda x, a, b: x / (1 + np.abs(x)),
    "softplus": lambda x, a, b: np.log1p(np.exp(x)),
}
Act = tuple[str, float, float]


@dataclass
class Step:
    """What one direction works with: the buffers by role, its number, axes of batch and hidden units."""

    ins: Sequence[Buffer | None]
    d: int
    b: Axis
    h: Axis
    t: Axis
    acts: list[Act]
    clip: float | None
    name: str

    def act(self, k: int, x: Expr) -> Expr:
        """Activation ``k`` of the cell, clipped before."""
        name, a, b = self.acts[k]
        if self.clip is not None:
            x = minimum(const(self.clip, x.dtype), maximum(const(-self.clip, x.dtype), x))
        return ACTIVATIONS[name][2](x, a, b)

    def weight(self, i: int, *idx: Any) -> Expr:
        b = must(self.ins, i)
        return widen(load(b, [const(self.d), *idx]))


class Recurrent(Op):
    """What RNN, GRU and LSTM share; a cell says how one step goes."""

    gates = 1
    states = 1
    defaults: tuple[str, ...] = ("Tanh",)

    # -- attributes

    def directions(self, node: Node) -> list[bool]:
        """For each direction whether it walks backwards. Raises UnsupportedOperator."""
        d = _text(node.attrs.get("direction", "forward"))
        table = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
        if d not in table:
            raise unsupported(node, f"direction {d!r}")
        return table[d]

    def activations(self, node: Node) -> list[Act]:
        """(name, alpha, beta) of every activation, direction by direction. Raises UnsupportedOperator."""
        n = len(self.directions(node))
        names = [_text(a) for a in node.attrs.get("activations") or list(self.defaults) * n]
        if len(names) != n * len(self.defaults):
            raise unsupported(node, f"{len(names)} activations, expected {n * len(self.defaults)}")
        alphas, betas = (list(node.attrs.get(k) or []) for k in ("activation_alpha", "activation_beta"))
        out = []
        for name in names:
            key = name.lower()
            if key not in ACTIVATIONS:
                raise unsupported(node, f"activation {name!r}")
            a, b, _ = ACTIVATIONS[key]
            alpha = float(alphas.pop(0)) if a is not None and alphas else a
            beta = float(betas.pop(0)) if b is not None and betas else b
            out.append((key, alpha or 0.0, beta or 0.0))
        return out

    def clip(self, node: Node) -> float | None:
        c = node.attrs.get("clip")
        return float(c) if c else None

    def hidden(self, node: Node) -> int:
        return static(node, need(node, 2).shape[2], "the hidden size")

    # -- types

    def indexed(self, node: Node) -> Sequence[Indexed]:
        if node.input(4) is None:
            return []
        return [Indexed(4, (const(0),), (need(node, 0).shape[int(node.attrs.get("layout", 0))],))]

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, w, r = need(node, 0), need(node, 1), need(node, 2)
        if x.rank != 3 or w.rank != 3 or r.rank != 3:
            raise shape_error(node, f"{self.name} takes X, W and R of rank 3")
        n, h = len(self.directions(node)), self.hidden(node)
        for v, want in ((w, self.gates * h), (r, self.gates * h)):
            if differ(v.shape[0], as_expr(n)) or differ(v.shape[1], as_expr(want)):
                raise shape_error(node, f"{v.name} must be [{n}, {want}, ...]")
        if differ(w.shape[2], x.shape[2]):
            raise shape_error(node, f"W is for {w.shape[2]!r} inputs, X has {x.shape[2]!r}")
        self.activations(node)
        flip = int(node.attrs.get("layout", 0))
        t, b = (x.shape[1], x.shape[0]) if flip else (x.shape[0], x.shape[1])
        state = (b, n, h) if flip else (n, b, h)
        expect_shape(node, 2, (n, self.gates * h, h))
        expect_shape(node, 3, (n, 2 * self.gates * h))
        expect_shape(node, 4, (b,))
        for i in range(5, 5 + self.states):
            expect_shape(node, i, state)
        expect_shape(node, 7, (n, 3 * h))
        y = (b, t, n, h) if flip else (t, n, b, h)
        s = (b, n, h) if flip else (n, b, h)
        return [TensorType.of(x.dtype, y)] + [TensorType.of(x.dtype, s)] * self.states

    # -- mathematics

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        flip = int(node.attrs.get("layout", 0))
        dirs, acts, per = self.directions(node), self.activations(node), len(self.defaults)
        x, h = must(ins, 0), self.hidden(node)
        nt, nb = (x.shape[1], x.shape[0]) if flip else (x.shape[0], x.shape[1])
        lets: list[LetStmt] = []
        emitted: list[Buffer] = []
        final: list[list[Buffer]] = []
        for d, back in enumerate(dirs):
            name = f"{outs[0].name}.d{d}"
            st = Step(ins, d, axis("b", nb), axis("j", h), axis("t", nt), acts[d * per : (d + 1) * per], self.clip(node), name)
            *before, proj = self.project(st, x, flip, h)
            fold, y, states = self.fold(node, st, proj.buf, back, flip)
            lets += [*before, proj, fold]
            emitted.append(y)
            final.append(states)
        for k, out in enumerate(outs[: 1 + self.states]):
            axes = tuple(axis(f"i{n}", s) for n, s in enumerate(out.shape))
            if k == 0:
                t, dd, b, j = (axes[1], axes[2], axes[0], axes[3]) if flip else axes
                parts = [load(y, [t.var, b.var, j.var]) for y in emitted]
            else:
                dd, b, j = (axes[1], axes[0], axes[2]) if flip else axes
                parts = [load(s[k - 1], [b.var, j.var]) for s in final]
            lets.append(define(out, axes, parts[0] if len(parts) == 1 else select(dd.var.eq(0), *parts)))
        return make(node, ins, outs, lets)

    def project(self, st: Step, x: Buffer, flip: int, h: int) -> list[Pull]:
        """``x W^T + biases`` for every step, behind what it needs: the part of the bias that does not meet a reset gate included."""
        q, i = axis("q", self.gates * h), axis("i", x.shape[2])
        xv = load(x, [st.b.var, st.t.var, i.var] if flip else [st.t.var, st.b.var, i.var])
        return [pull(f"{st.name}.x", (st.t, st.b, q), self.with_biases(st, q.var, sum_(i, widen(xv) * st.weight(1, q.var, i.var)), h))]

    def with_biases(self, st: Step, q: Expr, e: Expr, h: int) -> Expr:
        bias = get(st.ins, 3)
        if bias is not None:
            e = e + st.weight(3, q)
            rec = st.weight(3, q + self.gates * h)
            keep = self.recurrent_bias_apart(q, h)
            e = e + (rec if keep is None else select(keep, const(0.0, rec.dtype), rec))
        return e

    def recurrent_bias_apart(self, q: Expr, h: int) -> Expr | None:
        """Gates whose recurrent bias the cell adds itself."""
        return None

    def fold(self, node: Node, st: Step, proj: Buffer, back: bool, flip: int) -> tuple[Fold, Buffer, list[Buffer]]:
        names = ("h", "c")[: self.states]
        dtype = proj.dtype
        bufs = [Buffer(f"{st.name}.{n}", dtype, (st.b.extent, st.h.extent), "global") for n in names]
        at = [st.b.var, st.h.var]
        steps, new = self.step(node, st, proj, bufs)
        lens = get(st.ins, 4)
        state, live = [], None
        if lens is not None:
            live = st.t.var < cast(load(lens, [st.b.var]), index)
        for k, (b, n) in enumerate(zip(bufs, new, strict=True)):
            init = get(st.ins, 5 + k)
            where = [st.b.var, const(st.d), st.h.var] if flip else [const(st.d), st.b.var, st.h.var]
            first = const(0.0, dtype) if init is None else cast(load(init, where), dtype)
            nxt = load(n.buf, at)
            state.append(State(b, (st.b, st.h), first, nxt if live is None else select(live, nxt, load(b, at))))
        y = load(new[0].buf, at)
        emit = pull(f"{st.name}.y", (st.t, st.b, st.h), y if live is None else select(live, y, const(0.0, dtype)))
        return Fold(st.name, st.t, tuple(state), tuple(steps), (emit,), back, (st.b,)), emit.buf, bufs

    def step(self, node: Node, st: Step, proj: Buffer, state: list[Buffer]) -> tuple[list[Pull], list[Pull]]:
        """(pulls of one round in order, those among them that hold the next states)."""
        raise NotImplementedError

    def recurrent(self, st: Step, h: Buffer, q0: int, n: int, suffix: str, scale: Buffer | None = None) -> Pull:
        """``sum_k h[b, k] * R[q0 + q, k]`` for q < n; ``scale`` multiplies h first."""
        q, k = axis("q", n), axis("k", st.h.extent)
        hv = load(h, [st.b.var, k.var])
        if scale is not None:
            hv = hv * load(scale, [st.b.var, k.var])
        return pull(f"{st.name}.{suffix}", (st.b, q), sum_(k, hv * st.weight(2, q.var + q0, k.var)))

    # -- numpy

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a: list[Any] = padded(arrays, 8)
        x = np.asarray(a[0])
        out_type = x.dtype
        flip, h, per = int(node.attrs.get("layout", 0)), self.hidden(node), len(self.defaults)
        up = np.float64
        x = (x.transpose(1, 0, 2) if flip else x).astype(up)
        nt, nb, _ = x.shape
        lens = np.full(nb, nt) if a[4] is None else np.asarray(a[4])
        acts, dirs = self.activations(node), self.directions(node)
        ys = np.zeros((nt, len(dirs), nb, h), up)
        ends = [np.zeros((len(dirs), nb, h), up) for _ in range(self.states)]
        for d, back in enumerate(dirs):
            w, r = np.asarray(a[1])[d].astype(up), np.asarray(a[2])[d].astype(up)
            bias = np.zeros(2 * self.gates * h, up) if a[3] is None else np.asarray(a[3])[d].astype(up)
            state: list[Any] = []
            for k in range(self.states):
                s = a[5 + k]
                state.append(np.zeros((nb, h), up) if s is None else (np.asarray(s)[:, d] if flip else np.asarray(s)[d]).astype(up))
            peep = None if self.states < 2 or a[7] is None else np.asarray(a[7])[d].astype(up)
            clip = self.clip(node)

            def act(k: int, v: Array, d: int = d, clip: float | None = clip) -> Array:
                n, al, be = acts[d * per + k]
                return NUMPY[n](v if clip is None else np.clip(v, -clip, clip), al, be)

            for t in range(nt - 1, -1, -1) if back else range(nt):
                new = self.numpy_step(node, x[t] @ w.T, state, r, bias, peep, act, h)
                live = (t < lens)[:, None]
                ys[t, d] = np.where(live, new[0], 0)
                state = [np.where(live, n, s) for n, s in zip(new, state, strict=True)]
            for k in range(self.states):
                ends[k][d] = state[k]
        if flip:
            ys, ends = ys.transpose(2, 0, 1, 3), [e.transpose(1, 0, 2) for e in ends]
        return [v.astype(out_type) for v in (ys, *ends)]

    def numpy_step(self, node: Node, xw: Array, state: list[Array], r: Array, bias: Array, peep: Array | None, act: Any, h: int) -> list[Array]:
        raise NotImplementedError


@op("RNN")
class RNN(Recurrent):
    """``H' = f(X W^T + H R^T + Wb + Rb)``."""

    def step(self, node: Node, st: Step, proj: Buffer, state: list[Buffer]) -> tuple[list[Pull], list[Pull]]:
        rec = self.recurrent(st, state[0], 0, self.hidden(node), "r")
        at = [st.b.var, st.h.var]
        new = pull(f"{st.name}.hn", (st.b, st.h), st.act(0, load(proj, [st.t.var, *at]) + load(rec.buf, at)))
        return [rec, new], [new]

    def numpy_step(self, node: Node, xw: Array, state: list[Array], r: Array, bias: Array, peep: Array | None, act: Any, h: int) -> list[Array]:
        return [act(0, xw + state[0] @ r.T + bias[:h] + bias[h:])]


@op("GRU")
class GRU(Recurrent):
    """Gates z, r, h: ``h~ = g(X Wh^T + (r H) Rh^T + Rbh + Wbh)``, or with ``linear_before_reset`` ``g(X Wh^T + r (H Rh^T + Rbh) + Wbh)``;
    ``H' = (1 - z) h~ + z H``."""

    gates = 3
    defaults = ("Sigmoid", "Tanh")

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        self_ = _LinearGRU(self.name) if int(node.attrs.get("linear_before_reset", 0)) and type(self) is GRU else self
        return Recurrent.compute(self_, node, ins, outs)

    def step(self, node: Node, st: Step, proj: Buffer, state: list[Buffer]) -> tuple[list[Pull], list[Pull]]:
        h, n = state[0], self.hidden(node)
        at = [st.b.var, st.h.var]

        def gate(rec: Buffer, g: int, first: int = 0) -> Expr:
            return load(proj, [st.t.var, st.b.var, st.h.var + g * n]) + load(rec, [st.b.var, st.h.var + (g - first) * n])

        zr = self.recurrent(st, h, 0, 2 * n, "zr")
        r = pull(f"{st.name}.r", (st.b, st.h), st.act(0, gate(zr.buf, 1)))
        rh = self.recurrent(st, h, 2 * n, n, "rh", scale=r.buf)
        z = pull(f"{st.name}.z", (st.b, st.h), st.act(0, gate(zr.buf, 0)))
        zv = load(z.buf, at)
        new = pull(f"{st.name}.hn", (st.b, st.h), (const(1.0, zv.dtype) - zv) * st.act(1, gate(rh.buf, 2, 2)) + zv * load(h, at))
        return [zr, r, rh, z, new], [new]

    def numpy_step(self, node: Node, xw: Array, state: list[Array], r: Array, bias: Array, peep: Array | None, act: Any, h: int) -> list[Array]:
        s = state[0]
        wb, rb = bias[: 3 * h], bias[3 * h :]
        z = act(0, xw[:, :h] + s @ r[:h].T + wb[:h] + rb[:h])
        rg = act(0, xw[:, h : 2 * h] + s @ r[h : 2 * h].T + wb[h : 2 * h] + rb[h : 2 * h])
        if int(node.attrs.get("linear_before_reset", 0)):
            g = xw[:, 2 * h :] + rg * (s @ r[2 * h :].T + rb[2 * h :]) + wb[2 * h :]
        else:
            g = xw[:, 2 * h :] + (rg * s) @ r[2 * h :].T + rb[2 * h :] + wb[2 * h :]
        return [(1 - z) * act(1, g) + z * s]


class _LinearGRU(GRU):
    """The reset gate after the linear map: one product with R a step."""

    def __init__(self, name: str) -> None:
        self.name = name

    def recurrent_bias_apart(self, q: Expr, h: int) -> Expr | None:
        return const(2 * h) <= q

    def step(self, node: Node, st: Step, proj: Buffer, state: list[Buffer]) -> tuple[list[Pull], list[Pull]]:
        h, n = state[0], self.hidden(node)
        at = [st.b.var, st.h.var]
        rec = self.recurrent(st, h, 0, 3 * n, "r")

        def part(buf: Buffer, g: int, *lead: Expr) -> Expr:
            return load(buf, [*lead, st.b.var, st.h.var + g * n])

        z = pull(f"{st.name}.z", (st.b, st.h), st.act(0, part(proj, 0, st.t.var) + part(rec.buf, 0)))
        zv = load(z.buf, at)
        r = st.act(0, part(proj, 1, st.t.var) + part(rec.buf, 1))
        lin = part(rec.buf, 2)
        if get(st.ins, 3) is not None:
            lin = lin + st.weight(3, st.h.var + 5 * n)
        new = pull(f"{st.name}.hn", (st.b, st.h), (const(1.0, zv.dtype) - zv) * st.act(1, part(proj, 2, st.t.var) + r * lin) + zv * load(h, at))
        return [rec, z, new], [new]


@op("LSTM")
class LSTM(Recurrent):
    """Gates i, o, f, c: ``C' = f C + i g(c)``, ``H' = o h(C')``; peepholes P for i, o, f; ``input_forget`` couples f = 1 - i."""

    gates = 4
    states = 2
    defaults = ("Sigmoid", "Tanh", "Tanh")

    def step(self, node: Node, st: Step, proj: Buffer, state: list[Buffer]) -> tuple[list[Pull], list[Pull]]:
        h, c = state
        n = self.hidden(node)
        at = [st.b.var, st.h.var]
        rec = self.recurrent(st, h, 0, 4 * n, "r")
        cv = load(c, at)
        peep = get(st.ins, 7)

        def gate(g: int, cell: Expr | None = None) -> Expr:
            e = load(proj, [st.t.var, st.b.var, st.h.var + g * n]) + load(rec.buf, [st.b.var, st.h.var + g * n])
            return e if cell is None or peep is None else e + st.weight(7, st.h.var + g * n) * cell

        i = st.act(0, gate(0, cv))
        f = const(1.0, i.dtype) - i if int(node.attrs.get("input_forget", 0)) else st.act(0, gate(2, cv))
        cn = pull(f"{st.name}.cn", (st.b, st.h), f * cv + i * st.act(1, gate(3)))
        cnv = load(cn.buf, at)
        out = ACTIVATIONS[st.acts[2][0]][2](cnv, *st.acts[2][1:])
        hn = pull(f"{st.name}.hn", (st.b, st.h), st.act(0, gate(1, cnv)) * out)
        return [rec, cn, hn], [hn, cn]

    def numpy_step(self, node: Node, xw: Array, state: list[Array], r: Array, bias: Array, peep: Array | None, act: Any, h: int) -> list[Array]:
        s, c = state
        v = xw + s @ r.T + bias[: 4 * h] + bias[4 * h :]
        i, o, f, g = (v[:, k * h : (k + 1) * h] for k in range(4))
        if peep is not None:
            i, f = i + peep[:h] * c, f + peep[2 * h :] * c
        i = act(0, i)
        f = 1 - i if int(node.attrs.get("input_forget", 0)) else act(0, f)
        c = f * c + i * act(1, g)
        if peep is not None:
            o = o + peep[h : 2 * h] * c
        name, al, be = self.activations(node)[2]
        return [act(0, o) * NUMPY[name](c, al, be), c]


def _text(v: Any) -> str:
    return v.decode() if isinstance(v, bytes) else str(v)
