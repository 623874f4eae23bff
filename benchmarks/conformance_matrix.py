"""Results of the ONNX suite by operator and target, for `luthier ops`.

    python benchmarks/conformance_matrix.py cpu=tests/conformance/passing.txt wasm=build/conformance-wasm.csv

Each CSV is what `benchmarks/conformance.py --target T --csv FILE` wrote; a `.txt` lists the tests of the whole suite that pass. Counted are the suite's tests of single operators: node
tests that are no expansion of a function and whose graph, constants apart, holds one operator. Writes `compiler/conformance.json`;
targets that are not named keep their results.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import onnx_suite  # noqa: E402

OUT = ROOT / "compiler" / "conformance.json"


def operator_of(test: str) -> str | None:
    """The operator that a test is about, None for tests of several."""
    import onnx

    kind, _, name = test.partition("/")
    if kind != "node" or "_expanded" in name:
        return None
    model = onnx.load(onnx_suite.case_folder(ROOT / "build" / "conformance", test) / "model.onnx", load_external_data=False)
    ops = {(n.domain, n.op_type) for n in model.graph.node if n.op_type != "Constant"} or {(n.domain, n.op_type) for n in model.graph.node}
    if len(ops) != 1:
        return None
    domain, op = ops.pop()
    return op if domain in ("", "ai.onnx") else f"{domain}::{op}"


def statuses(path: Path) -> list[tuple[str, bool]]:
    """(test, whether it passed) of every test that was run."""
    if path.suffix == ".txt":
        passing = set(path.read_text().split())
        return [(t, t in passing) for t in onnx_suite.prepare(ROOT / "build" / "conformance")]
    with open(path, newline="") as f:
        return [(row["test"], row["status"] == "pass") for row in csv.DictReader(f)]


def tally(path: Path) -> dict[str, list[int]]:
    """{operator: [tests passed, tests run]}."""
    out: dict[str, list[int]] = {}
    for test, passed in statuses(path):
        op = operator_of(test)
        if op is not None:
            counts = out.setdefault(op, [0, 0])
            counts[0] += passed
            counts[1] += 1
    return dict(sorted(out.items()))


def main(arguments: list[str]) -> int:
    import onnx

    if not arguments or any("=" not in a for a in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    data: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {"targets": {}}
    data["onnx"] = onnx.__version__
    for a in arguments:
        target, _, path = a.partition("=")
        data["targets"][target] = tally(Path(path))
        print(f"{target}: {sum(p for p, _ in data['targets'][target].values())} of {sum(n for _, n in data['targets'][target].values())} tests of {len(data['targets'][target])} operators")
    lines = [f"  {json.dumps(t)}: {{\n" + ",\n".join(f"   {json.dumps(o)}: {json.dumps(c)}" for o, c in ops.items()) + "\n  }" for t, ops in sorted(data["targets"].items())]
    OUT.write_text('{\n "onnx": ' + json.dumps(data["onnx"]) + ',\n "targets": {\n' + ",\n".join(lines) + "\n }\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
