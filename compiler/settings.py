"""Every environment variable that luthier reads, declared once, with its help. ``luthier settings`` prints this table.

A leaf module like ``luthier.errors``: it imports nothing else of luthier, so every layer may read a setting with
``settings.cache_dir.get()``. Values are read when asked for, never cached, so a test can set one with ``monkeypatch``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from luthier.errors import SettingError

__all__ = ["Setting", "all_settings", "cache_dir", "cache_size", "check_indices", "color", "cuda_checks", "cxx", "debug", "dump", "override", "repro_dir", "spin_us", "threads", "toolchain", "webgpu_features", "winograd"]

T = TypeVar("T")
_REGISTRY: list[Setting[object]] = []


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One environment variable. ``parse`` turns its text into a value; ``default`` is used when it is unset or empty."""

    name: str
    parse: Callable[[str], T]
    default: T
    help: str

    def get(self) -> T:
        """The value now. Raises ``SettingError`` when the text does not parse."""
        text = os.environ.get(self.name, "").strip()
        return self.read(text) if text else self.default

    def read(self, text: str) -> T:
        """What ``text`` means. Raises ``SettingError``."""
        try:
            return self.parse(text)
        except ValueError as error:
            raise SettingError(f"{self.name}={text!r} is not valid: {error}", hint=self.help) from error

    def is_set(self) -> bool:
        return bool(self.text())

    def text(self) -> str:
        """The text that is set, empty for none."""
        return os.environ.get(self.name, "").strip()

    @contextmanager
    def temporarily(self, text: str) -> Iterator[None]:
        """Set for this process while the block runs."""
        before = os.environ.get(self.name)
        os.environ[self.name] = text
        try:
            yield
        finally:
            if before is None:
                del os.environ[self.name]
            else:
                os.environ[self.name] = before


def _declare(name: str, parse: Callable[[str], T], default: T, help: str) -> Setting[T]:
    setting = Setting(name, parse, default, help)
    _REGISTRY.append(setting)  # type: ignore[arg-type]
    return setting


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("must not be negative")
    return value


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("must be at least 1")
    return value


def _modes(text: str) -> frozenset[str]:
    """``trace``, ``bounds``, ``poison`` with commas; 1 is ``trace``, 0 nothing."""
    words = {w.strip() for w in text.lower().split(",") if w.strip()}
    words = {"trace" if w in ("1", "true", "yes", "on") else w for w in words} - {"0", "false", "no", "off"}
    if words - {"trace", "bounds", "poison"}:
        raise ValueError("expected trace, bounds, poison, 1 or 0")
    return frozenset(words)


def _gpu_features(text: str) -> frozenset[str]:
    """Optional features of WebGPU with commas between; ``none`` for none of them."""
    known = ("shader-f16", "subgroups", "packed_4x8_integer_dot_product")
    words = {w.strip() for w in text.split(",") if w.strip()} - {"none"}
    if words - set(known):
        raise ValueError(f"expected names of {', '.join(known)}, or none")
    return frozenset(words)


def _cuda_checks(text: str) -> frozenset[str]:
    words = {w.strip() for w in text.split(",") if w.strip()} - {"none"}
    if words - {"orders", "races"}:
        raise ValueError("expected orders, races or none")
    return frozenset(words)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else Path("~/.cache").expanduser()) / "luthier"


def provide(name: str, text: str) -> None:
    """A variable that another library needs, unless the user has set it."""
    os.environ.setdefault(name, text)


def write_dump(name: str, text: str) -> None:
    """A file of the folder LUTHIER_DUMP, where that is set. Raises SettingError when it cannot be written."""
    folder = dump.get()
    if folder is None:
        return
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise SettingError(f"{dump.name}: cannot write {path}: {e.strerror or e}", hint=dump.help) from e


def all_settings() -> list[Setting[object]]:
    """Every declared setting, in the order of this file."""
    return list(_REGISTRY)


dump = _declare("LUTHIER_DUMP", _path, None, "Folder into which a compile writes the IR after each pass that changed it")
override = _declare("LUTHIER_OVERRIDE", _path, None, "Folder of loop IR texts NAME.txt that take the place of the kernels NAME of every compile")
repro_dir = _declare("LUTHIER_REPRO_DIR", _path, None, "Folder for the bundles of failed compiles; default: repro in the folder of the kernel cache")
cache_dir = _declare("LUTHIER_CACHE_DIR", _path, _default_cache(), "Folder of the content-addressed cache of compiled kernels")
cache_size = _declare("LUTHIER_CACHE_MB", _count, 1024, "Upper limit of the kernel cache in MiB; 0 turns the cache off")
threads = _declare("LUTHIER_THREADS", _positive, None, "Worker threads of a loaded module; default: the cores this process may use")
spin_us = _declare("LUTHIER_SPIN_US", _count, 50, "Microseconds that an idle worker spins before it sleeps")
_NO_MODES: frozenset[str] = frozenset()
debug = _declare(
    "LUTHIER_DEBUG", _modes, _NO_MODES,
    "trace (or 1): the command line shows tracebacks, and every pass is followed by the verifier; bounds: compiled modules check every access; "
    "poison: they fill new memory with NaN and absurd integers first",
)  # fmt: skip
webgpu_features = _declare(
    "LUTHIER_WEBGPU_FEATURES", _gpu_features, None,
    "Optional WebGPU features that modules run in Python may use, with commas (none: not any); default: all that the adapter has",
)  # fmt: skip
toolchain = _declare("LUTHIER_CC", str, None, "Linker driver used by save (cc, clang, ld.lld, ...); default: the first one found")
cxx = _declare("LUTHIER_CXX", str, None, "C++ compiler that compiles CUDA kernels for cuda:emulate; default: the first of c++, g++, clang++")
cuda_checks = _declare(
    "LUTHIER_CUDA_CHECKS", _cuda_checks, frozenset({"orders"}),
    "What cuda:emulate looks for beside indices out of bounds and divergent barriers, with commas: orders (every launch runs twice, threads forwards "
    "and backwards, and must give the same bits), races (every access is looked at, slow), or none",
)  # fmt: skip
color = _declare("NO_COLOR", bool, False, "Any value: the command line prints without colours")
winograd = _declare(
    "LUTHIER_WINOGRAD", _count, 4, "Largest tile of Winograd's 3x3 convolutions: 4, 2 (smaller error), 0 for direct sums only"
)  # fmt: skip
check_indices = _declare(
    "LUTHIER_CHECK_INDICES", _switch, True,
    "0: modules compiled now do not check indices that are data; those out of range read the nearest element or write nothing",
)  # fmt: skip
