"""Artifacts that were damaged, made by an enemy, cut short or killed half-way: a clear error, or the old or the new one, whole."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

import luthier
from luthier import replace_folder
from luthier.artifact import load
from luthier.codegen.llvm.backend import find_linker
from luthier.errors import ArtifactError, LuthierError, TargetError
from luthier.module import Module

X = np.ones((1, 4), np.float32)


def compiled(factor: float, columns: int = 4, target: str = "cpu") -> Module:
    w = np.full((4, columns), factor, np.float32)
    graph = h.make_graph(
        [h.make_node("MatMul", ["x", "w"], ["y"])], "scaled", [h.make_tensor_value_info("x", T.FLOAT, ["n", 4])], [h.make_tensor_value_info("y", T.FLOAT, ["n", columns])],
        [numpy_helper.from_array(w, "w")],
    )  # fmt: skip
    return luthier.compile(h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9), target, threads=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        find_linker()
    except TargetError as e:
        pytest.skip(str(e))
    return compiled(1).save(tmp_path_factory.mktemp("hardening") / "one")


def factor(path: Path) -> float:
    return float(load(path).run({"x": X})["y"][0, 0]) / 4


# ---------------------------------------------------------------- replacing


def test_killed_at_any_moment_the_old_or_the_new_one_stands(saved: Path, tmp_path: Path) -> None:
    modules = [load(compiled(f).save(tmp_path / f"made-{f}")) for f in (2, 3)]
    out = tmp_path / "place" / "out"
    modules[0].save(out)
    rng = random.Random(4)
    seen = set()
    for _ in range(40):
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    for m in modules:
                        m.save(out)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.add(factor(out))
    assert seen == {2.0, 3.0}
    modules[0].save(out)
    assert factor(out) == 2
    assert os.listdir(out.parent) == ["out"]  # what the killed ones left is gone


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_reader_meets_no_mixture(saved: Path, tmp_path: Path) -> None:
    modules = [load(compiled(f).save(tmp_path / f"made-{f}")) for f in (2, 3)]
    out = modules[0].save(tmp_path / "out")
    pid = os.fork()
    if pid == 0:
        try:
            for k in range(200):
                modules[k % 2].save(out)
        finally:
            os._exit(0)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert factor(out) in (2.0, 3.0)


def test_what_others_own_beside_the_output_stays(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    module = load(saved)
    module.save(out)
    kept = [tmp_path / n for n in (f".out.old-{os.getpid()}", f".out.new-{os.getpid()}", ".out.new-0123abcd", ".other.new-0123abcd", ".out.new-backup00")]
    for p in kept:
        p.mkdir()
        (p / "mine.txt").write_text("mine")
    locked = tmp_path / ".out.new-11111111"
    with replace_folder.replacing(tmp_path / "elsewhere") as busy:  # another writer at work
        module.save(out)
        assert busy.exists()
    locked.mkdir()
    module.save(out)
    assert not locked.exists()  # empty: nobody's
    assert all((p / "mine.txt").read_text() == "mine" for p in kept)


def test_without_an_exchange_of_names(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replace_folder, "_exchange", lambda a, b: False)
    out = compiled(2).save(tmp_path / "out")
    compiled(3).save(out)
    assert factor(out) == 3
    real = os.rename

    def fails(a: Any, b: Any) -> None:
        if Path(b) == out and ".new-" in str(a):
            raise OSError(errno.EIO, "no")
        real(a, b)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(ArtifactError, match="cannot write"):
        compiled(2).save(out)
    assert factor(out) == 3
    assert os.listdir(tmp_path) == ["out"]


def test_through_a_link(saved: Path, tmp_path: Path) -> None:
    compiled(2).save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    compiled(3).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and factor(tmp_path / "real") == 3


@pytest.mark.parametrize("place", ["file/out", "file/a/out", "x" * 300, "no\x00name"])
def test_places_that_cannot_be(saved: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        load(saved).save(tmp_path / place)


def test_a_full_disk(saved: Path, tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    (tmp_path / "full.npz").symlink_to("/dev/full")
    (tmp_path / "file").touch()
    code = "import sys, luthier; from luthier.cli.commands import main; sys.argv = ['luthier', 'run', sys.argv[1], '-o', sys.argv[2]]; main()"
    for place, why in (("full.npz", "No space left"), ("file/below.npz", "Not a directory")):
        done = subprocess.run([sys.executable, "-c", code, str(saved), str(tmp_path / place)], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and f"cannot write {tmp_path / place}: {why}" in done.stderr, done


# ---------------------------------------------------------------- manifests


def edited(saved: Path, there: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(saved, there)
    manifest = json.loads((there / "manifest.json").read_text())
    new = change(manifest)
    (there / "manifest.json").write_text(json.dumps(manifest if new is None else new))
    return there


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a JSON document but the root."""
    here = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return here + [p for k, v in items for p in leaves(v, (*path, k))]


