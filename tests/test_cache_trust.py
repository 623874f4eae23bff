"""The kernel cache holds code that will run: only what this user alone could write is read."""

from __future__ import annotations

import os
import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.cache import ObjectCache

A, B = "ab" * 32, "cd" * 32


def cache(root: Path) -> ObjectCache:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = ObjectCache(root)
        c.put(A, b"code of a")
        c.put(B, b"code of b")
    assert c.get(A) == b"code of a"
    return c


def test_folders_and_files_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        c = cache(tmp_path / "made" / "here")
    finally:
        os.umask(before)
    for p in (c.root, *c.root.rglob("*")):
        assert stat.S_IMODE(p.stat().st_mode) & 0o077 == 0, p


def test_one_object_under_the_name_of_another(tmp_path: Path) -> None:
    c = cache(tmp_path)
    shutil.copy(c._path(A), c._path(B))
    assert c.get(B) is None


def replaced_by_link(p: Path) -> None:
    p.rename(p.with_suffix(".moved"))
    p.symlink_to(p.with_suffix(".moved"))


def pipe(p: Path) -> None:
    p.unlink()
    os.mkfifo(p)


def other_owner(p: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(p, 12345, 12345)


@pytest.mark.parametrize("harm", [lambda p: p.chmod(0o666), lambda p: p.chmod(0o620), replaced_by_link, pipe, other_owner])
def test_files_that_others_may_have_written(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    c = cache(tmp_path)
    harm(c._path(A))
    assert c.get(A) is None
    assert c.get(B) == b"code of b"
    c.put(A, b"code of a")  # made again, in the place of what was there
    assert c.get(A) == b"code of a"


@pytest.mark.parametrize("harm", [lambda p: p.chmod(0o777), lambda p: p.chmod(0o770), replaced_by_link, other_owner])
def test_folders_that_others_may_write(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    c = cache(tmp_path)
    harm(c._path(A).parent)
    assert c.get(A) is None
    harm(c.root)
    with pytest.warns(UserWarning, match="is not used"):
        c = ObjectCache(tmp_path)
    c.put(B, b"code of b")
    assert c.get(B) is None
