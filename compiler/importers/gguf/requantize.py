"""Weights of a language model other than the file's: quantized anew from the dequantized ones, or given by the caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from luthier.errors import QuantizationError
from luthier.importers.gguf.blocks import Grouped
from luthier.ir.ops.sparse_matmul import BlockSparse
from luthier.passes.quantize.quantize_weights import QuantizedWeight, fit_group, quantize

__all__ = ["Requantize", "Weights", "as_grouped", "permute_rows", "requantizer", "stack_blocks"]

Array = np.ndarray[Any, Any]
Weights = Mapping[str, QuantizedWeight | BlockSparse]
Requantize = Callable[[str, Callable[[], Array]], Grouped | BlockSparse | None]
GROUP = 64


def as_grouped(w: QuantizedWeight) -> Grouped:
    """The same weights with the fields of a file's blocks."""
    if w.zeros is None and w.zero != int(w.zero):  # 1 bit: -scale / 2 and scale / 2
        return Grouped(w.codes, w.bits, w.group, w.scales.astype(np.float32), 0, zeros=np.full(w.scales.shape, w.zero, np.float16))
    return Grouped(w.codes, w.bits, w.group, w.scales.astype(np.float32), int(w.zero), zeros=w.zeros)


def permute_rows(w: BlockSparse, order: Array) -> BlockSparse:
    """Row ``i`` of the result is row ``order[i]``."""
    count = np.diff(w.row_ptr)[order]
    picks = np.concatenate([np.arange(w.row_ptr[r], w.row_ptr[r + 1]) for r in order]) if len(order) else np.zeros(0, np.int64)
    ptr = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    return replace(w, row_ptr=ptr, cols=w.cols[picks], values=w.values[picks], scales=w.scales[picks], zeros=None if w.zeros is None else w.zeros[picks])


def stack_blocks(parts: list[BlockSparse]) -> BlockSparse | None:
    """Matrices one below the other; None when their forms differ or they have zero points of their own."""
    a = parts[0]
    if any((p.columns, p.block, p.bits, p.zero) != (a.columns, a.block, a.bits, a.zero) or p.zeros is not None for p in parts):
        return None
    starts = np.cumsum([0, *(len(p.cols) for p in parts)])
    ptr = np.concatenate([[0], *(p.row_ptr[1:] + s for p, s in zip(parts, starts, strict=False))]).astype(np.int32)
    cols, values, scales = (np.concatenate([getattr(p, k) for p in parts]) for k in ("cols", "values", "scales"))
    return replace(a, rows=sum(p.rows for p in parts), row_ptr=ptr, cols=cols, values=values, scales=scales)


def requantizer(precision: str | None, weights: Weights | None) -> Requantize | None:
    """What gives a tensor's new weights by its name and a function that dequantizes it; None where nothing changes.

    ``weights``: by tensor name, of :func:`luthier.passes.quantize.quantize_weights.quantize` or :func:`luthier.passes.quantize.prune_groups.prune_groups`; tensors that it lacks stay.
    ``precision``: ``w8``, ``w6`` .. ``w1`` or ``ternary``, by half-quadratic fitting (least squares for 8 bits and ternary, which are symmetric) in
    groups of 64. Raises QuantizationError."""
    if precision is not None and weights is not None:
        raise QuantizationError("precision and weights exclude each other")
    if weights is not None:
        given = dict(weights)

        def pick(name: str, values: Callable[[], Array]) -> Grouped | BlockSparse | None:
            w = given.get(name)
            return as_grouped(w) if isinstance(w, QuantizedWeight) else w

        return pick
    if precision is None:
        return None
    from luthier.quantization.precision import parse_precision

    want = parse_precision(precision)
    if want.kind != "weights":
        raise QuantizationError(f"language models are not made in precision {precision}", hint="choose w8, w6, w5, w4, w3, w2, w1 or ternary")
    method = "mse" if want.bits in (0, 8) else "hqq"

    def make(name: str, values: Callable[[], Array]) -> Grouped | BlockSparse | None:
        w = values()
        group = fit_group(w.shape[1], GROUP)
        if group is None:
            return None
        try:
            return as_grouped(quantize(w, want.bits, group, symmetric=want.bits == 8, method=method))
        except QuantizationError as error:
            raise error.at(node=name) from None

    return make
