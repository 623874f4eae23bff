"""Expr: a frozen, hash-consed scalar expression.

Two structurally equal expressions are the same object, so ``is`` compares, memo tables key on identity, and common
subexpressions are shared by construction. Constructors fold constants and keep index arithmetic in one normal form (a sum
of monomials with integer coefficients, constant last), so there is no separate index simplifier to call.

Semantics of the operators (``OPS``); every backend and the interpreter implement exactly these:

* integers wrap; ``index`` never overflows; float arithmetic is IEEE, multiply and add may be contracted to an FMA.
* ``div``: float division, or integer division truncating toward zero; ``rem`` its remainder (C ``fmod`` on floats).
  ``floordiv``/``mod``: floor semantics on integers (``mod`` takes the divisor's sign). A zero integer divisor gives 0.
* ``shl``/``shr``: a shift of at least the width gives 0 (``shr`` of a signed value: the sign). ``shr`` is arithmetic on ``i``.
* ``min(a, b) = a < b ? a : b`` and ``max(a, b) = a > b ? a : b``: **b when either is NaN** (one instruction on x86 and WASM).
* comparisons with NaN are false, except ``ne``.
* ``cast`` float to int truncates toward zero and saturates, NaN gives 0; int to int wraps; int to float rounds to nearest
  even; anything to bool is ``!= 0``. ``bitcast`` keeps the bits.
* ``round`` is half to even. ``select(c, a, b)`` evaluates both sides but loads of the side not taken must still be in bounds
  (use a masked load where they are not).
* ``load(buf, idx..., [mask, other])``: with a false mask no access happens and the value is ``other``.
* ``reduce`` (attr: monoid name and axes; args: values, then an optional ``where``) appears only in ``Compute``.
"""

from __future__ import annotations

from luthier.ir.construct import (
    before,
    binary,
    bitcast,
    call,
    carry_nan,
    cast,
    compare,
    extract,
    floordiv,
    land,
    lnot,
    load,
    lor,
    maximum,
    minimum,
    mod,
    proj,
    ramp,
    select,
    shuffle,
    unary,
    vreduce,
)
from luthier.ir.index_algebra import (
    Bounds,
    Poly,
    add_const,
    affine_parts,
    bounds,
    from_linear,
    linear,
    poly_const,
    prove,
    rejoin,
)
from luthier.ir.node import (
    BINARY,
    COMPARE,
    UNARY,
    Expr,
    Number,
    as_expr,
    bcast,
    collect,
    const,
    free_vars,
    is_const,
    make_node,
    tree_size,
    var,
)
from luthier.ir.traverse import (
    load_parts,
    loads,
    rebuild,
    rewrite,
    rewrite_loads,
    substitute,
    vars_outside_loads,
    walk,
)

__all__ = [
    "BINARY", "Bounds", "COMPARE", "Expr", "Number", "Poly", "UNARY", "add_const", "affine_parts", "as_expr", "bcast",
    "before", "binary", "bitcast", "bounds", "call", "carry_nan", "cast", "collect", "compare", "const", "extract", "floordiv", "free_vars",
    "from_linear", "is_const", "land", "linear", "lnot", "load", "load_parts", "loads", "lor", "make_node", "maximum",
    "minimum", "mod", "poly_const", "proj", "prove", "ramp", "rebuild", "rejoin", "rewrite", "rewrite_loads", "select",
    "shuffle", "substitute", "tree_size", "unary", "var", "vars_outside_loads", "vreduce", "walk",
]  # fmt: skip
