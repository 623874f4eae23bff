"""Recovery of a pruned and quantized model on calibration data, in two stages (arXiv 2412.17560), on torch.

1. Block by block: the graph is cut into runs of nodes that hold a few products each. The values and scales of a run's products are tuned so
   that what leaves the run is as in the original model, with inputs from the runs already tuned. Rounding passes gradients straight through.
2. End to end: the values are fixed, and all scales are tuned together so that the model's outputs are as in the original.

Which blocks are kept does not change. Nodes that depend on no tuned weight are computed once in numpy; the others need a torch form in
``FORMS``, which covers transformers and multilayer perceptrons. Losses are normalised mean squares; the best parameters seen are kept, the
start included, so no stage is worse than its start on the calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from luthier.errors import QuantizationError, UnsupportedOperator
from luthier.ir.graph import Graph, Node, Value
from luthier.ir.op import lookup
from luthier.ir.ops.sparse_matmul import BlockSparse
from luthier.quantization.calibrate import Feed, Layer

__all__ = ["Recovery", "require_torch"]

Array = np.ndarray[Any, Any]
Env = dict[Value, Any]
RUN = 6  # products in a run


def require_torch() -> Any:
    """The module. Raises QuantizationError when it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise QuantizationError("recovery needs torch", hint="pip install 'luthier[recover]'") from error
    return torch


