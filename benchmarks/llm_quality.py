"""Perplexity and KL divergence of a GGUF model over thousands of tokens: Luthier, llama.cpp and the f32 model of the same weights.

    python -m benchmarks.llm_quality MODEL.gguf [--tokens 4096] [--window 512] [--sides ours,exact,llama] [--resume FOLDER] [--markdown FILE]

The text is prose that is installed everywhere: documentation strings of Python's standard library, then licenses (/usr/share/common-licenses).
It is cut into windows that know nothing of one another. The reference is the Llama architecture in f32 over the dequantized
weights (torch where it is installed, else numpy). For every side: perplexity; the mean difference of the negative log-likelihood from the
reference's **on the same tokens**, in percent of perplexity, with its standard error (the tokens' differences over the square root of their
number); the mean KL divergence of the reference's distribution from the side's, with its standard error; how often the most likely
token is the reference's. Of two sides, the difference of their divergences on the same tokens is shown with its standard error too.

``--resume``: a folder that keeps every window's figures, so that a run goes on where another one ended. It belongs to one state of the
compiler and one model: use a new one for a new measurement.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llm import sample_text

Array = np.ndarray[Any, Any]
Logits = Callable[[Array], Array]
Rows = dict[str, dict[str, float]]
LICENSES = ("GPL-3", "Apache-2.0", "LGPL-2.1", "MPL-2.0", "GFDL-1.3", "Artistic")
COLUMNS = ("nll", "change", "kl", "same")


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
    """One number a token in every list, an array a window: negative log-likelihood, the reference's log-likelihood less this one's, KL divergence of the
    reference's distribution from this one, whether the most likely token is the same."""

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

    def last(self) -> dict[str, Array]:
        """The last window's arrays."""
        return {c: getattr(self, c)[-1] for c in COLUMNS}

    def restore(self, window: Mapping[str, Array]) -> None:
        for c in COLUMNS:
            getattr(self, c).append(np.asarray(window[c]))

    def row(self) -> dict[str, float]:
        d, k = np.concatenate(self.change), np.concatenate(self.kl)
        return {
            "perplexity": float(np.exp(np.concatenate(self.nll).mean())),
            "change": float(np.expm1(d.mean()) * 100), "change_error": float(d.std(ddof=1) / np.sqrt(d.size) * 100),
            "kl": float(k.mean()), "kl_error": float(k.std(ddof=1) / np.sqrt(k.size)), "same": float(np.concatenate(self.same).mean() * 100),
        }  # fmt: skip


