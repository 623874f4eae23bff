"""Greedy answers to ten prompts beside llama.cpp's, until the first token that differs, and by how much its logits did.

Both runtimes round activations to 8 bits in a way of their own, which decides between words of nearly the same probability. So the weights are
written once more as f32 (the ``gguf`` package), from which llama.cpp computes without rounding, and this package runs the file itself with
``exact``; ``--rounded`` compares what both do by default. llama.cpp's libraries: :mod:`benchmarks.peer_ggml`.

    LUTHIER_GGML=build/ggml python -m benchmarks.llm_greedy SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.peer_ggml import Llama
from luthier import llm

PROMPTS = (
    "What is the capital of France?", "Write a short poem about the sea.", "Explain what a compiler does.", "How many legs has a spider?",
    "Give me three names for a cat.", "Translate to French: good morning", "What is 12 times 12?", "Why is the sky blue?",
    "Write a Python function that adds two numbers.", "Tell me a joke.",
)  # fmt: skip


def as_f32(path: Path, out: Path) -> Path:
    """The same model with all weights in f32."""
    import gguf

    r = gguf.GGUFReader(path)
    w = gguf.GGUFWriter(out, r.fields["general.architecture"].contents())
    for f in r.fields.values():
        if f.name.startswith("GGUF.") or f.name in ("general.architecture", "general.file_type"):
            continue
        if f.types[0] == gguf.GGUFValueType.ARRAY:
            w.add_array(f.name, f.contents())
        else:
            w.add_key_value(f.name, f.contents(), f.types[0])
    for t in r.tensors:
        values = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        w.add_tensor(t.name, values.reshape([int(n) for n in reversed(t.shape)]))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return out


def compare(lm: llm.LanguageModel, peer: Llama, prompt: str, count: int) -> str:
    """A row of the table."""
    ids = lm.tokenizer.encode(lm.chat_prompt(prompt), add_special_tokens=False).ids
    lm.reset()
    peer.reset()
    a, b = lm.feed(ids), peer.feed(ids, lm.vocabulary)
    worst, same = 0.0, 0
    while same < count:
        worst = max(worst, float(np.abs(a - b).max()))
        mine, other = int(a.argmax()), int(b.argmax())
        if mine != other:
            return f"| {prompt} | {same} | {worst:.1e} | {b[other] - b[mine]:.1e} |"
        same += 1
        if mine in lm.end_tokens:
            return f"| {prompt} | {same}, the end | {worst:.1e} | - |"
        a, b = lm.feed([mine]), peer.feed([mine], lm.vocabulary)
    return f"| {prompt} | {same} | {worst:.1e} | - |"


def main(argv: Sequence[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=Path)
    ap.add_argument("--tokens", type=int, default=40)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--rounded", action="store_true")
    a = ap.parse_args(argv)
    lm = llm.load(a.model, threads=a.threads, capacity=512, exact=not a.rounded)
    with tempfile.TemporaryDirectory() as folder:
        peer = Llama(str(a.model if a.rounded else as_f32(a.model, Path(folder) / "f32.gguf")), a.threads, 512)
        print("| prompt | equal tokens | largest difference of logits | llama.cpp's gap at the first other token |\n|---|---|---|---|")
        for prompt in PROMPTS:
            print(compare(lm, peer, prompt, a.tokens), flush=True)


if __name__ == "__main__":
    main()
