"""Saved modules: loaded without the compiler, refused when damaged or foreign, run from C; the kernel cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

import luthier
from luthier.artifact import missing_features
from luthier.cache import ObjectCache
from luthier.codegen.llvm.backend import compile_texts, find_linker
from luthier.codegen.targets.target import host
from luthier.errors import ArtifactError, CompilationError, InputError, TargetError
from luthier.module import Module

ROOT = Path(__file__).resolve().parent.parent
W = np.random.default_rng(1).standard_normal((64, 32), dtype=np.float32)


def onnx_model() -> Any:
    nodes = [h.make_node("MatMul", ["x", "w"], ["a"]), h.make_node("Relu", ["a"], ["y"]), h.make_node("Shape", ["x"], ["s"])]
    ins = [h.make_tensor_value_info("x", T.FLOAT, ["n", 64])]
    outs = [h.make_tensor_value_info("y", T.FLOAT, ["n", 32]), h.make_tensor_value_info("s", T.INT64, [2])]
    graph = h.make_graph(nodes, "test", ins, outs, [numpy_helper.from_array(W, "w")])
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9)


def sample(n: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).standard_normal((n, 64), dtype=np.float32)


def expected(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.maximum(x.astype(np.float64) @ W.astype(np.float64), 0)


@pytest.fixture(scope="module")
def module() -> Module:
    return luthier.compile(onnx_model(), threads=2)


@pytest.fixture(scope="module")
def saved(module: Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        find_linker()
    except TargetError as e:
        pytest.skip(str(e))
    return module.save(tmp_path_factory.mktemp("artifacts") / "model.luthier")


def test_folder_holds_what_it_says(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["manifest.json", "model.h", "model.so", "weights.bin"]
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["inputs"] == [{"name": "x", "code": 1, "shape": ["n", 64]}]
    assert [o["name"] for o in manifest["outputs"]] == ["y", "s"]
    assert set(manifest["files"]) == {"model.h", "model.so", "weights.bin"}
    assert sorted(p.name for p in saved.parent.iterdir()) == [saved.name]  # nothing half-written is left


CHILD = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("onnx", "onnxruntime", "llvmlite") or name.startswith("luthier.ir"):
            raise ImportError(f"{name} must not be needed to run an artifact")
sys.meta_path.insert(0, Block())
import numpy as np, luthier
m = luthier.load(sys.argv[1])
x = np.load(sys.argv[2])
np.savez(sys.argv[3], **m.run({"x": x}))
m.save(sys.argv[4])
assert len(luthier.load(sys.argv[4]).profile({"x": x}, runs=2)) == len(m.manifest["calls"])
"""


def test_runs_without_compiler_and_onnx(saved: Path, module: Module, tmp_path: Path) -> None:
    x = sample(7)
    np.save(tmp_path / "x.npy", x)
    args = [str(saved), str(tmp_path / "x.npy"), str(tmp_path / "y.npz"), str(tmp_path / "copy")]
    r = subprocess.run([sys.executable, "-c", CHILD, *args], capture_output=True, text=True, check=False)
    assert r.returncode == 0, r.stderr
    got = np.load(tmp_path / "y.npz")
    np.testing.assert_array_equal(got["y"], module.run({"x": x})["y"])
    np.testing.assert_allclose(got["y"], expected(x), rtol=1e-5, atol=1e-5)
    assert got["s"].tolist() == [7, 64]


def test_save_replaces_an_artifact_and_nothing_else(module: Module, saved: Path, tmp_path: Path) -> None:
    there = tmp_path / "m"
    shutil.copytree(saved, there)
    (there / "weights.bin").write_bytes(b"old")
    module.save(there)
    assert luthier.load(there).inputs == module.inputs
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ArtifactError, match="is no artifact"):
        module.save(other)
    assert (other / "cat.jpg").read_bytes() == b"cat"


