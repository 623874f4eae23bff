"""A per-kernel profile as a Chrome trace, which chrome://tracing and Perfetto show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["trace_events", "write_trace"]


def trace_events(rows: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """Rows of ``Module.profile`` one after another, as they run; times in microseconds, each the mean over the runs of the profile."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": 1, "name": "process_name", "args": {"name": model}},
        {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "kernels (all threads meet after each)"}},
    ]
    at = 0.0
    for k, row in enumerate(rows):
        us = float(row["ms"]) * 1e3
        args: dict[str, Any] = {"call": k, "nodes": list(row["nodes"]), "flops": row["flops"], "bytes": row["bytes"]}
        if us > 0:
            args |= {"GFLOP/s": round(row["flops"] / us / 1e3, 2), "GB/s": round(row["bytes"] / us / 1e3, 2)}
        events.append({"ph": "X", "pid": 1, "tid": 1, "cat": "kernel", "name": row["kernel"], "ts": round(at, 3), "dur": round(us, 3), "args": args})
        at += us
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"model": model}}


def write_trace(rows: Sequence[Mapping[str, Any]], path: Path, model: str) -> None:
    """Raises OSError when the file cannot be written."""
    path.write_text(json.dumps(trace_events(rows, model)) + "\n", encoding="utf-8")
