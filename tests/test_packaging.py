"""What the wheel must contain, and that every environment variable is declared."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from luthier import settings

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("ir", "passes", "schedules", "codegen", "tuner", "compiler")


def sources() -> list[Path]:
    """Source files of the package, relative to the root."""
    found = (p.relative_to(ROOT) for layer in LAYERS for p in (ROOT / layer).rglob("*") if p.is_file())
    return sorted(p for p in found if "__pycache__" not in p.parts and p.suffix not in (".so", ".o"))


def test_every_folder_is_a_package() -> None:
    """setup.py finds packages by their ``__init__.py``: a folder without one would be missing from the wheel."""
    folders = {p.parent for p in sources() if p.suffix == ".py"}
    assert [str(f) for f in sorted(folders) if not (ROOT / f / "__init__.py").exists()] == []


def test_data_files_match_a_pattern() -> None:
    """A file that no pattern of setup.py names would be missing from the wheel."""
    setup = (ROOT / "setup.py").read_text()
    found = re.search(r"package_data=\{\"\": \[(.*?)\]", setup)
    assert found is not None
    patterns = re.findall(r'"([^"]+)"', found.group(1))
    data = [p for p in sources() if p.suffix != ".py" and p.suffix != ".md"]
    assert [str(p) for p in data if not any(fnmatch.fnmatch(p.name, pattern) or fnmatch.fnmatch(str(p), f"*/{pattern}") for pattern in patterns)] == []


def test_every_variable_is_declared() -> None:
    declared = {s.name for s in settings.all_settings()}
    used = {
        (str(p), name)
        for p in sources()
        if p.suffix == ".py"
        for name in re.findall(r"[\"'](LUTHIER_[A-Z_]+)[\"']", (ROOT / p).read_text())
    }
    assert {(p, n) for p, n in used if n not in declared or p != "compiler/settings.py"} == set()


def test_environment_is_read_in_one_file() -> None:
    readers = [
        str(p)
        for p in sources()
        if p.suffix == ".py"
        and re.search(r"os\.(environ|getenv)\b", (ROOT / p).read_text())
        and str(p) != "compiler/settings.py"
    ]
    assert readers == []
