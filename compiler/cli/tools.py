"""Commands for looking into things: ``luthier reduce``, ``luthier roofline``. :mod:`luthier.cli.commands` adds them to its group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.language import generate
from luthier.cli.options import ShapeParam
from luthier.cli.quantize import quantize
from luthier.cli.terminal import console, echo
from luthier.errors import InputError, LuthierError

if TYPE_CHECKING:
    from luthier.debug.roofline import Roofline

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
    echo(f"  {text}", err=True)


def _reduce_model(case: Path, command: str | None, target: str | None, timeout: float, output: Path | None) -> None:
    import onnx

    from luthier.debug.reduce import command_check, model_check, reduce_model
    from luthier.debug.repro import read_bundle

    options: dict[str, Any] = {}
    if case.is_dir():
        model, facts = read_bundle(case)
        options = facts["options"]
        echo(f"{case}: {facts['error']}: {facts['message'][:300]}")
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
    echo(f"{out}: {len(small.graph.node)} of {len(model.graph.node)} nodes: {', '.join(n.op_type for n in small.graph.node)[:300]}")


def _write_kernel(f: Any, path: Path) -> None:
    path.write_text(str(f), encoding="utf-8")



def _reduce_kernel(case: Path, command: str | None, target: str | None, kernel: str | None, timeout: float, output: Path | None) -> None:
    from luthier.debug.reduce import command_check, kernel_check, reduce_kernel
    from luthier.ir.parser import parse_funcs

    try:
        funcs = parse_funcs(case.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, LuthierError) as e:
        raise InputError(f"cannot read {case}: {e}") from e
    if kernel is None and len(funcs) != 1:
        raise InputError(f"{case} holds {len(funcs)} kernels", hint=f"name one with --kernel: {', '.join(funcs)[:200]}")
    name = kernel or next(iter(funcs))
    if name not in funcs:
        raise InputError(f"{case} has no kernel {name}", hint=f"it has {', '.join(funcs)[:200]}")
    check = command_check(command, ".txt", _write_kernel, timeout) if command else kernel_check(target or "cpu", timeout)
    small = reduce_kernel(funcs[name], check, _progress)
    out = output or case.with_suffix(".reduced.txt")
    out.write_text(str(small), encoding="utf-8")
    echo(f"{out}: {len(str(small).splitlines())} of {len(str(funcs[name]).splitlines())} lines")


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True, help="A cpu target that runs here.")
@click.option("--shape", "shapes", type=ShapeParam(), multiple=True, help="Pin the shape of an input; repeatable.")
@click.option("--threads", type=click.IntRange(1), help="Worker threads; default: the cores this process may use.")
@click.option("--input", "-i", "files", multiple=True, metavar="[NAME=]FILE", help="An input: .npy, or .npz with names.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random inputs that are not given.")
@click.option("--runs", default=30, show_default=True, type=click.IntRange(1), help="Timed calls.")
@click.option("--top", default=25, show_default=True, help="Kernels shown.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure to this file.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Draw to this .svg or .html file.")
@click.option("--debug", hidden=True, is_flag=False, flag_value="trace")
def roofline(
    model: Path, target: str, shapes: tuple[Any, ...], threads: int | None, files: tuple[str, ...], seed: int, runs: int, top: int, json_file: Path | None,
    output: Path | None, debug: str | None,
) -> None:  # fmt: skip
    """Operations, bytes, bound, ideal and measured time of every kernel of MODEL, against ceilings measured on this machine.

    For a GGUF file: decoded tokens a second against the bandwidth limit, by precision and length of the context."""
    from luthier.debug.roofline import analyse, draw
    from luthier.feeds import read_inputs

    if output is not None and output.suffix not in (".svg", ".html"):
        raise InputError(f"{output} is neither .svg nor .html")
    if not model.exists():
        raise InputError(f"no such file: {model}")
    if model.suffix == ".gguf":
        _language(model, target, threads, runs, json_file)
        return
    feeds = None
    if files:
        import luthier

        specs = luthier.compile(model, target=target, shapes=dict(shapes) or None).inputs
        feeds = read_inputs(specs, files)
    report = analyse(model, feeds, target, dict(shapes) or None, threads, runs, seed=seed)
    console().print(table(report, top))
    echo(summary(report))
    try:
        if json_file is not None:
            json_file.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        if output is not None:
            draw(report, output)
    except OSError as e:
        raise InputError(f"cannot write {e.filename}: {e}") from e


def _language(model: Path, target: str, threads: int | None, runs: int, json_file: Path | None) -> None:
    """Tokens a second against the bandwidth limit."""
    from luthier.llm.roofline import analyse_language, summary, table

    report = analyse_language(model, target, threads, runs=runs)
    console().print(table(report))
    echo(summary(report))
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")


def table(report: Roofline, top: int) -> Any:
    """The kernels that take longest, as a rich table."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    for title in ("ms", "ideal", "of ceiling", "Mop", "MB", "op/byte", "Gop/s", "GB/s"):
        out.add_column(title, justify="right")
    out.add_column("bound")
    out.add_column("kernel", overflow="fold")
    out.add_column("nodes", overflow="fold")
    for r in sorted(report.rows, key=lambda r: -r.ms)[:top]:
        rate = f"{r.bytes / r.ms / 1e6:.1f}" if r.ms else "-"
        out.add_row(
            f"{r.ms:.4f}", f"{r.ideal_ms:.4f}", f"{100 * r.fraction:.0f} %", f"{r.operations / 1e6:.2f}", f"{r.bytes / 1e6:.3f}", f"{r.intensity:.2f}",
            f"{r.gops:.1f}", rate, r.bound, r.kernel, ", ".join(r.nodes)[:120],
        )  # fmt: skip
    return out


def summary(report: Roofline) -> str:
    c = report.ceilings
    reads = ", ".join(f"{k} {v:.0f}" for k, v in c.reads.items())
    return (
        f"{report.model}: {report.run_ms:.3f} ms a run; {len(report.rows)} kernels {report.profile_ms:.3f} ms, ideal {report.ideal_ms:.3f} ms "
        f"({100 * report.ideal_ms / report.run_ms:.0f} % of the ceiling)\n"
        f"ceilings, {c.threads} thread(s) of {c.cpu}: {c.flops:.0f} GFLOP/s f32 FMA, {c.integers:.0f} Gop/s integer dot products; reads, GB/s: {reads}"
    )


COMMANDS: tuple[click.Command, ...] = (reduce, generate, roofline, quantize)
