"""The innermost loop of a GEMM keeps its tile in registers: no access to the stack between the multiply-adds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import cases

from luthier.codegen.llvm.backend import assembly
from luthier.codegen.llvm.printer import print_kernels
from luthier.codegen.targets.target import parse_target
from luthier.schedules.select import build


def inner_loops(text: str) -> list[list[str]]:
    """Runs of lines from a label to a jump back to that label, without another label between."""
    out: list[list[str]] = []
    label, body = "", []
    for line in text.splitlines():
        m = re.match(r"^(\.L\w+):", line)
        if m:
            label, body = m.group(1), []
        elif label:
            body.append(line)
            if re.match(rf"\s+j\w+\s+{re.escape(label)}$", line):
                out.append(body)
                label = ""
    return out


@pytest.mark.parametrize("level", ["cpu:x86-64-v3", "cpu:x86-64-v4"])
@pytest.mark.parametrize("mnk", [(96, 128, 64), (128, 384, 384), (49, 512, 256)], ids=str)
def test_gemm_tiles_stay_in_registers(mnk: tuple[int, int, int], level: str) -> None:
    target = parse_target(level)
    comp, arrays, _ = cases.matmul(*mnk, {}, np.random.default_rng(0))
    kernels = build(comp, target.caps, {"B": arrays["B"]})
    text = print_kernels([("k", kernels.funcs[-1])], target)
    hot = [b for b in inner_loops(assembly(text, target)) if sum("vfmadd" in x for x in b) >= 8]
    assert hot, "no inner loop of multiply-adds found"
    touched = [x.strip() for b in hot for x in b if "(%rsp" in x or "(%rbp" in x]
    assert not touched, touched[:5]