def windows(tokens: Array, window: int) -> list[tuple[int, Array]]:
    """(start, tokens) of every window; a rest that is shorter than half of one is dropped."""
    cut = [(lo, tokens[lo : lo + window]) for lo in range(0, len(tokens), window)]
    return [(lo, part) for lo, part in cut if len(part) >= max(2, window // 2)]


def evaluate(
    reference: Logits, sides: dict[str, Logits], tokens: Array, window: int, on_window: Callable[[int, Rows], None] | None = None, folder: Path | None = None,
) -> dict[str, Score]:  # fmt: skip
    """Scores by side, the reference's (``f32``) first. ``on_window`` is told the number of tokens and the rows so far. ``folder``: where windows are kept
    and found; the reference runs only where a side lacks a window."""
    scores = {name: Score() for name in ("f32", *sides)}
    for lo, part in windows(tokens, window):
        files = {name: None if folder is None else folder / f"{name}-{window}-{lo}.npz" for name in scores}
        missing = [name for name, p in files.items() if p is None or not p.exists()]
        for name, p in files.items():
            if p is not None and name not in missing:
                with np.load(p) as z:
                    if not np.array_equal(z["tokens"], part):
                        raise SystemExit(f"{p} is of another text or model; use another folder")
                    scores[name].restore(z)
        if missing:
            y = reference(part)
            ref = log_softmax(y)
            for name in missing:
                scores[name].add(ref, y if name == "f32" else sides[name](part), part)
                p = files[name]
                if p is not None:
                    p.parent.mkdir(parents=True, exist_ok=True)
                    np.savez(p, tokens=part, **scores[name].last())
        if on_window is not None:
            on_window(lo + len(part), {name: s.row() for name, s in scores.items()})
    return scores


def table(rows: Rows) -> str:
    lines = ["| | perplexity | against f32, % | KL divergence, nats | same token, % |", "|---|---|---|---|---|"]
    for name, r in rows.items():
        more = ("-", "-", "-") if name == "f32" else (f"{r['change']:+.2f} ± {r['change_error']:.2f}", f"{r['kl']:.2e} ± {r['kl_error']:.0e}", f"{r['same']:.1f}")
        lines.append(f"| {name} | {r['perplexity']:.4f} | {more[0]} | {more[1]} | {more[2]} |")
    return "\n".join(lines) + "\n"


def compared(scores: Mapping[str, Score], other: str) -> str:
    """A line for every side: its divergence and its log-likelihood's change less those of ``other``, on the same tokens."""
    lines = []
    base = scores[other]
    for name, s in scores.items():
        if name in ("f32", other):
            continue
        k = np.concatenate(s.kl) - np.concatenate(base.kl)
        c = np.concatenate(s.change) - np.concatenate(base.change)
        error = [float(d.std(ddof=1) / np.sqrt(d.size)) for d in (k, c)]
        lines.append(f"{name} less {other}, same tokens: divergence {k.mean():+.2e} ± {error[0]:.0e}, perplexity {np.expm1(c.mean()) * 100:+.2f} ± {error[1] * 100:.2f} %")
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


def reference(g: Any) -> Logits:
    """The f32 model in torch, or in numpy where torch is not installed."""
    try:
        import torch

        from benchmarks.llama_torch import TorchLlama
    except ImportError:
        from benchmarks.llama_numpy import Reference

        return Reference(g).forward
    model = TorchLlama(g)

    def run(tokens: Array) -> Array:
        with torch.no_grad():
            return np.asarray(model.forward(tokens).numpy())

    return run


def lazy(make: Callable[[], Logits]) -> Logits:
    """A side that is made when it is first run."""
    made = cache(make)
    return lambda tokens: made()(tokens)


OPTIONS: dict[str, dict[str, Any]] = {"ours": {}, "exact": {"exact": True}, "cache8": {"cache_bits": 8}}


def main(argv: Sequence[str] | None = None) -> None:
    from luthier.importers.gguf.file import read_gguf
    from luthier.importers.gguf_llama import config
    from luthier.importers.gguf_tokenizer import make_tokenizer

    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--tokens", type=int, default=4096)
    ap.add_argument("--window", type=int, default=512)
    ap.add_argument("--sides", default="ours,exact,llama", help="of " + ", ".join((*OPTIONS, "llama")))
    ap.add_argument("--resume", type=Path, metavar="FOLDER")
    ap.add_argument("--markdown", type=Path)
    a = ap.parse_args(argv)
    g = read_gguf(a.model)
    ids = np.array(make_tokenizer(g).encode(long_text(), add_special_tokens=False).ids)[: a.tokens]
    sides: dict[str, Logits] = {}
    for name in a.sides.split(","):
        if name == "llama":
            sides["llama.cpp"] = lazy(lambda: llama(a.model, a.window, config(g).vocabulary))
        else:
            sides[name] = lazy(lambda name=name: ours(a.model, a.window, **OPTIONS[name]))  # type: ignore[misc]

    def show(n: int, rows: Rows) -> None:
        text = f"{Path(a.model).name}, {n} tokens in windows of {a.window}\n\n" + table(rows)
        print(text, flush=True)
        if a.markdown:
            a.markdown.write_text(text)

    scores = evaluate(lazy(lambda: reference(g)), sides, ids, a.window, show, a.resume)
    if "llama.cpp" in scores:
        print(compared(scores, "llama.cpp"))


if __name__ == "__main__":
    main()
