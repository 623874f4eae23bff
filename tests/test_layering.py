"""The rules of the source tree that can be checked by parsing it."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("ir", "passes", "schedules", "codegen", "tuner", "compiler")
# Modules of the top package that import nothing of luthier: every layer may use them.
LEAVES = {"luthier.at_fork", "luthier.errors", "luthier.settings"}
LONG_FILE = 600


def sources() -> list[Path]:
    return sorted(p for layer in LAYERS for p in (ROOT / layer).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import; a relative import gives a name that starts with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "luthier":
                yield from ((node.lineno, f"luthier.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def layer_of(module: str) -> str:
    """The layer that a luthier module belongs to: ``luthier.ir.expr`` -> ir, ``luthier.cli.commands`` -> compiler."""
    second = module.split(".")[1] if "." in module else ""
    return second if second in LAYERS else "compiler"


def violations(path: str, text: str) -> list[str]:
    """What is wrong with one file, a line each."""
    found = []
    tree = ast.parse(text)
    here = path.split("/")[0]
    for line, module in imported(tree):
        if module.startswith("."):
            found.append(f"{path}:{line}: relative import")
        elif module.split(".")[0] in LAYERS:
            found.append(f"{path}:{line}: imports {module} by its bare name")
        elif module.split(".")[0] == "luthier" and module not in LEAVES:
            if LAYERS.index(layer_of(module)) > LAYERS.index(here):
                found.append(f"{path}:{line}: {here} imports {module}; the order is {' <- '.join(LAYERS)}")
            if f"luthier.{Path(path).stem}" in LEAVES and here == "compiler":
                found.append(f"{path}:{line}: {path} is a leaf and must not import {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and all(isinstance(s, ast.Pass) for s in node.body):
            name = ast.unparse(node.type) if node.type is not None else ""
            if name in ("", "Exception", "BaseException"):
                found.append(f"{path}:{node.lineno}: swallows every exception")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_source_file(path: Path) -> None:
    text = path.read_text()
    length = text.count("\n")
    if length > LONG_FILE:
        warnings.warn(f"{path.relative_to(ROOT)} has {length} lines; one sitting is about {LONG_FILE}", stacklevel=1)
    assert violations(str(path.relative_to(ROOT)), text) == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("ir/a.py", "from luthier.passes.fold import f", "ir imports luthier.passes.fold"),
        ("ir/a.py", "import luthier.cli.commands", "ir imports luthier.cli.commands"),
        ("ir/a.py", "from luthier import codegen", "ir imports luthier.codegen"),
        ("schedules/a.py", "def f():\n    from luthier.codegen.llvm import g", "schedules imports luthier.codegen.llvm"),
        ("passes/a.py", "from . import b", "relative import"),
        ("passes/a.py", "import ir", "bare name"),
        ("tuner/a.py", "try:\n    f()\nexcept Exception:\n    pass", "swallows"),
        ("tuner/a.py", "try:\n    f()\nexcept:\n    pass", "swallows"),
        ("compiler/errors.py", "import luthier.ir", "is a leaf"),
    ],
)
def test_rules_catch(path: str, text: str, expected: str) -> None:
    assert any(expected in line for line in violations(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("codegen/a.py", "from luthier.ir.loop import For\nfrom luthier.passes import x"),
        ("ir/a.py", "from luthier.errors import ShapeError"),
        ("compiler/a.py", "from luthier.tuner.search import s\ntry:\n    f()\nexcept OSError:\n    pass"),
    ],
)
def test_rules_allow(path: str, text: str) -> None:
    assert violations(path, text) == []


@pytest.mark.parametrize("name", LAYERS)
def test_folder_is_no_package_of_its_own(name: str) -> None:
    """``import ir`` from the root would make a second copy of every class."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "luthier" in done.stderr


def test_import_is_light() -> None:
    """``import luthier`` loads no third-party package and none of the layers."""
    code = textwrap.dedent("""
        import sys
        import luthier
        heavy = {"numpy", "onnx", "llvmlite", "rich", "click", "onnxruntime"} & set(sys.modules)
        layers = [m for m in sys.modules if m.startswith("luthier.") and m not in ("luthier.errors", "luthier.at_fork")]
        assert not heavy and not layers, (heavy, layers)
    """)
    subprocess.run([sys.executable, "-c", code], check=True)
