"""Machine code while the compiler is still busy with other kernels.

Texts are handed over as they are printed; forked processes turn them into objects meanwhile (LLVM is behind one lock in a
process, and its fatal errors end the process they happen in). At the end this process takes what no other has begun. Jobs are
files of a temporary folder, claimed by creating a file that must not exist; nothing is forked before there is work worth it,
nor from a process with several Python threads.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.at_fork import in_child
from luthier.errors import CompilationError

WORTH_A_PROCESS = 40_000  # bytes of text
MAX_PROCESSES = 16


class Workers:
    """``compile_text``: from a text to an object file, run here or in a fork of this process; ``prepare`` is called once before the
    first fork, so that children inherit what it sets up. Use as a context manager: leaving it ends the processes."""

    def __init__(self, compile_text: Callable[[str], bytes], prepare: Callable[[], Any], cores: int) -> None:
        self.compile_text, self.prepare = compile_text, prepare
        can_fork = hasattr(os, "fork") and threading.active_count() == 1
        self.wanted = min(cores - 1, MAX_PROCESSES) if can_fork else 0
        self.texts: list[str] = []
        self.number: dict[str, int] = {}
        self.size = 0
        self.folder: Path | None = None
        self.children: list[tuple[int, int]] = []  # process, pipe to it
        _active.add(self)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, text: str) -> None:
        """``text`` will be asked for; the same one counts once."""
        if text in self.number:
            return
        k = self.number[text] = len(self.texts)
        self.texts.append(text)
        self.size += len(text)
        if self.children:
            self._hand_over(k)
        elif self.wanted and self.size >= WORTH_A_PROCESS:
            self.folder = Path(tempfile.mkdtemp(prefix="luthier-"))
            self.prepare()
            for _ in range(self.wanted):
                self._fork()
            for j in range(len(self.texts)):
                self._hand_over(j)

    def objects(self) -> dict[str, bytes]:
        """Objects of all texts. Raises CompilationError when LLVM refuses one or dies on it."""
        done: dict[int, bytes] = {}
        for k in reversed(range(len(self.texts))):
            if self.folder is None or _claim(self.folder, k):
                done[k] = self.compile_text(self.texts[k])
        self._join()
        for k in range(len(self.texts)):
            if k not in done:
                assert self.folder is not None
                try:
                    done[k] = (self.folder / f"{k}.o").read_bytes()
                except OSError:
                    why = self.folder / f"{k}.error"
                    raise CompilationError(why.read_text() if why.exists() else "the process that compiled a kernel died") from None
        return {t: done[k] for t, k in self.number.items()}

    def close(self) -> None:
        """Ends the processes (unfinished work is dropped) and removes the folder."""
        if self.folder is not None:
            for k in range(len(self.texts)):
                _claim(self.folder, k)  # nothing new is begun
            self._join()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    # ------------------------------------------------------------ processes

    def _hand_over(self, k: int) -> None:
        assert self.folder is not None
        (self.folder / f"{k}.ll").write_text(self.texts[k])
        for _, pipe in self.children:
            try:
                os.write(pipe, k.to_bytes(4, "little"))
            except BrokenPipeError:  # that process died; its job is found missing at the end
                continue

    def forget(self) -> None:
        """In a forked child: the processes and the folder are its parent's."""
        for _, pipe in self.children:
            os.close(pipe)
        self.children.clear()
        self.folder = None

    def _fork(self) -> None:
        folder = self.folder
        r, w = os.pipe()
        pid = os.fork()
        if pid:
            os.close(r)
            self.children.append((pid, w))
            return
        status = 1
        try:
            os.close(w)
            self.folder = folder
            self._serve(r)
            status = 0
        finally:
            os._exit(status)

    def _serve(self, pipe: int) -> None:
        assert self.folder is not None
        while True:
            word = os.read(pipe, 4)
            if len(word) < 4:
                return
            k = int.from_bytes(word, "little")
            if not _claim(self.folder, k):
                continue
            part = self.folder / f"{k}.part"
            try:
                part.write_bytes(self.compile_text((self.folder / f"{k}.ll").read_text()))
                os.replace(part, self.folder / f"{k}.o")
            except CompilationError as e:
                part.write_text(str(e))
                os.replace(part, self.folder / f"{k}.error")

    def _join(self) -> None:
        for _, pipe in self.children:
            os.close(pipe)
        for pid, _ in self.children:
            os.waitpid(pid, 0)
        self.children.clear()


_active: weakref.WeakSet[Workers] = weakref.WeakSet()


def _forget_all() -> None:
    for w in list(_active):
        w.forget()


in_child(_forget_all)


def _claim(folder: Path, k: int) -> bool:
    try:
        os.close(os.open(folder / f"{k}.claim", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
