"""Rules of products, convolutions, normalisations, pooling, attention, resizing, losses and recurrent networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.importers.torch.emitter import Emitter, Kind, aten, writer
from luthier.importers.torch.reductions import count, norm
from luthier.importers.torch.shapes import pad as pad_rule
from luthier.ir import dtypes as D
from luthier.ir.dtypes import i64
from luthier.ir.errors import UnsupportedOperator
from luthier.ir.expr import as_expr
from luthier.ir.graph import Value

# ---------------------------------------------------------------- products


def product(e: Emitter, a: Value, b: Value) -> Value:
    """MatMul, of integers too."""
    if a.dtype.is_bool:
        return e.cast(e.op("MatMul", e.cast(a, D.i32), e.cast(b, D.i32)), D.boolean)
    return e.op("MatMul", a, b)


@aten("linalg_vecdot")
def vecdot(e: Emitter, x: Value, y: Value, dim: int = -1) -> Value:
    p = e.op("Mul", *e.promoted(Kind.DEFAULT, x, y))
    return e.reduce("ReduceSum", p, [dim], False)


@aten("mm", "bmm", "matmul", "mv", "dot", "vdot")
def matmul(e: Emitter, x: Value, mat2: Value | None = None, other: Value | None = None, vec: Value | None = None, tensor: Value | None = None) -> Value:
    b = next(v for v in (mat2, other, vec, tensor) if v is not None)
    return product(e, x, b)


@aten("linear")
def linear(e: Emitter, x: Value, weight: Value, bias: Value | None = None) -> Value:
    w = weight if weight.rank == 1 else e.transpose(weight, [1, 0])
    y = product(e, x, w)
    return y if bias is None else e.op("Add", y, bias)


def _scaled(e: Emitter, v: Value, by: Any) -> Value:
    return v if by == 1 else e.op("And" if v.dtype.is_bool else "Mul", v, e.number(by, v.dtype))


def _added(name: str, first: str, second: str) -> None:
    @aten(name)
    def rule(e: Emitter, x: Value, beta: Any = 1, alpha: Any = 1, **of: Any) -> Value:
        a, b = of[first], of[second]
        if name == "addr":
            p = outer(e, a, b)
        else:
            p = product(e, a, b)
        if name == "addbmm":
            p = e.reduce("ReduceSum", p, [0], False)
        p = _scaled(e, p, alpha)
        p = e.cast(p, e.dtype)
        if beta == 0:
            return e.expand(p, e.shape)
        x = e.cast(x, p.dtype)
        return e.op("Or", x, p) if p.dtype.is_bool else e.op("Add", _scaled(e, x, beta), p)


for _n, _a, _b in (("addmm", "mat1", "mat2"), ("addmv", "mat", "vec"), ("addbmm", "batch1", "batch2"), ("baddbmm", "batch1", "batch2"), ("addr", "vec1", "vec2")):
    _added(_n, _a, _b)


@aten("transformers::grouped_mm_fallback", "_grouped_mm")
def grouped_mm(
    e: Emitter, x: Value, weight: Value | None = None, mat2: Value | None = None, offs: Value | None = None, bias: Value | None = None,
    out_dtype: Any = None,
) -> Value:
    """Row t of ``x`` [S, K] times the matrix [K, N] of the group that it lies in; group g ends before row offs[g], later rows give zeros."""
    w = weight if weight is not None else mat2
    assert w is not None
    if x.rank != 2 or w.rank != 3 or offs is None or bias is not None:
        raise UnsupportedOperator("grouped products are supported of rows by matrices [groups, K, N], without bias")
    rows = e.op("Range", e.number(0, i64), e.number(x.shape[0], i64), e.number(1, i64))
    past = e.op("LessOrEqual", e.cast(offs, i64), e.reshape(rows, [x.shape[0], 1]))
    group = e.reduce("ReduceSum", e.cast(past, i64), [1], True)
    y = e.op("luthier::ExpertProduct", x, group, e.transpose(w, [0, 2, 1]))
    y = e.reshape(y, [x.shape[0], w.shape[2]])
    return e.op("Where", e.op("Less", group, e.number(w.shape[0], i64)), y, e.number(0, y.dtype))


@aten("outer")
def outer(e: Emitter, x: Value, vec2: Value) -> Value:
    a, b = e.promoted(Kind.DEFAULT, x, vec2)
    a = e.reshape(a, [a.shape[0], 1])
    return e.op("And" if a.dtype.is_bool else "Mul", a, b)


@aten("inner")
def inner(e: Emitter, x: Value, other: Value) -> Value:
    if x.rank == 0 or other.rank == 0:
        return e.op("Mul", x, other)
    r = other.rank
    if r > 2:
        y = product(e, x, e.transpose(e.reshape(other, [-1, other.shape[-1]]), [1, 0]))
        return e.reshape(y, e.out.shape)
    return product(e, x, e.transpose(other, list(reversed(range(r)))))


@aten("einsum")
def einsum(e: Emitter, equation: str, tensors: Sequence[Value], path: Any = None) -> Value:
    return e.op("Einsum", *tensors, equation=equation.replace(" ", ""))


@aten("tensordot")
def tensordot(e: Emitter, x: Value, other: Value, dims_self: Sequence[int], dims_other: Sequence[int]) -> Value:
    """Dimensions of extent 1 stretch to the other operand's: they are summed first."""
    for da, db in zip(dims_self, dims_other, strict=True):
        if x.shape[da] is not other.shape[db]:
            one = as_expr(1)
            x = e.reduce("ReduceSum", x, [da], True) if other.shape[db] is one else x
            other = e.reduce("ReduceSum", other, [db], True) if x.shape[da] is one else other
    da, db = [d % x.rank for d in dims_self], [d % other.rank for d in dims_other]
    fa, fb = [k for k in range(x.rank) if k not in da], [k for k in range(other.rank) if k not in db]
    inner_ = math.prod([x.shape[k] for k in da], start=as_expr(1))
    a = e.reshape(e.transpose(x, [*fa, *da]), [math.prod([x.shape[k] for k in fa], start=as_expr(1)), inner_])
    b = e.reshape(e.transpose(other, [*db, *fb]), [inner_, math.prod([other.shape[k] for k in fb], start=as_expr(1))])
    return e.reshape(product(e, a, b), [*(x.shape[k] for k in fa), *(other.shape[k] for k in fb)])


