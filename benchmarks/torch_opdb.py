"""Every operator of torch's own table of samples (``op_db``), compiled and compared with eager.

    python benchmarks/torch_opdb.py [NAME ...] [--samples 8] [--dtypes float32,int64,bool] [--seed N --count N] [--json FILE] [--report FILE]

An OpInfo counts when its export works and two eager runs agree; it passes when every sample that counts is equal within 1e-4 (floats) or
exactly. Results are kept in the JSON-lines file and a later run goes on from there. Indices of sorts are compared by what they point at,
contents of ``empty`` not at all.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import logging
import random
import signal
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

import luthier

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "torch_opdb.jsonl"
SECONDS = 120  # of an OpInfo and a type
# which operand the positions that an operator gives point into, where equal elements may stand in another order
ORDERED = {"sort", "argsort", "topk", "kthvalue", "median", "nanmedian", "mode", "msort"}
UP_TO_SIGNS = {"linalg.eigh"}  # of vectors
UNDEFINED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted", "resize_", "resize_as_")
Row = dict[str, Any]


class Slow(Exception):
    """An operator took longer than SECONDS."""


class Call(torch.nn.Module):
    """One sample: an operator with the arguments that are no tensors in place."""

    def __init__(self, op: Any, sample: Any) -> None:
        super().__init__()
        leaves, self.spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
        self.op = op
        self.where = [k for k, v in enumerate(leaves) if isinstance(v, torch.Tensor)]
        self.tensors = [leaves[k] for k in self.where]
        self.leaves = [None if isinstance(v, torch.Tensor) else v for v in leaves]

    def forward(self, *tensors: Any) -> Any:
        leaves = list(self.leaves)
        for k, t in zip(self.where, tensors, strict=True):
            leaves[k] = t
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.op(*args, **kwargs)

    def fresh(self) -> list[Any]:
        return [t.clone() for t in self.tensors]

    def run(self, f: Any) -> tuple[list[Any], list[Any]]:
        """The results of a call with copies of the tensors, and these copies after it."""
        tensors = self.fresh()
        return pytree.tree_leaves(f(*tensors)), tensors


def as_good(case: Call, k: int, got: Any, want: Any) -> bool:
    """Whether result ``k`` lies no further from that of the same call in f64 than twice what eager's own does: a sum that cancels."""
    if got.dtype != torch.float32 or got.shape != want.shape or not got.numel():
        return False
    case = copy.copy(case)
    case.tensors = [t.double() if t.is_floating_point() else t for t in case.tensors]
    exact = case.run(case)[0][k]
    return bool((got - exact).abs().max() <= 2 * (want - exact).abs().max())


def unseeded(case: Call) -> list[Any]:
    """The results of a call in which seeds that the sample's own function sets do not count."""
    torch.rand(1)
    with mock.patch.object(torch, "manual_seed", lambda seed: None):
        return case.run(case)[0]


def name_of(op: Any) -> str:
    return op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")


def equal(got: Any, want: Any) -> str:
    """Why two results differ; empty when they do not."""
    if got is None or want is None:
        return "" if got is want else "no result" if got is None else "a result where eager gives none"
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"{got.dtype}{list(got.shape)} for {want.dtype}{list(want.shape)}"
    if torch.allclose(got, want, rtol=1e-4, atol=1e-4, equal_nan=True):
        return ""
    return f"off by {(got.double() - want.double()).abs().max().item():.2e}"


