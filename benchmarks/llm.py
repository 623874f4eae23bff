"""A GGUF language model beside llama.cpp: decode and prefill tokens a second, perplexity, KL divergence, greedy text.

    python -m benchmarks.llm MODEL.gguf [--threads 1] [--prompt-tokens 256] [--quality 512]

Speed: interleaved rounds, the best of each. Quality on a text of an installed package (the documentation strings of Python's standard
library modules): perplexity of Luthier (8-bit and exact activations), of llama.cpp and of the f32 model with the dequantized weights
(numpy), and the mean KL divergence of their distributions from the f32 model's. llama.cpp's libraries: :mod:`benchmarks.peer_ggml`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
PROMPT = "The history of computing began long before the first electronic machines."


def sample_text() -> str:
    """English prose that every Python installation has."""
    import argparse as a
    import asyncio
    import collections
    import datetime
    import decimal
    import email
    import statistics
    import textwrap
    import threading

    modules = (statistics, textwrap, decimal, collections, datetime, threading, email, asyncio, a)
    docs = [m.__doc__ for m in modules] + [getattr(o, "__doc__", None) for m in modules for o in vars(m).values() if callable(o)]
    return "\n".join(d.strip() for d in docs if isinstance(d, str) and len(d) > 200)


def log_softmax(x: Array) -> Array:
    y = x.astype(np.float64) - x.max(-1, keepdims=True)
    return np.asarray(y - np.log(np.exp(y).sum(-1, keepdims=True)))


def perplexity(logits: Array, tokens: Array) -> float:
    p = log_softmax(logits[:-1])
    return float(np.exp(-p[np.arange(len(tokens) - 1), tokens[1:]].mean()))


def divergence(ref: Array, other: Array) -> float:
    """Mean KL(ref || other) over rows, in nats."""
    p, q = log_softmax(ref), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def best_of(run: Callable[[], None], seconds: float, best: float) -> float:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        t = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - t)
    return best


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--prompt-tokens", type=int, default=256)
    ap.add_argument("--quality", type=int, default=0, help="tokens of the quality text; 0: only speed")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--wait", action="store_true", help="read a line from standard input before measuring")
    a = ap.parse_args(argv)
    from luthier import llm

    ours = llm.load(a.model, threads=a.threads, capacity=2048)
    vocabulary = ours.vocabulary
    try:
        from benchmarks.peer_ggml import Llama

        peer: Any = Llama(a.model, a.threads)
    except FileNotFoundError as e:
        print(f"without llama.cpp: {e}", file=sys.stderr)
        peer = None
    ids = ours.tokenizer.encode(PROMPT, add_special_tokens=False).ids
    text = np.array(ours.tokenizer.encode(sample_text(), add_special_tokens=False).ids)
    if a.wait:
        print("ready", flush=True)
        sys.stdin.readline()
    decode = {"luthier": float("inf"), "llama.cpp": float("inf")}
    prefill = dict(decode)
    sides: list[tuple[str, Any, Callable[[list[int]], Any]]] = [("luthier", ours, ours.feed)]
    if peer is not None:
        sides.append(("llama.cpp", peer, lambda t: peer.feed(t, vocabulary)))
    long = [int(t) for t in text[: a.prompt_tokens]]
    for _ in range(a.rounds):
        for name, side, feed in sides:
            side.reset()
            t = time.perf_counter()
            feed(long)
            prefill[name] = min(prefill[name], time.perf_counter() - t)
            side.reset()
            feed(ids)
            decode[name] = best_of(lambda feed=feed: feed([ids[0]]), 0.5, decode[name])  # type: ignore[misc]
    print(f"\n{a.model.rsplit('/', 1)[-1]}, {a.threads} thread(s), tokens/s")
    for name, _, _ in sides:
        print(f"  {name:10s} decode {1 / decode[name]:7.1f}   prefill of {len(long)} {len(long) / prefill[name]:7.1f}")
    if not a.quality:
        return
    from benchmarks.llama_numpy import forward
    from luthier.importers.gguf.file import read_gguf

    tokens = text[: a.quality]
    ref = forward(read_gguf(a.model), tokens)
    print(f"\n{len(tokens)} tokens of documentation strings: perplexity, KL from the f32 model")
    print(f"  f32 numpy            {perplexity(ref, tokens):8.4f}")
    for name, exact in (("luthier", False), ("luthier exact", True)):
        m = llm.load(a.model, threads=a.threads, capacity=max(len(tokens), 64), exact=exact, all_logits=True)
        y = m.feed([int(t) for t in tokens])
        print(f"  {name:20s} {perplexity(y, tokens):8.4f}  {divergence(ref, y):.2e}")
    if peer is not None:
        peer.reset()
        y = peer.feed([int(t) for t in tokens], vocabulary, True)
        print(f"  {'llama.cpp':20s} {perplexity(y, tokens):8.4f}  {divergence(ref, y):.2e}")
    greedy: dict[str, list[int]] = {}
    for name, side, feed in sides:
        side.reset()
        logits, out = feed(ids), []
        for _ in range(32):
            out.append(int(np.argmax(logits)))
            logits = feed([out[-1]])
        greedy[name] = out
    print(f"\ngreedy after {PROMPT!r}")
    for name, out in greedy.items():
        print(f"  {name:10s} {ours.tokenizer.decode(out)!r}")


if __name__ == "__main__":
    main()
