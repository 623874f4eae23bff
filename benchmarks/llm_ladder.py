"""Perplexity of a GGUF language model at 8, 4, 3, 2 bits, ternary and 1 bit, and with half of its weights' blocks dropped.

    python -m benchmarks.llm_ladder MODEL.gguf [--tokens 2048] [--only w4,w2-gptq] [--folder build/llm_ladder] [--markdown FILE]
    python -m benchmarks.llm_ladder MODEL.gguf --kernels w4-gptq,w3-gptq      # the same weights through the compiled kernels

The matrices of all layers are dequantized and quantized anew by :func:`luthier.passes.quantize.quantize_weights.quantize` and
:func:`luthier.passes.quantize.prune_groups.prune_groups`; the embedding, which is the output matrix too, stays as it is in the file. ``gptq`` and
``moments`` take the sums ``X.T X`` of half of the calibration text, layer after layer, of what the quantized layers before let through; ``compensate``
takes all of it, and aims at the original's outputs; ``budget`` also gives layers sparsities of their own. Evaluation text: documentation strings of Python's standard library (:func:`benchmarks.llm.sample_text`); calibration text: those of other modules of it and of
numpy. Recovery (:mod:`benchmarks.llm_recover`) has two steps after arXiv 2412.17560: values, scales and zero points of a layer fitted to the
original's layer, one after another; then the scales and zero points of all layers to the original's distribution of the next token.

Everything lies in ``--folder``: quantized layers, and a window's figures of every variant, so a run goes on where another one ended. Needs torch.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.llama_torch import MATRICES, SOURCES, TorchLlama
from benchmarks.llm import sample_text
from luthier.importers.gguf.file import read_gguf
from luthier.importers.gguf_tokenizer import make_tokenizer
from luthier.ir.ops.sparse_matmul import BlockSparse
from luthier.passes.quantize.prune_groups import prune_groups
from luthier.passes.quantize.quantize_weights import QuantizedWeight, quantize

Array = np.ndarray[Any, Any]
Weight = QuantizedWeight | BlockSparse
GROUP, BLOCK = 64, 16
DENSE, SPARSE = ("codes", "scales", "zeros"), ("row_ptr", "cols", "values", "scales")


@dataclass(frozen=True, slots=True)
class Variant:
    """``bits``: 0 is ternary; ``method``: of :func:`quantize`, or of the sparse steps; ``start``: whose weights recovery begins with."""

    name: str
    label: str
    bits: int
    method: str
    sparse: bool = False
    start: str = ""


@dataclass(frozen=True, slots=True)
class Statistics:
    """``hessian``: ``X.T X`` of ``rows`` inputs X; ``cross``: ``X.T Y`` of the outputs Y to aim at."""

    hessian: Array
    rows: int
    cross: Array | None = None


def variants() -> dict[str, Variant]:
    found = [Variant("w8-rtn", "8 bits, nearest", 8, "rtn")]
    for name, text, bits in (("w4", "4 bits", 4), ("w3", "3 bits", 3), ("w2", "2 bits", 2), ("ternary", "ternary", 0), ("w1", "1 bit", 1)):
        methods = {"rtn": "nearest", "mse": "least squares", "hqq": "half-quadratic", "gptq": "error compensation"}
        if bits in (0, 1):
            methods = {"gptq": methods["gptq"]} if bits == 0 else {"hqq": methods["hqq"], "gptq": methods["gptq"]}
        found += [Variant(f"{name}-{m}", f"{text}, {t}", bits, m) for m, t in methods.items()]
    found.append(Variant("w2-blocks", "2 bits, then layer by layer", 2, "blocks", start="w2-gptq"))
    found.append(Variant("w2-end", "2 bits, then end to end", 2, "end", start="w2-blocks"))
    sparse = (
        ("magnitude", "magnitudes, nearest", ""), ("moments", "second moments, nearest", ""), ("compensate", "compensated", ""),
        ("budget", "compensated, layers by damage", ""),
        ("blocks", "then layer by layer", "w4s50-budget"), ("end", "then scales end to end", "w4s50-blocks"),
    )  # fmt: skip
    found += [Variant(f"w4s50-{m}", f"W4S50, {text}", 4, m, True, start) for m, text, start in sparse]
    return {v.name: v for v in found}


def calibration_text() -> str:
    """Documentation strings of numpy and of modules of the standard library that :func:`sample_text` does not read."""
    import csv
    import difflib
    import doctest
    import inspect
    import json
    import logging
    import optparse
    import pathlib
    import pickle
    import random
    import shutil
    import socket
    import subprocess
    import tarfile
    import unittest
    import urllib.request
    import zipfile

    modules = (
        csv, difflib, doctest, inspect, json, logging, optparse, pathlib, pickle, random, shutil, socket, subprocess, tarfile, unittest,
        urllib.request, zipfile, np, np.linalg, np.fft, np.random,
    )  # fmt: skip
    docs = [m.__doc__ for m in modules] + [getattr(o, "__doc__", None) for m in modules for o in vars(m).values() if callable(o)]
    kept = list(dict.fromkeys(d.strip() for d in docs if isinstance(d, str) and len(d) > 200))
    random.Random(0).shuffle(kept)
    own = sample_text()
    return "\n".join(t for t in kept if t not in own)


# ---------------------------------------------------------------- weights on disk


def save_weights(path: Path, weights: Mapping[str, Weight]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    for name, w in weights.items():
        for part in SPARSE if isinstance(w, BlockSparse) else DENSE:
            a = getattr(w, part)
            if a is not None:
                arrays[f"{name}/{part}"] = a
        numbers = [w.rows, w.columns, w.block, w.bits, w.zero] if isinstance(w, BlockSparse) else [w.bits, w.group, w.zero]
        arrays[f"{name}/numbers"] = np.array(numbers, np.float64)
    partial = path.with_suffix(".part.npz")
    np.savez(partial, **arrays)
    partial.rename(path)


def load_weights(path: Path) -> dict[str, Weight]:
    out: dict[str, Weight] = {}
    with np.load(path) as z:
        for key in [k for k in z.files if k.endswith("/numbers")]:
            name = key.rsplit("/", 1)[0]
            n = z[key]
            if f"{name}/row_ptr" in z.files:
                rows, columns, block, bits, zero = (int(v) for v in n)
                out[name] = BlockSparse(rows, columns, block, bits, *(z[f"{name}/{p}"] for p in SPARSE), None, zero)
            else:
                zeros = z[f"{name}/zeros"] if f"{name}/zeros" in z.files else None
                out[name] = QuantizedWeight(z[f"{name}/codes"], z[f"{name}/scales"], zeros, float(n[2]), int(n[0]), int(n[1]))
    return out


def dense(w: Weight) -> torch.Tensor:
    return torch.from_numpy(w.dense() if isinstance(w, BlockSparse) else w.dequantize())


def stored_bits(weights: Mapping[str, Weight]) -> float:
    """Bits a weight as stored, of all matrices together (of a sparse one: values, scales, i32 block columns as 16 bits, row pointers)."""
    size = count = 0
    for w in weights.values():
        if isinstance(w, BlockSparse):
            size += w.packed_values.nbytes + w.scales.nbytes + 2 * len(w.cols) + w.row_ptr.nbytes
            count += w.rows * w.columns
        else:
            size += w.nbytes
            count += w.codes.size
    return 8 * size / count


# ---------------------------------------------------------------- making variants


class Ladder:
    """``model``: in torch; ``calibration``: token numbers [windows, window]; ``folder``: of everything that is kept; ``fresh``: windows
    for recovery by its methods, of text that nothing was fitted to before: weights lose less on what they were fitted to."""

    def __init__(self, model: TorchLlama, calibration: Array, folder: Path, fresh: Mapping[str, Array] | None = None) -> None:
        self.model, self.calibration, self.folder, self.fresh = model, calibration, folder, fresh or {}

    def layer_file(self, v: Variant, i: int) -> Path:
        return self.folder / v.name / f"layer{i:02d}.npz"

    def weights(self, v: Variant) -> dict[str, Weight]:
        """The variant's weights by tensor name, made where the folder lacks them."""
        layers = range(self.model.c.layers)
        if not all(self.layer_file(v, i).exists() for i in layers):
            t = time.perf_counter()
            if v.method in ("blocks", "end"):
                from benchmarks.llm_recover import fit_end_to_end, fit_layers

                start, windows = self.weights(variants()[v.start]), self.fresh.get(v.method, self.calibration)
                if v.method == "blocks":
                    fit_layers(self.model, windows, start, lambda i, w: save_weights(self.layer_file(v, i), w), lambda i: self.known(v, i))
                else:
                    made = fit_end_to_end(self.model, windows, start, self.folder / v.name / "state.pt")
                    for i in layers:
                        save_weights(self.layer_file(v, i), {n: w for n, w in made.items() if n.startswith(f"blk.{i}.")})
            elif v.method in ("compensate", "budget"):
                self.prune_layers(v)
            else:
                self.quantize_layers(v)
            print(f"{v.name}: made in {time.perf_counter() - t:.0f} s", flush=True)
        out: dict[str, Weight] = {}
        for i in layers:
            out.update(load_weights(self.layer_file(v, i)))
        return out

    def known(self, v: Variant, i: int) -> dict[str, Weight] | None:
        p = self.layer_file(v, i)
        return load_weights(p) if p.exists() else None

    def quantize_layers(self, v: Variant) -> None:
        """Layer by layer; with statistics, on what the quantized layers before let through."""
        m = self.model
        needs = v.method in ("gptq", "moments")
        x = m.embed(self.calibration[: max(1, len(self.calibration) // 2)]) if needs else None
        for i in range(m.c.layers):
            p = f"blk.{i}."
            made = self.known(v, i) or {}
            fresh = not made
            if not needs:
                made = made or {p + n + ".weight": self.quantized(v, p + n + ".weight") for n in MATRICES}
            else:
                sums: dict[str, Statistics] = {}

                def product(name: str, h: torch.Tensor, made: dict[str, Weight] = made, sums: dict[str, Statistics] = sums) -> torch.Tensor:
                    if name not in made:
                        source = SOURCES[name.split(".")[2]]
                        if source not in sums:
                            flat = h.reshape(-1, h.shape[-1])
                            sums[source] = Statistics((flat.T @ flat).double().numpy(), len(flat))
                        made[name] = self.quantized(v, name, sums[source])
                    return h @ dense(made[name]).T

                assert x is not None
                with torch.no_grad():
                    x = m.block(i, x, product)
            if fresh:
                save_weights(self.layer_file(v, i), made)
            print(f"\r{v.name}: layer {i + 1} of {m.c.layers}", end="\n" if i + 1 == m.c.layers else "", flush=True)

    def prune_layers(self, v: Variant) -> None:
        """Layer by layer, on what the pruned layers before let through, towards what the original gives."""
        m = self.model
        shares = self.shares(v) if v.method == "budget" else [0.5] * m.c.layers
        want = here = m.embed(self.calibration)
        with torch.no_grad():
            for i in range(m.c.layers):
                after, made = None, self.known(v, i)
                if made is None:
                    after, made = self.pruned(v, i, want, here, shares[i])
                    save_weights(self.layer_file(v, i), made)
                want, here = m.block(i, want, m.product) if after is None else after, m.block(i, here, m.using({n: dense(w) for n, w in made.items()}))
                error = float(((here - want).square().sum(-1) / want.square().sum(-1)).mean())
                print(f"{v.name}: layer {i + 1} of {m.c.layers}, {error:.3f} away after it", flush=True)

    def shares(self, v: Variant) -> list[float]:
        """Sparsity of every layer under the budget of one half. A layer's damage is the divergence of the next token's distribution with this layer
        alone pruned; it is taken to grow by the same factor per dropped share everywhere, so the sum is least where the slopes are equal:
        the logarithm of the damage decides."""
        m, path = self.model, self.folder / "w4s50-damage.npz"
        tests = [(i, 0.5) for i in range(m.c.layers)] + [(i, s) for i in range(0, m.c.layers, 6) for s in (0.35, 0.65)]
        found: dict[str, float] = {k: float(x) for k, x in np.load(path).items()} if path.exists() else {}
        seen, apart = self.calibration[: len(self.calibration) // 4], self.calibration[-2:]
        with torch.no_grad():
            want = m.embed(seen)
            original = torch.log_softmax(m.forward(apart), -1)
            for i in range(m.c.layers):
                for s in [s for j, s in tests if j == i and f"{j}-{s}" not in found]:
                    made = self.pruned(v, i, want, want, s)[1]
                    q = torch.log_softmax(m.forward(apart, m.using({n: dense(w) for n, w in made.items()})), -1)
                    found[f"{i}-{s}"] = float((original.exp() * (original - q)).sum(-1).mean())
                    print(f"{v.name}: layer {i} alone, {s:.0%} dropped: divergence {found[f'{i}-{s}']:.4f}", flush=True)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.savez(path, **found)
                want = m.block(i, want, m.product)
        growth = np.mean([np.log(found[f"{i}-0.65"] / found[f"{i}-0.35"]) / 0.3 for i in range(0, m.c.layers, 6)])
        damage = np.log([found[f"{i}-0.5"] for i in range(m.c.layers)])
        out = 0.5 - (damage - damage.mean()) / growth
        for _ in range(50):  # what the ends cut off is shared by the others
            out = np.clip(out + 0.5 - out.mean(), 0, 0.8)
        print(f"{v.name}: growth {growth:.1f}, sparsities {' '.join(f'{s:.2f}' for s in out)}", flush=True)
        return [float(s) for s in out]

    def pruned(self, v: Variant, i: int, want: torch.Tensor, here: torch.Tensor, sparsity: float) -> tuple[torch.Tensor, dict[str, Weight]]:
        """(What the original layer makes of ``want``, layer ``i``'s pruned weights for the inputs ``here``). A product aims at the original's
        values, or, where it is added to the residual, at what brings the sum to the original's, tokens relative to their size."""
        m, p = self.model, f"blk.{i}."
        originals: dict[str, torch.Tensor] = {}
        after = m.block(i, want, lambda name, h: originals.setdefault(name, m.product(name, h)))
        goals = {p + "attn_output.weight": want + originals[p + "attn_output.weight"], p + "ffn_down.weight": after}
        made: dict[str, Weight] = {}
        residual = here

        def product(name: str, h: torch.Tensor) -> torch.Tensor:
            nonlocal residual
            flat, goal = h.reshape(-1, h.shape[-1]), goals.get(name)
            y = originals[name] if goal is None else goal - residual
            share = torch.ones(len(flat)) if goal is None else 1 / goal.reshape(len(flat), -1).square().sum(-1)
            weighted = flat * (share / share.mean())[:, None]
            seen = Statistics((weighted.T @ flat).double().numpy(), len(flat), (weighted.T @ y.reshape(len(flat), -1)).double().numpy())
            made[name] = self.quantized(v, name, seen, sparsity)
            out = h @ dense(made[name]).T
            residual = residual if goal is None else residual + out
            return out

        m.block(i, here, product)
        return after, made

    def quantized(self, v: Variant, name: str, seen: Statistics | None = None, sparsity: float = 0.5) -> Weight:
        w = self.model.w(name).numpy()
        h, cross = (None, None) if seen is None else (seen.hessian / seen.rows, None if seen.cross is None else seen.cross / seen.rows)
        if v.sparse:
            how = "nearest" if v.method in ("magnitude", "moments") else "compensate"
            return prune_groups(w, sparsity, BLOCK, v.bits, h, how, cross=cross, rows=None if seen is None else seen.rows)
        return quantize(w, v.bits, GROUP, method=v.method, hessian=None if seen is None else seen.hessian, rows=seen.rows if seen else None)


# ---------------------------------------------------------------- evaluation


class Evaluation:
    """The reference's log-probabilities of all windows are computed once, when they are needed."""

    def __init__(self, model: TorchLlama, windows: Sequence[Array], folder: Path) -> None:
        self.model, self.windows, self.folder = model, windows, folder
        self.references: dict[int, torch.Tensor] = {}

    def reference(self, i: int) -> torch.Tensor:
        if i not in self.references:
            with torch.no_grad():
                self.references[i] = torch.log_softmax(self.model.forward(self.windows[i]), -1)
        return self.references[i]

    def scores(self, name: str, make: Callable[[], Callable[[Array], torch.Tensor]]) -> dict[str, Array]:
        """One number a token: ``nll``, ``change`` (of the log-likelihood from the reference's), ``kl``, ``same``. ``make``: gives the side's logits."""
        parts, side = [], None
        for i, tokens in enumerate(self.windows):
            p = self.folder / name / f"window{len(tokens)}-{i}.npz"
            if not p.exists():
                side = side or make()
                with torch.no_grad():
                    ref, q = self.reference(i), torch.log_softmax(side(tokens), -1)
                    at = torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:].astype(np.int64))
                    found = {
                        "nll": -q[at].double().numpy(), "change": (ref[at].double() - q[at]).numpy(), "kl": (ref.exp() * (ref - q)).sum(-1).double().numpy(),
                        "same": (ref.argmax(-1) == q.argmax(-1)).numpy(),
                    }  # fmt: skip
                p.parent.mkdir(parents=True, exist_ok=True)
                np.savez(p, **found)
            with np.load(p) as z:
                parts.append({k: z[k] for k in ("nll", "change", "kl", "same")})
        return {k: np.concatenate([x[k] for x in parts]) for k in parts[0]}


def row(label: str, bits: str, s: Mapping[str, Array]) -> str:
    def mean(a: Array, factor: float = 1.0) -> tuple[float, float]:
        return float(a.mean()) * factor, float(a.std(ddof=1) / np.sqrt(a.size)) * factor

    ppl = float(np.exp(s["nll"].mean()))
    (c, ce), (k, ke) = mean(s["change"]), mean(s["kl"])
    return f"| {label} | {bits} | {ppl:.3f} | {np.expm1(c) * 100:+.2f} ± {np.exp(c) * ce * 100:.2f} | {k:.2g} ± {ke:.1g} | {s['same'].mean() * 100:.1f} |"


HEAD = "| layers' weights | stored bits | perplexity | against f32, % | KL divergence, nats | same token, % |\n|---|---|---|---|---|---|"


def main(argv: Sequence[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--tokens", type=int, default=2048)
    ap.add_argument("--window", type=int, default=512)
    ap.add_argument("--calibration", type=int, default=32768, help="tokens")
    ap.add_argument("--recovery", type=int, nargs=2, default=(32768, 59392), help="tokens for recovery layer by layer and end to end: text after --calibration")
    ap.add_argument("--only", default="", help="names or their beginnings, comma separated: " + ", ".join(variants()))
    ap.add_argument("--kernels", default="", help="variants that are also compiled and run by the package's kernels")
    ap.add_argument("--folder", type=Path, default=Path("build/llm_ladder"))
    ap.add_argument("--markdown", type=Path)
    a = ap.parse_args(argv)
    g = read_gguf(a.model)
    model = TorchLlama(g)
    encode = make_tokenizer(g).encode
    ids = np.array(encode(sample_text(), add_special_tokens=False).ids)[: a.tokens]
    text = np.array(encode(calibration_text(), add_special_tokens=False).ids)
    cuts = np.cumsum([0, a.calibration, *a.recovery]) // a.window
    seen, *fresh = (text[lo * a.window : hi * a.window].reshape(-1, a.window) for lo, hi in zip(cuts, cuts[1:]))
    parts = [ids[lo : lo + a.window] for lo in range(0, len(ids), a.window)]
    ladder, evaluation = Ladder(model, seen, a.folder, dict(zip(("blocks", "end"), fresh))), Evaluation(model, parts, a.folder)
    lines = []

    def show(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if a.markdown:
            text = f"{Path(a.model).name}, {len(ids)} tokens in windows of {a.window}, {seen.size} tokens of calibration text\n\n{HEAD}\n"
            a.markdown.write_text(text + "\n".join(lines) + "\n")

    print(HEAD)
    show(row("as in the file, f32", "5.0", evaluation.scores("f32", lambda: model.forward)))
    only, compiled = [s for s in a.only.split(",") if s], [s for s in a.kernels.split(",") if s]
    for v in variants().values():
        if only and not any(v.name.startswith(s) for s in only):
            continue
        weights = ladder.weights(v)

        def side(weights: Mapping[str, Weight] = weights) -> Callable[[Array], torch.Tensor]:
            product = model.using({n: dense(w) for n, w in weights.items()})
            return lambda tokens: model.forward(tokens, product)

        bits = f"{stored_bits(weights):.2f}"
        show(row(v.label, bits, evaluation.scores(v.name, side)))
        if v.name in compiled:

            def kernels(weights: Mapping[str, Weight] = weights) -> Callable[[Array], torch.Tensor]:
                from benchmarks.llm_quality import ours

                run = ours(a.model, a.window, weights=weights)
                return lambda tokens: torch.from_numpy(run(tokens))

            show(row(f"{v.label}: compiled, 8-bit activations", bits, evaluation.scores(v.name + "-kernels", kernels)))
        gc.collect()


__all__ = ["Ladder", "Variant", "Weight", "dense", "variants"]

if __name__ == "__main__":
    main()
