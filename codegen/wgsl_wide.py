"""Functions in WGSL on values of two 32-bit words, which it has no types for: 64-bit integers and floats (:mod:`luthier.passes.wide_words`).

The first word is the low one. Integers wrap; a divisor of zero gives zero. Floats are IEEE doubles, rounded to nearest even, in
integer arithmetic alone: an implementation may reassociate floats, never integers. A float on its way is a sign, an exponent and 63
bits of which bit 62 leads, the last one standing for all that were lost.
"""

from __future__ import annotations

import re

WORDS = """
fn w_add(a: W64, b: W64) -> W64 {
    let x = a.x + b.x;
    return W64(x, a.y + b.y + select(0u, 1u, x < a.x));
}
fn w_sub(a: W64, b: W64) -> W64 { return W64(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x)); }
fn w_mul32(a: u32, b: u32) -> W64 {
    let al = a & 65535u;
    let ah = a >> 16u;
    let bl = b & 65535u;
    let bh = b >> 16u;
    let ll = al * bl;
    let lh = al * bh;
    let hl = ah * bl;
    let mid = (ll >> 16u) + (lh & 65535u) + (hl & 65535u);
    return W64((mid << 16u) | (ll & 65535u), ah * bh + (lh >> 16u) + (hl >> 16u) + (mid >> 16u));
}
fn w_mul(a: W64, b: W64) -> W64 {
    let p = w_mul32(a.x, b.x);
    return W64(p.x, p.y + a.x * b.y + a.y * b.x);
}
fn w_neg(a: W64) -> W64 { return w_sub(W64(0u, 0u), a); }
fn w_size(a: W64) -> W64 {
    if (a.y >= 2147483648u) { return w_neg(a); }
    return a;
}
fn w_and(a: W64, b: W64) -> W64 { return a & b; }
fn w_or(a: W64, b: W64) -> W64 { return a | b; }
fn w_xor(a: W64, b: W64) -> W64 { return a ^ b; }
fn w_not(a: W64) -> W64 { return ~a; }
fn w_popcount(a: W64) -> W64 { return W64(countOneBits(a.x) + countOneBits(a.y), 0u); }
fn w_eq(a: W64, b: W64) -> bool { return a.x == b.x && a.y == b.y; }
fn w_ult(a: W64, b: W64) -> bool { return a.y < b.y || (a.y == b.y && a.x < b.x); }
fn w_ule(a: W64, b: W64) -> bool { return !w_ult(b, a); }
fn w_ilt(a: W64, b: W64) -> bool { return w_ult(a ^ W64(0u, 2147483648u), b ^ W64(0u, 2147483648u)); }
fn w_ile(a: W64, b: W64) -> bool { return !w_ilt(b, a); }
fn w_left(a: W64, n: u32) -> W64 {
    if (n == 0u) { return a; }
    if (n >= 64u) { return W64(0u, 0u); }
    if (n >= 32u) { return W64(0u, a.x << (n - 32u)); }
    return W64(a.x << n, (a.y << n) | (a.x >> (32u - n)));
}
fn w_right(a: W64, n: u32) -> W64 {
    if (n == 0u) { return a; }
    if (n >= 64u) { return W64(0u, 0u); }
    if (n >= 32u) { return W64(a.y >> (n - 32u), 0u); }
    return W64((a.x >> n) | (a.y << (32u - n)), a.y >> n);
}
fn w_by(n: W64) -> u32 { return select(64u, n.x, n.y == 0u); }
fn w_shl(a: W64, n: W64) -> W64 { return w_left(a, w_by(n)); }
fn w_ushr(a: W64, n: W64) -> W64 { return w_right(a, w_by(n)); }
fn w_ishr(a: W64, n: W64) -> W64 {
    let sign = W64(0u - (a.y >> 31u), 0u - (a.y >> 31u));
    return w_right(a ^ sign, w_by(n)) ^ sign;
}
fn w_zeros(a: W64) -> u32 { return select(32u + countLeadingZeros(a.x), countLeadingZeros(a.y), a.y != 0u); }
fn w_divide(a: W64, b: W64) -> vec4<u32> {
    if (b.x == 0u && b.y == 0u) { return vec4<u32>(0u, 0u, 0u, 0u); }
    if (a.y == 0u && b.y == 0u) { return vec4<u32>(a.x / max(b.x, 1u), 0u, a.x % max(b.x, 1u), 0u); }
    if (w_ult(a, b)) { return vec4<u32>(0u, 0u, a.x, a.y); }
    var q = W64(0u, 0u);
    var r = W64(0u, 0u);
    let skip = w_zeros(a);
    var rest = w_left(a, skip);
    for (var i = skip; i < 64u; i++) {
        let top = r.y >> 31u;
        r = W64((r.x << 1u) | (rest.y >> 31u), (r.y << 1u) | (r.x >> 31u));
        rest = w_add(rest, rest);
        q = w_add(q, q);
        if (top != 0u || !w_ult(r, b)) {
            r = w_sub(r, b);
            q.x |= 1u;
        }
    }
    return vec4<u32>(q, r);
}
fn w_udiv(a: W64, b: W64) -> W64 { return w_divide(a, b).xy; }
fn w_urem(a: W64, b: W64) -> W64 { return w_divide(a, b).zw; }
fn w_idiv(a: W64, b: W64) -> W64 {
    let q = w_divide(w_size(a), w_size(b)).xy;
    if (((a.y ^ b.y) >> 31u) != 0u) { return w_neg(q); }
    return q;
}
fn w_irem(a: W64, b: W64) -> W64 {
    let r = w_divide(w_size(a), w_size(b)).zw;
    if ((a.y >> 31u) != 0u) { return w_neg(r); }
    return r;
}
fn w_ifloordiv(a: W64, b: W64) -> W64 {
    let d = w_divide(w_size(a), w_size(b));
    if (((a.y ^ b.y) >> 31u) == 0u) { return d.xy; }
    if ((d.z | d.w) == 0u) { return w_neg(d.xy); }
    return ~d.xy;
}
fn w_imod(a: W64, b: W64) -> W64 {
    let r = w_irem(a, b);
    if ((r.x | r.y) != 0u && ((r.y ^ b.y) >> 31u) != 0u) { return w_add(r, b); }
    return r;
}
fn w_of_i32(a: i32) -> W64 { return W64(bitcast<u32>(a), bitcast<u32>(a >> 31u)); }
fn w_of_u32(a: u32) -> W64 { return W64(a, 0u); }
fn w_i_near(a: W64) -> i32 {
    let low = bitcast<i32>(a.x);
    if (a.y == bitcast<u32>(low >> 31u)) { return low; }
    return select(2147483647i, i32(-2147483648), (a.y >> 31u) != 0u);
}
fn w_u_near(a: W64) -> i32 { return select(2147483647i, bitcast<i32>(a.x), a.y == 0u && a.x < 2147483648u); }
fn w_jam(a: W64, n: u32) -> W64 {
    let r = w_right(a, n);
    let back = w_left(r, n);
    return W64(r.x | select(1u, 0u, back.x == a.x && back.y == a.y), r.y);
}
fn w_pack(sign: u32, e: i32, given: W64) -> W64 {
    if (e >= 2047i) { return W64(0u, sign | 2146435072u); }
    var m = given;
    if (e < 1i) { m = w_jam(m, min(u32(1i - e), 64u)); }
    m = w_right(w_add(m, W64(511u + ((m.x >> 10u) & 1u), 0u)), 10u);
    return w_add(W64(m.x, m.y | sign), W64(0u, u32(max(e, 1i) - 1i) << 20u));
}
fn w_narrow(sign: u32, e: i32, m: W64, odd: bool) -> f32 {
    var x = m.y | select(0u, 1u, m.x != 0u);
    if (e >= 255i) { return bitcast<f32>(select(sign | 2139095040u, sign | 2139095039u, odd)); }
    if (e < 1i) {
        let n = min(u32(1i - e), 31u);
        x = (x >> n) | select(0u, 1u, (x & ((1u << n) - 1u)) != 0u);
    }
    let r = select((x + 63u + ((x >> 7u) & 1u)) >> 7u, (x >> 7u) | select(0u, 1u, (x & 127u) != 0u), odd);
    return bitcast<f32>(sign | ((u32(max(e, 1i) - 1i) << 23u) + r));
}
fn w_f_of_u(a: W64) -> W64 {
    if ((a.x | a.y) == 0u) { return a; }
    let n = w_zeros(a);
    return w_pack(0u, 1086i - i32(n), w_jam(w_left(a, n), 1u));
}
fn w_f_of_i(a: W64) -> W64 {
    let r = w_f_of_u(w_size(a));
    return W64(r.x, r.y | (a.y & 2147483648u));
}
fn w_f32_of_size(sign: u32, a: W64, odd: bool) -> f32 {
    if ((a.x | a.y) == 0u) { return 0.0f; }
    let n = w_zeros(a);
    return w_narrow(sign, 190i - i32(n), w_jam(w_left(a, n), 1u), odd);
}
fn w_u_f32(a: W64) -> f32 { return w_f32_of_size(0u, a, false); }
fn w_i_f32(a: W64) -> f32 { return w_f32_of_size(a.y & 2147483648u, w_size(a), false); }
fn w_u_odd(a: W64) -> f32 { return w_f32_of_size(0u, a, true); }
fn w_i_odd(a: W64) -> f32 { return w_f32_of_size(a.y & 2147483648u, w_size(a), true); }
fn w_f_of_f32(v: f32) -> W64 {
    let b = bitcast<u32>(v);
    let sign = b & 2147483648u;
    var m = b & 8388607u;
    var e = (b >> 23u) & 255u;
    if (e == 255u) { return W64(m << 29u, sign | 2146435072u | (m >> 3u)); }
    if (e == 0u) {
        if (m == 0u) { return W64(0u, sign); }
        let n = countLeadingZeros(m) - 8u;
        m = (m << n) & 8388607u;
        return W64(m << 29u, sign | ((897u - n) << 20u) | (m >> 3u));
    }
    return W64(m << 29u, sign | ((e + 896u) << 20u) | (m >> 3u));
}
fn w_f_isnan(a: W64) -> bool {
    let h = a.y & 2147483647u;
    return h > 2146435072u || (h == 2146435072u && a.x != 0u);
}
fn w_f_isinf(a: W64) -> bool { return (a.y & 2147483647u) == 2146435072u && a.x == 0u; }
fn w_f_bits(a: W64) -> W64 {
    let e = (a.y >> 20u) & 2047u;
    return W64(a.x, (a.y & 1048575u) | select(1048576u, 0u, e == 0u));
}
fn w_f_exponent(a: W64) -> i32 { return max(i32((a.y >> 20u) & 2047u), 1i); }
fn w_f_to_f32(a: W64, odd: bool) -> f32 {
    let sign = a.y & 2147483648u;
    if ((a.y & 2146435072u) == 2146435072u) {
        return bitcast<f32>(sign | 2139095040u | select(0u, 4194304u, w_f_isnan(a)));
    }
    return w_narrow(sign, w_f_exponent(a) - 896i, w_left(w_f_bits(a), 10u), odd);
}
fn w_f_f32(a: W64) -> f32 { return w_f_to_f32(a, false); }
fn w_f_odd(a: W64) -> f32 { return w_f_to_f32(a, true); }
fn w_f_whole(a: W64) -> W64 {
    let e = w_f_exponent(a) - 1023i;
    if (e < 0i) { return W64(0u, 0u); }
    if (e >= 52i) { return w_left(w_f_bits(a), u32(e - 52i)); }
    return w_right(w_f_bits(a), u32(52i - e));
}
fn w_i_of_f(a: W64) -> W64 {
    if (w_f_isnan(a)) { return W64(0u, 0u); }
    let sign = a.y >> 31u;
    if (w_f_exponent(a) >= 1086i) { return select(W64(4294967295u, 2147483647u), W64(0u, 2147483648u), sign != 0u); }
    if (sign != 0u) { return w_neg(w_f_whole(a)); }
    return w_f_whole(a);
}
fn w_u_of_f(a: W64) -> W64 {
    if (w_f_isnan(a) || (a.y >> 31u) != 0u) { return W64(0u, 0u); }
    if (w_f_exponent(a) >= 1087i) { return W64(4294967295u, 4294967295u); }
    return w_f_whole(a);
}
fn w_i_of_f32(a: f32) -> W64 { return w_i_of_f(w_f_of_f32(a)); }
fn w_u_of_f32(a: f32) -> W64 { return w_u_of_f(w_f_of_f32(a)); }
fn w_feq(a: W64, b: W64) -> bool {
    if (w_f_isnan(a) || w_f_isnan(b)) { return false; }
    return (a.x == b.x && a.y == b.y) || ((a.x | b.x) == 0u && ((a.y | b.y) & 2147483647u) == 0u);
}
fn w_flt(a: W64, b: W64) -> bool {
    if (w_f_isnan(a) || w_f_isnan(b) || w_feq(a, b)) { return false; }
    let sa = a.y >> 31u;
    if (sa != (b.y >> 31u)) { return sa != 0u; }
    if (sa != 0u) { return w_ult(b, a); }
    return w_ult(a, b);
}
fn w_fle(a: W64, b: W64) -> bool { return w_flt(a, b) || w_feq(a, b); }
fn w_fneg(a: W64) -> W64 { return W64(a.x, a.y ^ 2147483648u); }
fn w_fabs(a: W64) -> W64 { return W64(a.x, a.y & 2147483647u); }
fn w_fadd(p: W64, q: W64) -> W64 {
    let nan = W64(0u, 2146959360u);
    if (w_f_isnan(p) || w_f_isnan(q)) { return nan; }
    if (w_f_isinf(p)) {
        if (w_f_isinf(q) && p.y != q.y) { return nan; }
        return p;
    }
    if (w_f_isinf(q)) { return q; }
    let swap = w_ult(w_fabs(p), w_fabs(q));
    let a = select(p, q, swap);
    let b = select(q, p, swap);
    let sign = a.y & 2147483648u;
    var e = w_f_exponent(a);
    let big = w_left(w_f_bits(a), 10u);
    let small = w_jam(w_left(w_f_bits(b), 10u), min(u32(e - w_f_exponent(b)), 64u));
    if (((a.y ^ b.y) >> 31u) == 0u) {
        var m = w_add(big, small);
        if ((m.y >> 31u) != 0u) {
            m = w_jam(m, 1u);
            e++;
        }
        return w_pack(sign, e, m);
    }
    let m = w_sub(big, small);
    if ((m.x | m.y) == 0u) { return W64(0u, 0u); }
    let n = w_zeros(m) - 1u;
    return w_pack(sign, e - i32(n), w_left(m, n));
}
fn w_fsub(a: W64, b: W64) -> W64 { return w_fadd(a, w_fneg(b)); }
fn w_fmul(a: W64, b: W64) -> W64 {
    let sign = (a.y ^ b.y) & 2147483648u;
    let za = ((a.y & 2147483647u) | a.x) == 0u;
    let zb = ((b.y & 2147483647u) | b.x) == 0u;
    if (w_f_isnan(a) || w_f_isnan(b) || (w_f_isinf(a) && zb) || (w_f_isinf(b) && za)) { return W64(0u, 2146959360u); }
    if (w_f_isinf(a) || w_f_isinf(b)) { return W64(0u, sign | 2146435072u); }
    if (za || zb) { return W64(0u, sign); }
    var x = w_f_bits(a);
    var y = w_f_bits(b);
    let nx = w_zeros(x);
    let ny = w_zeros(y);
    x = w_left(x, nx);
    y = w_left(y, ny);
    let lo = w_mul32(x.x, y.x);
    let m1 = w_mul32(x.x, y.y);
    let m2 = w_mul32(x.y, y.x);
    let mid = w_add(W64(m1.x, 0u), w_add(W64(m2.x, 0u), W64(lo.y, 0u)));
    var m = w_add(w_mul32(x.y, y.y), w_add(W64(m1.y, 0u), w_add(W64(m2.y, 0u), W64(mid.y, 0u))));
    if ((lo.x | mid.x) != 0u) { m.x |= 1u; }
    var e = w_f_exponent(a) + w_f_exponent(b) - 1023i + 22i - i32(nx) - i32(ny);
    if ((m.y >> 31u) != 0u) {
        m = w_jam(m, 1u);
        e++;
    }
    return w_pack(sign, e, m);
}
fn w_fdiv(a: W64, b: W64) -> W64 {
    let sign = (a.y ^ b.y) & 2147483648u;
    let za = ((a.y & 2147483647u) | a.x) == 0u;
    let zb = ((b.y & 2147483647u) | b.x) == 0u;
    if (w_f_isnan(a) || w_f_isnan(b) || (w_f_isinf(a) && w_f_isinf(b)) || (za && zb)) { return W64(0u, 2146959360u); }
    if (w_f_isinf(a) || zb) { return W64(0u, sign | 2146435072u); }
    if (w_f_isinf(b) || za) { return W64(0u, sign); }
    var r = w_f_bits(a);
    var d = w_f_bits(b);
    let nr = w_zeros(r) - 11u;
    let nd = w_zeros(d) - 11u;
    r = w_left(r, nr);
    d = w_left(d, nd);
    var e = w_f_exponent(a) - i32(nr) - w_f_exponent(b) + i32(nd) + 1023i;
    if (w_ult(r, d)) {
        r = w_add(r, r);
        e--;
    }
    var q = W64(0u, 0u);
    for (var i = 0i; i < 63i; i++) {
        q = w_add(q, q);
        if (!w_ult(r, d)) {
            r = w_sub(r, d);
            q.x |= 1u;
        }
        r = w_add(r, r);
    }
    if ((r.x | r.y) != 0u) { q.x |= 1u; }
    return w_pack(sign, e, q);
}
fn w_frem(a: W64, b: W64) -> W64 {
    let zb = ((b.y & 2147483647u) | b.x) == 0u;
    if (w_f_isnan(a) || w_f_isnan(b) || w_f_isinf(a) || zb) { return W64(0u, 2146959360u); }
    if (w_ult(w_fabs(a), w_fabs(b))) { return a; }
    let sign = a.y & 2147483648u;
    var r = w_f_bits(a);
    var d = w_f_bits(b);
    let nr = w_zeros(r) - 11u;
    let nd = w_zeros(d) - 11u;
    r = w_left(r, nr);
    d = w_left(d, nd);
    var e = w_f_exponent(a) - i32(nr);
    let low = w_f_exponent(b) - i32(nd);
    for (; e > low; e--) {
        if (!w_ult(r, d)) { r = w_sub(r, d); }
        r = w_add(r, r);
    }
    if (!w_ult(r, d)) { r = w_sub(r, d); }
    if ((r.x | r.y) == 0u) { return W64(0u, sign); }
    let n = w_zeros(r) - 1u;
    return w_pack(sign, low + 10i - i32(n), w_left(r, n));
}
fn w_fsqrt(a: W64) -> W64 {
    if (((a.y & 2147483647u) | a.x) == 0u) { return a; }
    if (w_f_isnan(a) || (a.y >> 31u) != 0u) { return W64(0u, 2146959360u); }
    if (w_f_isinf(a)) { return a; }
    var m = w_f_bits(a);
    let n = w_zeros(m) - 11u;
    m = w_left(m, n + 10u);
    var e = w_f_exponent(a) - i32(n) - 1023i;
    if ((e & 1i) != 0i) {
        m = w_add(m, m);
        e--;
    }
    var q = W64(0u, 0u);
    var r = W64(0u, 0u);
    for (var i = 0i; i < 55i; i++) {
        r = w_add(w_left(r, 2u), w_right(m, 62u));
        m = w_left(m, 2u);
        let t = w_add(w_left(q, 2u), W64(1u, 0u));
        q = w_add(q, q);
        if (!w_ult(r, t)) {
            r = w_sub(r, t);
            q.x |= 1u;
        }
    }
    q = w_left(q, 8u);
    if ((r.x | r.y) != 0u) { q.x |= 1u; }
    return w_pack(0u, (e >> 1u) + 1023i, q);
}
fn w_f_cut(a: W64, n: u32) -> W64 { return w_left(w_right(a, n), n); }
fn w_ftrunc(a: W64) -> W64 {
    let e = w_f_exponent(a) - 1023i;
    if (e >= 52i) { return a; }
    if (e < 0i) { return W64(0u, a.y & 2147483648u); }
    return w_f_cut(a, u32(52i - e));
}
fn w_ffloor(a: W64) -> W64 {
    let t = w_ftrunc(a);
    if ((a.y >> 31u) == 0u || w_feq(t, a) || w_f_isnan(a)) { return t; }
    return w_fadd(t, W64(0u, 3220176896u));
}
fn w_fceil(a: W64) -> W64 { return w_fneg(w_ffloor(w_fneg(a))); }
fn w_fround(a: W64) -> W64 {
    let e = w_f_exponent(a) - 1023i;
    if (e >= 52i) { return a; }
    let sign = a.y & 2147483648u;
    if (e < -1i) { return W64(0u, sign); }
    if (e == -1i) { return W64(0u, sign | select(1072693248u, 0u, ((a.y & 1048575u) | a.x) == 0u)); }
    let n = u32(52i - e);
    let low = w_left(W64(1u, 0u), n);
    let half = w_right(low, 1u);
    let up = w_f_cut(w_add(a, half), n);
    let tie = w_eq(w_sub(a, w_f_cut(a, n)), half);
    if (tie) { return up & ~low; }
    return up;
}
"""

