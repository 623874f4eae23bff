"""Compiling without garbage collection."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

from luthier.at_fork import in_child

_pausing: set[int] = set()  # threads that have turned it off


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection: expressions make no cycles, and looking for some costs a tenth of a compilation."""
    was = gc.isenabled()
    me = threading.get_ident()
    if was:
        _pausing.add(me)
        gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
            _pausing.discard(me)


def _resume() -> None:
    """In a forked child, which has not the thread that would."""
    if _pausing - {threading.get_ident()}:
        _pausing.clear()
        gc.enable()


in_child(_resume)