class Tuned:
    """The weights of one product as parameters: ``latent`` f32 [kept, block] are weights before rounding, ``scale`` f32 [kept]."""

    def __init__(self, torch: Any, layer: Layer, w: BlockSparse) -> None:
        self.torch, self.layer, self.w = torch, layer, w
        if w.zeros is not None:
            raise QuantizationError("recovery tunes symmetric values only", node=layer.name, op=layer.node.op)
        signed = w.values.astype(np.float32) - w.zero
        self.low, self.high = -w.zero, (1 << w.bits) - 1 - w.zero
        self.scale = torch.tensor(w.scales.astype(np.float32))
        self.start = torch.tensor(signed)
        self.code = torch.zeros(signed.shape)  # movement of the values, in steps
        rows = np.repeat(np.arange(w.rows), np.diff(w.row_ptr))
        count = -(-w.columns // w.block)
        self.place = torch.tensor(rows * count + w.cols.astype(np.int64))
        self.shape = (w.rows, count, w.block)

    def codes(self) -> Any:
        """Whole numbers whose gradient is that of ``start + code``."""
        q = self.torch.clamp(self.start + self.code, self.low, self.high)
        return q + (self.torch.round(q) - q).detach()

    def matrix(self) -> Any:
        """The weights [N, K]."""
        flat = self.torch.zeros(self.shape[0] * self.shape[1], self.shape[2])
        flat = flat.index_put((self.place,), self.codes() * self.scale[:, None])
        return flat.reshape(self.shape[0], -1)[:, : self.w.columns]

    def stored(self) -> BlockSparse:
        q = self.codes().detach().numpy()
        s = self.scale.detach().numpy().astype(self.w.scales.dtype)
        if not np.isfinite(s.astype(np.float32)).all():
            raise QuantizationError("tuning made a scale infinite", node=self.layer.name, op=self.layer.node.op)
        return replace(self.w, values=np.rint(q + self.w.zero).astype(np.uint8), scales=s)


class Recovery:
    """``layers``: the products by node; ``weights``: their start; ``data``: calibration batches. :meth:`weights` gives what was found.

    Raises QuantizationError without torch, UnsupportedOperator for a node without a torch form."""

    def __init__(self, graph: Graph, layers: Mapping[Node, Layer], weights: Mapping[Node, BlockSparse], data: Sequence[Feed], progress: bool = False) -> None:
        self.torch = require_torch()
        self.torch.manual_seed(0)
        self.graph, self.data, self.progress = graph, data, progress
        self.tuned = {n: Tuned(self.torch, layers[n], w) for n, w in weights.items()}
        self.torch_values: set[Value] = set()
        for n in graph.nodes:
            if n.op == "Shape":  # the same for all weights
                continue
            if n in self.tuned or any(v in self.torch_values for v in n.inputs if v is not None):
                self.torch_values.update(n.outputs)
                if n.op not in FORMS:
                    raise UnsupportedOperator(f"recovery has no torch form of {n.op}", node=n.name, op=n.op, hint="leave recover out, or exclude the products before it")
        self.fixed: list[Env] = []  # values that do not depend on tuned weights, a batch
        self.wanted: list[Env] = []  # the original's values, a batch
        for feed in data:
            env: Env = {v: feed[v.name] for v in graph.inputs}
            self._plain(env)
            self.fixed.append({v: a for v, a in env.items() if v not in self.torch_values})
            self.wanted.append(env)

    def weights(self) -> dict[Node, BlockSparse]:
        return {n: t.stored() for n, t in self.tuned.items()}

    # ------------------------------------------------------------ running

    def _plain(self, env: Env) -> None:
        """The original model: numpy where nothing is tuned, torch with its own weights elsewhere."""
        with self.torch.no_grad():
            for n in self.graph.nodes:
                self._node(n, env, None)

    def _node(self, n: Node, env: Env, tuned: Mapping[Node, Tuned] | None) -> None:
        args = [None if v is None else v.data if v.data is not None else env[v] for v in n.inputs]
        if n.op == "Shape":
            made: Sequence[Any] = (np.array(args[0].shape, np.int64)[int(n.attrs.get("start", 0)) : n.attrs.get("end")],)  # type: ignore[union-attr]
        elif not any(v in self.torch_values for v in n.outputs):
            o = lookup(n.op)
            assert o is not None
            made = o.reference(n, *args)
        else:
            if tuned is not None and n in tuned:
                t = tuned[n]
                args[1] = t.matrix() if t.layer.transposed else t.matrix().T
            made = (FORMS[n.op](self.torch, n, *[self._tensor(a) for a in args]),)
        for v, a in zip(n.outputs, made, strict=False):
            env[v] = a

    def _tensor(self, a: Any) -> Any:
        return self.torch.from_numpy(np.require(a, requirements=["C", "W"])) if isinstance(a, np.ndarray) else a

    def _runs(self) -> list[list[Node]]:
        """Nodes of the graph in order, ``RUN`` products each; nodes that are not tuned through belong to none."""
        runs: list[list[Node]] = [[]]
        count = 0
        for n in self.graph.nodes:
            if n in self.tuned:
                if count == RUN:
                    runs.append([])
                    count = 0
                count += 1
            if any(v in self.torch_values for v in n.outputs):
                runs[-1].append(n)
        return runs

    # ------------------------------------------------------------ stages

    def reconstruct_blocks(self, epochs: int) -> None:
        """Stage 1: values and scales, run by run."""
        student = [dict(e) for e in self.fixed]
        results = set(self.graph.outputs)
        for run in self._runs():
            inside = set(run)
            made = {v for n in run for v in n.outputs}
            later = {v for n in self.graph.nodes if n not in inside for v in n.inputs if v is not None} | results
            leaving = [v for v in made if v in later]
            mine = {n: self.tuned[n] for n in run if n in self.tuned}
            groups = [([t.code for t in mine.values()], 0.03), ([t.scale for t in mine.values()], None)]

            def loss(i: int, run: list[Node] = run, leaving: list[Value] = leaving, mine: Mapping[Node, Tuned] = mine, student: list[Env] = student) -> Any:
                env = dict(student[i])
                for n in run:
                    self._node(n, env, mine)
                return self._distance(env, self.wanted[i], leaving)

            self._descend(loss, groups, epochs)
            with self.torch.no_grad():
                for env in student:
                    for n in run:
                        self._node(n, env, mine)

    def tune_scales(self, epochs: int) -> None:
        """Stage 2: all scales, on the outputs of the model."""
        outputs = [v for v in self.graph.outputs if v in self.torch_values]
        nodes = [n for run in self._runs() for n in run]

        def loss(i: int) -> Any:
            env = dict(self.fixed[i])
            for n in nodes:
                self._node(n, env, self.tuned)
            return self._distance(env, self.wanted[i], outputs)

        self._descend(loss, [([t.scale for t in self.tuned.values()], None)], epochs)

    def _distance(self, got: Env, want: Env, values: Sequence[Value]) -> Any:
        total = 0.0
        for v in values:
            w = self._tensor(want[v])
            if w.is_floating_point():
                total = total + ((got[v] - w) ** 2).sum() / (w**2).sum().clamp_min(1e-12)
        return total

    def _descend(self, loss: Callable[[int], Any], groups: list[tuple[list[Any], float | None]], epochs: int) -> None:
        """Adam over the batches; a rate of None is a part of each tensor's mean magnitude. Keeps the best of the epochs' ends."""
        params = [p for ps, _ in groups for p in ps]
        for p in params:
            p.requires_grad_(True)
        rates = [{"params": [p], "lr": rate or 3e-3 * float(p.detach().abs().mean())} for ps, rate in groups for p in ps]
        adam = self.torch.optim.Adam(rates)
        schedule = self.torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, epochs * len(self.data)))

        def score() -> float:
            with self.torch.no_grad():
                return sum(float(loss(i)) for i in range(len(self.data)))

        best, kept = score(), [p.detach().clone() for p in params]
        for _ in range(epochs):
            for i in self.torch.randperm(len(self.data)).tolist():
                adam.zero_grad()
                loss(i).backward()
                adam.step()
                schedule.step()
            now = score()
            if now < best:
                best, kept = now, [p.detach().clone() for p in params]
        with self.torch.no_grad():
            for p, k in zip(params, kept, strict=True):
                p.copy_(k)
                p.requires_grad_(False)


# ---------------------------------------------------------------- torch forms


def _axes(n: Node, arg: Any) -> list[int] | None:
    return None if arg is None else [int(a) for a in np.asarray(arg).reshape(-1)]


def _reshape(torch: Any, n: Node, x: Any, shape: Any) -> Any:
    dims = [int(s) for s in np.asarray(shape)]
    return x.reshape([x.shape[i] if s == 0 and not n.attrs.get("allowzero", 0) else s for i, s in enumerate(dims)])


