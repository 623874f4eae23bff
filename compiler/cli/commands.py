"""The command line: ``luthier`` with its sub-commands, and ``compile``, which is ``luthier compile``.

Errors are one line on standard error and exit status 2; anything that is not a ``LuthierError`` is a defect and exits with 70.
``--debug`` (or ``LUTHIER_DEBUG=trace``) shows the traceback. Heavy imports happen inside the commands, so ``luthier --help`` is quick.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from luthier import settings
from luthier.cli.options import ShapeParam
from luthier.cli.quantize import quantize_options
from luthier.cli.terminal import console, echo, printable
from luthier.cli.tools import COMMANDS
from luthier.cli.tuning import print_tuning, tune_command, tuning_progress
from luthier.errors import InputError, LuthierError

if TYPE_CHECKING:
    from luthier.module import Module

INTERRUPTED, DEFECT = 130, 70
F = TypeVar("F", bound=Callable[..., Any])


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def wrap(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return wrap


_debug = click.option(
    "--debug", metavar="[=MODE]", is_flag=False, flag_value="trace", callback=lambda ctx, param, value: value and settings.debug.read(value) and value,
    help="Show a traceback with an error (=trace); =bounds: compiled kernels check every access.",
)  # fmt: skip
_model = click.argument("model", type=click.Path(path_type=Path))
_compile_options = _options(
    click.option("--target", default="cpu", show_default=True, help="cpu, cpu:x86-64-v3, wasm, webgpu, cuda:sm_90, ..."),
    click.option("--shape", "shapes", type=ShapeParam(), multiple=True, help="Pin the shape of an input; repeatable."),
    click.option("--threads", type=click.IntRange(1), help="Worker threads; default: the cores this process may use."),
)
_data_options = _options(
    click.option("--input", "-i", "files", multiple=True, metavar="[NAME=]FILE", help="An input: .npy, or .npz with names."),
    click.option("--seed", default=0, show_default=True, help="Seed of the random inputs that are not given."),
)


def _checks(debug: str | None) -> str | None:
    """What the compiler needs to know of ``--debug``; without it the setting decides."""
    return debug if debug and "bounds" in debug else None


def _open(model: Path, target: str, shapes: Sequence[tuple[str, tuple[int, ...]]], threads: int | None, debug: str | None) -> Module:
    """Compile a model file, or load an artifact folder."""
    import luthier

    if model.is_dir():
        return luthier.load(model)
    _existing(model)
    return luthier.compile(model, target=target, shapes=dict(shapes) or None, threads=threads, debug=_checks(debug))


def _existing(model: Path) -> Path:
    if not model.exists():
        raise InputError(f"no such file: {model}")
    return model


def _inputs(
    module: Module, files: Sequence[str], shapes: Sequence[tuple[str, tuple[int | str, ...]]], seed: int
) -> dict[str, Any]:
    """The arrays named by ``--input``, and random ones for what remains (symbolic extents from ``--shape``, else 1)."""
    from luthier.feeds import random_inputs, read_inputs

    for kind, found in module.manifest.get("structured", {}).items():
        if found:
            raise InputError(f"{kind} of the model are sequences or optionals: {', '.join(found)}", hint="run it from Python, where they are lists of arrays and None")
    return random_inputs(module.inputs, dict(shapes), seed, given=read_inputs(module.inputs, files))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="luthier")
def luthier() -> None:
    """An ahead-of-time tensor compiler and autotuner."""


@luthier.command("compile")
@_model
@_compile_options
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Artifact folder; default: MODEL's stem + .luthier.")
@click.option("--precision", "-p", help="Quantize first: w8 .. w1, ternary (w4a8: activations as well), int8, f16, bf16, auto.")
@click.option("--tune", metavar="[TIME]", is_flag=False, flag_value="10s", help="Measure kernels on this machine, for 10s or another time (docs/tuning.md).")
@click.option("--name", help="What npm calls a web package; default: the name of its folder.")
@click.option("--version", help="The version of a web package; default: 1.0.0.")
@click.option("--shard-mb", type=float, help="The most megabytes of a file of weights of a web package; default: 24.")
@click.option("--language", is_flag=True, help="MODEL is an ONNX decoder: make a language model of it (docs/llm.md).")
@quantize_options
@_debug
def compile_command(
    model: Path, target: str, shapes: tuple[Any, ...], threads: int | None, output: Path | None, precision: str | None, tune: str | None, language: bool, debug: str | None,
    name: str | None, version: str | None, shard_mb: float | None, **quantization: Any,
) -> None:
    """Compile an ONNX MODEL (or a GGUF language model) into an artifact: a folder that runs without Python."""
    import luthier as package
    from luthier.artifact import package_names

    out = output or Path(f"{_existing(model).stem}.luthier")
    package_names(out, name, version)  # what is wrong with them is told before the work
    source: Any = model
    if precision is not None:
        from luthier.cli.quantize import quantize_file

        quantization["reduce_range"] = bool(quantization["reduce_range"])  # this package's own kernels are exact with 8 bits
        source, shapes = quantize_file(model, precision, dict(shapes) or None, threads, quantization).graph, ()
    start = time.perf_counter()
    if language and precision is not None:
        raise InputError("--language and --precision exclude each other", hint="quantize the export first: luthier quantize")
    with warnings.catch_warnings(record=True) as notes, tuning_progress(tune) as chosen:
        if language:
            from luthier.llm.model import compile_gguf

            module = compile_gguf(model, target, dict(shapes), threads, _checks(debug), chosen)
        else:
            module = package.compile(source, target=target, shapes=dict(shapes) or None, threads=threads, debug=_checks(debug), tune=chosen)
    for note in notes:
        echo(f"note: {note.message}", err=True)
    print_tuning(chosen)
    compiled = time.perf_counter() - start
    module.save(out, shard_mb, name, version)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    echo(f"{out}: {size / 1e6:.1f} MB, compiled for {target} in {compiled:.2f} s")
    for kind, values in (("input", module.inputs), ("output", module.outputs)):
        for value in values:
            echo(f"  {kind:6} {printable(value.name)}: {value.dtype}[{printable(', '.join(map(str, value.shape)))}]")


@luthier.command()
@_model
@_compile_options
@_data_options
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the outputs to this .npz file.")
@_debug
def run(
    model: Path, target: str, shapes: tuple[Any, ...], threads: int | None, files: tuple[str, ...], seed: int,
    output: Path | None, debug: str | None,
) -> None:  # fmt: skip
    """Run MODEL (an ONNX file or an artifact) once and print or write its outputs."""
    import numpy as np

    module = _open(model, target, shapes, threads, debug)
    feeds = _inputs(module, files, shapes, seed)
    outputs = module.run(feeds)
    for name, array in outputs.items():
        echo(f"{printable(name)}: {_describe(array)}")
    if output is not None:
        try:
            np.savez(output, allow_pickle=True, **outputs)
        except (OSError, ValueError) as e:
            raise InputError(f"cannot write {output}: {getattr(e, 'strerror', None) or e}") from e


def _describe(value: Any) -> str:
    """Shape, dtype and a few numbers of an array."""
    import numpy as np

    array = np.asarray(value)
    text = f"{array.dtype}{list(array.shape)}"
    if array.size and array.dtype.kind in "fiub":
        wide = array.astype(np.float64)
        text += f" min {wide.min():.6g} max {wide.max():.6g} mean {wide.mean():.6g}"
    flat = np.array2string(array.reshape(-1)[:8], precision=4, separator=", ", max_line_width=200)
    return f"{text} {flat[:-1]}{', ...' if array.size > 8 else ''}]"


@luthier.command()
@_model
@_compile_options
@_data_options
@click.option("--runs", default=50, show_default=True, type=click.IntRange(1), help="Timed calls.")
@click.option("--profile/--no-profile", default=True, help="Also time every kernel.")
@click.option("--top", default=20, show_default=True, help="Kernels shown.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write the profile as a Chrome trace (.json).")
@click.option("--onnxruntime", "peer", is_flag=True, help="Also time onnxruntime, with as many threads (MODEL an ONNX file).")
@_debug
def bench(
    model: Path, target: str, shapes: tuple[Any, ...], threads: int | None, files: tuple[str, ...], seed: int, runs: int,
    profile: bool, top: int, trace: Path | None, peer: bool, debug: str | None,
) -> None:  # fmt: skip
    """Latency of MODEL and a per-kernel profile with the names of its nodes."""
    module = _open(model, target, shapes, threads, debug)
    feeds = _inputs(module, files, shapes, seed)
    outputs = module.run(feeds)
    _print_times("luthier", _times(lambda: module.run(feeds, out=outputs), runs))
    if peer:
        from luthier.debug.compare import session

        reference = session(model, threads)
        _print_times("onnxruntime", _times(lambda: reference.run(None, feeds), runs))
    if profile or trace is not None:
        rows = module.profile(feeds)
        if profile:
            _print_profile(rows, top)
        if trace is not None:
            from luthier.debug.trace import write_trace

            try:
                write_trace(rows, trace, model.name)
            except OSError as e:
                raise InputError(f"cannot write {trace}: {e}") from e
            echo(f"{trace}: {len(rows)} kernel calls, open it in chrome://tracing or ui.perfetto.dev")


def _times(call: Callable[[], object], runs: int) -> list[float]:
    """Milliseconds of ``runs`` calls after a warm-up of at most half a second."""
    end = time.perf_counter() + 0.5
    for _ in range(10):
        call()
        if time.perf_counter() > end:
            break
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _print_times(name: str, times: list[float]) -> None:
    echo(f"{name}: median {statistics.median(times):.3f} ms, min {min(times):.3f} ms, {len(times)} runs")


def _print_profile(rows: Sequence[Mapping[str, Any]], top: int) -> None:
    from rich.table import Table

    total = sum(row["ms"] for row in rows) or 1.0
    table = Table(box=None, pad_edge=False)
    for title in ("ms", "%", "GFLOP/s", "GB/s"):
        table.add_column(title, justify="right")
    table.add_column("kernel", overflow="fold")
    table.add_column("nodes", overflow="fold")
    ordered = sorted(rows, key=lambda row: -row["ms"])
    for row in ordered[:top]:
        rate = [f"{row[k] / row['ms'] / 1e6:.1f}" if row.get(k) and row["ms"] else "" for k in ("flops", "bytes")]
        nodes = row["nodes"] if isinstance(row["nodes"], str) else ", ".join(row["nodes"])
        table.add_row(f"{row['ms']:.3f}", f"{100 * row['ms'] / total:.1f}", *rate, str(row["kernel"]), nodes)
    console().print(table)
    if len(ordered) > top:
        echo(f"and {len(ordered) - top} more kernels, {sum(r['ms'] for r in ordered[top:]):.3f} ms")


@luthier.command()
@_model
@_compile_options
@click.option("--stage", multiple=True, help="Show only these stages (as named in the listing); repeatable.")
@click.option("--kernel", help="Show only what mentions this kernel or node.")
@click.option("--list", "listing", is_flag=True, help="List the stages instead of printing them.")
@click.option("--knobs", is_flag=True, help="List the templates of the kernels with their knobs and the values that a tuner tries.")
@_debug
def inspect(
    model: Path, target: str, shapes: tuple[Any, ...], threads: int | None, stage: tuple[str, ...], kernel: str | None,
    listing: bool, knobs: bool, debug: str | None,
) -> None:  # fmt: skip
    """Show how MODEL compiles: graph, groups, kernels, loop IR, source."""
    from luthier.debug.inspection import knob_table, stages

    if knobs:
        for line in knob_table(_existing(model), target, dict(shapes)):
            echo(printable(line))
        return
    for name, text in stages(_existing(model), target, dict(shapes), threads):
        if stage and not any(s in name for s in stage):
            continue
        if listing:
            echo(f"{name}: {text.count(chr(10)) + 1} lines")
            continue
        if kernel:
            text = "\n\n".join(block for block in text.split("\n\n") if kernel in block)
        if text:
            echo(f"== {name}\n{text}")


@luthier.command()
@_model
@_compile_options
@_data_options
@click.option("--rtol", default=1e-3, show_default=True, help="Relative to the largest magnitude of the value.")
@click.option("--all", "everything", is_flag=True, help="Print every value, not only those that diverge.")
@_debug
def compare(
    model: Path, target: str, shapes: tuple[Any, ...], threads: int | None, files: tuple[str, ...], seed: int, rtol: float,
    everything: bool, debug: str | None,
) -> None:  # fmt: skip
    """Compare every intermediate value of MODEL with onnxruntime's; the first divergence is named. Exits 1 if there is one."""
    from luthier.debug.compare import compare_values

    rows = compare_values(_existing(model), target, dict(shapes), threads, files, seed)
    bad = [row for row in rows if not row.error <= rtol]
    for row in rows:
        if everything or row in bad:
            echo(f"{'DIVERGES' if row in bad else 'ok':8} {row.value} ({row.op} {row.node}): error {row.error:.3g} {row.detail}".rstrip())
    echo(f"{len(rows)} values compared, {len(bad)} diverge by more than {rtol:g}")
    if bad:
        first = bad[0]
        echo(f'first divergence: value "{first.value}" of node "{first.node}" ({first.op})')
        raise click.exceptions.Exit(1)


