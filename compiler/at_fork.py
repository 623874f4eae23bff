"""Forks of a process that compiles in another thread. The child has that thread's locks but not the thread: what it was in the middle of
would never end. So whoever forks waits until no thread is inside of LLVM or an import of ours (:data:`whole`), and the child forgets what the
other threads had begun (:func:`in_child`)."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["in_child", "whole"]

whole = threading.RLock()  # held where a fork would leave something half-done
_forget: list[Callable[[], None]] = []


def in_child(action: Callable[[], None]) -> None:
    """``action`` runs first thing in every forked child of this process."""
    _forget.append(action)


def _llvm_lock() -> Any:
    """llvmlite's own lock, which all of its calls hold (objects are disposed of at any time, without ours); None before it is imported."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    return getattr(getattr(ffi, "lib", None), "_lock", None)


_held: list[Any] = []


def _before() -> None:
    whole.acquire()
    lock = _llvm_lock()
    if lock is not None:
        lock.__enter__()
    _held.append(lock)


def _after() -> None:
    lock = _held.pop()
    if lock is not None:
        lock.__exit__(None, None, None)
    whole.release()


def _after_in_child() -> None:
    _after()
    for action in _forget:
        action()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
