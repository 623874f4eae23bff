"""TfIdfVectorizer on integers: counts of n-grams, written with basic operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luthier.ir.graph import Node, Value
from luthier.ir.op import op
from luthier.ir.ops.common import Array, need, shape_error, unsupported
from luthier.ir.ops.transformer import Composite, Steps

MOST = 1 << 24  # places
END = np.iinfo(np.int64).max


@op("TfIdfVectorizer")
class TfIdfVectorizer(Composite):
    """X [C] or [N, C] to [D] or [N, D]: how often each n-gram of ``pool_int64s`` occurs, at the place that ``ngram_indexes`` gives it; its
    elements may lie up to ``max_skip_count`` + 1 apart. Mode IDF: the weight of those that occur, TFIDF: weight times count."""

    def grams(self, node: Node) -> list[tuple[int, Array, Array]]:
        """(length, pool [G, length], places [G]) of the lengths that are counted."""
        pool = node.attrs.get("pool_int64s")
        if node.attrs.get("pool_strings") or pool is None:
            raise unsupported(node, "n-grams of strings are not supported: no target computes with them")
        starts = [int(v) for v in node.attrs["ngram_counts"]]
        places = np.array(node.attrs["ngram_indexes"], np.int64)
        if not len(places) or not 0 <= places.min() <= places.max() < MOST:
            raise shape_error(node, f"ngram_indexes must lie in 0 to {MOST - 1}")
        if not 0 <= int(node.attrs["max_skip_count"]) <= 256:
            raise unsupported(node, f"max_skip_count is {node.attrs['max_skip_count']}, at most 256 is supported")
        out, first = [], 0
        for k, (lo, hi) in enumerate(zip(starts, [*starts[1:], len(pool)], strict=True)):
            n = k + 1
            if not 0 <= lo <= hi <= len(pool) or (hi - lo) % n or first + (hi - lo) // n > len(places):
                raise shape_error(node, f"ngram_counts {starts} do not fit {len(pool)} elements and {len(places)} indexes")
            count = (hi - lo) // n
            if int(node.attrs["min_gram_length"]) <= n <= int(node.attrs["max_gram_length"]) and count:
                out.append((n, np.array(pool[lo:hi], np.int64).reshape(count, n), places[first : first + count]))
            first += count
        return out

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        x = need(node, 0)
        if x.rank not in (1, 2) or not x.dtype.is_int:
            raise shape_error(node, "TfIdfVectorizer takes [C] or [N, C] of integers")
        mode = node.attrs["mode"]
        mode = mode.decode() if isinstance(mode, bytes) else mode
        grams = self.grams(node)
        size = int(np.max(node.attrs["ngram_indexes"])) + 1
        rows = x if x.rank == 2 else s("Unsqueeze", x, s.const([0]))
        counts, places = [], []
        for n, pool, where in grams:
            total: Value | None = None
            for apart in range(1, 2 + (int(node.attrs["max_skip_count"]) if n > 1 else 0)):
                c = self.count(s, rows, pool, n, apart)
                total = c if total is None else s("Add", total, c)
            assert total is not None
            counts.append(total)
            places.append(where)
        zeros = s("Expand", s.const(0, np.float32), s("Concat", s.extent(rows, 0), s.const([1]), axis=0))
        found = s("Concat", *counts, zeros, axis=1)
        at = np.concatenate([*places, np.zeros(0, np.int64)])
        if len(np.unique(at)) == len(at):
            column = np.full(size, len(at))
            column[at] = np.arange(len(at))
            y = s("Gather", found, s.const(column), axis=1)
        else:  # n-grams that share a place are counted together
            y = s("MatMul", found, s.const(np.concatenate([at[:, None] == np.arange(size), np.zeros((1, size), bool)]), np.float32))
        if mode == "IDF":
            y = s("Min", y, s.const(1, np.float32))
        if mode != "TF":
            weights = node.attrs.get("weights")
            factors = np.ones(size)
            if weights is not None:
                factors[np.asarray(node.attrs["ngram_indexes"])[: len(weights)]] = weights
            y = s("Mul", y, s.const(factors, np.float32))
        return [y if x.rank == 2 else s("Squeeze", y, s.const([0]))]

    def count(self, s: Steps, rows: Value, pool: Array, n: int, apart: int) -> Value:
        """[N, G]: occurrences with elements ``apart`` places from each other."""
        same: Value | None = None
        for j in range(n):
            end = -(n - 1 - j) * apart or END
            part = s("Slice", rows, s.const([j * apart]), s.const([end]), s.const([1]))
            equal = s("Equal", s("Unsqueeze", part, s.const([2])), s.const(pool[:, j], rows.dtype.numpy))
            same = equal if same is None else s("And", same, equal)
        assert same is not None
        return s("ReduceSum", s("Cast", same, to=1), s.const([1]), keepdims=0)
