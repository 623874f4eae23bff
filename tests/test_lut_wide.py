"""Tables of 128 entries: in the interpreter, in machine code, and under emulation where bochs is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import luthier.pipeline as pipeline
from luthier.codegen.llvm.backend import assembly, kernel_text
from luthier.codegen.llvm.printer import legalize_llvm
from luthier.codegen.targets.target import parse_target
from luthier.ir.graph import Graph
from luthier.ir.interpret.loops import run_func
from luthier.schedules.lowbit.lut_gemv import pack_planes, trits
from luthier.schedules.lowbit.lut_wide import ENTRIES, pack_quintuples
from luthier.schedules.select import Kernels, Record
from tests.emulated import Array, arrays, missing, run_emulated
from tests.test_lowbit import ROUNDED, nmse, product

TARGET = parse_target("cpu:icelake-server")
FORMS = [(1, 64, "symmetric"), (1, 128, "zeros"), (2, 64, "symmetric"), (2, 64, "offsets"), (3, 32, "symmetric"), (0, 256, "symmetric"), (0, 64, "symmetric")]


def candidates(graph: Graph, target: str = TARGET.name) -> list[Kernels]:
    """What a choice by measurement would choose from."""
    seen: list[Sequence[Kernels]] = []

    def note(found: Sequence[Kernels]) -> Kernels:
        seen.append(found)
        return found[0]

    pipeline.compile_program(graph, parse_target(target).caps, record=Record(note))
    return [k for found in seen for k in found if k.template == "lut_wide"]


def output(memory: dict[str, Array], size: int) -> Array:
    (name,) = [n for n, a in memory.items() if a.size == size and n.endswith("o0")]
    return memory[name]


@pytest.mark.parametrize(("bits", "group", "form"), FORMS)
def test_product_in_the_interpreter(bits: int, group: int, form: str) -> None:
    rng = np.random.default_rng(bits)
    graph, w = product(72, 256, group, bits, 32, 2, rng, form)
    x = rng.standard_normal((2, 256)).astype(np.float32)
    k = candidates(graph)[0]
    memory = arrays(k, x, "", 2)
    for f in k.funcs:
        run_func(f, {b.name: memory[b.name] for b in f.buffers}, {})
    assert nmse(output(memory, 144).reshape(2, 72), x.astype(np.float64) @ w.T) < ROUNDED


@pytest.mark.skipif(bool(missing(TARGET)), reason=missing(TARGET))
@pytest.mark.parametrize(("bits", "group", "form"), FORMS)
def test_product_under_emulation(bits: int, group: int, form: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(bits)
    graph, w = product(200, 512, group, bits, 32, 2, rng, form)
    x = rng.standard_normal((2, 512)).astype(np.float32)
    for n, k in enumerate(candidates(graph)):
        (tmp_path / str(n)).mkdir()
        got = run_emulated(k, arrays(k, x, "", 2), TARGET, tmp_path / str(n))
        assert nmse(output(got, 400).reshape(2, 200), x.astype(np.float64) @ w.T) < ROUNDED


def test_machine_code() -> None:
    graph, _ = product(128, 256, 64, 1, 32, 1, np.random.default_rng(0))
    k = candidates(graph)[0]
    text = assembly(kernel_text(legalize_llvm(k.funcs[-1]), TARGET)[1], TARGET)
    assert "vpermi2b" in text or "vpermt2b" in text


def test_only_where_the_processor_has_it_and_only_by_measurement() -> None:
    graph, _ = product(128, 256, 64, 1, 32, 1, np.random.default_rng(0))
    assert not candidates(graph, "cpu:x86-64-v4") and not candidates(graph, "cpu:x86-64-v3")
    program = pipeline.compile_program(graph, TARGET.caps)
    assert "lut_wide" not in {f.attrs.get("template") for f in program.kernels.values()}


def decoded(raw: Array, size: int) -> Array:
    """[.., size] bytes in the order of the rows."""
    order = np.empty(size, int)
    order[0::2], order[1::2] = np.arange(size // 2), np.arange(size // 2, size)
    out = np.empty_like(raw)
    out[..., order] = raw
    return out


@pytest.mark.parametrize("bits", [1, 2])
def test_octets_hold_every_bit(bits: int) -> None:
    u = np.random.default_rng(0).integers(0, 1 << bits, (64, 40)).astype(np.uint8)
    raw = decoded(pack_planes(bits, 64, signed=True)(u).view(np.uint8).reshape(5, bits, 64), 64)
    octets = np.where(raw & 128, raw ^ 127, raw)
    back = sum(((octets[:, b, None, :] >> np.arange(8)[:, None]) & 1) << b for b in range(bits))
    assert np.array_equal(np.asarray(back).transpose(2, 0, 1).reshape(64, 40), u)


@pytest.mark.parametrize("flush", [32, 64])
def test_quintuples_hold_every_value(flush: int) -> None:
    assert len({tuple(t) for t in trits(5, ENTRIES)}) == 122 <= ENTRIES  # 3 ** 5 up to the sign
    u = np.random.default_rng(0).integers(0, 3, (64, flush)).astype(np.uint8)
    n = -(-flush // 5)
    raw = decoded(pack_quintuples(flush, 64)(u).view(np.uint8).reshape(n, 64), 64)
    values = trits(5, ENTRIES)[raw & 127] * np.where(raw & 128, -1, 1)[..., None]
    assert np.array_equal(values.transpose(1, 0, 2).reshape(64, -1)[:, :flush], u.astype(int) - 1)
