"""Functions in WGSL on values of two 32-bit words, which it has no types for: 64-bit integers and floats (:mod:`luthier.passes.gpu.wide_words`).

The first word is the low one. Integers wrap; a divisor of zero gives zero. Floats are IEEE doubles, rounded to nearest even, in
integer arithmetic alone: an implementation may reassociate floats, never integers. A float on its way is a sign, an exponent and 63
bits of which bit 62 leads, the last one standing for all that were lost. Two underscores: no name of a model keeps two.
"""

from __future__ import annotations

import re

WORDS = """
fn w__add(a: W__64, b: W__64) -> W__64 {
    let x = a.x + b.x;
    return W__64(x, a.y + b.y + select(0u, 1u, x < a.x));
}
fn w__sub(a: W__64, b: W__64) -> W__64 { return W__64(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x)); }
fn w__mul32(a: u32, b: u32) -> W__64 {
    let al = a & 65535u;
    let ah = a >> 16u;
    let bl = b & 65535u;
    let bh = b >> 16u;
    let ll = al * bl;
    let lh = al * bh;
    let hl = ah * bl;
    let mid = (ll >> 16u) + (lh & 65535u) + (hl & 65535u);
    return W__64((mid << 16u) | (ll & 65535u), ah * bh + (lh >> 16u) + (hl >> 16u) + (mid >> 16u));
}
fn w__mul(a: W__64, b: W__64) -> W__64 {
    let p = w__mul32(a.x, b.x);
    return W__64(p.x, p.y + a.x * b.y + a.y * b.x);
}
fn w__neg(a: W__64) -> W__64 { return w__sub(W__64(0u, 0u), a); }
fn w__size(a: W__64) -> W__64 { return select(a, w__neg(a), a.y >= 2147483648u); }
fn w__and(a: W__64, b: W__64) -> W__64 { return a & b; }
fn w__or(a: W__64, b: W__64) -> W__64 { return a | b; }
fn w__xor(a: W__64, b: W__64) -> W__64 { return a ^ b; }
fn w__not(a: W__64) -> W__64 { return ~a; }
fn w__popcount(a: W__64) -> W__64 { return W__64(countOneBits(a.x) + countOneBits(a.y), 0u); }
fn w__eq(a: W__64, b: W__64) -> bool { return a.x == b.x && a.y == b.y; }
fn w__ult(a: W__64, b: W__64) -> bool { return a.y < b.y || (a.y == b.y && a.x < b.x); }
fn w__ule(a: W__64, b: W__64) -> bool { return !w__ult(b, a); }
fn w__ilt(a: W__64, b: W__64) -> bool { return w__ult(a ^ W__64(0u, 2147483648u), b ^ W__64(0u, 2147483648u)); }
fn w__ile(a: W__64, b: W__64) -> bool { return !w__ilt(b, a); }
fn w__left(a: W__64, n: u32) -> W__64 {
    let k = n & 31u;
    let low = a.x << k;
    let r = select(W__64(low, (a.y << k) | ((a.x >> 1u) >> (31u - k))), W__64(0u, low), n >= 32u);
    return select(r, W__64(0u, 0u), n >= 64u);
}
fn w__right(a: W__64, n: u32) -> W__64 {
    let k = n & 31u;
    let high = a.y >> k;
    let r = select(W__64((a.x >> k) | ((a.y << 1u) << (31u - k)), high), W__64(high, 0u), n >= 32u);
    return select(r, W__64(0u, 0u), n >= 64u);
}
fn w__by(n: W__64) -> u32 { return select(64u, n.x, n.y == 0u); }
fn w__shl(a: W__64, n: W__64) -> W__64 { return w__left(a, w__by(n)); }
fn w__ushr(a: W__64, n: W__64) -> W__64 { return w__right(a, w__by(n)); }
fn w__ishr(a: W__64, n: W__64) -> W__64 {
    let sign = W__64(0u - (a.y >> 31u), 0u - (a.y >> 31u));
    return w__right(a ^ sign, w__by(n)) ^ sign;
}
fn w__zeros(a: W__64) -> u32 { return select(32u + countLeadingZeros(a.x), countLeadingZeros(a.y), a.y != 0u); }
fn w__divide(a: W__64, b: W__64) -> vec4<u32> {
    if (b.x == 0u && b.y == 0u) { return vec4<u32>(0u, 0u, 0u, 0u); }
    if (a.y == 0u && b.y == 0u) { return vec4<u32>(a.x / max(b.x, 1u), 0u, a.x % max(b.x, 1u), 0u); }
    if (w__ult(a, b)) { return vec4<u32>(0u, 0u, a.x, a.y); }
    var q = W__64(0u, 0u);
    var r = W__64(0u, 0u);
    let skip = w__zeros(a);
    var rest = w__left(a, skip);
    for (var i = skip; i < 64u; i++) {
        let top = r.y >> 31u;
        r = W__64((r.x << 1u) | (rest.y >> 31u), (r.y << 1u) | (r.x >> 31u));
        rest = w__add(rest, rest);
        q = w__add(q, q);
        if (top != 0u || !w__ult(r, b)) {
            r = w__sub(r, b);
            q.x |= 1u;
        }
    }
    return vec4<u32>(q, r);
}
fn w__udiv(a: W__64, b: W__64) -> W__64 { return w__divide(a, b).xy; }
fn w__urem(a: W__64, b: W__64) -> W__64 { return w__divide(a, b).zw; }
fn w__idiv(a: W__64, b: W__64) -> W__64 {
    let q = w__divide(w__size(a), w__size(b)).xy;
    if (((a.y ^ b.y) >> 31u) != 0u) { return w__neg(q); }
    return q;
}
fn w__irem(a: W__64, b: W__64) -> W__64 {
    let r = w__divide(w__size(a), w__size(b)).zw;
    if ((a.y >> 31u) != 0u) { return w__neg(r); }
    return r;
}
fn w__ifloordiv(a: W__64, b: W__64) -> W__64 {
    let d = w__divide(w__size(a), w__size(b));
    if (((a.y ^ b.y) >> 31u) == 0u) { return d.xy; }
    if ((d.z | d.w) == 0u) { return w__neg(d.xy); }
    return ~d.xy;
}
fn w__imod(a: W__64, b: W__64) -> W__64 {
    let r = w__irem(a, b);
    if ((r.x | r.y) != 0u && ((r.y ^ b.y) >> 31u) != 0u) { return w__add(r, b); }
    return r;
}
fn w__of_i32(a: i32) -> W__64 { return W__64(bitcast<u32>(a), bitcast<u32>(a >> 31u)); }
fn w__of_u32(a: u32) -> W__64 { return W__64(a, 0u); }
fn w__i_near(a: W__64) -> i32 {
    let low = bitcast<i32>(a.x);
    if (a.y == bitcast<u32>(low >> 31u)) { return low; }
    return select(2147483647i, i32(-2147483648), (a.y >> 31u) != 0u);
}
fn w__u_near(a: W__64) -> i32 { return select(2147483647i, bitcast<i32>(a.x), a.y == 0u && a.x < 2147483648u); }
fn w__jam(a: W__64, n: u32) -> W__64 {
    let r = w__right(a, n);
    let back = w__left(r, n) ^ a;
    return W__64(r.x | min(back.x | back.y, 1u), r.y);
}
fn w__half(a: W__64) -> W__64 { return W__64((a.x >> 1u) | (a.y << 31u) | (a.x & 1u), a.y >> 1u); }
fn w__pack(sign: u32, e: i32, given: W__64) -> W__64 {
    let m = w__jam(given, u32(clamp(1i - e, 0i, 64i)));
    let x = m.x + 511u + ((m.x >> 10u) & 1u);
    let y = m.y + select(0u, 1u, x < m.x);
    let r = W__64((x >> 10u) | (y << 22u), ((y >> 10u) + (u32(clamp(e, 1i, 2047i) - 1i) << 20u)) | sign);
    return select(r, W__64(0u, sign | 2146435072u), e >= 2047i);
}
fn w__narrow(sign: u32, e: i32, m: W__64, odd: bool) -> f32 {
    var x = m.y | select(0u, 1u, m.x != 0u);
    if (e >= 255i) { return bitcast<f32>(select(sign | 2139095040u, sign | 2139095039u, odd)); }
    if (e < 1i) {
        let n = min(u32(1i - e), 31u);
        x = (x >> n) | select(0u, 1u, (x & ((1u << n) - 1u)) != 0u);
    }
    let r = select((x + 63u + ((x >> 7u) & 1u)) >> 7u, (x >> 7u) | select(0u, 1u, (x & 127u) != 0u), odd);
    return bitcast<f32>(sign | ((u32(max(e, 1i) - 1i) << 23u) + r));
}
fn w__f_of_u(a: W__64) -> W__64 {
    if ((a.x | a.y) == 0u) { return a; }
    let n = w__zeros(a);
    return w__pack(0u, 1086i - i32(n), w__half(w__left(a, n)));
}
fn w__f_of_i(a: W__64) -> W__64 {
    let r = w__f_of_u(w__size(a));
    return W__64(r.x, r.y | (a.y & 2147483648u));
}
fn w__f32_of_size(sign: u32, a: W__64, odd: bool) -> f32 {
    if ((a.x | a.y) == 0u) { return 0.0f; }
    let n = w__zeros(a);
    return w__narrow(sign, 190i - i32(n), w__half(w__left(a, n)), odd);
}
fn w__u_f32(a: W__64) -> f32 { return w__f32_of_size(0u, a, false); }
fn w__i_f32(a: W__64) -> f32 { return w__f32_of_size(a.y & 2147483648u, w__size(a), false); }
fn w__u_odd(a: W__64) -> f32 { return w__f32_of_size(0u, a, true); }
fn w__i_odd(a: W__64) -> f32 { return w__f32_of_size(a.y & 2147483648u, w__size(a), true); }
fn w__f_of_f32(v: f32) -> W__64 {
    let b = bitcast<u32>(v);
    let sign = b & 2147483648u;
    var m = b & 8388607u;
    var e = (b >> 23u) & 255u;
    if (e == 255u) { return W__64(m << 29u, sign | 2146435072u | (m >> 3u)); }
    if (e == 0u) {
        if (m == 0u) { return W__64(0u, sign); }
        let n = countLeadingZeros(m) - 8u;
        m = (m << n) & 8388607u;
        return W__64(m << 29u, sign | ((897u - n) << 20u) | (m >> 3u));
    }
    return W__64(m << 29u, sign | ((e + 896u) << 20u) | (m >> 3u));
}
fn w__f_isnan(a: W__64) -> bool {
    let h = a.y & 2147483647u;
    return h > 2146435072u || (h == 2146435072u && a.x != 0u);
}
fn w__f_isinf(a: W__64) -> bool { return (a.y & 2147483647u) == 2146435072u && a.x == 0u; }
fn w__f_bits(a: W__64) -> W__64 {
    let e = (a.y >> 20u) & 2047u;
    return W__64(a.x, (a.y & 1048575u) | select(1048576u, 0u, e == 0u));
}
fn w__f_exponent(a: W__64) -> i32 { return max(i32((a.y >> 20u) & 2047u), 1i); }
fn w__f_to_f32(a: W__64, odd: bool) -> f32 {
    let sign = a.y & 2147483648u;
    if ((a.y & 2146435072u) == 2146435072u) {
        return bitcast<f32>(sign | 2139095040u | select(0u, 4194304u, w__f_isnan(a)));
    }
    return w__narrow(sign, w__f_exponent(a) - 896i, w__left(w__f_bits(a), 10u), odd);
}
fn w__f_f32(a: W__64) -> f32 { return w__f_to_f32(a, false); }
fn w__f_odd(a: W__64) -> f32 { return w__f_to_f32(a, true); }
fn w__f_whole(a: W__64) -> W__64 {
    let e = w__f_exponent(a) - 1023i;
    if (e < 0i) { return W__64(0u, 0u); }
    if (e >= 52i) { return w__left(w__f_bits(a), u32(e - 52i)); }
    return w__right(w__f_bits(a), u32(52i - e));
}
fn w__i_of_f(a: W__64) -> W__64 {
    if (w__f_isnan(a)) { return W__64(0u, 0u); }
    let sign = a.y >> 31u;
    if (w__f_exponent(a) >= 1086i) { return select(W__64(4294967295u, 2147483647u), W__64(0u, 2147483648u), sign != 0u); }
    if (sign != 0u) { return w__neg(w__f_whole(a)); }
    return w__f_whole(a);
}
fn w__u_of_f(a: W__64) -> W__64 {
    if (w__f_isnan(a) || (a.y >> 31u) != 0u) { return W__64(0u, 0u); }
    if (w__f_exponent(a) >= 1087i) { return W__64(4294967295u, 4294967295u); }
    return w__f_whole(a);
}
fn w__i_of_f32(a: f32) -> W__64 { return w__i_of_f(w__f_of_f32(a)); }
fn w__u_of_f32(a: f32) -> W__64 { return w__u_of_f(w__f_of_f32(a)); }
fn w__feq(a: W__64, b: W__64) -> bool {
    let same = (a.x == b.x && a.y == b.y) || ((a.x | b.x) == 0u && ((a.y | b.y) & 2147483647u) == 0u);
    return same && !(w__f_isnan(a) || w__f_isnan(b));
}
fn w__f_key(a: W__64) -> W__64 { return select(W__64(a.x, a.y + 2147483648u), w__neg(a), (a.y >> 31u) != 0u); }
fn w__flt(a: W__64, b: W__64) -> bool { return w__ult(w__f_key(a), w__f_key(b)) && !(w__f_isnan(a) || w__f_isnan(b)); }
fn w__fle(a: W__64, b: W__64) -> bool { return w__flt(a, b) || w__feq(a, b); }
fn w__fneg(a: W__64) -> W__64 { return W__64(a.x, a.y ^ 2147483648u); }
fn w__fabs(a: W__64) -> W__64 { return W__64(a.x, a.y & 2147483647u); }
fn w__fadd(p: W__64, q: W__64) -> W__64 {
    let swap = w__ult(w__fabs(p), w__fabs(q));
    let a = select(p, q, swap);
    let b = select(q, p, swap);
    let less = ((a.y ^ b.y) >> 31u) != 0u;
    let big = w__left(w__f_bits(a), 10u);
    let small = w__jam(w__left(w__f_bits(b), 10u), min(u32(w__f_exponent(a) - w__f_exponent(b)), 64u));
    let sum = w__add(big, select(small, w__neg(small), less));
    let none = (sum.x | sum.y) == 0u;
    let up = (sum.y >> 31u) != 0u;
    let n = select(max(w__zeros(sum), 1u) - 1u, 0u, up || !less);
    let m = select(w__left(sum, n), w__half(sum), up);
    let r = w__pack(a.y & 2147483648u, w__f_exponent(a) + select(0i, 1i, up) - i32(n), m);
    let finite = select(r, W__64(0u, 0u), none && less);
    let large = (a.y & 2146435072u) == 2146435072u;
    let nan = w__f_isnan(a) || w__f_isnan(b) || (large && less && w__f_isinf(b));
    return select(select(finite, a, large), W__64(0u, 2146959360u), nan);
}
fn w__fsub(a: W__64, b: W__64) -> W__64 { return w__fadd(a, w__fneg(b)); }
fn w__fmul(a: W__64, b: W__64) -> W__64 {
    let sign = (a.y ^ b.y) & 2147483648u;
    let zero = ((a.y & 2147483647u) | a.x) == 0u || ((b.y & 2147483647u) | b.x) == 0u;
    let large = w__f_isinf(a) || w__f_isinf(b);
    var x = w__f_bits(a);
    var y = w__f_bits(b);
    let nx = w__zeros(x);
    let ny = w__zeros(y);
    x = w__left(x, nx);
    y = w__left(y, ny);
    let lo = w__mul32(x.x, y.x);
    let m1 = w__mul32(x.x, y.y);
    let m2 = w__mul32(x.y, y.x);
    let mid = w__add(W__64(m1.x, 0u), w__add(W__64(m2.x, 0u), W__64(lo.y, 0u)));
    var m = w__add(w__mul32(x.y, y.y), w__add(W__64(m1.y, 0u), w__add(W__64(m2.y, 0u), W__64(mid.y, 0u))));
    m.x |= min(lo.x | mid.x, 1u);
    let up = (m.y >> 31u) != 0u;
    let e = w__f_exponent(a) + w__f_exponent(b) - 1001i - i32(nx) - i32(ny) + select(0i, 1i, up);
    let r = select(w__pack(sign, e, select(m, w__half(m), up)), W__64(0u, sign), zero);
    let nan = w__f_isnan(a) || w__f_isnan(b) || (large && zero);
    return select(select(r, W__64(0u, sign | 2146435072u), large), W__64(0u, 2146959360u), nan);
}
fn w__fdiv(a: W__64, b: W__64) -> W__64 {
    let sign = (a.y ^ b.y) & 2147483648u;
    let za = ((a.y & 2147483647u) | a.x) == 0u;
    let zb = ((b.y & 2147483647u) | b.x) == 0u;
    if (w__f_isnan(a) || w__f_isnan(b) || (w__f_isinf(a) && w__f_isinf(b)) || (za && zb)) { return W__64(0u, 2146959360u); }
    if (w__f_isinf(a) || zb) { return W__64(0u, sign | 2146435072u); }
    if (w__f_isinf(b) || za) { return W__64(0u, sign); }
    var r = w__f_bits(a);
    var d = w__f_bits(b);
    let nr = w__zeros(r) - 11u;
    let nd = w__zeros(d) - 11u;
    r = w__left(r, nr);
    d = w__left(d, nd);
    var e = w__f_exponent(a) - i32(nr) - w__f_exponent(b) + i32(nd) + 1023i;
    if (w__ult(r, d)) {
        r = w__add(r, r);
        e--;
    }
    var q = W__64(0u, 0u);
    for (var i = 0i; i < 63i; i++) {
        q = w__add(q, q);
        if (!w__ult(r, d)) {
            r = w__sub(r, d);
            q.x |= 1u;
        }
        r = w__add(r, r);
    }
    if ((r.x | r.y) != 0u) { q.x |= 1u; }
    return w__pack(sign, e, q);
}
fn w__frem(a: W__64, b: W__64) -> W__64 {
    let zb = ((b.y & 2147483647u) | b.x) == 0u;
    if (w__f_isnan(a) || w__f_isnan(b) || w__f_isinf(a) || zb) { return W__64(0u, 2146959360u); }
    if (w__ult(w__fabs(a), w__fabs(b))) { return a; }
    let sign = a.y & 2147483648u;
    var r = w__f_bits(a);
    var d = w__f_bits(b);
    let nr = w__zeros(r) - 11u;
    let nd = w__zeros(d) - 11u;
    r = w__left(r, nr);
    d = w__left(d, nd);
    var e = w__f_exponent(a) - i32(nr);
    let low = w__f_exponent(b) - i32(nd);
    for (; e > low; e--) {
        if (!w__ult(r, d)) { r = w__sub(r, d); }
        r = w__add(r, r);
    }
    if (!w__ult(r, d)) { r = w__sub(r, d); }
    if ((r.x | r.y) == 0u) { return W__64(0u, sign); }
    let n = w__zeros(r) - 1u;
    return w__pack(sign, low + 10i - i32(n), w__left(r, n));
}
fn w__fsqrt(a: W__64) -> W__64 {
    if (((a.y & 2147483647u) | a.x) == 0u) { return a; }
    if (w__f_isnan(a) || (a.y >> 31u) != 0u) { return W__64(0u, 2146959360u); }
    if (w__f_isinf(a)) { return a; }
    var m = w__f_bits(a);
    let n = w__zeros(m) - 11u;
    m = w__left(m, n + 10u);
    var e = w__f_exponent(a) - i32(n) - 1023i;
    if ((e & 1i) != 0i) {
        m = w__add(m, m);
        e--;
    }
    var q = W__64(0u, 0u);
    var r = W__64(0u, 0u);
    for (var i = 0i; i < 55i; i++) {
        r = w__add(w__left(r, 2u), w__right(m, 62u));
        m = w__left(m, 2u);
        let t = w__add(w__left(q, 2u), W__64(1u, 0u));
        q = w__add(q, q);
        if (!w__ult(r, t)) {
            r = w__sub(r, t);
            q.x |= 1u;
        }
    }
    q = w__left(q, 8u);
    if ((r.x | r.y) != 0u) { q.x |= 1u; }
    return w__pack(0u, (e >> 1u) + 1023i, q);
}
fn w__f_cut(a: W__64, n: u32) -> W__64 { return w__left(w__right(a, n), n); }
fn w__ftrunc(a: W__64) -> W__64 {
    let e = w__f_exponent(a) - 1023i;
    if (e >= 52i) { return a; }
    if (e < 0i) { return W__64(0u, a.y & 2147483648u); }
    return w__f_cut(a, u32(52i - e));
}
fn w__ffloor(a: W__64) -> W__64 {
    let t = w__ftrunc(a);
    let down = (a.y >> 31u) != 0u && (t.x != a.x || t.y != a.y) && !w__f_isnan(a);
    return w__fadd(t, W__64(0u, select(2147483648u, 3220176896u, down)));
}
fn w__fceil(a: W__64) -> W__64 { return w__fneg(w__ffloor(w__fneg(a))); }
fn w__fround(a: W__64) -> W__64 {
    let e = w__f_exponent(a) - 1023i;
    if (e >= 52i) { return a; }
    let sign = a.y & 2147483648u;
    if (e < -1i) { return W__64(0u, sign); }
    if (e == -1i) { return W__64(0u, sign | select(1072693248u, 0u, ((a.y & 1048575u) | a.x) == 0u)); }
    let n = u32(52i - e);
    let low = w__left(W__64(1u, 0u), n);
    let half = w__right(low, 1u);
    let up = w__f_cut(w__add(a, half), n);
    let tie = w__eq(w__sub(a, w__f_cut(a, n)), half);
    if (tie) { return up & ~low; }
    return up;
}
"""

