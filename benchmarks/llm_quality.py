"""Perplexity and KL divergence of a GGUF model over thousands of tokens: Luthier, llama.cpp and the f32 model of the same weights.

    python -m benchmarks.llm_quality MODEL.gguf [--tokens 4096] [--window 512] [--sides ours,head,exact,llama] [--markdown FILE]

The text is prose that is installed everywhere: documentation strings of Python's standard library, then licenses (/usr/share/common-licenses).
It is cut into windows that know nothing of one another. The reference is the Llama architecture in numpy, f32, over the dequantized
weights. For every side: perplexity; the mean difference of the negative log-likelihood from the reference's **on the same tokens**, in
percent of perplexity, with its standard error (the tokens' differences over the square root of their number); the mean KL divergence
of the reference's distribution from the side's, with its standard error; how often the most likely token is the reference's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llm import sample_text

Array = np.ndarray[Any, Any]
Logits = Callable[[Array], Array]
Rows = dict[str, dict[str, float]]
LICENSES = ("GPL-3", "Apache-2.0", "LGPL-2.1", "MPL-2.0", "GFDL-1.3", "Artistic")


def log_softmax(x: Array) -> Array:
    """Of f32 rows, in f32 with sums in f64 (errors near 1e-6; divergences here are 1e-3)."""
    y = x - x.max(-1, keepdims=True)
    return np.asarray(y - np.log(np.exp(y).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32))


def long_text() -> str:
    """About 60 thousand tokens of English; the first 16 thousand do not depend on the installed packages."""
    parts = [sample_text()]
    for name in LICENSES:
        p = Path("/usr/share/common-licenses") / name
        if p.exists():
            parts.append(p.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(parts)


@dataclass
class Score:
    """Sums over tokens. ``nll``: of the reference minus nothing; lists hold one number a token."""

    nll: list[Array] = field(default_factory=list)
    change: list[Array] = field(default_factory=list)
    kl: list[Array] = field(default_factory=list)
    same: list[Array] = field(default_factory=list)

    def add(self, ref: Array, logits: Array, tokens: Array) -> None:
        """``ref``: log-probabilities [n, vocabulary] of the reference; ``logits``: of this side."""
        q = log_softmax(logits)
        at = np.arange(len(tokens) - 1), tokens[1:]
        self.nll.append(-q[at].astype(np.float64))
        self.change.append(ref[at].astype(np.float64) - q[at])
        self.kl.append((np.exp(ref) * (ref - q)).sum(-1, dtype=np.float64))
        self.same.append(ref.argmax(-1) == q.argmax(-1))

    def row(self) -> dict[str, float]:
        d, k = np.concatenate(self.change), np.concatenate(self.kl)
        return {
            "perplexity": float(np.exp(np.concatenate(self.nll).mean())),
            "change": float(np.expm1(d.mean()) * 100), "change_error": float(d.std(ddof=1) / np.sqrt(d.size) * 100),
            "kl": float(k.mean()), "kl_error": float(k.std(ddof=1) / np.sqrt(k.size)), "same": float(np.concatenate(self.same).mean() * 100),
        }  # fmt: skip


def evaluate(reference: Logits, sides: dict[str, Logits], tokens: Array, window: int, on_window: Callable[[int, Rows], None] | None = None) -> Rows:
    """Rows by side, the reference's first. ``tokens`` are cut into windows; a rest that is shorter than half of one is dropped. ``on_window`` is told the
    number of tokens and the rows so far."""
    scores = {name: Score() for name in ("f32", *sides)}
    for lo in range(0, len(tokens), window):
        part = tokens[lo : lo + window]
        if len(part) < max(2, window // 2):
            break
        y = reference(part)
        ref = log_softmax(y)
        scores["f32"].add(ref, y, part)
        for name, side in sides.items():
            scores[name].add(ref, side(part), part)
        if on_window is not None:
            on_window(lo + len(part), {name: s.row() for name, s in scores.items()})
    return {name: s.row() for name, s in scores.items()}


def table(rows: Rows) -> str:
    lines = ["| | perplexity | against f32, % | KL divergence, nats | same token, % |", "|---|---|---|---|---|"]
    for name, r in rows.items():
        more = ("-", "-", "-") if name == "f32" else (f"{r['change']:+.2f} ± {r['change_error']:.2f}", f"{r['kl']:.2e} ± {r['kl_error']:.0e}", f"{r['same']:.1f}")
        lines.append(f"| {name} | {r['perplexity']:.4f} | {more[0]} | {more[1]} | {more[2]} |")
    return "\n".join(lines) + "\n"


def ours(model: str | Path, window: int, threads: int | None = None, **options: Any) -> Logits:
    """The model compiled with ``options`` of :func:`luthier.llm.load`."""
    from luthier import llm

    m = llm.load(model, threads=threads, capacity=window, all_logits=True, **options)

    def run(tokens: Array) -> Array:
        m.reset()
        return m.feed([int(t) for t in tokens])

    return run


def llama(model: str | Path, window: int, vocabulary: int, threads: int = 2) -> Logits:
    """llama.cpp. Raises FileNotFoundError where its libraries are not (:mod:`benchmarks.peer_ggml`)."""
    from benchmarks.peer_ggml import Llama

    m = Llama(str(model), threads, window)

    def run(tokens: Array) -> Array:
        m.reset()
        return m.feed([int(t) for t in tokens], vocabulary, True)

    return run


OPTIONS: dict[str, dict[str, Any]] = {"ours": {}, "exact": {"exact": True}, "cache8": {"cache_bits": 8}}


def main(argv: Sequence[str] | None = None) -> None:
    from benchmarks.llama_numpy import Reference
    from luthier.importers.gguf import read_gguf
    from luthier.importers.gguf_tokenizer import make_tokenizer

    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--tokens", type=int, default=4096)
    ap.add_argument("--window", type=int, default=512)
    ap.add_argument("--sides", default="ours,exact,llama")
    ap.add_argument("--markdown", type=Path)
    a = ap.parse_args(argv)
    g = read_gguf(a.model)
    ref = Reference(g)
    ids = np.array(make_tokenizer(g).encode(long_text(), add_special_tokens=False).ids)[: a.tokens]
    sides: dict[str, Logits] = {}
    for name in a.sides.split(","):
        if name == "llama":
            sides["llama.cpp"] = llama(a.model, a.window, ref.c.vocabulary)
        else:
            sides[name] = ours(a.model, a.window, **OPTIONS[name])

    def show(n: int, rows: Rows) -> None:
        text = f"{Path(a.model).name}, {n} tokens in windows of {a.window}\n\n" + table(rows)
        print(text, flush=True)
        if a.markdown:
            a.markdown.write_text(text)

    evaluate(ref.forward, sides, ids, a.window, show)


if __name__ == "__main__":
    main()