_SIGNED = {"div": "w_idiv", "rem": "w_irem", "floordiv": "w_ifloordiv", "mod": "w_imod", "shr": "w_ishr", "lt": "w_ilt", "le": "w_ile", "abs": "w_size"}
_UNSIGNED = {"div": "w_udiv", "rem": "w_urem", "floordiv": "w_udiv", "mod": "w_urem", "shr": "w_ushr", "lt": "w_ult", "le": "w_ule"}
_EITHER = {n: f"w_{n}" for n in ("add", "sub", "mul", "and", "or", "xor", "not", "neg", "shl", "popcount", "eq")}
_FLOAT = {n: f"w_f{n}" for n in ("add", "sub", "mul", "div", "rem", "neg", "abs", "sqrt", "floor", "ceil", "round", "trunc", "lt", "le", "eq")}
SPELLING: dict[str, tuple[str, ...]] = {  # intrinsic without its prefix -> functions, the outer one first
    **{f"i64.{k}": (v,) for k, v in (_EITHER | _SIGNED).items()}, **{f"u64.{k}": (v,) for k, v in (_EITHER | _UNSIGNED).items()},
    **{f"f64.{k}": (v,) for k, v in _FLOAT.items()}, "f64.isnan": ("w_f_isnan",), "f64.isinf": ("w_f_isinf",),
    **{f"{t}64.of.{s}": (f"w_of_{s}",) for t in "iu" for s in ("i32", "u32")}, "f64.of.i32": ("w_f_of_i", "w_of_i32"), "f64.of.u32": ("w_f_of_u", "w_of_u32"),
    "i64.of.f32": ("w_i_of_f32",), "u64.of.f32": ("w_u_of_f32",), "f64.of.f32": ("w_f_of_f32",), "f64.of.i64": ("w_f_of_i",), "f64.of.u64": ("w_f_of_u",),
    "i64.of.f64": ("w_i_of_f",), "u64.of.f64": ("w_u_of_f",), **{f"f32.of.{t}64": (f"w_{t}_f32",) for t in "iuf"},
    **{f"odd.of.{t}64": (f"w_{t}_odd",) for t in "iuf"}, "near.of.i64": ("w_i_near",), "near.of.u64": ("w_u_near",),
}  # fmt: skip

FUNCTIONS: dict[str, str] = {re.match(r"fn (\w+)", t)[1]: t for t in re.split(r"\n(?=fn )", WORDS.strip())}  # type: ignore[index]
ORDER = {n: k for k, n in enumerate(FUNCTIONS)}
ALIAS = "alias W64 = vec2<u32>;"


def needed(names: set[str]) -> list[str]:
    """The text of some functions and of those that they call, in order of definition, behind the name of the type."""
    todo, found = list(names), set(names)
    while todo:
        for n in re.findall(r"\bw_\w+", FUNCTIONS[todo.pop()]):
            if n not in found:
                found.add(n)
                todo.append(n)
    return [ALIAS, *(FUNCTIONS[n] for n in sorted(found, key=ORDER.__getitem__))] if found else []
