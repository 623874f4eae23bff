"""``luthier generate``: text from a language model on the command line."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import click

from luthier.errors import InputError

__all__ = ["generate"]


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--max-tokens", "-n", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the most likely token every time.")
@click.option("--top-k", type=int, default=40, show_default=True, help="Only the k most likely tokens; 0: all.")
@click.option("--top-p", type=float, default=0.95, show_default=True, help="Only the most likely tokens with this probability together.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--chat", is_flag=True, help="PROMPT is a user's message, not a text to continue.")
@click.option("--capacity", type=click.IntRange(1), help="Positions of the cache; default: the model's context, at most 2048.")
@click.option("--target", default="cpu", show_default=True, help="cpu, cpu:x86-64-v3, wasm, wasm:simd, ...")
@click.option("--threads", type=click.IntRange(1), help="Worker threads; default: the cores this process may use.")
@click.option("--cache-bits", type=click.Choice(["8", "16"]), default="16", show_default=True, help="Of keys and values.")
@click.option("--precision", help="Quantize the layers' matrices anew: w8, w6, w5, w4, w3, w2, w1, ternary.")
@click.option("--exact", is_flag=True, help="Activations in f32 instead of 8 bits.")
@click.option("--stats", is_flag=True, help="Tokens a second on standard error.")
@click.option("--debug", hidden=True, is_flag=False, flag_value="trace")
def generate(
    model: Path, prompt: str, max_tokens: int, temperature: float, top_k: int, top_p: float, seed: int | None, chat: bool,
    capacity: int | None, target: str, threads: int | None, cache_bits: str, precision: str | None, exact: bool, stats: bool, debug: str | None,
) -> None:
    """Continue PROMPT with MODEL (a GGUF file, an ONNX decoder with tokenizer.json beside it, or the folder of a compiled one), printing
    the text as it is made."""
    from luthier.llm.model import Sampling, load

    if not model.exists():
        raise InputError(f"no such file: {model}")
    sampling = Sampling(temperature, top_k, top_p, seed)
    t0 = time.perf_counter()
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        lm = load(model, target, threads=threads, capacity=capacity, exact=exact, cache_bits=int(cache_bits), precision=precision)
    for note in notes:
        click.echo(f"note: {note.message}", err=True)
    t1 = time.perf_counter()
    first = 0.0
    pieces = 0
    for piece in lm.generate(prompt, max_tokens, sampling, chat):
        first = first or time.perf_counter()
        pieces += 1
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
    if stats:
        end = time.perf_counter()
        rate = (pieces - 1) / (end - first) if pieces > 1 else float("nan")
        click.echo(f"compiled in {t1 - t0:.2f} s, first text after {first - t1:.3f} s, then {rate:.1f} pieces/s", err=True)