def _layer_norm(torch: Any, n: Node, x: Any, scale: Any, bias: Any = None) -> Any:
    axis = int(n.attrs.get("axis", -1)) % x.dim()
    y = torch.nn.functional.layer_norm(x, x.shape[axis:], None, None, float(n.attrs.get("epsilon", 1e-5))) * scale
    return y if bias is None else y + bias


def _gemm(torch: Any, n: Node, a: Any, b: Any, c: Any = None) -> Any:
    y = (a.T if n.attrs.get("transA", 0) else a) @ (b.T if n.attrs.get("transB", 0) else b) * float(n.attrs.get("alpha", 1.0))
    return y if c is None else y + c * float(n.attrs.get("beta", 1.0))


def _slice(torch: Any, n: Node, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    first, last = [int(v) for v in starts], [int(v) for v in ends]
    which = list(range(len(first))) if axes is None else [int(v) for v in axes]
    step = [1] * len(first) if steps is None else [int(v) for v in steps]
    cut: list[Any] = [slice(None)] * x.dim()
    for a, lo, hi, st in zip(which, first, last, step, strict=True):
        if st < 1:
            raise UnsupportedOperator("recovery has no torch form of a reversed Slice", node=n.name, op=n.op)
        cut[a % x.dim()] = slice(lo, hi, st)
    return x[tuple(cut)]


def _reduced(fn: Callable[..., Any]) -> Callable[..., Any]:
    def go(torch: Any, n: Node, x: Any, axes: Any = None) -> Any:
        which = _axes(n, axes) or list(range(x.dim()))
        return fn(torch, x, which, bool(n.attrs.get("keepdims", 1)))

    return go


def _unsqueeze(torch: Any, n: Node, x: Any, axes: Any) -> Any:
    rank = x.dim() + len(_axes(n, axes) or [])
    for a in sorted(v % rank for v in _axes(n, axes) or []):
        x = x.unsqueeze(a)
    return x


def _gelu(torch: Any, n: Node, x: Any) -> Any:
    how = n.attrs.get("approximate", "none")
    return torch.nn.functional.gelu(x, approximate=how.decode() if isinstance(how, bytes) else how)


FORMS: dict[str, Callable[..., Any]] = {
    "Add": lambda torch, n, a, b: a + b, "Sub": lambda torch, n, a, b: a - b, "Mul": lambda torch, n, a, b: a * b, "Div": lambda torch, n, a, b: a / b,
    "Pow": lambda torch, n, a, b: a**b, "Neg": lambda torch, n, a: -a, "Sqrt": lambda torch, n, a: torch.sqrt(a), "Exp": lambda torch, n, a: torch.exp(a),
    "Erf": lambda torch, n, a: torch.erf(a), "Tanh": lambda torch, n, a: torch.tanh(a), "Sigmoid": lambda torch, n, a: torch.sigmoid(a),
    "Relu": lambda torch, n, a: torch.relu(a), "Gelu": _gelu, "Identity": lambda torch, n, a: a, "Reciprocal": lambda torch, n, a: 1 / a,
    "MatMul": lambda torch, n, a, b: a @ b, "Gemm": _gemm, "Reshape": _reshape, "LayerNormalization": _layer_norm, "Slice": _slice, "Unsqueeze": _unsqueeze,
    "Transpose": lambda torch, n, x: x.permute([int(a) for a in n.attrs.get("perm") or range(x.dim() - 1, -1, -1)]),
    "Softmax": lambda torch, n, x: torch.softmax(x, int(n.attrs.get("axis", -1))),
    "Concat": lambda torch, n, *xs: torch.cat(xs, int(n.attrs["axis"])),
    "Expand": lambda torch, n, x, shape: x.expand(torch.broadcast_shapes(x.shape, [int(s) for s in shape])),
    "Squeeze": lambda torch, n, x, axes=None: x.squeeze() if axes is None else x.squeeze([int(a) for a in axes]),
    "Clip": lambda torch, n, x, lo=None, hi=None: torch.clamp(x, None if lo is None else lo.item(), None if hi is None else hi.item()),
    "Where": lambda torch, n, c, a, b: torch.where(c, a, b), "Max": lambda torch, n, a, b: torch.maximum(a, b),
    "Gather": lambda torch, n, x, i: torch.index_select(x, int(n.attrs.get("axis", 0)), i.reshape(-1) % x.shape[int(n.attrs.get("axis", 0))]).reshape(
        [*x.shape[: int(n.attrs.get("axis", 0)) % x.dim()], *i.shape, *x.shape[int(n.attrs.get("axis", 0)) % x.dim() + 1 :]]
    ),
    "ReduceSum": _reduced(lambda torch, x, a, keep: x.sum(a, keep)), "ReduceMean": _reduced(lambda torch, x, a, keep: x.mean(a, keep)),
    "ReduceL2": _reduced(lambda torch, x, a, keep: x.pow(2).sum(a, keep).sqrt()),
}  # fmt: skip
