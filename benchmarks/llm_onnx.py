"""An ONNX decoder (past and present) beside onnxruntime's loop that feeds present back: decode and prefill tokens a second, equal tokens.

    python -m benchmarks.llm_onnx MODEL.onnx [--threads 1] [--prompt-tokens 64] [--context 256] [--tokens 32]

Rounds alternate between the two; the best of each counts. Prompts are random tokens, the same for both.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Runtime:
    """onnxruntime over a decoder without further inputs: present goes back as past."""

    def __init__(self, path: str, threads: int = 1) -> None:
        import onnxruntime as ort

        o = ort.SessionOptions()
        o.intra_op_num_threads, o.inter_op_num_threads, o.log_severity_level = threads, 1, 3
        self.session = ort.InferenceSession(path, o, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.pasts = [n for n in self.inputs if n.startswith("past")]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.given: dict[str, Array] = {}
        self.reset()

    def reset(self) -> None:
        self.length = 0
        self.past = {}
        for n in self.pasts:
            i = self.inputs[n]
            shape = [e if isinstance(e, int) else 1 if k == 0 else 0 for k, e in enumerate(i.shape)]
            self.past[n] = np.zeros(shape, np.float16 if "float16" in i.type else np.float32)

    def feed(self, tokens: list[int]) -> Array:
        """Logits after the last token."""
        n = len(tokens)
        all_ = {
            "input_ids": np.array([tokens], np.int64), "attention_mask": np.ones((1, self.length + n), np.int64),
            "position_ids": np.arange(self.length, self.length + n)[None], **self.past, **self.given,
        }  # fmt: skip
        out = self.session.run(None, {k: v for k, v in all_.items() if k in self.inputs})
        made = dict(zip(self.outputs, out, strict=True))
        self.length += n
        self.past = {p: made[p.replace("past_key_values", "present") if "past_key_values" in p else p.replace("past", "present")] for p in self.pasts}
        return np.asarray(made["logits"][0, -1])


def greedy(feed: Any, prompt: list[int], n: int) -> list[int]:
    """The n most likely tokens after a prompt."""
    out: list[int] = []
    logits = feed(prompt)
    for _ in range(n):
        out.append(int(np.argmax(logits)))
        logits = feed([out[-1]])
    return out


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--prompt-tokens", type=int, default=64)
    ap.add_argument("--context", type=int, default=256, help="tokens before the ones whose decoding is timed")
    ap.add_argument("--tokens", type=int, default=32)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--wait", action="store_true", help="read a line from standard input before measuring")
    a = ap.parse_args(argv)
    from luthier import llm

    ours = llm.load(a.model, threads=a.threads, chunk=max(a.context, 64))
    peer = Runtime(a.model, a.threads)
    rng = np.random.default_rng(0)
    prompt = [int(t) for t in rng.integers(0, ours.vocabulary, a.prompt_tokens)]
    before = [int(t) for t in rng.integers(0, ours.vocabulary, a.context)]
    sides: list[tuple[str, Any]] = [("luthier", ours), ("onnxruntime", peer)]
    for _, s in sides:
        s.feed(prompt[:2])
        s.feed(prompt[:1])
    if a.wait:
        print("ready", flush=True)
        sys.stdin.readline()
    inf = float("inf")
    prefill, decode = dict.fromkeys(("luthier", "onnxruntime"), inf), dict.fromkeys(("luthier", "onnxruntime"), inf)
    for _ in range(a.rounds):
        for name, s in sides:
            s.reset()
            t = time.perf_counter()
            s.feed(prompt)
            prefill[name] = min(prefill[name], time.perf_counter() - t)
            s.reset()
            s.feed(before)
            for k in range(a.tokens):
                t = time.perf_counter()
                s.feed([prompt[k % len(prompt)]])
                decode[name] = min(decode[name], time.perf_counter() - t)
    print(f"{a.model.rsplit('/', 1)[-1]}, {a.threads} thread(s), tokens/s ({ours.about['by']})")
    for name, _ in sides:
        print(f"  {name:12s} decode after {len(before)} {1 / decode[name]:8.1f}   prefill of {len(prompt)} {len(prompt) / prefill[name]:8.1f}")
    texts = []
    for _, s in sides:
        s.reset()
        texts.append(greedy(s.feed, prompt[:16], a.tokens))
    print(f"  greedy tokens {'equal' if texts[0] == texts[1] else f'differ: {texts}'}")


if __name__ == "__main__":
    main()
