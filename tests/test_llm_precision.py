"""Language models whose matrices are quantized anew, or given: compiled beside numpy over the same dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.llama_numpy import Reference
from luthier import llm
from luthier.cli.commands import main
from luthier.errors import InputError, InvalidModel, QuantizationError
from luthier.importers.gguf.file import read_gguf
from luthier.importers.gguf.requantize import permute_rows, stack_blocks
from luthier.passes.quantize.prune_groups import prune_groups
from luthier.passes.quantize.quantize_weights import quantize
from tests.test_gguf import tiny

Array = np.ndarray[Any, Any]
TOKENS = [5, 17, 93, 0, 41, 41, 8, 60, 2, 77, 12]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def matrices(path: Path) -> dict[str, Array]:
    g = read_gguf(path)
    return {n: t.numpy() for n, t in g.tensors.items() if n.startswith("blk.") and len(t.shape) == 2}


def compare(path: Path, weights: dict[str, Any], replaced: dict[str, Array]) -> None:
    want = Reference(read_gguf(path), np.float64, replaced).forward(np.array(TOKENS))
    plain = Reference(read_gguf(path), np.float64).forward(np.array(TOKENS))
    assert np.abs(want - plain).max() > 1e-2 * np.abs(want).max()  # other weights
    got = llm.load(path, threads=1, capacity=32, chunk=4, exact=True, all_logits=True, weights=weights).feed(TOKENS)
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()  # keys and values in half precision


@pytest.mark.parametrize(("bits", "method", "symmetric"), [(4, "rtn", False), (3, "hqq", False), (2, "mse", False), (2, "mse", True), (0, "mse", True), (1, "mse", True)])
def test_given_weights(small: Path, bits: int, method: str, symmetric: bool) -> None:
    """Codes with zero points of both kinds and without, 32 columns a scale."""
    weights = {n: quantize(w, bits, 32, symmetric, method) for n, w in matrices(small).items()}
    compare(small, weights, {n: w.dequantize() for n, w in weights.items()})


def test_given_sparse_weights(small: Path) -> None:
    weights = {n: prune_groups(w, 0.5, 16, 4) for n, w in matrices(small).items()}
    compare(small, weights, {n: w.dense() for n, w in weights.items()})


def test_some_tensors_stay(small: Path) -> None:
    w = quantize(matrices(small)["blk.1.attn_k.weight"], 2, 32)
    compare(small, {"blk.1.attn_k.weight": w}, {"blk.1.attn_k.weight": w.dequantize()})


@pytest.mark.parametrize(("precision", "near"), [("w8", 0.03), ("w4", 0.4)])
def test_precision(small: Path, precision: str, near: float) -> None:
    want = Reference(read_gguf(small), np.float64).forward(np.array(TOKENS))[-1]
    got = llm.load(small, threads=1, capacity=32, exact=True, precision=precision).feed(TOKENS)
    assert np.sqrt(np.square(got - want).mean()) < near * want.std()


def test_rows_of_sparse_weights() -> None:
    rng = np.random.default_rng(0)
    a, b = (prune_groups(rng.standard_normal((n, 64)).astype(np.float32), 0.4) for n in (12, 5))
    order = rng.permutation(12)
    assert np.array_equal(permute_rows(a, order).dense(), a.dense()[order])
    both = stack_blocks([a, b])
    assert both is not None and np.array_equal(both.dense(), np.concatenate([a.dense(), b.dense()]))
    assert stack_blocks([a, prune_groups(rng.standard_normal((4, 64)).astype(np.float32), 0.4, 8)]) is None


def test_wrong_precision_or_weights(small: Path) -> None:
    with pytest.raises(QuantizationError, match="not made in precision int8"):
        llm.load(small, precision="int8")
    with pytest.raises(QuantizationError, match="exclude each other"):
        llm.load(small, precision="w4", weights={})
    with pytest.raises(InvalidModel, match="weights of 64 x 96 were given for tensor 'blk.0.ffn_up.weight' of 96 x 64"):
        llm.load(small, weights={"blk.0.ffn_up.weight": quantize(np.ones((64, 96), np.float32), 4, 32)})


def test_on_the_command_line(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(small), "x", "--precision", "w9"])
    assert stop.value.code == 2 and "unknown precision 'w9'" in capsys.readouterr().err
    llm.load(small, threads=1, capacity=32).module.save(tmp_path / "made")
    with pytest.raises(InputError, match="compiled already"):
        llm.load(tmp_path / "made", precision="w4")