_SIGNED = {"div": "w__idiv", "rem": "w__irem", "floordiv": "w__ifloordiv", "mod": "w__imod", "shr": "w__ishr", "lt": "w__ilt", "le": "w__ile", "abs": "w__size"}
_UNSIGNED = {"div": "w__udiv", "rem": "w__urem", "floordiv": "w__udiv", "mod": "w__urem", "shr": "w__ushr", "lt": "w__ult", "le": "w__ule"}
_EITHER = {n: f"w__{n}" for n in ("add", "sub", "mul", "and", "or", "xor", "not", "neg", "shl", "popcount", "eq")}
_FLOAT = {n: f"w__f{n}" for n in ("add", "sub", "mul", "div", "rem", "neg", "abs", "sqrt", "floor", "ceil", "round", "trunc", "lt", "le", "eq")}
SPELLING: dict[str, tuple[str, ...]] = {  # intrinsic without its prefix -> functions, the outer one first
    **{f"i64.{k}": (v,) for k, v in (_EITHER | _SIGNED).items()}, **{f"u64.{k}": (v,) for k, v in (_EITHER | _UNSIGNED).items()},
    **{f"f64.{k}": (v,) for k, v in _FLOAT.items()}, "f64.isnan": ("w__f_isnan",), "f64.isinf": ("w__f_isinf",),
    **{f"{t}64.of.{s}": (f"w__of_{s}",) for t in "iu" for s in ("i32", "u32")}, "f64.of.i32": ("w__f_of_i", "w__of_i32"), "f64.of.u32": ("w__f_of_u", "w__of_u32"),
    "i64.of.f32": ("w__i_of_f32",), "u64.of.f32": ("w__u_of_f32",), "f64.of.f32": ("w__f_of_f32",), "f64.of.i64": ("w__f_of_i",), "f64.of.u64": ("w__f_of_u",),
    "i64.of.f64": ("w__i_of_f",), "u64.of.f64": ("w__u_of_f",), **{f"f32.of.{t}64": (f"w__{t}_f32",) for t in "iuf"},
    **{f"odd.of.{t}64": (f"w__{t}_odd",) for t in "iuf"}, "near.of.i64": ("w__i_near",), "near.of.u64": ("w__u_near",),
}  # fmt: skip

FUNCTIONS: dict[str, str] = {re.match(r"fn (\w+)", t)[1]: t for t in re.split(r"\n(?=fn )", WORDS.strip())}  # type: ignore[index]
ORDER = {n: k for k, n in enumerate(FUNCTIONS)}
ALIAS = "alias W__64 = vec2<u32>;"


def needed(names: set[str]) -> list[str]:
    """The text of some functions and of those that they call, in order of definition, behind the name of the type."""
    todo, found = list(names), set(names)
    while todo:
        for n in re.findall(r"\bw__\w+", FUNCTIONS[todo.pop()]):
            if n not in found:
                found.add(n)
                todo.append(n)
    return [ALIAS, *(FUNCTIONS[n] for n in sorted(found, key=ORDER.__getitem__))] if found else []
