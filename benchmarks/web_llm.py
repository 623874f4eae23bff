"""A GGUF language model in one headless Chromium: Luthier's wasm package beside wllama (llama.cpp for browsers), in turns.

    python -m benchmarks.web_llm MODEL.gguf [--threads 1] [--rounds 5] [--tokens 48] [--markdown FILE] [--variant relaxed] [--no-peer] [--package DIR]

Both read the same file (compiled, for Luthier), have a page and a worker of their own and take the same texts; greedy. Decoding: the
mean time of the tokens after the first; prefill: the time to the first token of a prompt of some fifty tokens. Shown are medians of all
rounds. The peer and the tokenizer: `npm install @wllama/wllama@3.8.1 @huggingface/tokenizers@0.2.0` in `build/web`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.browser import NODE_MODULES, ROOT, Browser

PROMPT = "The history of computing began long before the first electronic machines."
LONG = (
    "The compiler reads a model, looks for patterns that it knows, and writes one function for the whole of it. Every weight keeps the bits "
    "that the file gave it, and every product of a matrix and a vector walks over these bits once. "
)
CAPACITY, CHUNK = 512, 256


class Site:
    """The folder that the pages are served from. ``with Site(model, target) as s``."""

    def __init__(self, model: Path, package: Path | None = None) -> None:
        from luthier import llm
        from luthier.cli.serve import make_server

        self.root = Path(tempfile.mkdtemp(prefix="luthier-llm-"))
        (self.root / "index.html").write_text("<!doctype html><title>language models</title>")
        (self.root / "bench.js").symlink_to(ROOT / "benchmarks" / "browser" / "language_bench.js")
        (self.root / "node_modules").symlink_to(NODE_MODULES)
        (self.root / "model.gguf").symlink_to(model.resolve())
        if package is None:
            llm.compile_model(model, "wasm", capacity=CAPACITY, chunk=CHUNK).save(self.root / "package")
        else:
            (self.root / "package").symlink_to(package.resolve())
        self.server = make_server(self.root, policy=None, links=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        shutil.rmtree(self.root)


def compare(model: Path, threads: int, rounds: int, tokens: int, variant: str | None = None, peer: bool = True, package: Path | None = None) -> dict[str, Any]:
    """{runtime: {"decode", "prefill": medians in tokens a second, "load_ms", "text", "info"}}. Raises BrowserError."""
    out: dict[str, Any] = {}
    with Site(model, package) as site, Browser() as browser:
        sides = {"luthier": ("/package/", {"threads": threads, **({"variant": variant} if variant else {})})}
        if peer:
            sides["wllama"] = ("/model.gguf", {"threads": threads, "capacity": CAPACITY, "chunk": CHUNK})
        pages = {}
        for name, (url, options) in sides.items():
            page = pages[name] = browser.open(site.server.url)
            out[name] = page.call("/bench.js", "setup", {"runtime": name, "url": url, "options": options}) | {"decode": [], "prefill": []}
            page.call("/bench.js", "turn", {"prompt": PROMPT, "tokens": 8})  # the optimising tier of the compiler
        for k in range(rounds):
            for name in list(pages)[:: 1 if k % 2 == 0 else -1]:
                short = pages[name].call("/bench.js", "turn", {"prompt": PROMPT, "tokens": tokens})
                long = pages[name].call("/bench.js", "turn", {"prompt": LONG, "tokens": 2})
                out[name]["decode"].append(1e3 / short["token_ms"])
                out[name]["prefill"].append(long["prompt"] / long["first_ms"] * 1e3)
                out[name] |= {"text": short["text"], "prompt": long["prompt"]}
        out["browser"] = browser.version
    for r in out.values():
        if isinstance(r, dict):
            r |= {"decode": statistics.median(r["decode"]), "prefill": statistics.median(r["prefill"])}
    return out


def table(model: str, threads: int, result: dict[str, Any]) -> str:
    """Lines of Markdown."""
    lines = [
        f"{model}, Chromium {result['browser']}, {threads} thread(s)", "",
        "| runtime | decode, tokens/s | prefill, tokens/s | loading, s |", "|---|---|---|---|",
    ]  # fmt: skip
    for name in ("luthier", "wllama"):
        if name in result:
            r = result[name]
            more = r["info"].get("variant") or r["info"].get("version", "")
            lines.append(f"| {name} ({more}) | {r['decode']:.1f} | {r['prefill']:.1f} | {r['load_ms'] / 1e3:.2f} |")
    lines += ["", f"Greedy after {PROMPT!r}:", ""]
    lines += [f"* {name}: {result[name]['text']!r}" for name in ("luthier", "wllama") if name in result]
    return "\n".join(lines) + "\n"


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=Path)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--tokens", type=int, default=48)
    ap.add_argument("--variant")
    ap.add_argument("--no-peer", action="store_true")
    ap.add_argument("--markdown", type=Path)
    ap.add_argument("--package", type=Path, help="what luthier compile MODEL --target=wasm --shape cache=512 made; default: compile")
    a = ap.parse_args()
    text = table(a.model.name, a.threads, compare(a.model, a.threads, a.rounds, a.tokens, a.variant, not a.no_peer, a.package))
    print(text)
    if a.markdown:
        a.markdown.write_text(text)


if __name__ == "__main__":
    main()