def check(op: Any, dtype: torch.dtype, samples: int, target: str = "cpu") -> Row:
    """{'op', 'dtype', 'status': pass, wrong, refused, crash, or not counted: random, no-export, no-sample}."""
    row: Row = {"op": name_of(op), "dtype": str(dtype).removeprefix("torch.")}
    try:
        cases = [Call(op.op, s) for s in list(op.sample_inputs("cpu", dtype, requires_grad=False))[:samples]]
    except Exception as error:  # a sample generator of torch's
        return row | {"status": "no-sample", "why": str(error)[:200]}
    programs = []
    for case in cases:
        try:
            with torch.no_grad():
                want, changed = case.run(case)
                again = unseeded(case)
                if not all(isinstance(t, torch.Tensor) for t in want) or op.name in UNDEFINED or any(equal(a, b) for a, b in zip(again, want, strict=True)):
                    return row | {"status": "random", "why": ""}
                programs.append((case, torch.export.export(case, tuple(case.fresh())), want, changed))
        except Exception as error:  # torch's own refusals, of many types
            return row | {"status": "no-export", "why": f"{type(error).__name__}: {error}"[:200]}
    for done, (case, program, want, changed) in enumerate(programs):
        try:
            got, inputs = case.run(luthier.compile(program, target=target, threads=1))
        except luthier.LuthierError as error:
            return row | {"status": "refused", "why": str(error)[:400], "done": done}
        except Slow:
            raise
        except Exception as error:
            return row | {"status": "crash", "why": f"{type(error).__name__}: {error}"[:400], "done": done}
        why = next((w for a, b in zip(inputs, changed, strict=True) if (w := equal(a, b))), "")
        if why:
            return row | {"status": "wrong", "why": f"an input that the operator changes: {why}", "done": done}
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            positions = op.name in ORDERED and b.dtype == torch.int64 and (k == 1 or op.name == "argsort")
            why = "" if positions and a.shape == b.shape else equal(a, b)
            if why and not (op.name in UP_TO_SIGNS and not equal(a.abs(), b.abs())) and not as_good(case, k, a, b):
                return row | {"status": "wrong", "why": why, "done": done}
    return row | {"status": "pass", "done": len(programs)}


def report(rows: list[Row]) -> str:
    """A table in Markdown: how many pass, and all others with reasons."""
    kinds = collections.Counter(r["status"] for r in rows)
    counted = [r for r in rows if r["status"] in ("pass", "wrong", "refused", "crash", "slow")]
    ops = {r["op"] for r in counted}
    good = ops - {r["op"] for r in counted if r["status"] != "pass"}
    lines = [
        "# torch's operators (`op_db`)", "", f"torch {torch.__version__}; `python benchmarks/torch_opdb.py --report`.", "",
        f"Of {len(ops)} OpInfos whose export is functional and deterministic {len(good)} are equal to eager in every type "
        f"({100 * len(good) / max(len(ops), 1):.1f} %); rows (operator and type): " + ", ".join(f"{k} {n}" for k, n in sorted(kinds.items())) + ".",
        "", "| operator | type | what | why |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {r['op']} | {r['dtype']} | {r['status']} | {r['why'].splitlines()[0][:160].replace('|', '/') if r['why'] else ''} |" for r in counted if r["status"] != "pass"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--dtypes", default="float32,int64,bool")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=0, help="a seeded sample of so many OpInfos; 0: all")
    parser.add_argument("--json", type=Path, default=KEPT)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    ops = [op for op in op_db if not args.names or op.name in args.names or name_of(op) in args.names]
    if args.count:
        ops = random.Random(args.seed).sample(ops, args.count)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.json.read_text().splitlines()] if args.json.exists() and not args.names else []
    done = {(r["op"], r["dtype"]) for r in rows}

    def late(*_: Any) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, late)
    for op in ops:
        for dtype in (getattr(torch, d) for d in args.dtypes.split(",")):
            if dtype not in op.dtypes or (name_of(op), str(dtype).removeprefix("torch.")) in done:
                continue
            signal.alarm(SECONDS)
            try:
                row = check(op, dtype, args.samples)
            except Slow:
                row = {"op": name_of(op), "dtype": str(dtype).removeprefix("torch."), "status": "slow", "why": f"over {SECONDS} s"}
            finally:
                signal.alarm(0)
            rows.append(row)
            if args.names:
                print(row)
            else:
                with args.json.open("a") as f:
                    f.write(json.dumps(row) + "\n")
    text = report(rows)
    print(text.splitlines()[4] if not args.names else "")
    if args.report:
        args.report.write_text(text)
    return int(any(r["status"] in ("wrong", "crash", "slow") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
