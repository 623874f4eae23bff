"""What was measured and chosen, kept in SQLite: one row a (kernel, point, device), safe against being killed and shared by processes.

Keys are texts: of a kernel (:func:`signature`), of a device (:func:`fingerprint`), of the templates' sources (:func:`version`). A database that
is locked, full or broken costs what it would have kept and a warning, never the tuning.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from luthier.codegen.targets.target import Target
from luthier.ir.compute import Compute, let_exprs
from luthier.ir.expr import Expr, walk
from luthier.schedules.select import Point

SCHEMA = """
create table if not exists measured (kernel text, device text, version text, point text, seconds real, error text, features text, at real,
    primary key (kernel, device, version, point));
create table if not exists chosen (kernel text, device text, version text, point text, gain real, budget real, at real,
    primary key (kernel, device, version));
create table if not exists judged (model text, device text, version text, gain real, at real, primary key (model, device, version));
"""
WAIT = 10.0  # seconds for another process's transaction


class Database:
    """``path``: the file, made when it is first written. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.db = self._open()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.db.close()

    def _open(self) -> sqlite3.Connection:
        for attempt in range(2):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                db = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
                db.execute("pragma journal_mode=wal")
                db.execute("pragma synchronous=normal")
                db.executescript(SCHEMA)
                return db
            except (OSError, sqlite3.OperationalError) as e:  # no room, no rights, locked: tuning goes on without it
                warnings.warn(f"{self.path}: {e}; what is measured now is not kept", stacklevel=3)
                break
            except sqlite3.DatabaseError as e:
                if attempt:
                    break
                aside = self.path.with_suffix(f".broken-{int(time.time())}")
                os.replace(self.path, aside)
                warnings.warn(f"{self.path} is no database ({e}): it is {aside.name} now, and a new one is made", stacklevel=3)
        db = sqlite3.connect(":memory:", isolation_level=None)
        db.executescript(SCHEMA)
        return db

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            warnings.warn(f"{self.path}: {e}; a measurement is not kept", stacklevel=4)

    def measured(self, kernel: str, device: str) -> dict[str, tuple[float | None, str]]:
        """By point: seconds (None where it failed) and the error."""
        rows = self.db.execute("select point, seconds, error from measured where kernel=? and device=? and version=?", (kernel, device, version()))
        return {p: (s, e) for p, s, e in rows}

    def add(self, kernel: str, device: str, point: str, seconds: float | None, error: str = "", features: list[float] | None = None) -> None:
        row = (kernel, device, version(), point, seconds, error, json.dumps(features) if features else None, time.time())
        with self._kept():
            self.db.execute("insert or replace into measured values (?,?,?,?,?,?,?,?)", row)

    def chosen(self, kernel: str, device: str, budget: float) -> tuple[Point, float] | None:
        """The point and how many times faster than the default it is; None where less time than ``budget`` was spent on it."""
        row = self.db.execute(
            "select point, gain from chosen where kernel=? and device=? and version=? and budget>=?", (kernel, device, version(), 0.99 * budget),
        ).fetchone()  # fmt: skip
        return None if row is None else (from_text(row[0]), float(row[1]))

    def choose(self, kernel: str, device: str, point: Point, gain: float, budget: float) -> None:
        """``gain``: the default's time over the point's; ``budget``: seconds that the whole model was given."""
        row = (kernel, device, version(), to_text(point), gain, budget, time.time())
        with self._kept():
            self.db.execute("insert or replace into chosen values (?,?,?,?,?,?,?)", row)

    def verdict(self, model: str, device: str) -> float | None:
        """How many times faster a model was with its points, where that was measured."""
        row = self.db.execute("select gain from judged where model=? and device=? and version=?", (model, device, version())).fetchone()
        return None if row is None else float(row[0])

    def judge(self, model: str, device: str, gain: float) -> None:
        with self._kept():
            self.db.execute("insert or replace into judged values (?,?,?,?,?)", (model, device, version(), gain, time.time()))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every measurement, for training and for JSON lines."""
        names = ("kernel", "device", "version", "point", "seconds", "error", "features", "at")
        for row in self.db.execute(f"select {', '.join(names)} from measured order by kernel, device, at"):
            yield dict(zip(names, row, strict=True))


def to_text(p: Point) -> str:
    return json.dumps([p.template, [list(k) for k in p.knobs]])


def from_text(text: str) -> Point:
    template, knobs = json.loads(text)
    return Point(template, tuple((n, tuple(v) if isinstance(v, list) else v) for n, v in knobs))


def signature(compute: Compute, constants: Any, dims: Any = ()) -> str:
    """A key of all that decides the kernel: the Compute with the bounds of its variables and the names of its constants, and the sizes
    with which it is measured."""
    h = hashlib.sha256(str(replace(compute, name="k")).encode())
    seen: set[Expr] = set()
    for x in compute.lets:
        for e in let_exprs(x):
            seen |= {v for v in walk(e) if v.op == "var"}
    for v in sorted(seen, key=lambda v: str(v.attr[0])):
        h.update(f"{v.attr}\n".encode())
    h.update(repr((sorted(constants), sorted(dims))).encode())
    return h.hexdigest()


def fingerprint(target: Target, threads: int) -> str:
    """Of the device: code generation's target, the processor at hand, threads."""
    return f"{target.name} {target.cpu} {','.join(sorted(target.flags))} {_processor()} x{threads}"


@cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {k.strip(): v.strip() for k, v in lines.items()}
    return " ".join(found.get(k, "") for k in ("model name", "cpu family", "model", "stepping", "cache size", "CPU part"))


@cache
def version() -> str:
    """Of the templates and passes that make kernels: a hash of their sources."""
    import luthier.passes
    import luthier.schedules

    h = hashlib.sha256()
    for room in (luthier.schedules, luthier.passes):
        for p in sorted(Path(room.__path__[0]).rglob("*.py")):
            h.update(p.read_bytes())
    return h.hexdigest()[:16]
