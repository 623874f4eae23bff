"""``luthier quantize``, and the options of ``luthier compile --precision``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from luthier.cli.options import ShapeParam
from luthier.cli.terminal import console, echo
from luthier.errors import InputError

if TYPE_CHECKING:
    from luthier.quantization.quantize import Quantized

__all__ = ["quantize", "quantize_file", "quantize_options"]

F = TypeVar("F", bound=Callable[..., Any])
_OPTIONS = (
    click.option("--calibration", "-c", metavar="FILE", help="Real inputs: an .npz by input names, or a folder of them."),
    click.option("--samples", type=click.IntRange(1), help="Use at most so many calibration batches."),
    click.option("--group", default=64, show_default=True, help="Columns that share a scale (16 to 256); 0: one scale a row."),
    click.option("--symmetric", is_flag=True, help="Low-bit weights without zero points."),
    click.option("--method", help="rtn, mse, hqq or gptq; default: gptq with calibration data, else mse (int8: rtn)."),
    click.option("--scales", "scale_dtype", default="f16", show_default=True, help="Type of low-bit scales: f16, bf16 or f32."),
    click.option("--observer", default="minmax", show_default=True, help="Ranges of int8: minmax, percentile or entropy."),
    click.option("--percentile", default=99.99, show_default=True, help="What observer percentile keeps."),
    click.option("--smooth", type=float, help="int8: strength of activation smoothing, 0 to 1."),
    click.option("--reduce-range/--full-range", default=None, help="int8: weights of 7 bits, right on every CPU and runtime (default of quantize), or of 8 (of compile)."),
    click.option("--budget-mb", type=float, help="auto: all constants take at most so many million bytes."),
    click.option("--sensitivity", default="output", show_default=True, help="auto: output (measured) or proxy (layers' own errors)."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Nodes that stay as they are, by name with *; repeatable."),
    click.option("--embeddings/--no-embeddings", default=True, help="Large tables become bytes with a scale a row."),
    click.option("--report", type=click.Path(path_type=Path), help="Write the accuracy report as JSON."),
    click.option("--speed/--no-speed", default=True, help="Measure the machine's ceilings (a second) for the estimate of speed."),
)


def quantize_options(command: F) -> F:
    """All options of a quantization but the precision."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def quantize_file(model: Path, precision: str, shapes: Mapping[str, Any] | None, threads: int | None, options: Mapping[str, Any]) -> Quantized:
    """Quantize with the values of :func:`quantize_options`; the report is printed and written."""
    from luthier.quantization.quantize import quantize as run

    report, speed = options["report"], options["speed"]
    given = {k: v for k, v in options.items() if k not in ("report", "speed") and v is not None}
    done = run(model, precision, shapes=shapes, progress=sys.stderr.isatty(), **given)
    if speed:
        from luthier.codegen.targets.ceilings import measure

        done.report.estimate_speed(measure(threads or 1))
    done.report.print(console())
    if report is not None:
        done.report.save(report)
    return done


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--precision", "-p", required=True, help="w8, w6, w5, w4, w3, w2, w1, ternary (w4a8: activations as well), int8, f16, bf16, auto.")
@click.option("--shape", "shapes", multiple=True, metavar="name=1x128", help="Pin the shape of an input; repeatable.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the speed estimate.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Where the ONNX file goes; default: MODEL's stem + .PRECISION.onnx.")
@click.option("--form", default="portable", show_default=True, help="portable: onnxruntime runs it; luthier: own bits of 1, 3, 5, 6 and ternary.")
@quantize_options
@click.option("--debug", hidden=True, is_flag=False, flag_value="trace")
def quantize(model: Path, precision: str, shapes: tuple[str, ...], threads: int | None, output: Path | None, form: str, debug: str | None, **options: Any) -> None:
    """Quantize an ONNX MODEL, print what it costs, and write it as ONNX."""
    from luthier.quantization.export_onnx import FORMS
    from luthier.quantization.precision import parse_precision

    parse_precision(precision)
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}", hint=f"choose one of {', '.join(FORMS)}")
    if not model.exists():
        raise InputError(f"no such file: {model}")
    pins = dict(ShapeParam().convert(text, None, None) for text in shapes)
    if options["reduce_range"] is None:
        options["reduce_range"] = form == "portable"  # the file is for other runtimes
    done = quantize_file(model, precision, pins or None, threads, options)
    out = done.save(output or Path(f"{model.stem}.{precision}.onnx"), form)
    echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