WRONG = (None, True, -1, 1.5, 10**30, "text", [], {}, [[]], float("nan"), "../../up", "\x1b[2J")


@pytest.mark.parametrize("target", ["cpu", "wasm"])
def test_every_field_of_every_type(saved: Path, tmp_path: Path, target: str) -> None:
    """No value in any place ends in anything but an error of ours, or in a module."""
    if target != "cpu":
        saved = compiled(1, target=target).save(tmp_path / "package")
    manifest = json.loads((saved / "manifest.json").read_text())
    there = tmp_path / "m"
    shutil.copytree(saved, there)
    refused = 0
    for k, path in enumerate(leaves(manifest)):
        for bad in (*WRONG[k % 3 :: 3], ...):
            copy = json.loads(json.dumps(manifest))
            at = copy
            for step in path[:-1]:
                at = at[step]
            if bad is ...:
                del at[path[-1]]
            else:
                at[path[-1]] = bad
            (there / "manifest.json").write_text(json.dumps(copy))
            try:
                load(there, threads=1)
            except LuthierError:
                refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m["inputs"][0].update(code=99), r"inputs\[0\].code is 99"),
        (lambda m: m["outputs"][0].update(shape=[1] * 9), r"outputs\[0\].shape"),
        (lambda m: m.update(dims={"n": [7, 0]}), "dims.n is"),
        (lambda m: m.update(extra=["../evil"]), "extra.0. is"),
        (lambda m: m.update(extra=["/etc/passwd"]), "extra.0. is"),
        (lambda m: m.update(web={"shards": [{"file": "../x", "offset": 0, "bytes": 1, "sha256": ""}]}), "web.shards.0..file"),
        (lambda m: m.update(weights_bytes=1 << 40), "fewer than"),
        (lambda m: m.update(calls=[{"kernel": "k", "nodes": [], "flops": ["+", 1], "bytes": 0}]), "flops"),
        (lambda m: m["files"].update({"model.so": m["files"]["weights.bin"]}), "model.so is damaged"),
        (lambda m: [m], "no object"),
        (lambda m: m.update(target=[]), "target is"),
    ],
)  # fmt: skip
def test_manifests(saved: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], match: str) -> None:
    with pytest.raises(ArtifactError, match=match):
        load(edited(saved, tmp_path / "m", change))


def test_deep_nesting(saved: Path, tmp_path: Path) -> None:
    there = edited(saved, tmp_path / "m", lambda m: None)
    (there / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="cannot read"):
        load(there)


@pytest.mark.parametrize("name", ["manifest.json", "weights.bin", "model.so"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_no_regular_files(saved: Path, tmp_path: Path, name: str, kind: str) -> None:
    there = edited(saved, tmp_path / "m", lambda m: None)
    path = there / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ArtifactError, match="no regular file"):
        load(there)


@pytest.mark.parametrize("suffix", [".onnx", ".gguf"])
def test_models_that_are_no_regular_files(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(LuthierError, match="no regular file"):
            luthier.compile(tmp_path / f"{name}{suffix}")


@pytest.mark.parametrize("columns", [64, 1 << 19])
def test_weights_cut_short_after_they_were_loaded(saved: Path, tmp_path: Path, columns: int) -> None:
    """Small weights are a copy, large ones are looked at before a call. In a process of its own: the fault would be a SIGBUS."""
    out = compiled(2, columns).save(tmp_path / "out")
    code = (
        "import sys, os, numpy as np, luthier\nm = luthier.load(sys.argv[1], threads=1)\nos.truncate(sys.argv[1] + '/weights.bin', 0)\n"
        "try:\n  print(m.run({'x': np.ones((1, 4), np.float32)})['y'][0, 0])\nexcept luthier.errors.ArtifactError as e:\n  print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert done.stdout.strip() == "8.0" if columns == 64 else "was cut short after it was loaded" in done.stdout
