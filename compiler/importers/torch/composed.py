"""Operators written with others where torch has no decomposition that can be traced.

Running extremes, most frequent elements, losses, histograms, bags of embeddings, adaptive pooling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from luthier.importers.torch.emitter import decomposed

Tensor = torch.Tensor


def _reduced(v: Tensor, reduction: int) -> Tensor:
    return v if reduction == 0 else v.mean() if reduction == 1 else v.sum()


# ---------------------------------------------------------------- running


def running(x: Tensor, dim: int, join: Callable[[Tensor, Tensor], Tensor], neutral: Any) -> Tensor:
    """Prefixes of an associative ``join`` by doubling distances: log2(n) steps."""
    n, step = x.shape[dim], 1
    while step < n:
        shape = list(x.shape)
        shape[dim] = step
        before = torch.cat([torch.full(shape, neutral, dtype=x.dtype), x.narrow(dim, 0, n - step)], dim)
        x, step = join(before, x), 2 * step
    return x


def _running_extreme(name: str, join: Callable[[Tensor, Tensor], Tensor]) -> None:
    @decomposed(name)
    def rule(x: Tensor, dim: int) -> Any:
        if x.dim() == 0:
            return x.clone(), torch.zeros_like(x, dtype=torch.int64)
        if not x.is_floating_point():
            wide = x.to(torch.int64)
            info = torch.iinfo(torch.int64)
            best = running(wide, dim, join, info.min if name == "cummax" else info.max)
            hit = wide == best
        else:
            best = running(x, dim, join, -math.inf if name == "cummax" else math.inf)
            hit = (x == best) | (torch.isnan(x) & torch.isnan(best))
        shape = [1] * x.dim()
        shape[dim] = -1
        at = torch.arange(x.shape[dim]).reshape(shape)
        return best.to(x.dtype), running(torch.where(hit, at, 0), dim, torch.maximum, 0)


_running_extreme("cummax", torch.maximum)
_running_extreme("cummin", torch.minimum)


@decomposed("logcumsumexp")
def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    return running(x, dim, torch.logaddexp, -math.inf) if x.dim() else x.clone()


@decomposed("mode")
def mode(x: Tensor, dim: int = -1, keepdim: bool = False) -> Any:
    """The most frequent element, the least of equals, and its last position."""
    if x.dim() == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    y = x.movedim(dim, -1)
    values = y.to(torch.uint8) if y.dtype == torch.bool else y
    times = (values.unsqueeze(-1) == values.unsqueeze(-2)).sum(-1)
    most = times == times.amax(-1, keepdim=True)
    high = math.inf if values.is_floating_point() else torch.iinfo(values.dtype).max
    best = torch.where(most, values, high).amin(-1, keepdim=True)
    at = torch.where(values == best, torch.arange(y.shape[-1]), -1).amax(-1, keepdim=True)
    found = best.to(x.dtype).movedim(-1, dim), at.movedim(-1, dim)
    return found if keepdim else tuple(v.squeeze(dim) for v in found)


def _middle(x: Tensor, dim: int, keepdim: bool, skip: bool) -> Any:
    """The lower middle of the sorted elements and where it stands; NaN, unless skipped, where there is one."""
    if x.dim() == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    values, where = torch.sort(x, dim=dim, stable=True)
    n = x.shape[dim]
    if not x.is_floating_point():
        k = torch.full_like(values.narrow(dim, 0, 1), (n - 1) // 2, dtype=torch.int64)
    else:
        numbers = (~torch.isnan(x)).sum(dim, keepdim=True)
        middle = torch.clamp((numbers - 1) // 2, min=0)
        k = middle if skip else torch.where(numbers == n, (n - 1) // 2, torch.clamp(numbers, max=n - 1))
    found = values.gather(dim, k), where.gather(dim, k)
    return found if keepdim else tuple(v.squeeze(dim) for v in found)


@decomposed("median")
def median(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    return _middle(x.reshape(-1), 0, False, False)[0] if dim is None else _middle(x, dim, keepdim, False)


@decomposed("nanmedian")
def nanmedian(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    return _middle(x.reshape(-1), 0, False, True)[0] if dim is None else _middle(x, dim, keepdim, True)


# ---------------------------------------------------------------- writes into a copy


@decomposed("diagonal_scatter")
def diagonal_scatter(x: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    y = x.clone()
    y.diagonal(offset, dim1, dim2).copy_(src)
    return y


@decomposed("as_strided_scatter")
def as_strided_scatter(x: Tensor, src: Tensor, size: Any, stride: Any, storage_offset: Any = None) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    y.as_strided(size, stride, storage_offset).copy_(src)
    return y


@decomposed("index_reduce")
def index_reduce(x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Tensor:
    shape = [1] * source.dim()
    if source.dim():
        shape[dim] = -1
    return torch.scatter_reduce(x, dim, index.reshape(shape).expand(source.shape), source, reduce, include_self=include_self)


@decomposed("embedding_renorm")
def embedding_renorm(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    at = indices.reshape(-1)
    rows = weight[at]
    norms = torch.linalg.vector_norm(rows, norm_type, dim=-1, keepdim=True)
    return weight.index_put((at,), torch.where(norms > max_norm, rows * (max_norm / (norms + 1e-7)), rows))


# ---------------------------------------------------------------- elements


@decomposed("angle")
def angle(x: Tensor) -> Tensor:
    y = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    return torch.where(torch.isnan(y), y, torch.where(y < 0, math.pi, 0.0).to(y.dtype))


@decomposed("frexp")
def frexp(x: Tensor) -> Any:
    """Of f32, by its bits; subnormal numbers are scaled into the normal range first."""
    low = x.abs() < 2.0**-126
    bits = torch.where(low, x * 2.0**25, x).view(torch.int32)
    same = (x == 0) | torch.isinf(x) | torch.isnan(x)
    exponent = ((bits >> 23) & 255) - 126 - torch.where(low, 25, 0).to(torch.int32)
    mantissa = ((bits & -2139095041) | (126 << 23)).view(torch.float32)
    return torch.where(same, x, mantissa), torch.where(same, 0, exponent).to(torch.int32)


@decomposed("nextafter")
def nextafter(x: Tensor, other: Tensor) -> Tensor:
    """Of f32: one step of the bits as an integer, up where the size grows."""
    a, b = torch.broadcast_tensors(x, other)
    away = torch.where((b > a) == (a > 0), 1, -1).to(torch.int32)
    stepped = (a.clone().view(torch.int32) + away).view(torch.float32)
    least = torch.copysign(torch.full_like(b, 2.0**-149), b)
    y = torch.where(a == 0, least, stepped)
    return torch.where(a == b, b, torch.where(torch.isnan(a) | torch.isnan(b), math.nan, y))


@decomposed("lcm")
def lcm(a: Tensor, b: Tensor) -> Tensor:
    g = torch.gcd(a, b)
    return torch.where(g == 0, 0, (torch.div(a, torch.where(g == 0, 1, g), rounding_mode="trunc") * b).abs()).to(g.dtype)


@decomposed("combinations")
def combinations(x: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    rows = list(choose(range(x.shape[0]), r))
    return x[torch.tensor(rows, dtype=torch.int64).reshape(len(rows), r)] if r else x.new_zeros(0)


@decomposed("bilinear")
def bilinear(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = (torch.matmul(a.unsqueeze(-2).unsqueeze(-2), weight).squeeze(-2) * b.unsqueeze(-2)).sum(-1)
    return y if bias is None else y + bias


# ---------------------------------------------------------------- losses


@decomposed("margin_ranking_loss")
def margin_ranking_loss(a: Tensor, b: Tensor, target: Tensor, margin: float = 0.0, reduction: int = 1) -> Tensor:
    return _reduced(torch.clamp(-target * (a - b) + margin, min=0), reduction)


@decomposed("hinge_embedding_loss")
def hinge_embedding_loss(x: Tensor, target: Tensor, margin: float = 1.0, reduction: int = 1) -> Tensor:
    far = torch.where(target == 1, 0, torch.clamp(margin - x, min=0))
    return _reduced(far + torch.where(target == -1, 0, x), reduction)


@decomposed("multilabel_margin_loss")
def multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """Labels count up to the first -1 of a row; the others' scores are to lie one below each of theirs."""
    single = x.dim() < 2
    y, t = x.reshape(1, -1) if single else x, target.reshape(1, -1) if single else target
    n = y.shape[-1]
    counts = torch.cumsum((t < 0).to(torch.int64), -1) == 0
    label = torch.where(counts, t, 0)
    is_label = ((label.unsqueeze(-1) == torch.arange(n)) & counts.unsqueeze(-1)).any(-2)
    z = 1 - y.gather(-1, label).unsqueeze(-1) + y.unsqueeze(-2)
    z = torch.where(counts.unsqueeze(-1) & ~is_label.unsqueeze(-2), torch.clamp(z, min=0), 0)
    v = z.sum((-1, -2)) / n
    return _reduced(v.reshape(x.shape[:-1]), reduction)


