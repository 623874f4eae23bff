"""The content-addressed cache of compiled kernels: one file per object, named by the hash of everything that decided it.

Writers put a file beside its place and rename it, so a reader sees a whole object or none; concurrent processes need no lock.
A damaged or truncated file is recognised by its checksum, which covers the name, and ignored. The checksum is no signature: what is read is
code that will run, so folders and files must belong to this user, and nobody else may write them. The folder is trimmed, oldest use first, when
it grows over ``LUTHIER_CACHE_MB``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from luthier import settings

__all__ = ["ObjectCache"]

_MAGIC = b"LTO2"


class ObjectCache:
    """``root``: the folder (default: the setting ``LUTHIER_CACHE_DIR``). A folder that cannot be written is no error: the
    cache is then empty and stays so; nor is one that others may write, of which a warning tells. ``hits``, ``misses``: counts since the
    object was made."""

    def __init__(self, root: Path | None = None) -> None:
        self.limit = settings.cache_size.get() << 20
        self.root = (root or settings.cache_dir.get()) / "objects"
        self.hits = self.misses = 0
        self._written = 0
        with contextlib.suppress(OSError):  # it is not there yet
            if not _ours(os.lstat(self.root), stat.S_ISDIR):
                warnings.warn(f"the kernel cache {self.root} belongs to another user, or others may write it: it is not used (chmod -R go-w, or remove it)", stacklevel=2)
                self.limit = 0

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key[2:]}.o"

    def get(self, key: str) -> bytes | None:
        """The object stored under ``key`` (a hexadecimal hash), or None."""
        if self.limit:
            path = self._path(key)
            try:
                data = _read(path)
            except OSError:
                data = b""
            if data[:4] == _MAGIC and _checksum(key, data[36:]) == data[4:36]:
                self.hits += 1
                with contextlib.suppress(OSError):  # read-only cache: only the order of eviction suffers
                    os.utime(path)
                return data[36:]
        self.misses += 1
        return None

    def put(self, key: str, data: bytes) -> None:
        """Store ``data``; a full disk or a read-only folder leaves the cache as it was."""
        if not self.limit:
            return
        path = self._path(key)
        try:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            for folder in (self.root, path.parent):
                folder.mkdir(mode=0o700, exist_ok=True)
            fd, temp = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            try:
                with os.fdopen(fd, "wb") as f:
                    f.write(_MAGIC + _checksum(key, data) + data)
                os.replace(temp, path)
            except OSError:
                os.unlink(temp)
                return
        except OSError:
            return
        self._written += len(data)
        if self._written > max(self.limit // 16, 1 << 20):
            self._written = 0
            self.trim()

    def trim(self) -> None:
        """Remove the objects that were not used for the longest time until three quarters of the limit remain."""
        files = []
        for p in self.root.glob("*/*.o"):
            with contextlib.suppress(OSError):  # another process may remove it first
                s = p.stat()
                files.append((s.st_mtime, s.st_size, p))
        total = sum(size for _, size, _ in files)
        if total <= self.limit:
            return
        for _, size, p in sorted(files):
            if total <= self.limit * 3 // 4:
                break
            with contextlib.suppress(OSError):
                p.unlink()
                total -= size


def _checksum(key: str, data: bytes) -> bytes:
    return hashlib.sha256(key.encode() + data).digest()


def _ours(s: os.stat_result, kind: Callable[[int], bool]) -> bool:
    """A file or folder of this user that no other one may write."""
    return kind(s.st_mode) and (not hasattr(os, "geteuid") or s.st_uid == os.geteuid()) and not s.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read(path: Path) -> bytes:
    """Raises OSError, also for what others may have written."""
    if not _ours(os.lstat(path.parent), stat.S_ISDIR):
        raise PermissionError(path)
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(fd, "rb") as f:
        if not _ours(os.fstat(fd), stat.S_ISREG):
            raise PermissionError(path)
        return f.read()