@aten("kron")
def kron(e: Emitter, x: Value, other: Value) -> Value:
    a, b = e.promoted(Kind.DEFAULT, x, other)
    r = max(a.rank, b.rank)
    sa, sb = [*[as_expr(1)] * (r - a.rank), *a.shape], [*[as_expr(1)] * (r - b.rank), *b.shape]
    wide = e.reshape(a, [v for n in sa for v in (n, 1)])
    tall = e.reshape(b, [v for n in sb for v in (1, n)])
    return e.reshape(e.op("And" if a.dtype.is_bool else "Mul", wide, tall), e.out.shape)


@aten("linalg_det")
def det(e: Emitter, x: Value | None = None, A: Value | None = None) -> Value:
    return e.op("Det", x if x is not None else A)


@aten("cross", "linalg_cross")
def cross(e: Emitter, x: Value, other: Value, dim: int | None = -1) -> Value:
    if dim is None:
        dim = next(k for k, n in enumerate(e.out.shape) if n == 3)
    a, b = (e.expand(v, e.out.shape) for v in e.promoted(Kind.DEFAULT, x, other))
    d = dim % a.rank
    turned = [e.op("Gather", v, e.const("order", np.array(o, np.int64)), axis=d) for v, o in ((a, (1, 2, 0)), (b, (2, 0, 1)), (a, (2, 0, 1)), (b, (1, 2, 0)))]
    return e.op("Sub", e.op("Mul", turned[0], turned[1]), e.op("Mul", turned[2], turned[3]))


# ---------------------------------------------------------------- convolutions


def _each(v: Any, n: int) -> list[Any]:
    items = [v] if isinstance(v, int) else list(v)
    return items * n if len(items) == 1 else items


def _convolution(e: Emitter, x: Value, w: Value, bias: Value | None, stride: Any, padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int) -> Value:
    n = w.rank - 2
    unbatched = x.rank == n + 1
    if unbatched:
        x = e.reshape(x, [1, *x.shape])
    attrs: dict[str, Any] = {"strides": tuple(_each(stride, n)), "dilations": tuple(_each(dilation, n)), "group": groups}
    if isinstance(padding, str):
        attrs["auto_pad"] = "VALID" if padding == "valid" else "SAME_UPPER"
    else:
        attrs["pads"] = tuple(_each(padding, n)) * 2
    if transposed:
        attrs["output_padding"] = tuple(_each(output_padding, n))
    y = e.op("ConvTranspose" if transposed else "Conv", x, w, *([bias] if bias is not None else []), **attrs)
    return e.reshape(y, y.shape[1:]) if unbatched else y