# ---------------------------------------------------------------- histograms and bags


def _bins(x: Tensor, bins: int, low: Any, high: Any, weight: Tensor | None) -> Tensor:
    at = torch.clamp(torch.floor((x - low) / (high - low) * bins).to(torch.int64), 0, bins - 1)
    inside = (x >= low) & (x <= high)
    return torch.zeros(bins, dtype=x.dtype).index_add(0, at, torch.where(inside, 1.0 if weight is None else weight, 0.0).to(x.dtype))


def _range(x: Tensor, low: Any, high: Any, grow: float) -> tuple[Any, Any]:
    """The range that is given, or of the elements where none is; one of no width grows both ways."""
    if low != high:
        return low, high
    if x.numel() == 0:
        return low - grow, high + grow
    a, b = (x.amin(), x.amax()) if low == 0 else (torch.full((), low, dtype=x.dtype), torch.full((), high, dtype=x.dtype))
    flat = a == b
    return torch.where(flat, a - grow, a), torch.where(flat, b + grow, b)


@decomposed("histc")
def histc(x: Tensor, bins: int = 100, min: Any = 0, max: Any = 0) -> Tensor:
    y = x.reshape(-1)
    y = y if y.is_floating_point() else y.to(torch.float32)
    return _bins(y, bins, *_range(y, min, max, 1.0), None).to(x.dtype)


