"""Commands for looking into things: ``luthier reduce``, ``luthier roofline``. :mod:`luthier.cli` adds them to its group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from luthier.errors import InputError, LuthierError

__all__ = ["COMMANDS"]


@click.command()
@click.argument("case", type=click.Path(path_type=Path))
@click.option("--check", "command", metavar="CMD", help="Reduce what this command (with {} for the file) ends on with a status other than 0.")
@click.option("--target", default=None, help="Target to compile for; default: the bundle's, else cpu.")
@click.option("--kernel", help="Which kernel, where CASE is a text of several.")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds for one attempt.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Where the small case goes; default: beside CASE.")
@click.option("--debug", hidden=True, is_flag=False, flag_value="trace")
def reduce(case: Path, command: str | None, target: str | None, kernel: str | None, timeout: float, output: Path | None, debug: str | None) -> None:
    """Shrink CASE, a repro bundle, an ONNX model or a kernel in loop IR text, as long as it fails in the same way."""
    if case.is_dir() or case.suffix == ".onnx":
        _reduce_model(case, command, target, timeout, output)
    else:
        _reduce_kernel(case, command, target, kernel, timeout, output)


def _progress(text: str) -> None:
    click.echo(f"  {text}", err=True)


def _reduce_model(case: Path, command: str | None, target: str | None, timeout: float, output: Path | None) -> None:
    import onnx

    from luthier.reduce import command_check, model_check, reduce_model
    from luthier.repro import read_bundle

    options: dict[str, Any] = {}
    if case.is_dir():
        model, facts = read_bundle(case)
        options = facts["options"]
        click.echo(f"{case}: {facts['error']}: {facts['message'][:300]}")
    else:
        try:
            model = onnx.load(case)
        except Exception as e:  # onnx raises protobuf's and its own classes
            raise InputError(f"cannot read {case}: {type(e).__name__}: {e}") from e
    if target is not None:
        options = {**options, "target": target}
    check = command_check(command, ".onnx", lambda m, p: onnx.save(m, p), timeout) if command else model_check(options, timeout)
    small = reduce_model(model, check, _progress)
    out = output or (case / "reduced.onnx" if case.is_dir() else case.with_suffix(".reduced.onnx"))
    onnx.save(small, out)
    click.echo(f"{out}: {len(small.graph.node)} of {len(model.graph.node)} nodes: {', '.join(n.op_type for n in small.graph.node)[:300]}")


def _reduce_kernel(case: Path, command: str | None, target: str | None, kernel: str | None, timeout: float, output: Path | None) -> None:
    from luthier.ir.parser import parse_funcs
    from luthier.reduce import command_check, kernel_check, reduce_kernel

    try:
        funcs = parse_funcs(case.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, LuthierError) as e:
        raise InputError(f"cannot read {case}: {e}") from e
    if kernel is None and len(funcs) != 1:
        raise InputError(f"{case} holds {len(funcs)} kernels", hint=f"name one with --kernel: {', '.join(funcs)[:200]}")
    name = kernel or next(iter(funcs))
    if name not in funcs:
        raise InputError(f"{case} has no kernel {name}", hint=f"it has {', '.join(funcs)[:200]}")
    check = command_check(command, ".txt", lambda f, p: p.write_text(str(f)), timeout) if command else kernel_check(target or "cpu", timeout)
    small = reduce_kernel(funcs[name], check, _progress)
    out = output or case.with_suffix(".reduced.txt")
    out.write_text(str(small), encoding="utf-8")
    click.echo(f"{out}: {len(str(small).splitlines())} of {len(str(funcs[name]).splitlines())} lines")


COMMANDS: tuple[click.Command, ...] = (reduce,)