@aten("convolution", "_convolution")
def convolution(
    e: Emitter, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int,
    **_: Any,
) -> Value:
    return _convolution(e, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


@aten("conv1d", "conv2d", "conv3d")
def conv(e: Emitter, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Value:
    return _convolution(e, x, weight, bias, stride, padding, dilation, False, 0, groups)


@aten("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    e: Emitter, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:
    return _convolution(e, x, weight, bias, stride, padding, dilation, True, output_padding, groups)


# ---------------------------------------------------------------- normalisation


def _ones(e: Emitter, shape: Sequence[Any], dtype: D.DType, value: float) -> Value:
    return e.expand(e.number(value, dtype), shape)


@aten("layer_norm", "native_layer_norm")
def layer_norm(
    e: Emitter, x: Value, normalized_shape: Sequence[Any], weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5, cudnn_enable: bool = True,
) -> Any:
    n = len(normalized_shape)
    scale = weight if weight is not None else _ones(e, x.shape[x.rank - n :], x.dtype, 1.0)
    three = isinstance(e.out, (tuple, list))
    outs = e.ops("LayerNormalization", 3 if three else 1, x, scale, *([bias] if bias is not None else []), axis=x.rank - n, epsilon=float(eps))
    return outs if three else outs[0]


@aten("rms_norm", "_fused_rms_norm")
def rms_norm(e: Emitter, x: Value, normalized_shape: Sequence[Any], weight: Value | None = None, eps: float | None = None) -> Any:
    n = len(normalized_shape)
    scale = weight if weight is not None else _ones(e, x.shape[x.rank - n :], x.dtype, 1.0)
    tiny = {32: 2.0**-23, 16: 2.0**-10 if x.dtype is D.f16 else 2.0**-7, 64: 2.0**-52}[x.dtype.bits]
    y = e.op("RMSNormalization", x, scale, axis=x.rank - n, epsilon=float(eps) if eps is not None else tiny)
    return (y, None) if isinstance(e.out, (tuple, list)) else y


def _moved(e: Emitter, running_mean: Value | None, running_var: Value | None, mean: Value, var: Value, n: Value, momentum: float) -> None:
    """Running statistics go towards those of ``n`` elements each, the variance without bias, in place."""
    unbiased = e.op("Mul", var, e.op("Div", n, e.op("Sub", n, e.number(1, var.dtype))))
    for name, old, new in (("running_mean", running_mean, mean), ("running_var", running_var, unbiased)):
        if old is not None:
            kept = e.op("Mul", old, e.number(1 - momentum, old.dtype))
            e.refs[name].write(e, e.op("Add", kept, e.cast(e.op("Mul", new, e.number(momentum, new.dtype)), old.dtype)))


@writer("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_impl_index")
def batch_norm(
    e: Emitter, x: Value, weight: Value | None = None, bias: Value | None = None, running_mean: Value | None = None, running_var: Value | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, cudnn_enabled: bool = True, **_: Any,
) -> Any:
    """In training the statistics of the batch count, and the running ones are moved towards them in place (the variance without bias)."""
    if x.rank < 2:  # of no elements: torch takes no others
        return x if not isinstance(e.out, (tuple, list)) else (x, *(e.const("none", np.zeros(0, np.float32)) for _ in range(2)))
    c = [x.shape[1]]
    own = training or running_mean is None or running_var is None
    mean, var = running_mean, running_var
    if own:
        axes = [0, *range(2, x.rank)]
        center = e.reduce("ReduceMean", x, axes, True)
        d = e.op("Sub", x, center)
        spread = e.reduce("ReduceMean", e.op("Mul", d, d), axes, True)
        mean, var = e.reshape(center, c), e.reshape(spread, c)
        if training:
            _moved(e, running_mean, running_var, mean, var, count(e, x, axes, var.dtype), momentum)
    assert mean is not None and var is not None
    scale = weight if weight is not None else _ones(e, c, mean.dtype, 1.0)
    shift = bias if bias is not None else _ones(e, c, mean.dtype, 0.0)
    y = e.op("BatchNormalization", x, scale, shift, mean, var, epsilon=float(eps))
    if not isinstance(e.out, (tuple, list)):
        return y
    if not own:
        return y, e.const("none", np.zeros(0, np.float32)), e.const("none", np.zeros(0, np.float32))
    return y, mean, e.op("aten::rsqrt", e.op("Add", var, e.number(eps, var.dtype)))


@writer("instance_norm")
def instance_norm(
    e: Emitter, x: Value, weight: Value | None = None, bias: Value | None = None, running_mean: Value | None = None, running_var: Value | None = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, cudnn_enabled: bool = True,
) -> Value:
    if not use_input_stats:
        return batch_norm(e, x, weight, bias, running_mean, running_var, False, momentum, eps)  # type: ignore[no-any-return]
    c = [x.shape[1]]
    if running_mean is not None or running_var is not None:
        axes = list(range(2, x.rank))
        d = e.op("Sub", x, e.reduce("ReduceMean", x, axes, True))
        mean = e.reduce("ReduceMean", x, [0, *axes], False)
        var = e.reduce("ReduceMean", e.op("Mul", d, d), [0, *axes], False)
        _moved(e, running_mean, running_var, mean, var, count(e, x, axes, var.dtype), momentum)
    scale, shift = weight or _ones(e, c, x.dtype, 1.0), bias or _ones(e, c, x.dtype, 0.0)
    return e.op("InstanceNormalization", x, scale, shift, epsilon=float(eps))


@aten("group_norm", "native_group_norm")
def group_norm(
    e: Emitter, x: Value, num_groups: int = 0, weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5, group: int = 0, **_: Any,
) -> Any:
    c = [x.shape[1]]
    scale, shift = weight or _ones(e, c, x.dtype, 1.0), bias or _ones(e, c, x.dtype, 0.0)
    groups = num_groups or group
    y = e.op("GroupNormalization", x, scale, shift, num_groups=groups, epsilon=float(eps))
    if not isinstance(e.out, (tuple, list)):
        return y
    parts = e.reshape(x, [x.shape[0], groups, -1])
    mean = e.reduce("ReduceMean", parts, [2], True)
    d = e.op("Sub", parts, mean)
    var = e.reduce("ReduceMean", e.op("Mul", d, d), [2], False)
    return y, e.reshape(mean, var.shape), e.op("aten::rsqrt", e.op("Add", var, e.number(eps, var.dtype)))


@aten("local_response_norm")
def local_response_norm(e: Emitter, x: Value, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Value:
    return e.op("LRN", x, size=size, alpha=alpha, beta=beta, bias=k)


@aten("_safe_softmax")
def safe_softmax(e: Emitter, x: Value, dim: int, dtype: Any = None) -> Value:
    """Rows of -inf give zeros."""
    p = softmax(e, x, dim)
    return e.op("Where", e.op("IsNaN", p), e.number(0.0, p.dtype), p)


@aten("softmax", "_softmax")
def softmax(e: Emitter, x: Value, dim: int, dtype: Any = None, half_to_float: bool = False) -> Value:
    v = e.cast(x, e.dtype)
    return e.op("Softmax", v, axis=dim % v.rank) if v.rank else e.number(1.0, v.dtype)


@aten("log_softmax", "_log_softmax")
def log_softmax(e: Emitter, x: Value, dim: int, dtype: Any = None, half_to_float: bool = False) -> Value:
    v = e.cast(x, e.dtype)
    return e.op("LogSoftmax", v, axis=dim % v.rank) if v.rank else e.number(0.0, v.dtype)


@aten("softmin")
def softmin(e: Emitter, x: Value, dim: int) -> Value:
    return softmax(e, e.op("Neg", x), dim)


# ---------------------------------------------------------------- pooling


def _batched(e: Emitter, x: Value, n: int) -> tuple[Value, bool]:
    return (e.reshape(x, [1, *x.shape]), True) if x.rank == n + 1 else (x, False)


def _max_pool(names: Sequence[str], n: int, indices: bool) -> None:
    @aten(*names)
    def rule(e: Emitter, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False) -> Any:
        y, single = _batched(e, x, n)
        k = _each(kernel_size, n)
        attrs: dict[str, Any] = {"kernel_shape": tuple(k), "strides": tuple(_each(stride, n) if stride else k), "pads": tuple(_each(padding, n)) * 2,
                 "dilations": tuple(_each(dilation, n)), "ceil_mode": int(ceil_mode)}  # fmt: skip
        outs = e.ops("MaxPool", 2 if indices else 1, y, **attrs)
        if indices:  # ONNX counts through the whole tensor, torch in a channel's plane
            plane = as_expr(1)
            for s in y.shape[2:]:
                plane = plane * s
            outs = (outs[0], e.op("Mod", outs[1], e.number(plane, i64)))
        outs = tuple(e.reshape(o, o.shape[1:]) for o in outs) if single else outs
        return outs if indices else outs[0]


for _k in (1, 2, 3):
    _max_pool([f"max_pool{_k}d"], _k, False)
    _max_pool([f"max_pool{_k}d_with_indices"], _k, True)


def _avg_pool(n: int) -> None:
    @aten(f"avg_pool{n}d")
    def rule(
        e: Emitter, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Value:
        y, single = _batched(e, x, n)
        k, p = _each(kernel_size, n), _each(padding, n)
        steps = _each(stride, n) if stride else k
        kind = y.dtype
        y = y if kind.is_float else e.cast(y, D.f64)
        attrs: dict[str, Any] = {"kernel_shape": tuple(k), "strides": tuple(steps)}
        if divisor_override is not None:  # sums: zeros all around, as far as the last window reaches
            y = pad_rule(e, y, [v for q, t, s in reversed(list(zip(p, k, steps, strict=True))) for v in (q, q + t + s)])
            out = e.op("Mul", e.op("AveragePool", y, **attrs), e.number(math.prod(k) / divisor_override, y.dtype))
            want = e.dims(e.out.shape)[-n:]
            axes = range(out.rank - n, out.rank)
            out = e.op("Slice", out, e.vector([0] * n), e.vector(want), e.vector(axes), e.vector([1] * n))
        else:
            out = e.op("AveragePool", y, **attrs, pads=tuple(p) * 2, ceil_mode=int(ceil_mode), count_include_pad=int(count_include_pad))
        out = out if kind.is_float else e.cast(e.op("aten::trunc", out), kind)
        return e.reshape(out, out.shape[1:]) if single else out

    @aten(f"adaptive_avg_pool{n}d", f"_adaptive_avg_pool{n}d")
    def adaptive(e: Emitter, x: Value, output_size: Any) -> Value:
        return _adaptive(e, x, n)


def _adaptive(e: Emitter, x: Value, n: int) -> Value:
    """Windows from floor(k n / m) to ceil((k + 1) n / m): equal ones where m divides n, else an axis at a time by slices."""
    want = e.dims(e.out.shape)[-n:]
    if all(w.op == "const" and w.attr == 1 for w in want):
        return e.reduce("ReduceMean", x, range(x.rank - n, x.rank), True)
    have = x.shape[-n:]
    if all(w is h for w, h in zip(want, have, strict=True)):
        return x
    if any(v.op != "const" for v in (*want, *have)):
        raise UnsupportedOperator("adaptive pooling of open extents to more than one element", hint="pin height and width")
    sizes = [(h.attr, w.attr) for h, w in zip(have, want, strict=True)]
    if all(h % w == 0 for h, w in sizes):
        y, single = _batched(e, x, n)
        k = tuple(h // w for h, w in sizes)
        out = e.op("AveragePool", y, kernel_shape=k, strides=k)
        return e.reshape(out, out.shape[1:]) if single else out
    for axis, (h, w) in enumerate(sizes, x.rank - n):
        parts = [e.reduce("ReduceMean", e.slice(x, axis, k * h // w, -((k + 1) * -h // w)), [axis], True) for k in range(w)]
        x = e.op("Concat", *parts, axis=axis) if len(parts) > 1 else parts[0]
    return x


for _k in (1, 2, 3):
    _avg_pool(_k)


@aten("lp_pool2d", "lp_pool1d")
def lp_pool(e: Emitter, x: Value, norm_type: float, kernel_size: Any, stride: Any = (), ceil_mode: bool = False) -> Value:
    n = x.rank - 2
    k = _each(kernel_size, n)
    return e.op("LpPool", x, p=int(norm_type), kernel_shape=tuple(k), strides=tuple(_each(stride, n) if stride else k), ceil_mode=int(ceil_mode))


@aten("max_unpool2d")
def max_unpool2d(e: Emitter, x: Value, indices: Value, output_size: Sequence[Any]) -> Value:
    lead = list(x.shape[:-2])
    plane = e.expand(e.number(0, x.dtype), [*lead, math.prod([as_expr(s) for s in output_size], start=as_expr(1))])
    flat = [*lead, x.shape[-1] * x.shape[-2]]
    y = e.op("ScatterElements", plane, e.reshape(indices, flat), e.reshape(x, flat), axis=len(lead))
    return e.reshape(y, [*lead, *output_size])


# ---------------------------------------------------------------- attention


@aten("scaled_dot_product_attention")
def attention(
    e: Emitter, query: Value, key: Value, value: Value, attn_mask: Value | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Value:
    """softmax(scale Q K' + mask) V; heads of K and V are repeated for groups of heads of Q."""
    if dropout_p:
        raise UnsupportedOperator("attention with dropout draws random numbers", hint="call model.eval()")
    q, k, v = query, key, value
    if enable_gqa and k.shape[-3] is not q.shape[-3]:
        k, v = (_repeated(e, t, q.shape[-3]) for t in (k, v))
    size = q.shape[-1]
    if scale is None and size.op != "const":
        raise UnsupportedOperator("attention over heads of an open size", hint="pin the last dimension")
    s = 1 / math.sqrt(size.attr) if scale is None else float(scale)
    scores = e.op("MatMul", e.op("Mul", q, e.number(s, q.dtype)), e.transpose(k, [*range(k.rank - 2), k.rank - 1, k.rank - 2]))
    low = e.number(-math.inf, q.dtype)
    if is_causal:
        rows, columns = q.shape[-2], k.shape[-2]
        i = e.reshape(e.op("Range", e.number(0, i64), e.number(rows, i64), e.number(1, i64)), [rows, 1])
        j = e.op("Range", e.number(0, i64), e.number(columns, i64), e.number(1, i64))
        scores = e.op("Add", scores, e.op("Where", e.op("LessOrEqual", j, i), e.number(0.0, q.dtype), low))
    if attn_mask is not None:
        mask = e.op("Where", attn_mask, e.number(0.0, q.dtype), low) if attn_mask.dtype.is_bool else e.cast(attn_mask, q.dtype)
        scores = e.op("Add", scores, mask)
    p = e.op("Softmax", scores, axis=scores.rank - 1)
    if attn_mask is not None:
        p = e.op("Where", e.op("IsNaN", p), e.number(0.0, p.dtype), p)
    return e.op("MatMul", p, v)


def _repeated(e: Emitter, t: Value, heads: Any) -> Value:
    *lead, h, n, d = t.shape
    times = heads // h
    y = e.expand(e.reshape(t, [*lead, h, 1, n, d]), [*lead, h, times, n, d])
    return e.reshape(y, [*lead, heads, n, d])


@aten("_scaled_dot_product_flash_attention_for_cpu")
def flash(
    e: Emitter, query: Value, key: Value, value: Value, dropout_p: float = 0.0, is_causal: bool = False, attn_mask: Value | None = None, scale: float | None = None,
) -> Any:
    return attention(e, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa=True), None


@aten("_scaled_dot_product_attention_math")
def attention_math(
    e: Emitter, query: Value, key: Value, value: Value, attn_mask: Value | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    dropout_mask: Any = None, scale: float | None = None, enable_gqa: bool = False,
) -> Any:
    return attention(e, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa), None


# ---------------------------------------------------------------- resizing and sampling


def _resized(e: Emitter, x: Value, mode: str, corners: bool, scales: Sequence[float | None], **more: Any) -> Value:
    n = x.rank - 2
    sizes = e.dims(e.out.shape)
    attrs: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": "asymmetric" if mode == "nearest" else "align_corners" if corners else "half_pixel"}
    if mode == "nearest":
        attrs["nearest_mode"] = "floor"
    if mode == "cubic":
        attrs["cubic_coeff_a"] = -0.75
    attrs |= more
    given = [s for s in scales if s is not None]
    if len(given) == n and not corners:  # torch then takes the scale as it is, not the ratio of the sizes
        return e.op("Resize", x, None, e.const("scales", np.array([1.0, 1.0, *given], np.float32)), **attrs)
    return e.op("Resize", x, None, None, e.vector(sizes), **attrs)


def _upsample(names: Sequence[str], mode: str, **more: Any) -> None:
    @aten(*names)
    def rule(
        e: Emitter, x: Value, output_size: Any = None, align_corners: bool = False, scale_factors: Sequence[float] | None = None, scales: float | None = None,
        scales_d: float | None = None, scales_h: float | None = None, scales_w: float | None = None,
    ) -> Value:
        n = x.rank - 2
        if align_corners and more.get("antialias"):
            raise UnsupportedOperator("resizing with antialiasing and aligned corners is not supported", hint="align_corners=False")
        found = list(scale_factors) if scale_factors else [scales] if n == 1 else [scales_d, scales_h, scales_w][3 - n :]
        return _resized(e, x, mode, align_corners, found if output_size is None or scale_factors is None else [None], **more)


_upsample(["upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"], "nearest")
_upsample(["_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"], "nearest",
          coordinate_transformation_mode="half_pixel", nearest_mode="round_prefer_ceil")  # fmt: skip
_upsample(["upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"], "linear")
_upsample(["upsample_bicubic2d"], "cubic")
_upsample(["_upsample_bilinear2d_aa"], "linear", antialias=1, exclude_outside=1)
_upsample(["_upsample_bicubic2d_aa"], "cubic", antialias=1, cubic_coeff_a=-0.5, exclude_outside=1)


@aten("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(e: Emitter, x: Value, grid: Value, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Value:
    modes, pads = ("linear", "nearest", "cubic"), ("zeros", "border", "reflection")
    return e.op("GridSample", x, grid, mode=modes[interpolation_mode], padding_mode=pads[padding_mode], align_corners=int(align_corners))


@aten("affine_grid_generator")
def affine_grid(e: Emitter, theta: Value, size: Sequence[Any], align_corners: bool) -> Value:
    return e.op("AffineGrid", theta, e.vector(size), align_corners=int(align_corners))


@aten("im2col")
def im2col(e: Emitter, x: Value, kernel_size: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]) -> Value:
    """Windows as columns: [N, C kh kw, places]."""
    y, single = _batched(e, x, 2)
    y = pad_rule(e, y, [padding[1], padding[1], padding[0], padding[0]])
    for axis, k, d, s in ((2, 0, 0, 0), (4, 1, 1, 1)):
        n, taps = y.shape[axis], kernel_size[k]
        places = (n - as_expr(dilation[d] * (taps - 1) + 1)) // stride[s] + 1
        first = e.op("Mul", e.op("Range", e.number(0, i64), e.number(places, i64), e.number(1, i64)), e.number(stride[s], i64))
        where = e.op("Add", e.reshape(e.vector([t * dilation[d] for t in range(taps)]), [taps, 1]), first)
        y = e.op("Gather", y, where, axis=axis)
    n, c, kh, oh, kw, ow = y.shape
    out = e.reshape(e.transpose(y, [0, 1, 2, 4, 3, 5]), [n, c * kh * kw, oh * ow])
    return e.reshape(out, out.shape[1:]) if single else out


@aten("col2im")
def col2im(e: Emitter, x: Value, output_size: Sequence[Any], kernel_size: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]) -> Value:
    single = x.rank == 2
    y = e.reshape(x, [1, *x.shape]) if single else x
    y = e.op("Col2Im", y, e.vector(output_size), e.vector(kernel_size), dilations=tuple(dilation), pads=tuple(padding) * 2, strides=tuple(stride))
    return e.reshape(y, y.shape[1:]) if single else y


# ---------------------------------------------------------------- distances and losses


@aten("cdist", "_cdist_forward", "_euclidean_dist")
def cdist(e: Emitter, x1: Value, x2: Value, p: float = 2.0, compute_mode: Any = None) -> Value:
    a = e.reshape(x1, [*x1.shape[:-1], 1, x1.shape[-1]])
    b = e.reshape(x2, [*x2.shape[:-2], 1, *x2.shape[-2:]])
    return norm(e, e.op("Sub", a, b), p, dim=[-1])


@aten("cosine_similarity")
def cosine_similarity(e: Emitter, x1: Value, x2: Value, dim: int = 1, eps: float = 1e-8) -> Value:
    a, b = (e.expand(v, _wide(e, x1, x2)) for v in e.promoted(Kind.DEFAULT, x1, x2))
    d = [dim % a.rank] if a.rank else []
    na, nb = (e.op("Max", e.reduce("ReduceL2", v, d, True) if v.rank else e.op("Abs", v), e.number(eps, v.dtype)) for v in (a, b))
    p = e.op("Mul", e.op("Div", a, na), e.op("Div", b, nb))
    return e.reduce("ReduceSum", p, d, False) if p.rank else p


def _wide(e: Emitter, a: Value, b: Value) -> Sequence[Any]:
    return e.op("And", e.op("Equal", a, a), e.op("Equal", b, b)).shape


def _loss(e: Emitter, v: Value, reduction: int) -> Value:
    return v if reduction == 0 else e.reduce("ReduceMean" if reduction == 1 else "ReduceSum", v, None, False)


@aten("mse_loss")
def mse_loss(e: Emitter, x: Value, target: Value, reduction: int = 1) -> Value:
    d = e.op("Sub", *e.promoted(Kind.DEFAULT, x, target))
    return _loss(e, e.op("Mul", d, d), reduction)


@aten("l1_loss")
def l1_loss(e: Emitter, x: Value, target: Value, reduction: int = 1) -> Value:
    return _loss(e, e.op("Abs", e.op("Sub", *e.promoted(Kind.DEFAULT, x, target))), reduction)


@aten("smooth_l1_loss")
def smooth_l1_loss(e: Emitter, x: Value, target: Value, reduction: int = 1, beta: float = 1.0) -> Value:
    size = e.op("Abs", e.op("Sub", *e.promoted(Kind.DEFAULT, x, target)))
    if beta == 0:
        return _loss(e, size, reduction)
    half, b = e.number(0.5, size.dtype), e.number(beta, size.dtype)
    near = e.op("Div", e.op("Mul", half, e.op("Mul", size, size)), b)
    far = e.op("Sub", size, e.op("Mul", half, b))
    return _loss(e, e.op("Where", e.op("Less", size, b), near, far), reduction)


@aten("huber_loss")
def huber_loss(e: Emitter, x: Value, target: Value, reduction: int = 1, delta: float = 1.0) -> Value:
    size = e.op("Abs", e.op("Sub", *e.promoted(Kind.DEFAULT, x, target)))
    half, b = e.number(0.5, size.dtype), e.number(delta, size.dtype)
    near = e.op("Mul", half, e.op("Mul", size, size))
    far = e.op("Mul", b, e.op("Sub", size, e.op("Mul", half, b)))
    return _loss(e, e.op("Where", e.op("LessOrEqual", size, b), near, far), reduction)


@aten("binary_cross_entropy_with_logits")
def bce_with_logits(e: Emitter, x: Value, target: Value, weight: Value | None = None, pos_weight: Value | None = None, reduction: int = 1) -> Value:
    """(1 - t) x - w log sigmoid(x), w = 1 + (pos_weight - 1) t."""
    one = e.number(1.0, x.dtype)
    low = e.op("Min", x, e.number(0.0, x.dtype))
    log_s = e.op("Sub", low, e.op("aten::log1p", e.op("Exp", e.op("Neg", e.op("Abs", x)))))
    w = one if pos_weight is None else e.op("Add", one, e.op("Mul", e.op("Sub", pos_weight, one), target))
    v = e.op("Sub", e.op("Mul", e.op("Sub", one, target), x), e.op("Mul", w, log_s))
    return _loss(e, v if weight is None else e.op("Mul", v, weight), reduction)


@aten("binary_cross_entropy")
def bce(e: Emitter, x: Value, target: Value, weight: Value | None = None, reduction: int = 1) -> Value:
    one, least = e.number(1.0, x.dtype), e.number(-100.0, x.dtype)
    a = e.op("Mul", target, e.op("Max", e.op("Log", x), least))
    b = e.op("Mul", e.op("Sub", one, target), e.op("Max", e.op("aten::log1p", e.op("Neg", x)), least))
    v = e.op("Neg", e.op("Add", a, b))
    return _loss(e, v if weight is None else e.op("Mul", v, weight), reduction)


@aten("nll_loss", "nll_loss_nd", "nll_loss_forward", "nll_loss2d_forward")
def nll_loss(e: Emitter, x: Value, target: Value, weight: Value | None = None, reduction: int = 1, ignore_index: int = -100) -> Any:
    """-weight[t] x[n, t], means over the weights that count."""
    axis = 0 if x.rank == 1 else 1
    ignored = e.op("Equal", target, e.number(ignore_index, target.dtype))
    safe = e.op("Where", ignored, e.number(0, target.dtype), target)
    at = e.reshape(safe, [*safe.shape[:axis], 1, *safe.shape[axis:]])
    picked = e.reshape(e.op("GatherElements", x, at, axis=axis), safe.shape)
    w = e.op("Gather", weight, safe, axis=0) if weight is not None else e.expand(e.number(1.0, x.dtype), safe.shape)
    w = e.op("Where", ignored, e.number(0.0, x.dtype), w)
    v = e.op("Neg", e.op("Mul", picked, w))
    total = e.reduce("ReduceSum", w, None, False) if w.rank else w
    if reduction == 1:
        v = e.op("Div", e.reduce("ReduceSum", v, None, False) if v.rank else v, total)
    elif reduction == 2 and v.rank:
        v = e.reduce("ReduceSum", v, None, False)
    return (v, total) if isinstance(e.out, (tuple, list)) else v


@aten("cross_entropy_loss")
def cross_entropy(
    e: Emitter, x: Value, target: Value, weight: Value | None = None, reduction: int = 1, ignore_index: int = -100, label_smoothing: float = 0.0,
) -> Value:
    axis = 0 if x.rank == 1 else 1
    logs = e.op("LogSoftmax", x, axis=axis)
    if target.dtype.is_float or label_smoothing:
        if not target.dtype.is_float or label_smoothing:
            raise UnsupportedOperator("cross_entropy with label smoothing is not supported")
        p = e.op("Mul", logs, target)
        if weight is not None:
            p = e.op("Mul", p, e.reshape(weight, [weight.shape[0], *[1] * (x.rank - axis - 1)]))
        v = e.op("Neg", e.reduce("ReduceSum", p, [axis], False))
        if reduction != 1:
            return _loss(e, v, reduction)
        n = as_expr(1)
        for s in v.shape:
            n = n * s
        return e.op("Div", e.reduce("ReduceSum", v, None, False) if v.rank else v, e.number(n.attr if n.op == "const" else n, v.dtype))
    return nll_loss(e, logs, target, weight, reduction, ignore_index)  # type: ignore[no-any-return]


@aten("kl_div")
def kl_div(e: Emitter, x: Value, target: Value, reduction: int = 1, log_target: bool = False) -> Value:
    if log_target:
        return _loss(e, e.op("Mul", e.op("Exp", target), e.op("Sub", target, x)), reduction)
    zero = e.number(0.0, target.dtype)
    plogp = e.op("Where", e.op("Equal", target, zero), zero, e.op("Mul", target, e.op("Log", target)))
    return _loss(e, e.op("Sub", plogp, e.op("Mul", target, x)), reduction)


# ---------------------------------------------------------------- recurrent networks

# gates as ONNX orders them, among those of torch (LSTM: i f g o -> i o f g; GRU: r z n -> z r n)
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def _recurrent(
    e: Emitter, op: str, x: Value, states: Sequence[Value], params: Sequence[Value], biases: bool, layers: int, dropout: float, train: bool, both: bool, first: bool,
    **attrs: Any,
) -> tuple[Value, ...]:
    if train and dropout:
        raise UnsupportedOperator("dropout between layers draws random numbers", hint="call model.eval()")
    single = x.rank == 2
    if single:
        x, states = e.reshape(x, [x.shape[0], 1, x.shape[1]]), [e.reshape(s, [s.shape[0], 1, s.shape[1]]) for s in states]
    elif first:
        x = e.transpose(x, [1, 0, 2])
    ways = 2 if both else 1
    a_layer = len(params) // (layers * ways)
    if a_layer != (4 if biases else 2):
        raise UnsupportedOperator(f"{op} with projections is not supported")
    order = _GATES[op]
    last: list[list[Value]] = [[] for _ in states]

    def gates(w: Value) -> Value:
        n = len(order)
        if n == 1:
            return w
        parts = e.ops("Split", n, w, axis=0, num_outputs=n)
        return e.op("Concat", *(parts[k] for k in order), axis=0)

    for layer in range(layers):
        packs: list[list[Value]] = [[], [], []]
        for d in range(ways):
            p = params[(layer * ways + d) * a_layer :][:a_layer]
            for k in range(2):
                w = gates(p[k])
                packs[k].append(e.reshape(w, [1, *w.shape]))
            if biases:
                b = e.op("Concat", gates(p[2]), gates(p[3]), axis=0)
                packs[2].append(e.reshape(b, [1, *b.shape]))
        w, r, *b = (e.op("Concat", *v, axis=0) if len(v) > 1 else v[0] for v in packs if v)
        own = [e.slice(s, 0, layer * ways, (layer + 1) * ways) for s in states]
        hidden = r.shape[-1].attr
        y, *ends = e.ops(op, 1 + len(states), x, w, r, b[0] if b else None, None, *own, hidden_size=hidden, direction="bidirectional" if both else "forward", **attrs)
        x = e.reshape(e.transpose(y, [0, 2, 1, 3]), [y.shape[0], y.shape[2], y.shape[1] * y.shape[3]])
        for k, v in enumerate(ends):
            last[k].append(v)
    finals = [e.op("Concat", *v, axis=0) if len(v) > 1 else v[0] for v in last]
    if single:
        return e.reshape(x, [x.shape[0], x.shape[2]]), *(e.reshape(v, [v.shape[0], v.shape[2]]) for v in finals)
    return e.transpose(x, [1, 0, 2]) if first else x, *finals


@aten("lstm.input")
def lstm(
    e: Emitter, x: Value, hx: Sequence[Value], params: Sequence[Value], has_biases: bool, num_layers: int, dropout: float, train: bool, bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, ...]:
    return _recurrent(e, "LSTM", x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)


@aten("gru.input")
def gru(
    e: Emitter, x: Value, hx: Value, params: Sequence[Value], has_biases: bool, num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Value, ...]:
    return _recurrent(e, "GRU", x, [hx], params, has_biases, num_layers, dropout, train, bidirectional, batch_first, linear_before_reset=1)


def _rnn(name: str, activation: str) -> None:
    @aten(f"{name}.input")
    def rule(
        e: Emitter, x: Value, hx: Value, params: Sequence[Value], has_biases: bool, num_layers: int, dropout: float, train: bool, bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Value, ...]:
        both = [activation] * (2 if bidirectional else 1)
        return _recurrent(e, "RNN", x, [hx], params, has_biases, num_layers, dropout, train, bidirectional, batch_first, activations=tuple(both))


_rnn("rnn_tanh", "Tanh")
_rnn("rnn_relu", "Relu")