@pytest.mark.parametrize("name", ["model.so", "weights.bin", "model.h"])
def test_damage_is_found(saved: Path, tmp_path: Path, name: str) -> None:
    there = tmp_path / "m"
    shutil.copytree(saved, there)
    data = bytearray((there / name).read_bytes())
    data[len(data) // 2] ^= 1
    (there / name).write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        luthier.load(there)
    (there / name).unlink()
    with pytest.raises(ArtifactError, match=f"cannot read .*{name}"):
        luthier.load(there)


def test_other_versions_and_machines_are_refused(saved: Path, tmp_path: Path) -> None:
    there = tmp_path / "m"
    shutil.copytree(saved, there)
    manifest = json.loads((there / "manifest.json").read_text())

    def write(changes: dict[str, Any]) -> None:
        (there / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    write({"abi": 99})
    with pytest.raises(ArtifactError, match="ABI 99"):
        luthier.load(there)
    write({"target": {**manifest["target"], "triple": "riscv64-unknown-linux-gnu"}})
    with pytest.raises(ArtifactError, match="architecture riscv64"):
        luthier.load(there)
    (there / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"cannot read .*manifest\.json"):
        luthier.load(there)
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        luthier.load(tmp_path / "nowhere")


def test_processor_features_are_compared() -> None:
    here = {"triple": host().triple, "features": sorted(host().flags)}
    assert missing_features(here) == []
    if "avx512f" in host().flags:
        pytest.skip("this machine has AVX-512")
    assert missing_features({**here, "features": [*here["features"], "avx512f", "avx512vnni"]}) == ["avx512f", "avx512vnni"]


def test_code_for_another_machine_can_be_saved_but_not_run(tmp_path: Path) -> None:
    if not {"avx512f"} - host().flags:
        pytest.skip("this machine has AVX-512")
    m = luthier.compile(onnx_model(), target="cpu:x86-64-v4")
    with pytest.raises(TargetError, match="x86-64-v4 does not run on this machine"):
        m.run({"x": sample(2)})
    with pytest.raises(ArtifactError, match="lacks avx512"):
        luthier.load(m.save(tmp_path / "v4"))


@pytest.mark.parametrize("target", ["cpu:x86-64-v2", "cpu:x86-64-v3"])
def test_portable_levels_give_right_results(target: str) -> None:
    from luthier.codegen.targets.target import parse_target

    if parse_target(target).missing_here():
        pytest.skip(f"this machine cannot run {target}")
    x = sample(5)
    np.testing.assert_allclose(luthier.compile(onnx_model(), target=target).run({"x": x})["y"], expected(x), rtol=1e-5, atol=1e-5)


def test_c_program_runs_the_artifact(saved: Path, tmp_path: Path) -> None:
    cc = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if cc is None:
        pytest.skip("no C compiler")
    exe = tmp_path / "run"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(saved)]
    built = subprocess.run([cc, *flags, str(ROOT / "examples/c/run.c"), "-o", str(exe), "-ldl"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    good = subprocess.run([str(exe), str(saved), "3x64"], capture_output=True, text=True, check=False, env={**os.environ, "LT_OUTPUTS": "2"})
    assert good.returncode == 0, good.stderr
    lines = good.stdout.splitlines()
    x = ((np.arange(3 * 64) % 17).astype(np.float32) / np.float32(17) - np.float32(0.5)).reshape(3, 64)
    assert lines[0].startswith("output 0: dtype 1 [3, 32] ")
    np.testing.assert_allclose([float(v) for v in lines[0].split("] ")[1].split()], expected(x).reshape(-1)[:8], rtol=1e-4, atol=1e-4)
    assert lines[1] == "output 1: dtype 7 [2] 3 64"
    bad = subprocess.run([str(exe), str(saved), "3x65"], capture_output=True, text=True, check=False, env={**os.environ, "LT_OUTPUTS": "2"})
    assert bad.returncode == 1 and "input x: dimension 1 is 65, expected 64" in bad.stderr


def test_header_is_plain_c_and_cpp(saved: Path, tmp_path: Path) -> None:
    for compiler, suffix in (("cc", "c"), ("c++", "cpp")):
        if shutil.which(compiler) is None:
            pytest.skip(f"no {compiler}")
        src = tmp_path / f"t.{suffix}"
        src.write_text('#include "model.h"\nint check[sizeof(lt_tensor) == 88 ? 1 : -1];\n')
        r = subprocess.run([compiler, "-Wall", "-Werror", "-pedantic", "-I", str(saved), "-c", str(src), "-o", str(tmp_path / "t.o")], capture_output=True, text=True, check=False)
        assert r.returncode == 0, r.stderr


# ---------------------------------------------------------------- calls


def test_arrays_of_other_libraries_are_not_copied(module: Module) -> None:
    x = sample(4)

    class Interface:
        __array_interface__ = x.__array_interface__

    class Capsule:
        def __dlpack__(self, **options: Any) -> Any:
            return x.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return x.__dlpack_device__()

    want = module.run({"x": x})["y"]
    for other in (Interface(), Capsule(), x.tolist()):
        np.testing.assert_array_equal(module.run({"x": other})["y"], want)
    frozen = x.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(module.run({"x": frozen})["y"], want)
    np.testing.assert_array_equal(module.run({"x": np.asfortranarray(x)})["y"], want)
    np.testing.assert_array_equal(module(x)[0], want)


def test_outputs_are_written_where_the_caller_wants(module: Module) -> None:
    x = sample(3)
    y = np.full((3, 32), np.nan, np.float32)
    got = module.run({"x": x}, out={"y": y})
    assert got["y"] is y
    np.testing.assert_allclose(y, expected(x), rtol=1e-5, atol=1e-5)
    for bad in (np.zeros((2, 32), np.float32), np.zeros((3, 32)), np.zeros((3, 64), np.float32)[:, ::2], np.zeros(96, np.float32)):
        with pytest.raises(InputError, match="out\\['y'\\]"):
            module.run({"x": x}, out={"y": bad})
    np.testing.assert_allclose(module.run({"x": x})["y"], expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("feeds", "message"), [
    ({"x": np.zeros((2, 64))}, "input x has dtype float64, expected float32"), ({"x": np.zeros(64, np.float32)}, "input x has rank 1, expected 2"),
    ({"x": np.zeros((2, 63), np.float32)}, "input x: dimension 1 is 63, expected 64"), ({}, "missing input x"),
    ({"x": np.zeros((2, 64), np.float32), "z": 1}, "no input 'z'"), ({"x": "text"}, "input x: str is no array"),
])  # fmt: skip
def test_wrong_inputs_are_named(module: Module, feeds: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as e:
        module.run(feeds)
    assert message in str(e.value)


def test_profile_names_nodes_and_counts_work(module: Module) -> None:
    rows = module.profile({"x": sample(100)}, runs=3)
    gemm = max(rows, key=lambda r: r["flops"])
    assert "a" in gemm["nodes"] or "y" in gemm["nodes"]
    assert 0.95 * 2 * 100 * 64 * 32 <= gemm["flops"] <= 1.2 * 2 * 100 * 64 * 32
    assert gemm["ms"] > 0 and gemm["bytes"] >= 4 * (100 * 64 + 64 * 32 + 100 * 32)


# ---------------------------------------------------------------- the cache


def test_second_compile_takes_everything_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import luthier.codegen.llvm.backend as backend

    monkeypatch.setenv("LUTHIER_CACHE_DIR", str(tmp_path))
    first = luthier.compile(onnx_model())

    def refuse(*args: Any) -> bytes:
        raise AssertionError("compiled although the cache has it")

    monkeypatch.setattr(backend, "compile_text", refuse)
    again = luthier.compile(onnx_model())
    x = sample(3)
    np.testing.assert_array_equal(first.run({"x": x})["y"], again.run({"x": x})["y"])


def test_damaged_objects_are_made_again(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path)
    text = f'target triple = "{host().triple}"\ndefine i32 @f() {{\n  ret i32 7\n}}\n'
    (first,) = compile_texts([text], host(), cache)
    (file,) = (tmp_path / "objects").glob("*/*.o")
    file.write_bytes(file.read_bytes()[:-1])
    fresh = ObjectCache(tmp_path)
    (second,) = compile_texts([text], host(), fresh)
    assert second == first and fresh.misses == 1 and fresh.hits == 0
    assert compile_texts([text], host(), fresh) == [first] and fresh.hits == 1


def test_cache_is_trimmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE_MB", "1")
    cache = ObjectCache(tmp_path)
    for k in range(12):
        cache.put(f"{k:064x}", bytes(200_000))
        os.utime(cache._path(f"{k:064x}"), (1000 + k, 1000 + k))
    cache.trim()
    left = [k for k in range(12) if cache._path(f"{k:064x}").exists()]
    assert left and left[-1] == 11 and left == list(range(left[0], 12))
    assert sum(p.stat().st_size for p in (tmp_path / "objects").glob("*/*.o")) <= 1 << 20


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "objects").write_text("a file where the folder should be")
    cache = ObjectCache(tmp_path)
    cache.put("ab" * 32, b"data")
    assert cache.get("ab" * 32) is None


def test_processes_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import luthier.codegen.llvm.backend as backend
    import luthier.codegen.program.compile_ahead as compile_ahead

    monkeypatch.setattr(compile_ahead, "WORTH_A_PROCESS", 1)
    monkeypatch.setattr(backend, "usable_cores", lambda: 3)
    texts = [f'target triple = "{host().triple}"\ndefine i32 @f{k}() {{\n  ret i32 {k}\n}}\n' for k in range(7)]
    assert compile_texts(texts, host()) == [backend.compile_text(t, host()) for t in texts]
    with pytest.raises(CompilationError, match="LLVM refuses"):
        compile_texts([*texts, "define nonsense"], host())


def test_missing_linker_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TargetError, match="no linker found"):
        find_linker()
    monkeypatch.setenv("LUTHIER_CC", "no-such-linker")
    with pytest.raises(TargetError, match="no-such-linker"):
        find_linker()
