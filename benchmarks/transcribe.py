"""A whole transcription with whisper-tiny.en, greedy, by Luthier and by onnxruntime on the same files: tokens must be equal.

    python benchmarks/transcribe.py [WAV ...] [--threads N] [--target T]

Without files the sentences of `SPOKEN` are spoken by Debian's espeak-ng. Each runtime keeps its own caches from step to step.
Exit code 1 where tokens differ. Times are of the loop as it stands here, one run each: `benchmarks/cpu.py` compares the three
models fairly."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if p not in ("", str(ROOT))] + [str(ROOT)]
from benchmarks.compare_models import Outputs, Runner, ort_runner  # noqa: E402
from benchmarks.models import Array, get, package_file, whisper_features  # noqa: E402

PARTS = ("whisper-encoder", "whisper-first", "whisper-step")
START, END, LONGEST, RATE = (50257, 50362), 50256, 448, 16000
SPOKEN = (
    "The quick brown fox jumps over the lazy dog.",
    "Please call me at five o'clock in the afternoon, and bring the large red book with you.",
    "We measured the temperature of the water every morning, and wrote the numbers down on a piece of paper.",
)


def spoken(text: str, out: Path) -> Path:
    """A WAV file of espeak-ng's default voice. Raises RuntimeError where that is not installed."""
    if shutil.which("espeak-ng") is None:
        raise RuntimeError("espeak-ng is missing: install Debian's package of that name, or name WAV files")
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "140", "-w", str(out), text], check=True)
    return out


def samples(path: Path) -> Array:
    """f32 in [-1,1] at 16 kHz, of a mono or stereo WAV file of 16 bits; resampled linearly where its rate is another one."""
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"{path}: {8 * file.getsampwidth()} bits a sample, not 16")
        data = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, file.getnchannels()).mean(1) / 32768
        rate = file.getframerate()
    at = np.arange(int(data.size * RATE / rate)) * rate / RATE
    return np.interp(at, np.arange(data.size), data).astype(np.float32)


def clips(files: Sequence[Path], sentences: Sequence[str]) -> Iterator[tuple[str, Array]]:
    """(name, samples) of each file; without files, of each sentence, spoken."""
    for p in files:
        yield str(p), samples(p)
    if not files:
        with tempfile.TemporaryDirectory() as folder:
            for text in sentences:
                yield text, samples(spoken(text, Path(folder) / "spoken.wav"))


def transcribe(run: dict[str, Runner], features: Array) -> list[int]:
    """The likeliest token at each step, among those that the model's configuration lets through, up to the end of the text."""
    config = json.loads(package_file("whisper", "config.json").read_text())
    never = np.array(config["suppress_ids"])
    hidden = run[PARTS[0]]({"input_features": features[None]})["last_hidden_state"]
    made: Outputs = run[PARTS[1]]({"input_ids": np.array([START]), "encoder_hidden_states": hidden})
    kept = {f"past_key_values.{k.removeprefix('present.')}": v for k, v in made.items() if k != "logits"}
    tokens: list[int] = []
    while len(tokens) < LONGEST - len(START):
        scores = np.array(made["logits"])[0, -1]
        scores[never] = -np.inf
        if not tokens:
            scores[config["suppress_ids_begin"]] = -np.inf
        token = int(scores.argmax())
        if token == END:
            break
        tokens.append(token)
        made = run[PARTS[2]]({"input_ids": np.array([[token]]), **kept})
        kept |= {f"past_key_values.{k.removeprefix('present.')}": v for k, v in made.items() if k != "logits"}
    return tokens


def text_of(tokens: list[int]) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(package_file("whisper", "tokenizer.json"))).decode(tokens)).strip()


def main() -> int:
    """Command line; see the module's docstring."""
    import luthier

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default="cpu")
    args = parser.parse_args()
    compiled = {p: luthier.compile(get(p).path, target=args.target, threads=args.threads).run for p in PARTS}

    runtimes: dict[str, dict[str, Runner]] = {
        "luthier": compiled,
        "onnxruntime": {part: ort_runner(get(part).path, args.threads) for part in PARTS},
    }
    wrong = 0
    for name, sound in clips(args.files, SPOKEN):
        features = whisper_features(sound)
        results, seconds = {}, {}
        for label, run in runtimes.items():
            started = time.perf_counter()
            results[label] = transcribe(run, features)
            seconds[label] = time.perf_counter() - started
        same = results["luthier"] == results["onnxruntime"]
        wrong += not same
        times = ", ".join(f"{label} {s:.2f} s" for label, s in seconds.items())
        print(
            f"{name}\n  {text_of(results['luthier'])}\n"
            f"  {len(results['luthier'])} tokens, {'equal' if same else 'DIFFERENT'}; {times}"
        )
        if not same:
            print(f"  onnxruntime: {text_of(results['onnxruntime'])}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