@luthier.command()
@click.option("--missing", is_flag=True, help="Also list the ONNX operators that no file of luthier.ir.ops registers.")
@_debug
def ops(missing: bool, debug: str | None) -> None:
    """The operators and the targets: how many tests of the ONNX suite pass for each (measured from saved artifacts)."""
    from luthier.debug.inspection import conformance, operator_matrix

    header, rows = operator_matrix(missing)
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console().print(table)
    echo(f"{len(rows)} operators; cells are tests of the ONNX suite {conformance()['onnx']} passed / run; untested: none was run; no: the target builds no module")
    for k, target in enumerate(header[2:], 2):
        counts = [tuple(map(int, row[k].split("/"))) for row in rows if "/" in row[k]]
        if counts:
            whole = sum(1 for passed, run in counts if passed == run)
            echo(f"  {target}: {whole} of {len(counts)} tested operators pass all their tests, {sum(p for p, _ in counts)} of {sum(r for _, r in counts)} tests")


@luthier.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--open/--no-open", "show", default=True, help="Open the demo page in the browser.")
@_debug
def serve(folder: Path, port: int, show: bool, debug: str | None) -> None:
    """Show the web package FOLDER (of compile --target=wasm or webgpu) on this machine, with the headers that threads need."""
    from luthier.cli.serve import serve as run_server

    run_server(folder, port, show)


