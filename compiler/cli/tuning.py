"""``luthier tune`` and the progress of ``compile --tune``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.options import ShapeParam
from luthier.cli.terminal import console, echo, printable
from luthier.errors import InputError

if TYPE_CHECKING:
    from luthier.tuner.tune import Progress, Tuning

_SIZE = "NAME=N"


@contextmanager
def tuning_progress(tune: str | Tuning | None) -> Iterator[Any]:
    """What :func:`luthier.compile` takes as ``tune``: False without one, else a Tuning whose steps are drawn on standard error."""
    if tune is None:
        yield False
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from luthier.tuner.tune import Tuning

    tuning = Tuning.of(tune)
    columns = (TextColumn("tuning"), BarColumn(24), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Bar(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("tuning", total=None, text="compiling")

        def report(p: Progress) -> None:
            gain = f"{p.seconds / p.best:.2f}x" if p.best else ""
            text = f"kernel {p.done + 1}/{p.kernels}, {p.tried} candidates, kernels {gain}, {p.left:.0f} s left  {printable(p.doing)[:40]}"
            bar.update(task, completed=min(p.done, p.kernels), total=max(p.kernels, 1), text=text)

        tuning.report = report
        yield tuning


def print_tuning(tuning: Any, top: int = 0) -> None:
    """What was found, the kernels that gained first."""
    if not tuning:
        return
    found = sorted((k for k in tuning.kernels if k.best is not None), key=lambda k: k.cost * (1 - 1 / k.gain), reverse=True)
    whole = f", the whole model {tuning.gain:.2f} times as fast" if tuning.gain is not None else ""
    echo(f"tuned: {len(found)} of {len(tuning.kernels)} kernels, {tuning.tried} candidates, {tuning.measured} measured now{whole}{f' ({tuning.note})' if tuning.note else ''}")
    for k in found[:top]:
        echo(f"  {k.gain:5.2f}x  {k.calls} x {1e6 * k.seconds:.1f} us  {printable(k.compute.name)}: {k.best}")
    busy = [k for k in tuning.kernels if k.why.startswith("the machine is busy")]
    if busy:
        echo(f"note: {len(busy)} kernels keep their default because the machine was busy; tune again when it is not", err=True)


def _sizes(texts: tuple[str, ...]) -> dict[str, int]:
    out = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value.isdigit() or not int(value):
            raise InputError(f"--size {text!r} is not {_SIZE}", hint="for example --size length=128")
        out[name] = int(value)
    return out


@click.command("tune")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--target", default="cpu", show_default=True, help="cpu, cpu:x86-64-v3: code that runs on this machine.")
@click.option("--shape", "shapes", type=ShapeParam(), multiple=True, help="Pin the shape of an input; repeatable.")
@click.option("--size", "sizes", multiple=True, metavar=_SIZE, help="What an open dimension is while kernels are measured; repeatable.")
@click.option("--threads", type=click.IntRange(1), help="Worker threads; default: the cores this process may use.")
@click.option("--budget", default="30s", show_default=True, help="How long kernels are measured: 30s, 2m.")
@click.option("--exact", is_flag=True, help="Only candidates whose results are the default's bit for bit.")
@click.option("--exhaust", is_flag=True, help="Every candidate of every kernel, however long.")
@click.option("--top", default=10, show_default=True, help="Kernels to list.")
@click.option("--train", type=click.Path(path_type=Path), help="Train a cost model from what was measured so far and write it to this file.")
def tune_command(
    model: Path | None, target: str, shapes: tuple[Any, ...], sizes: tuple[str, ...], threads: int | None, budget: str, exact: bool, exhaust: bool, top: int,
    train: Path | None,
) -> None:
    """Measure how MODEL's kernels are best built on this machine. Later compilations with --tune use it; an interrupt keeps what was found."""
    import luthier
    from luthier.tuner.tune import Tuning

    if train is not None:
        from luthier.tuner.train import train_from

        echo(train_from(train))
        return
    if model is None or not model.exists():
        raise InputError("no model to tune" if model is None else f"no such file: {model}")
    tuning = Tuning.of(budget)
    tuning.exact, tuning.exhaust, tuning.sizes = exact, exhaust, _sizes(sizes)
    with warnings.catch_warnings(record=True) as notes, tuning_progress(tuning) as chosen:
        luthier.compile(model, target=target, shapes=dict(shapes) or None, threads=threads, tune=chosen)
    for note in notes:
        echo(f"note: {note.message}", err=True)
    print_tuning(tuning, top)
