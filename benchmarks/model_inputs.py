"""Inputs that mean something: rendered text, scenes, speech-like sound, sentences, file bytes. Seeded, numpy only (Pillow draws)."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SENTENCES = (
    "The compiler splits the loop, keeps the tile in registers and writes each result once.",
    "A measurement without its conditions is an anecdote, so every table names the machine.",
    "She walked along the harbour at dusk while the fishing boats came in one after another.",
    "Interest rates were left unchanged for the third month in a row, the central bank said.",
    "Add the flour slowly, stir until the dough is smooth and let it rest for half an hour.",
    "Light from that galaxy left before the first fish crawled onto dry land.",
    "Please restart the router, wait for two minutes and then tell me which lamps are green.",
    "The violin maker taps the plate and listens, then shaves another hair's breadth of spruce.",
)
WORDS = "Luthier compiles tensors ahead of time 0123456789 matrix vector kernel 42.7 % total amount due".split()


def text_image(seed: int, height: int, width: int, size: int = 28) -> NDArray[np.uint8]:
    """A page of printed words on a tinted background: u8[height,width,3]."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    back = tuple(int(v) for v in rng.integers(215, 256, 3))
    ink = tuple(int(v) for v in rng.integers(0, 70, 3))
    image = Image.new("RGB", (width, height), back)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size)
    y = max(2, int(size * 0.4)) if height > size * 2 else max(0, (height - int(size * 1.2)) // 2)
    while y + size <= height:
        x = int(size * 0.4)
        while True:
            word = WORDS[int(rng.integers(len(WORDS)))]
            length = int(draw.textlength(word + " ", font=font))
            if x + length > width - size // 3:
                break
            draw.text((x, y), word, fill=ink, font=font)
            x += length
        y += int(size * 1.9)
    pixels = np.asarray(image, dtype=np.int16) + rng.integers(-4, 5, (height, width, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def text_line(seed: int, height: int, width: int, flipped: bool = False) -> NDArray[np.uint8]:
    """One printed line that fills the picture: u8[height,width,3]; upside down when `flipped`."""
    picture = text_image(seed, height, width, size=int(height * 0.62))
    return picture[::-1, ::-1] if flipped else picture


def scene(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """A picture with the statistics of a photograph: 1/f texture, shaded ellipses and boxes. u8[height,width,3]."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    fy = np.fft.fftfreq(height)[:, None]
    fx = np.fft.rfftfreq(width)[None, :]
    falloff = 1.0 / np.maximum(np.hypot(fy, fx), 1.0 / max(height, width)) ** rng.uniform(0.5, 1.9)
    texture = np.empty((height, width, 3))
    shared = rng.standard_normal((height, fx.shape[1], 2)) @ np.array([1, 1j])
    for c in range(3):
        own = rng.standard_normal((height, fx.shape[1], 2)) @ np.array([1, 1j]) * rng.uniform(0.2, 1)
        texture[:, :, c] = np.fft.irfft2((shared + 0.5 * own) * falloff, s=(height, width))
    texture = (texture - texture.mean()) / texture.std() * rng.uniform(10, 70) + rng.uniform(40, 215, 3)
    image = Image.fromarray(np.clip(texture, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 10))):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        ry, rx = rng.uniform(0.05, 0.3, 2) * min(height, width)
        colour = rng.uniform(20, 235, 3)
        box = rng.random() < 0.3
        for ring in range(8):
            k = 1 - ring / 8
            bounds = (cx - rx * k, cy - ry * k, cx + rx * k, cy + ry * k)
            fill = tuple(int(v) for v in np.clip(colour * (0.6 + 0.07 * ring), 0, 255))
            (draw.rectangle if box else draw.ellipse)(bounds, fill=fill)
    return np.asarray(image)


def normalized(
    picture: NDArray[np.uint8],
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] = (0.229, 0.224, 0.225),
) -> NDArray[np.float32]:
    """u8[H,W,3] -> f32[3,H,W], scaled to [0,1], shifted by `mean` and divided by `std`."""
    shift, scale = np.array(mean, np.float32), np.array(std, np.float32)
    scaled = (picture.astype(np.float32) / 255 - shift) / scale
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def images(seed: int, batch: int, height: int, width: int) -> NDArray[np.float32]:
    """ImageNet-normalised scenes: f32[batch,3,height,width]."""
    return np.stack([normalized(scene(seed * 1000 + i, height, width)) for i in range(batch)])


def speech(seed: int, seconds: float, rate: int = 16000) -> NDArray[np.float32]:
    """Vowel-like syllables with pauses, over faint noise: f32[seconds * rate] in [-1,1].

    Each syllable is a sum of harmonics of a gliding pitch, shaped by three formants.
    """
    rng = np.random.default_rng(seed)
    total = int(seconds * rate)
    out = rng.standard_normal(total) * 0.002
    vowels = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))
    start = int(0.15 * rate)
    syllable = 0
    while start < total:
        length = int(rng.uniform(0.12, 0.3) * rate)
        t = np.arange(min(length, total - start)) / rate
        pitch = rng.uniform(100, 180) * (1 + rng.uniform(-0.25, 0.1) * t / max(t[-1], 1e-3))
        phase = 2 * np.pi * np.cumsum(pitch) / rate
        formants = vowels[int(rng.integers(len(vowels)))]
        sound = np.zeros_like(t)
        for k in range(1, 36):
            freq = k * pitch.mean()
            gain = sum(1 / (1 + ((freq - f) / (60 + 0.06 * f)) ** 2) / (i + 1) for i, f in enumerate(formants))
            sound += gain / k**0.4 * np.sin(k * phase)
        envelope = np.sin(np.pi * np.linspace(0, 1, t.size)) ** 0.5
        out[start : start + t.size] += sound / (np.abs(sound).max() + 1e-9) * envelope * rng.uniform(0.3, 0.6)
        syllable += 1
        start += length + int(rng.uniform(0.01, 0.05) * rate)
        if syllable % 9 == 0:
            start += int(0.4 * rate)
    return np.clip(out, -1, 1).astype(np.float32)


class WordPiece:
    """BERT's uncased WordPiece over a vocabulary file: greedy longest match, `##` continues a word."""

    def __init__(self, vocab: Path) -> None:
        self.ids = {line: i for i, line in enumerate(vocab.read_text(encoding="utf-8").split("\n")) if line}

    def word(self, word: str) -> list[int]:
        """The ids of one lower-case word; `[UNK]` when some part is not in the vocabulary."""
        ids: list[int] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.ids:
                    ids.append(self.ids[piece])
                    start = end
                    break
            else:
                return [self.ids["[UNK]"]]
        return ids

    def encode(self, text: str) -> list[int]:
        """`[CLS]` ids `[SEP]`, punctuation split off."""
        spaced = "".join(c if c.isalnum() else f" {c} " for c in text.lower())
        return [self.ids["[CLS]"], *(i for w in spaced.split() for i in self.word(w)), self.ids["[SEP]"]]


def tokens(vocab: Path, seed: int, batch: int, length: int) -> dict[str, NDArray[np.int64]]:
    """English sentences as BERT inputs of i64[batch,length]; rows after the first are shorter and padded."""
    piece = WordPiece(vocab)
    rng = np.random.default_rng(seed)
    ids = np.zeros((batch, length), np.int64)
    mask = np.zeros((batch, length), np.int64)
    for row in range(batch):
        wanted = length if row == 0 else max(2, length - int(rng.integers(0, max(1, length // 2))))
        text: list[int] = []
        while len(text) < wanted - 2:
            text += piece.encode(SENTENCES[int(rng.integers(len(SENTENCES)))])[1:-1]
        line = [piece.ids["[CLS]"], *text[: wanted - 2], piece.ids["[SEP]"]]
        ids[row, :wanted] = line
        mask[row, :wanted] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def unigram(tokenizer: Path, text: str) -> list[int]:
    """SentencePiece's unigram tokens of a text: the split with the highest sum of scores, from a `tokenizer.json`."""
    vocab = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    pieces = {piece: (index, score) for index, (piece, score) in enumerate(vocab)}
    text = "\u2581" + text.replace(" ", "\u2581")
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]  # score, where the last piece starts, its id
    for end in range(1, len(text) + 1):
        best.append((best[end - 1][0] - 20.0, end - 1, 2))  # an unknown character
        for start in range(max(0, end - 16), end):
            found = pieces.get(text[start:end])
            if found and best[start][0] + found[1] > best[end][0]:
                best[end] = (best[start][0] + found[1], start, found[0])
    ids: list[int] = []
    end = len(text)
    while end:
        _, start, index = best[end]
        ids.append(index)
        end = start
    return ids[::-1]


def log_mel(wave: NDArray[np.float32], bands: int = 80, rate: int = 16000, normalized: bool = True) -> NDArray[np.float32]:
    """Whisper's features of a wave, which is normalised first or taken as it is: f32[bands, len(wave) / 160], 25 ms windows,
    Slaney's mel scale."""
    if normalized:
        wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    padded = np.pad(wave.astype(np.float64), 200, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][: wave.size // 160]
    power = np.abs(np.fft.rfft(frames * np.hanning(401)[:-1], axis=1)) ** 2

    def to_mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + np.log(hz / 1000) * 27 / np.log(6.4)

    mels = np.linspace(0, to_mel(rate / 2), bands + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    freqs = np.linspace(0, rate / 2, 201)
    rising = (freqs[None] - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - freqs[None]) / np.diff(edges)[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    log = np.log10(np.maximum(filters @ power.T, 1e-10))
    return ((np.maximum(log, log.max() - 8) + 4) / 4).astype(np.float32)


def file_samples() -> dict[str, bytes]:
    """Small files of known kinds, by the name that a file-type classifier should give them."""
    python = '"""Reads rows."""\nimport csv\nimport sys\n\n\ndef main(path: str) -> int:\n'
    python += "    with open(path) as handle:\n        for row in csv.reader(handle):\n            print(row)\n    return 0\n"
    python += '\n\nif __name__ == "__main__":\n    sys.exit(main(sys.argv[1]))\n'
    page = "<!DOCTYPE html>\n<html><head><title>Tools</title><style>p{color:#333}</style></head>\n<body>"
    page += "".join(f'<p class="t">Paragraph {i} with a <a href="/x/{i}">link</a>.</p>\n' for i in range(30))
    source = '#include <stdio.h>\n#include <stdlib.h>\n\nstatic int add(int a, int b) {\n    return a + b;\n}\n\n'
    source += 'int main(int argc, char **argv) {\n    printf("%d\\n", add(argc, 2));\n    return EXIT_SUCCESS;\n}\n'
    rows = "".join(f'  {{"id": {i}, "name": "item {i}", "tags": ["a", "b"], "ok": true}},\n' for i in range(40))
    pixels = b"".join(b"\0" + bytes((x * y) & 255 for x in range(96)) for y in range(64))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 32, 64, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )
    script = "#!/bin/bash\nset -euo pipefail\nfor f in *.txt; do\n  echo \"$f\"\n  wc -l \"$f\" | awk '{print $1}'\ndone\n"
    return {
        "python": python.encode(),
        "html": (page + "</body></html>\n").encode(),
        "c": source.encode(),
        "json": ("[\n" + rows + '  {"id": -1}\n]\n').encode(),
        "png": png,
        "shell": script.encode(),
    }


def magika_tokens(content: bytes, beg: int = 1024, end: int = 1024, block: int = 4096, pad: int = 256) -> NDArray[np.int32]:
    """The first and last bytes of a file, stripped of white space and padded with 256: i32[1,beg+end]."""
    head = np.frombuffer(content[:block].lstrip()[:beg], np.uint8).astype(np.int32)
    tail = np.frombuffer(content[-block:].rstrip()[-end:], np.uint8).astype(np.int32)
    row = np.full(beg + end, pad, np.int32)
    row[: head.size] = head
    row[beg + end - tail.size :] = tail
    return row[None]
