"""The target ``cuda:sm_NN``: cubins of every family, and the driver API, spoken to a library that answers as the driver does and
runs kernels on the emulator. On a machine with a GPU the same modules run there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import luthier
from luthier.backends import cuda_driver
from luthier.backends.cuda_emulate import CHECKS, FLAGS, build, compiler
from luthier.backends.cuda_module import CudaModule
from luthier.backends.host_module import HostModule
from luthier.codegen.gpu.nvrtc import library
from luthier.errors import ArtifactError, CompilationError, KernelError, OutOfMemoryError, TargetError
from tests.cuda import need_compiler
from tests.test_cuda_emulate import FAMILIES, recurrence

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the driver's double."""
    need_compiler()
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run(
        [compiler(), *FLAGS, "-shared", str(HERE / "fake_cuda_driver.cpp"), "-o", str(folder / "libcuda.so"), "-ldl"], check=True
    )
    header = HERE.parent / "codegen" / "runtime"
    (folder / "runtime.so").write_bytes(build((header / "cuda_emulate.cpp").read_text(), ()))
    yield folder


@pytest.fixture
def on_fake(fake: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(cuda_driver, "LIBRARIES", (str(fake / "libcuda.so"),))
    monkeypatch.setenv("FAKE_CUDA_RUNTIME", str(fake / "runtime.so"))
    cuda_driver.driver.cache_clear()
    yield fake
    cuda_driver.driver.cache_clear()


def for_gpu(m: HostModule, folder: Path) -> CudaModule:
    """A module for the emulator as one for a GPU: images are what the driver's double takes."""
    assert isinstance(m, CudaModule)
    (folder / "kernels.so").write_bytes(build(m.source, CHECKS))
    code, images = b"", {}
    for p in m.host["pipelines"]:
        text = f"{len(p['buffers']) + len(p['scalars'])} {folder / 'kernels.so'}\0".encode()
        images[p["symbol"]] = {"cubin": [len(code), len(text)], "ptx": [len(code) + len(text), len(text) + 4]}
        code += text + b"ptx " + text
    target = {**m.manifest["target"], "cpu": "sm_80", "name": "cuda:sm_80"}
    return CudaModule({**m.manifest, "target": target}, {**m.host, "images": images}, m.source, code, m._weights)


@pytest.mark.parametrize("name", FAMILIES)
def test_arguments_arrive(name: str, on_fake: Path, tmp_path: Path) -> None:
    make, feeds, want, _ = FAMILIES[name]
    m = for_gpu(make(), tmp_path)
    np.testing.assert_allclose(m.run(feeds)["y"], want if want.size else recurrence(feeds["x"]), rtol=1e-5, atol=1e-5)
    assert all(row["ms"] >= 0 for row in m.profile(feeds, runs=1))


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("none", TargetError, "finds no GPU"),
        ("memory", OutOfMemoryError, "out of memory"),
        ("old", ArtifactError, "is for sm_80, this GPU is sm_120"),
        ("launch", KernelError, "context is lost"),
    ],
)
def test_faults(
    fault: str, error: type[Exception], text: str, on_fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, feeds, _, _ = FAMILIES["product"]
    m = for_gpu(make(), tmp_path)
    monkeypatch.setenv("FAKE_CUDA", fault)
    with pytest.raises(error, match=text):
        m.run(feeds)
    monkeypatch.setenv("FAKE_CUDA", "")
    if fault == "launch":  # nothing works any more in this process, and every call says so
        with pytest.raises(error, match="context is lost"):
            m.run(feeds)


def test_ptx_where_no_cubin_fits(on_fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA", "image")
    make, feeds, want, _ = FAMILIES["product"]
    np.testing.assert_allclose(for_gpu(make(), tmp_path).run(feeds)["y"], want, rtol=1e-4, atol=1e-4)


def need_nvrtc() -> None:
    try:
        library()
    except TargetError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_without_a_spill(name: str, arch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need_nvrtc()
    compile_ = luthier.compile
    monkeypatch.setattr(luthier, "compile", lambda m, target: compile_(m, target=f"cuda:{arch}"))
    make, feeds, _, _ = FAMILIES[name]
    m = make()
    assert m.manifest["resources"] and all(
        r["registers"] > 0 and not r["spills"] and not r["stack"] for r in m.manifest["resources"].values()
    )
    assert all(c[:4] == b"\x7fELF" for c in m.images("cubin").values()) and all(b".entry" in c for c in m.images("ptx").values())
    m.save(tmp_path / "m")
    loaded: Any = luthier.load(tmp_path / "m")
    assert loaded.images("cubin") == m.images("cubin")


@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_nvrtc()
    try:
        cuda_driver.driver()
    except TargetError as e:
        pytest.skip(str(e))
    compile_ = luthier.compile
    monkeypatch.setattr(luthier, "compile", lambda m, target: compile_(m, target="cuda:sm_80"))
    make, feeds, want, _ = FAMILIES[name]
    np.testing.assert_allclose(make().run(feeds)["y"], want if want.size else recurrence(feeds["x"]), rtol=1e-4, atol=1e-4)


def test_what_the_compiler_refuses() -> None:
    need_nvrtc()
    from luthier.codegen.gpu.nvrtc import compile_kernel

    with pytest.raises(CompilationError, match="undefined"):
        compile_kernel("__global__ void k() { nothing_of_this_name(); }")
