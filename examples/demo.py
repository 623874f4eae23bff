"""What `make demo` runs: two real models from PyPI packages, compiled for this CPU, on inputs whose answer you can judge.

1. PP-OCRv4's recognition model (package rapidocr-onnxruntime) reads lines of text off pictures that are drawn here.
2. magika's model names the kind of some files.

Each is then timed beside onnxruntime, same inputs and threads, turn by turn. Exits 1 if an answer differs from onnxruntime's.

    python examples/demo.py [--threads N]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

import luthier

LINES = ["Hello from Luthier", "Total: 1,284.50 EUR", "Gate B17 boards at 09:45"]
Array = np.ndarray[Any, np.dtype[Any]]


def package_file(package: str, path: str) -> Path:
    """A file of an installed package, which need not be importable."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"the package {package} is not installed; `make demo` installs it")
    return Path(found.submodule_search_locations[0]) / path


def draw(text: str) -> Image.Image:
    """A picture of a line of text, 48 pixels high."""
    font = ImageFont.load_default(size=30)
    width = int(font.getlength(text)) + 32
    picture = Image.new("RGB", (width, 48), (246, 241, 229))
    ImageDraw.Draw(picture).text((16, 5), text, fill=(25, 40, 80), font=font)
    return picture


def to_tensor(picture: Image.Image) -> Array:
    """f32[1, 3, 48, width] in -1 .. 1, channels blue, green, red: what the recognition model was trained on."""
    pixels = np.asarray(picture, dtype=np.float32)[:, :, ::-1]
    return np.ascontiguousarray(((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None])


def decode(scores: Array, alphabet: list[str]) -> str:
    """Greedy CTC: the best class of each step, repeats merged, blanks (class 0) dropped."""
    best = scores[0].argmax(axis=-1)
    keep = [int(c) for k, c in enumerate(best) if c and (k == 0 or c != best[k - 1])]
    return "".join(alphabet[c - 1] if c <= len(alphabet) else " " for c in keep)


def show(picture: Image.Image, columns: int = 76) -> str:
    """The picture as text, dark pixels as blocks, two rows a line."""
    rows = 2 * max(1, round(columns * picture.height / picture.width / 2))
    dark = np.asarray(picture.convert("L").resize((columns, rows))) < 190
    marks = np.array([" ", "▀", "▄", "█"])
    return "\n".join("".join(marks[dark[y] + 2 * dark[y + 1]]).rstrip() for y in range(0, rows, 2))


def peer_session(model: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def timed(first: Callable[[], object], second: Callable[[], object], runs: int = 40) -> tuple[float, float]:
    """Median milliseconds of two calls, timed in blocks that take turns so that both see the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(4):
        for call, mine in zip((first, second), times):
            call()
            for _ in range(runs // 4):
                start = time.perf_counter()
                call()
                mine.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def compile_model(model: Path, threads: int) -> luthier.Module:
    start = time.perf_counter()
    module = luthier.compile(model, target="cpu", threads=threads)
    print(f"compiled {model.name} in {time.perf_counter() - start:.2f} s")
    return module


def report(name: str, module: luthier.Module, peer: onnxruntime.InferenceSession, feeds: dict[str, Array], threads: int) -> None:
    ours, theirs = timed(lambda: module.run(feeds), lambda: peer.run(None, feeds))
    print(f"{name}, {threads} threads: luthier {ours:.2f} ms, onnxruntime {theirs:.2f} ms ({theirs / ours:.2f}x)\n")


def read_pictures(threads: int) -> bool:
    print("reading text off pictures (PP-OCRv4 recognition)")
    model = package_file("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx")
    peer = peer_session(model, threads)
    alphabet = peer.get_modelmeta().custom_metadata_map["character"].split("\n")
    module = compile_model(model, threads)
    same = True
    for text in LINES:
        picture = draw(text)
        feeds = {module.inputs[0].name: to_tensor(picture)}
        read = decode(next(iter(module.run(feeds).values())), alphabet).strip()
        expected = decode(peer.run(None, feeds)[0], alphabet).strip()
        same &= read == expected
        print(f"\n{show(picture)}\n  drawn: {text}\n  read:  {read}" + ("" if read == expected else f"\n  onnxruntime read: {expected}"))
    print()
    report(f"one line, {feeds[module.inputs[0].name].shape[3]} pixels wide", module, peer, feeds, threads)
    return same


def features(content: bytes, config: dict[str, Any]) -> Array:
    """i32[1, begin + end]: the first and the last bytes of a file without white space around it, padded."""
    begin, end, pad = config["beg_size"], config["end_size"], config["padding_token"]
    head = list(content[: config["block_size"]].lstrip()[:begin])
    tail = list(content[-config["block_size"] :].rstrip()[-end:]) if end else []
    return np.array([head + [pad] * (begin - len(head)) + [pad] * (end - len(tail)) + tail], dtype=np.int32)


def name_files(threads: int) -> bool:
    print("naming the kind of files from their bytes (magika)")
    folder = package_file("magika", "models/standard_v3_3")
    config = json.loads((folder / "config.min.json").read_text())
    labels = config["target_labels_space"]
    root = Path(__file__).resolve().parent.parent
    files = [Path(__file__), root / "README.md", root / "Makefile", root / "pyproject.toml", Path(sys.executable).resolve()]
    module, peer = compile_model(folder / "model.onnx", threads), peer_session(folder / "model.onnx", threads)
    batch = np.concatenate([features(f.read_bytes(), config) for f in files])
    feeds = {module.inputs[0].name: batch}
    scores, expected = next(iter(module.run(feeds).values())), peer.run(None, feeds)[0]
    for file, row in zip(files, scores):
        print(f"  {file.name:16} {labels[int(row.argmax())]} ({row.max():.0%})")
    report(f"{len(files)} files", module, peer, feeds, threads)
    return bool((scores.argmax(axis=1) == expected.argmax(axis=1)).all())


def main() -> int:
    import os

    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    threads = parser.parse_args().threads
    answers = [read_pictures(threads), name_files(threads)]
    print("all answers equal onnxruntime's" if all(answers) else "ANSWERS DIFFER FROM ONNXRUNTIME'S")
    return 0 if all(answers) else 1


if __name__ == "__main__":
    raise SystemExit(main())
