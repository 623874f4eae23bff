"""A seeded sample of the ONNX backend suite, from the saved artifact; the whole suite is ``python benchmarks/conformance.py``.

``passing.txt`` lists the tests that pass (``python benchmarks/conformance.py --update`` rewrites it): one of them that fails is
a regression. A test that is not listed may be refused or wrong, but must not crash, hang, or raise anything but a luthier error.
"""

from __future__ import annotations

import csv
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda import need_compiler

ROOT = Path(__file__).resolve().parents[2]
PASSING = frozenset((Path(__file__).parent / "passing.txt").read_text().split())
SAMPLE, SEED = 240, 20261122
EXPECTED = random.Random(SEED).sample(sorted(PASSING), min(SAMPLE, len(PASSING)))


def run(folder: Path, *arguments: str) -> dict[str, dict[str, str]]:
    """Rows of the harness's csv file by test."""
    table = folder / "conformance.csv"
    command = [sys.executable, str(ROOT / "benchmarks" / "conformance.py"), "--jobs", "2", "--csv", str(table), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode in (0, 1), done.stderr + done.stdout
    with open(table) as file:
        return {row["test"]: row for row in csv.DictReader(file)}


def drawn(kind: str, count: int) -> list[str]:
    """A sample of what passes on a target."""
    names = sorted((Path(__file__).parent / f"passing-{kind}.txt").read_text().split())
    return random.Random(SEED).sample([n for n in names if not n.startswith("light/")], count)  # whole networks take long without a GPU


CUDA = drawn("cuda", 300)


@pytest.fixture(scope="module")
def cuda_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    need_compiler()
    folder = tmp_path_factory.mktemp("conformance-cuda")
    (folder / "tests.txt").write_text("\n".join(CUDA))
    return run(folder, "--target", "cuda:emulate", "--tests", str(folder / "tests.txt"))


@pytest.mark.parametrize("name", CUDA)
def test_still_passes_on_cuda(name: str, cuda_rows: dict[str, dict[str, str]]) -> None:
    row = cuda_rows[name]
    assert row["status"] == "pass", f"{row['status']} in {row['phase']}: {row['message']}"


@pytest.fixture(scope="module")
def expected_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("conformance")
    (folder / "tests.txt").write_text("\n".join(EXPECTED))
    return run(folder, "--tests", str(folder / "tests.txt"))


@pytest.mark.parametrize("name", EXPECTED)
def test_still_passes(name: str, expected_rows: dict[str, dict[str, str]]) -> None:
    row = expected_rows[name]
    assert row["status"] == "pass", f"{row['status']} in {row['phase']}: {row['message']}"


def test_the_rest_fails_cleanly(tmp_path: Path) -> None:
    """Of a sample of the whole suite: no crash, no hang, no foreign exception, and every refusal names node and operator."""
    rows = run(tmp_path, "--sample", "120", "--seed", str(SEED))
    dirty = [f"{r['test']}: {r['status']} {r['message']}" for r in rows.values() if r["status"] in ("crash", "timeout", "error")]
    assert dirty == []
    unnamed = [f"{r['test']}: {r['message']}" for r in rows.values() if r["status"] == "refused" and not (r["op"] and r["node"])]
    assert unnamed == []
