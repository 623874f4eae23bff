"""prune_groups: which blocks of a weight matrix are kept, and their quantized values (after arXiv 2412.17560).

A block is ``1 x block`` weights of one row. Its saliency is what dropping it costs: ``sum w[j]^2 E[x[j]^2]`` with the second moments of the
layer's inputs, or, where the columns' correlations are known, ``sum w[j]^2 / inv(H)[j, j]`` (optimal brain surgeon, as SparseGPT uses it).

``nearest`` rounds what is left. ``compensate`` chooses blocks and values together, by what the layer's outputs lose
(:mod:`luthier.passes.quantize.alternate_directions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import numpy as np

from luthier.errors import QuantizationError
from luthier.ir.builder import Names, infer_node
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.ir.ops.sparse_matmul import BLOCKS, LEVELS, BlockSparse
from luthier.ir.ops.two_of_four import TwoOfFour
from luthier.passes.quantize.alternate_directions import ColumnMoments, fit_kept, round_columns
from luthier.passes.quantize.weight_grid import Array

__all__ = ["SCOPES", "prune_groups", "saliency", "select_groups", "sparsify_products"]

SCOPES = ("layer", "row")
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a block's largest magnitude, tried as the end of its range
DENSE_ACT = 32  # columns of activations that share a scale where a layer that kept most of its blocks runs dense


def saliency(w: Array, block: int, moments: Array | None = None) -> Array:
    """[N, ceil(K / block)]. ``w`` f32 [N, K]; ``moments``: E[x^2] of every column [K] (None: all equal)."""
    n, k = w.shape
    each = np.square(w.astype(np.float64))
    if moments is not None:
        each = each * np.asarray(moments, np.float64)
    padded = np.zeros((n, -(-k // block) * block))
    padded[:, :k] = each
    return np.asarray(padded.reshape(n, -1, block).sum(2))


def select_groups(scores: Array, sparsity: float, scope: str = "layer") -> Array:
    """Blocks to keep, bool like ``scores`` [N, blocks]: those of the largest saliency, ``round((1 - sparsity) * count)`` of them in the whole
    matrix or in every row. Raises QuantizationError."""
    if not 0 <= sparsity <= 1:
        raise QuantizationError(f"a sparsity of {sparsity} is not in 0..1")
    if scope not in SCOPES:
        raise QuantizationError(f"unknown scope {scope!r}", hint=f"choose one of {', '.join(SCOPES)}")
    if not np.isfinite(scores).all():
        raise QuantizationError("saliencies are NaN or infinite", hint="check the weights and the calibration data")
    s = scores.reshape(1, -1) if scope == "layer" else scores
    kept = round((1 - sparsity) * s.shape[1])
    order = np.argsort(-s, axis=1, kind="stable")[:, :kept]
    keep = np.zeros(s.shape, bool)
    np.put_along_axis(keep, order, True, 1)
    return keep.reshape(scores.shape)


def prune_groups(
    weight: Array, sparsity: float, block: int = 16, bits: int = 4, hessian: Array | None = None, method: str = "nearest", scope: str = "layer",
    moments: Array | None = None, cross: Array | None = None, rows: int | None = None,
) -> BlockSparse:  # fmt: skip
    """``weight`` f32 [N, K] with ``sparsity`` of its blocks dropped and the others in ``bits``.

    ``hessian``: ``X.T X`` [K, K] of the layer's inputs or any multiple; ``moments``: their mean squares [K] where that is all that is known
    (neither: magnitudes decide). ``method``: ``nearest`` or ``compensate`` (needs ``hessian``). ``scope``: the share is kept in the whole ``layer``
    or in every ``row``. ``cross``: ``X.T Y`` [K, N] of the outputs Y that the layer should have, the same multiple as ``hessian`` (``compensate``
    only; None: those of ``weight``); ``rows``: samples behind both. Raises QuantizationError."""
    w = np.array(weight, np.float32)
    if w.ndim != 2 or not w.size or not np.isfinite(w).all():
        raise QuantizationError(f"weights must be a matrix of numbers; given {list(w.shape)}" + ("" if np.isfinite(w).all() else " with NaN or infinite ones"))
    if block not in BLOCKS or bits not in (4, 8):
        raise QuantizationError(f"blocks of {block} values of {bits} bits are not supported", hint="choose 8, 16 or 32 values of 4 or 8 bits")
    if method not in ("nearest", "compensate"):
        raise QuantizationError(f"unknown method {method!r}", hint="choose nearest or compensate")
    if method == "compensate" and hessian is None:
        raise QuantizationError("compensation needs activation statistics", hint="give calibration data")
    n, k = w.shape
    for given, want in ((hessian, (k, k)), (moments, (k,)), (cross, (k, n))):
        if given is not None and np.shape(given) != want:
            raise QuantizationError(f"activation statistics of {np.shape(given)} do not fit {k} columns")
    if method == "nearest":
        seen = np.diagonal(hessian) if hessian is not None else moments
        keep = select_groups(saliency(w, block, seen), sparsity, scope)
        scales, codes = _nearest(w, keep, block, bits, seen)
    else:
        assert hessian is not None
        keep, scales, codes = _compensated(w, sparsity, block, bits, scope, ColumnMoments(hessian, cross, rows))
    ptr = np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32)
    half = 1 << (bits - 1)
    return BlockSparse(n, k, block, bits, ptr, np.nonzero(keep)[1].astype(np.int32), (codes[keep] + half).astype(np.uint8), scales[keep], None, half)


def _scale(cut: Array, bits: int, importance: Array) -> Array:
    """Scales f16 [N] of blocks ``cut`` [N, block]: the range, with the largest magnitude at its longer end, that loses least."""
    half = 1 << (bits - 1)
    top = cut[np.arange(len(cut)), np.abs(cut).argmax(1)]
    best = np.full(len(cut), np.inf)
    out = np.zeros(len(cut), np.float16)
    for f in SHRINK:
        s = (top * f / -half).astype(np.float16)
        wide = s.astype(np.float32)[:, None]
        near = np.clip(np.rint(np.divide(cut, wide, out=np.zeros_like(cut), where=wide != 0)), -half, half - 1) * wide
        loss = (np.square(near - cut) * importance).sum(1)
        better = loss < best
        best, out = np.where(better, loss, best), np.where(better, s, out)
    return out


def _codes(cut: Array, scale: Array, bits: int) -> Array:
    half, wide = 1 << (bits - 1), scale.astype(np.float32)[..., None]
    return np.asarray(np.clip(np.rint(np.divide(cut, wide, out=np.zeros_like(cut), where=wide != 0)), -half, half - 1))


def _nearest(w: Array, keep: Array, block: int, bits: int, moments: Array | None) -> tuple[Array, Array]:
    n, k = w.shape
    v = np.zeros((n, keep.shape[1] * block), np.float32)
    v[:, :k] = w
    imp = np.zeros(v.shape[1], np.float32)
    imp[:k] = 1 if moments is None else moments
    cut = v.reshape(-1, block)
    scales = _scale(cut, bits, np.tile(imp.reshape(-1, block), (n, 1)))
    return scales.reshape(keep.shape), _codes(cut, scales, bits).reshape(*keep.shape, block)


def _compensated(w: Array, sparsity: float, block: int, bits: int, scope: str, stats: ColumnMoments) -> tuple[Array, Array, Array]:
    """(blocks that are kept [N, blocks], scales [N, blocks], codes [N, blocks, block])."""
    n, k = w.shape
    found: list[Array] = []

    def select(scores: Array, share: float) -> Array:
        padded = np.zeros((n, -(-k // block) * block), np.float32)
        padded[:, :k] = scores
        found[:] = [select_groups(padded.reshape(n, -1, block).sum(2), sparsity * share, scope)]
        return np.repeat(found[0], block, 1)[:, :k]

    aim = stats.aim(w)
    fitted, each = fit_kept(aim, stats, select)
    keep = found[0]
    scales, codes = _nearest(fitted, keep, block, bits, stats.moments)
    every = np.repeat(scales, block, 1)[:, :k]
    codes.reshape(n, -1)[:, :k] = round_columns(fitted, aim, each, every, stats, lambda x, s: _codes(x[..., None], s, bits)[..., 0])
    return keep, scales, codes


def sparsify_products(graph: Graph, weights: Mapping[Node, BlockSparse | TwoOfFour], act_levels: int = LEVELS) -> bool:
    """In place; True when something changed. Before: ``y = MatMul(x, const f32 [K, N])``, or Gemm with bias. After:
    ``y = luthier::SparseMatMul(x, row_ptr, cols, values, scales, zeros, bias)``, or ``luthier::TwoOfFourMatMul(x, bytes, scales, bias)``; a bias that
    is no vector is added afterwards."""
    if not weights:
        return False
    names = Names(graph)
    nodes: list[Node] = []
    for node in graph.nodes:
        w = weights.get(node)
        nodes += [node] if w is None else _product(node, w, names, act_levels)
    graph.nodes = nodes
    return True


def _product(n: Node, w: BlockSparse | TwoOfFour, names: Names, act_levels: int) -> list[Node]:
    def const(part: str, data: Array) -> Value:
        return Value.const(names.fresh(f"{n.name}.{part}"), np.ascontiguousarray(data))

    if isinstance(w, TwoOfFour):
        op, rows, parts, attrs = "luthier::TwoOfFourMatMul", len(w.values), ("values", "scales"), w.attrs(gcd(DENSE_ACT, w.group) if act_levels else 0)
    else:
        op, rows, parts = "luthier::SparseMatMul", w.rows, ("rows", "columns", "values", "scales", "zeros")  # type: ignore[assignment]
        attrs = w.attrs(act_levels, DENSE_ACT if act_levels else 0)
    ins: list[Value | None] = [n.inputs[0], *(None if a is None else const(p, a) for p, a in zip(parts, w.arrays()))]
    bias, beta, out = n.input(2), float(n.attrs.get("beta", 1.0)), n.outputs[0]
    inside = bias is not None and bias.data is not None and bias.data.size == rows and bias.rank <= 2
    if bias is None or beta == 0 or inside:
        if inside and beta != 0:
            assert bias is not None and bias.data is not None
            ins.append(const("bias", bias.data.reshape(-1) * bias.data.dtype.type(beta)))
        return [infer_node(Node(op, tuple(ins), (out,), dict(attrs), n.name, n.source))]
    product = Value(names.fresh(f"{n.name}.product"), TensorType(out.dtype, out.shape))
    done = [infer_node(Node(op, tuple(ins), (product,), dict(attrs), n.name, n.source))]
    if beta != 1.0:
        scaled = Value(names.fresh(f"{n.name}.beta"), bias.type)
        done.append(infer_node(Node("Mul", (bias, const("factor", np.array(beta, bias.dtype.numpy))), (scaled,), {}, f"{n.name}.beta", n.source)))
        bias = scaled
    return [*done, infer_node(Node("Add", (product, bias), (out,), {}, f"{n.name}.add", n.source))]