@decomposed("histogram")
def histogram(x: Tensor, bins: Any = 100, *, range: Any = None, weight: Tensor | None = None, density: bool = False) -> Any:
    y = x.reshape(-1)
    w = None if weight is None else weight.reshape(-1)
    if isinstance(bins, Tensor):
        edges, n = bins, bins.shape[0] - 1
        at = torch.clamp(torch.where(y == edges[-1], n - 1, torch.bucketize(y, edges, right=True) - 1), 0, n - 1)
        inside = (y >= edges[0]) & (y <= edges[-1])
        counts = torch.zeros(n, dtype=x.dtype).index_add(0, at, torch.where(inside, 1.0 if w is None else w, 0.0).to(x.dtype))
    else:
        low, high = _range(y, *(range or (0.0, 0.0)), 0.5)
        edges = torch.lerp(torch.as_tensor(low, dtype=x.dtype), torch.as_tensor(high, dtype=x.dtype), torch.linspace(0, 1, bins + 1, dtype=x.dtype))
        counts = _bins(y, bins, low, high, w)
    return (counts / (counts.sum() * edges.diff()) if density else counts), edges


@decomposed("_embedding_bag_forward_only", "_embedding_bag")
def embedding_bag(
    weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False, mode: int = 0, sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False, padding_idx: int = -1,
) -> Any:
    """Sums (0), means (1) or greatest elements (2) of the rows of each bag; without rows zeros. Indices of ``padding_idx`` do not count."""
    starts = offsets[:-1] if include_last_offset else offsets
    bags, n = starts.shape[0], indices.shape[0]
    bag = torch.bucketize(torch.arange(n), starts.to(torch.int64), right=True) - 1
    counts = (indices != padding_idx).to(torch.int64) if padding_idx >= 0 else torch.ones_like(indices, dtype=torch.int64)
    rows = weight[indices]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    size = torch.zeros(bags, dtype=torch.int64).index_add(0, bag, counts)
    at = bag.unsqueeze(-1).expand(rows.shape)
    if mode == 2:
        low = torch.full((bags, weight.shape[1]), -math.inf, dtype=weight.dtype)
        best = low.scatter_reduce(0, at, torch.where(counts.unsqueeze(-1) > 0, rows, -math.inf), "amax")
        y = torch.where(size.unsqueeze(-1) > 0, best, 0.0)
    else:
        y = torch.zeros(bags, weight.shape[1], dtype=weight.dtype).index_add(0, bag, rows * counts.unsqueeze(-1).to(weight.dtype))
        if mode == 1:
            y = y / torch.clamp(size, min=1).unsqueeze(-1).to(weight.dtype)
    return y, bag.to(indices.dtype), size.to(indices.dtype), torch.zeros_like(y, dtype=indices.dtype) if mode == 2 else torch.zeros(bags, dtype=indices.dtype)


# ---------------------------------------------------------------- pooling


def _adaptive_max(n: int) -> None:
    pool = (torch.nn.functional.max_pool1d, torch.nn.functional.max_pool2d, torch.nn.functional.max_pool3d)[n - 1]

    @decomposed(f"adaptive_max_pool{n}d")
    def rule(x: Tensor, output_size: Any) -> Any:
        """Windows from floor(k h / m) to ceil((k + 1) h / m); positions count through the last ``n`` dimensions."""
        want, have = [output_size] if isinstance(output_size, int) else list(output_size), list(x.shape[-n:])
        if all(h % w == 0 for h, w in zip(have, want, strict=True)):
            return pool(x, [h // w for h, w in zip(have, want, strict=True)], return_indices=True)
        at = torch.zeros([1] * (2 * n), dtype=torch.int64)
        for k, (h, w) in enumerate(zip(have, want, strict=True)):
            ends = [(i * h // w, -((i + 1) * -h // w)) for i in range(w)]
            taps = max(b - a for a, b in ends)
            shape = [1] * (2 * n)
            shape[k], shape[n + k] = w, taps
            at = at * h + torch.tensor([min(a + t, b - 1) for a, b in ends for t in range(taps)]).reshape(shape)
        at = at.flatten(-n)
        windows = x.flatten(-n).index_select(-1, at.reshape(-1)).reshape(*x.shape[:-n], *at.shape)
        best = windows.argmax(-1, keepdim=True)
        return windows.gather(-1, best).squeeze(-1), at.expand(windows.shape).gather(-1, best).squeeze(-1)


for _n in (1, 2, 3):
    _adaptive_max(_n)
