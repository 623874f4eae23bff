"""The registry of backends: one file makes one, and records refer to what exists."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.codegen.targets import backends
from luthier.codegen.targets.backend import all_backends, backend_of, loader_of
from luthier.codegen.targets.target import parse_target
from luthier.errors import ArtifactError, TargetError


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "toy.py").write_text(textwrap.dedent("""
        from luthier.codegen.targets.backend import Backend
        from luthier.codegen.targets.target import Target
        from luthier.schedules.base.capabilities import Capabilities

        HERE = __name__
        KNOWN = ("toy", "toy:big")

        def parse(rest):
            return Target(f"toy:{rest}", "", "", "", Capabilities(), kind="toy")

        def build(program, target, threads, record=None):
            return target.name, threads, record

        BACKEND = Backend("toy", f"{HERE}:parse", f"{HERE}:KNOWN", f"{HERE}:build", "", retiles=True)
    """))
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    all_backends.cache_clear()
    parse_target.cache_clear()
    yield
    sys.modules.pop(f"{backends.__name__}.toy", None)
    monkeypatch.undo()
    all_backends.cache_clear()
    parse_target.cache_clear()


def test_a_file_is_a_backend(toy: None) -> None:
    t = parse_target("toy:big")
    assert t.backend is backend_of("toy:small") is loader_of("toy")
    assert t.backend.build_module(None, t, 3, record=4) == ("toy:big", 3, 4)
    with pytest.raises(TargetError, match="no target 'nosuch:x'") as e:
        parse_target("nosuch:x")
    assert "toy:big" in str(e.value) and "cpu:x86-64-v3" in str(e.value)


def test_without_the_file_there_is_none() -> None:
    with pytest.raises(TargetError, match="no target 'toy'"):
        parse_target("toy")
    with pytest.raises(ArtifactError, match="kind 'toy'"):
        loader_of("toy")


@pytest.mark.parametrize("kind", all_backends())
def test_records_refer_to_what_exists(kind: str) -> None:
    b = backend_of(kind)
    assert b.kind == kind
    for f in filter(None, (b.parse, b.builder, b.loader, b.ahead)):
        assert callable(pkgutil.resolve_name(f))
    for name in pkgutil.resolve_name(b.known):
        if b.kind != "cpu" or name != "cpu":  # the name alone asks for this machine
            assert parse_target(name).backend is b


def test_reading_the_records_is_light() -> None:
    code = """
        import json, sys
        from luthier.codegen.targets.backend import all_backends
        all_backends()
        print(json.dumps(sorted(m for m in sys.modules if m.startswith(("luthier.", "numpy", "llvmlite", "onnx")))))
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True).stdout
    allowed = ("luthier.errors", "luthier.at_fork", "luthier.codegen")
    assert [m for m in json.loads(out) if not m.startswith(allowed)] == []
