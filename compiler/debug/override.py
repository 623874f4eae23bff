"""Kernels from files: with ``LUTHIER_OVERRIDE=dir``, ``dir/NAME.txt`` (loop IR text) takes the place of the kernel NAME.

``LUTHIER_DUMP=dir`` writes such a file for every kernel (``dir/kernels/NAME.txt``): copy one, change it, compile again. The file must
keep the kernel's parameters. Names that the model does not have are ignored, so that one folder may serve several models.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from luthier import settings
from luthier.errors import LuthierError, SettingError
from luthier.ir.loop import Buffer, Func
from luthier.ir.parser import parse_func
from luthier.ir.program import Program
from luthier.ir.verify import verify

__all__ = ["override_kernels", "write_kernels"]


def override_kernels(program: Program, folder: Path | None = None) -> list[str]:
    """Replaces kernels of ``program`` in place; the names of those replaced. ``folder``: default is the setting.

    Raises SettingError when the folder is missing, or a file does not parse, breaks the rules of the loop IR, or has other
    parameters than the kernel."""
    folder = folder or settings.override.get()
    if folder is None:
        return []
    if not folder.is_dir():
        raise SettingError(f"{settings.override.name}={str(folder)!r} is no folder", hint=settings.override.help)
    done = []
    for name, f in program.kernels.items():
        path = folder / f"{name}.txt"
        if path.is_file():
            program.kernels[name] = _read(path, f)
            done.append(name)
    return done


def _read(path: Path, old: Func) -> Func:
    try:
        new = verify(parse_func(path.read_text(encoding="utf-8"), old.data))
    except (LuthierError, OSError, UnicodeDecodeError) as e:
        raise SettingError(f"{path}: {e}", hint="start from the text that LUTHIER_DUMP writes") from e
    a, b = [_signature(p) for p in old.params], [_signature(p) for p in new.params]
    if a != b:
        raise SettingError(f"{path} has the parameters ({', '.join(b)}), the kernel has ({', '.join(a)})", hint="only the body may change")
    return replace(new, name=old.name, attrs=old.attrs, params=old.params) if old.params == new.params else replace(new, name=old.name, attrs=old.attrs)


def _signature(p: object) -> str:
    return f"{p.name}: {p.dtype}[{', '.join(map(repr, p.shape))}]" if isinstance(p, Buffer) else f"{p!r}: {getattr(p, 'dtype', '')}"


def write_kernels(program: Program) -> None:
    """With LUTHIER_DUMP: one file a kernel, in the form that :func:`override_kernels` reads."""
    for name, f in program.kernels.items():
        settings.write_dump(f"kernels/{name}.txt", str(f))