@luthier.command("settings")
@_debug
def settings_command(debug: str | None) -> None:
    """The environment variables that luthier reads, with their values now."""
    for setting in settings.all_settings():
        origin = "set" if setting.is_set() else "default"
        echo(f"{setting.name} = {setting.get()} ({origin})\n    {setting.help}")


def _fail(message: str, code: int) -> NoReturn:
    echo(f"luthier: {' '.join(message.split())}", err=True)
    sys.exit(code)


def entry(command: click.Command, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command; turn every way to fail into one line and an exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    words = ["--debug=trace" if w == "--debug" else w for w in given]  # its value is optional and never the next word
    debug = any(w.startswith("--debug=") and "trace" in w for w in words)
    try:
        debug = debug or "trace" in settings.debug.get()
        code = command.main(words, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        echo(error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        if debug:
            raise
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # a reader such as head went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except LuthierError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except OSError as error:  # a disk, a folder, a right: of the machine, not of the model
        if debug:
            raise
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}", LuthierError.exit_code)
    except Exception as error:
        if debug:
            raise
        notes = "".join(f"; {n}" for n in getattr(error, "__notes__", ()))
        _fail(f"internal error, please report it: {type(error).__name__}: {error} (--debug shows where){notes}", DEFECT)
    sys.exit(code if isinstance(code, int) else 0)


for _tool in (*COMMANDS, tune_command):
    luthier.add_command(_tool)
main: Callable[[], NoReturn] = functools.partial(entry, luthier)
compile_main: Callable[[], NoReturn] = functools.partial(entry, compile_command)
