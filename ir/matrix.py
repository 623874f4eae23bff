"""Products of small matrices that the 32 threads of a warp compute together (CUDA ``mma.sync``): effects, :data:`MMA` is {element: intrinsic}.

What a thread gets is what it would have computed alone::

    for i < 2 mi: for j < 2 ni: for k < 16: acc[i * 2 ni + j] += A[a + i * am + k * ak] * B[b + (j // 2) * 8 + j % 2 + k * bk]

with ``A`` and ``B`` the bits of 16-bit floats, sums in f32, as ``call(acc, A, a, am, ak, B, b, bk)`` with the attributes ``mi`` and ``ni``. The threads
must be so numbered that ``a`` is a warp's own plus ``thread // 4 % 8``, and ``b`` its own plus ``thread % 4 * 2``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, bf16, f16
from luthier.ir.intrin import register

MMA = {f16: "mma.m16n8k16.f16", bf16: "mma.m16n8k16.bf16"}


def _product(kind: DType) -> Any:
    def run(acc: Any, a: Any, at: Any, am: Any, ak: Any, b: Any, bt: Any, bk: Any, mi: int, ni: int) -> None:
        k, i, j = np.arange(16), np.arange(2 * mi)[:, None], np.arange(2 * ni)[:, None]
        x = a.reshape(-1)[int(at) + i * int(am) + k * int(ak)].view(kind.numpy).astype(np.float32)
        y = b.reshape(-1)[int(bt) + j // 2 * 8 + j % 2 + k * int(bk)].view(kind.numpy).astype(np.float32)
        acc.reshape(-1)[...] += (x @ y.T).reshape(-1)

    return run


for _d, _name in MMA.items():
    register(_name, _product(_d), f"sums of 16 products of {_d} in f32", effect=True)
