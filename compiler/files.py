"""Files that somebody else wrote: regular ones alone (a pipe or a device would never end), names that stay in their folder."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

__all__ = ["inside", "open_regular"]


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """``path`` opened for reading. Raises OSError, also when it is a pipe, a device or a folder."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(None, "it is no regular file", os.fspath(path))
    return os.fdopen(fd, "rb")


def inside(name: str) -> bool:
    """Whether ``name`` is a path below a folder, in plain words: relative, no ``..``."""
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts and "\0" not in name and "\\" not in name
