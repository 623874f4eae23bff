"""A folder that takes another one's place at once: a reader, or the next process after a crash, finds the old one or the new one, whole.

The new folder is written beside its place, under a name of its own, locked by its writer. Linux exchanges the two names in one step; elsewhere
the old one is moved aside first. What a writer that was killed has left is recognised by its lock being free, and removed by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from luthier.manifest import NAME as MANIFEST

try:
    import fcntl
except ImportError:  # no POSIX system: nothing is locked, nothing is cleaned up
    fcntl = None  # type: ignore[assignment]

__all__ = ["replacing"]

UNFINISHED = ".luthier-unfinished"  # in a folder that is still being written
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def _exchange(a: Path, b: Path) -> bool:
    """The two names swapped in one step; False where the system or its file system cannot. Raises OSError."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), os.fspath(b))


def _lock(path: Path) -> int | None:
    """A descriptor of the folder that holds its lock, None where there are no locks. Raises OSError; BlockingIOError when it is locked."""
    if fcntl is None:
        return None
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:  # a file system without locks
        os.close(fd)
        return None
    return fd


def _new(path: Path) -> tuple[Path, int | None]:
    """An empty folder beside ``path``, and its lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fresh = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
        try:
            fresh.mkdir()
        except FileExistsError:
            continue
        try:
            lock = _lock(fresh)
        except (FileNotFoundError, BlockingIOError):  # somebody cleaned up before it was locked
            continue
        try:
            (fresh / UNFINISHED).touch()
            return fresh, lock
        except FileNotFoundError:
            if lock is not None:
                os.close(lock)


def _remove_leftovers(path: Path) -> None:
    """Folders of writers of ``path`` that were killed."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(new|old)-[0-9a-f]{{8}}")
    with contextlib.suppress(OSError):
        for left in path.parent.iterdir():
            if name.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
                with contextlib.suppress(OSError):
                    _remove_leftover(left)


def _remove_leftover(left: Path) -> None:
    lock = _lock(left)
    if lock is None:
        return
    try:
        if (left / UNFINISHED).exists() or (left / MANIFEST).is_file():
            _discard(left)
        else:
            left.rmdir()  # only when it is empty
    finally:
        os.close(lock)


def _discard(folder: Path) -> None:
    """Removes it; what tells that it is ours goes last."""
    with contextlib.suppress(OSError):
        (folder / UNFINISHED).touch()
        for p in folder.iterdir():
            if p.name != UNFINISHED:
                shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()
        shutil.rmtree(folder)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The folder to write; when the block ends well it takes the place of ``path``, whose old contents are removed. Raises OSError."""
    _remove_leftovers(path)
    fresh, lock = _new(path)
    stale: Path | None = fresh
    try:
        yield fresh
        (fresh / UNFINISHED).unlink()
        if not path.exists():
            os.rename(fresh, path)
            stale = None
        elif not _exchange(fresh, path):
            stale = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
            os.rename(path, stale)
            try:
                os.rename(fresh, path)
            except OSError:
                os.rename(stale, path)
                stale = fresh
                raise
    finally:
        if stale is not None:
            _discard(stale)
        if lock is not None:
            os.close(lock)
