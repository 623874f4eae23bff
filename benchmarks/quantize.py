"""Accuracy of quantized models against f32 on real inputs, ours beside onnxruntime's own quantization.

    python -m benchmarks.quantize [--part static] [--part weights] [--part sparse] [--update]

Calibration and evaluation use different data: other scenes; for text, calibration takes Python's own manual (``pydoc_data``), evaluation the
sentences of ``benchmarks/model_inputs.py`` and pages of the manual that calibration did not see. onnxruntime runs its files in its precise
mode (``session.x64quantprecision``) and in its default mode, which saturates pair sums on processors without VNNI.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import model_inputs as made  # noqa: E402
from benchmarks import models  # noqa: E402

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]
RESULT = ROOT / "benchmarks" / "results" / "quantize.md"
LENGTH = 128


def manual_pages(piece: made.WordPiece, first: int, count: int) -> list[Feed]:
    """Pages of Python's manual, ``LENGTH`` tokens each: BERT inputs i64[1, LENGTH]."""
    from pydoc_data import topics

    ids = [i for key in sorted(topics.topics)[::3] for i in piece.encode(topics.topics[key][:1500])[1:-1]]
    step = LENGTH - 2
    return [bert([piece.ids["[CLS]"], *ids[k * step : (k + 1) * step], piece.ids["[SEP]"]]) for k in range(first, first + count)]


def bert(ids: Sequence[int]) -> Feed:
    row = np.zeros((1, LENGTH), np.int64)
    row[0, : len(ids)] = ids
    mask = (np.arange(LENGTH) < len(ids)).astype(np.int64)[None]
    return {"input_ids": row, "attention_mask": mask, "token_type_ids": np.zeros_like(row)}


def text_data(calibration: int = 24, evaluation: int = 16) -> tuple[list[Feed], list[Feed]]:
    piece = made.WordPiece(models.package_file("minilm", "vocab.txt"))
    sentences = [bert(piece.encode(s)) for s in made.SENTENCES]
    return manual_pages(piece, 0, calibration), sentences + manual_pages(piece, calibration, evaluation - len(sentences))


def image_data(calibration: int = 16, evaluation: int = 24) -> tuple[list[Feed], list[Feed]]:
    return [models.image_inputs(1000 + s) for s in range(calibration)], [models.image_inputs(s) for s in range(evaluation)]


class Score:
    """Against f32 over all evaluation inputs: worst and mean cosine of a row, NMSE, rows with the same largest element."""

    def __init__(self, want: Sequence[Array]) -> None:
        self.want = [w.reshape(-1, w.shape[-1]).astype(np.float64) for w in want]

    def __call__(self, got: Sequence[Array]) -> str:
        a, b = np.concatenate(self.want), np.concatenate([g.reshape(-1, g.shape[-1]).astype(np.float64) for g in got])
        cos = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-30)
        nmse = np.square(a - b).sum() / np.square(a).sum()
        return f"{cos.mean():.5f} | {cos.min():.5f} | {nmse:.2e} | {100 * (a.argmax(1) == b.argmax(1)).mean():.0f} %"


def ort_session(path: str, precise: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ort_outputs(path: str, data: Sequence[Feed], output: str, precise: bool = True) -> list[Array]:
    s = ort_session(path, precise)
    names = {i.name for i in s.get_inputs()}
    return [s.run([output], {k: v for k, v in f.items() if k in names})[0] for f in data]


def ort_static(source: str, data: Sequence[Feed], method: str, out: str, shapes: Mapping[str, Any], operators: Sequence[str] = ()) -> None:
    """onnxruntime.quantization's own static quantization: QDQ, u8 activations, i8 weights by channel; its pre-processing first.

    ``operators``: the only ones to quantize, those with two activations left out; none: its defaults."""
    import logging

    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.disable(logging.WARNING)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(data)

        def get_next(self) -> Feed | None:
            return next(self.left, None)

    model = onnx.load(source)
    for i in model.graph.input:
        for d, extent in zip(i.type.tensor_type.shape.dim, shapes[i.name]):
            d.dim_value = extent
    pinned = out + ".pinned.onnx"
    onnx.save(model, pinned)
    quant_pre_process(pinned, out + ".pre.onnx", skip_symbolic_shape=True)
    how = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}[method]
    quantize_static(
        out + ".pre.onnx", out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=how,
        op_types_to_quantize=list(operators) or None, extra_options={"MatMulConstBOnly": bool(operators)},
    )  # fmt: skip


def static(names: Sequence[str], observers: Sequence[str], say: Callable[[str], None]) -> None:
    """Table of static int8."""
    import luthier

    say("## Static int8\n")
    for name in names:
        case = models.get(name)
        calibration, evaluation = image_data() if name == "mobilenetv2" else text_data()
        output = "logits" if name == "mobilenetv2" else "sentence_embedding"
        shapes = {k: v.shape for k, v in evaluation[0].items()}
        score = Score(ort_outputs(str(case.path), evaluation, output))
        say(f"### {name}, output `{output}`: {len(calibration)} calibration and {len(evaluation)} other evaluation inputs\n")
        say("| quantized by | run by | mean cosine | worst | NMSE | same largest | MB | s |\n|---|---|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            forms: list[dict[str, Any]] = [{"observer": o} for o in observers]
            forms += [{"observer": "minmax", "smooth": 0.5}, {"observer": "minmax", "smooth": 0.5, "method": "gptq"}] if name != "mobilenetv2" else [{"observer": "minmax", "method": "gptq"}]
            for form in forms:
                label = ", ".join(f"{k} {v}" if k != "observer" else str(v) for k, v in form.items())
                start = time.perf_counter()
                q = luthier.quantize(case.path, "int8", calibration=calibration, shapes=shapes, embeddings=False, detail=None, reduce_range=False, **form)
                took = time.perf_counter() - start
                module = q.compile()
                file = str(q.save(os.path.join(folder, "own.onnx")))
                size = os.path.getsize(file) / 1e6
                say(f"| Luthier, {label} | Luthier | {score([module.run(f)[output] for f in evaluation])} | {size:.1f} | {took:.0f} |")
                if form == forms[0]:
                    for precise in (True, False):
                        say(f"| Luthier, {label} | onnxruntime{', precise' if precise else ''} | {score(ort_outputs(file, evaluation, output, precise))} | {size:.1f} | |")
            foreign: list[tuple[str, tuple[str, ...]]] = [(o, ()) for o in observers]
            foreign += [("minmax", ("MatMul", "Gemm"))] if name != "mobilenetv2" else []
            for method, only in foreign:
                file = os.path.join(folder, f"{method}{len(only)}.onnx")
                label = method + (", products with constants only" if only else "") + ("" if method == "minmax" else " (8 inputs)")
                start = time.perf_counter()
                try:
                    ort_static(str(case.path), calibration[:8] if method != "minmax" else calibration, method, file, shapes, only)
                except Exception as error:  # onnxruntime.quantization raises what it likes
                    say(f"| onnxruntime, {label} | failed: {type(error).__name__}: {str(error)[:80]} | | | | | | |")
                    continue
                took = time.perf_counter() - start
                for precise in (True, False):
                    out = ort_outputs(file, evaluation, output, precise)
                    say(f"| onnxruntime, {label} | onnxruntime{', precise' if precise else ''} | {score(out)} | {os.path.getsize(file) / 1e6:.1f} | {took:.0f} |")
                if method == "minmax":
                    module = luthier.compile(file, shapes=shapes)
                    wanted = {i.name for i in module.inputs}
                    say(f"| onnxruntime, {label} | Luthier | {score([module.run({k: v for k, v in f.items() if k in wanted})[output] for f in evaluation])} | | |")
        say("")


def weights(say: Callable[[str], None], group: int, widths: Sequence[int]) -> None:
    """Table of weight-only widths and methods on MiniLM."""
    from luthier.passes.quantize.quantize_weights import METHODS, output_error
    from luthier.passes.quantize.quantize_weights import quantize as quantize_matrix
    from luthier.quantization.calibrate import collect, load_graph, read_data, weight_layers
    from luthier.quantization.mixed import FedModel

    calibration, evaluation = text_data()
    case = models.get("minilm")
    graph = load_graph(case.path, {k: v.shape for k, v in evaluation[0].items()})
    layers = weight_layers(graph)
    stats = collect(graph, read_data(calibration, graph), hessians=layers)
    fed = FedModel(graph, layers, evaluation)
    score = Score([w["sentence_embedding"] for w in fed.want])
    say(f"## Weight-only, MiniLM ({len(layers)} products, groups of {group}, zero points, f16 scales), sentence embeddings\n")
    say(f"{len(calibration)} calibration pages (gptq only), {len(evaluation)} evaluation texts. Layer NMSE: mean over the layers, on the calibration data.\n")
    say("| bits | method | bits a weight | mean cosine | worst | NMSE | same largest | layer NMSE | s |\n|---|---|---|---|---|---|---|---|---|")
    for bits in widths:
        for method in METHODS:
            start = time.perf_counter()
            parts = {x: quantize_matrix(x.matrix(), bits, group, False, method, stats.hessian(x), rows=stats.samples(x)) for x in layers}
            took = time.perf_counter() - start
            own = float(np.mean([output_error(x.matrix(), q.dequantize(), stats.hessian(x)) for x, q in parts.items()]))
            got = fed.run({x: q.dequantize() for x, q in parts.items()})
            stored = sum(q.nbytes for q in parts.values()) * 8 / sum(q.codes.size for q in parts.values())
            say(f"| {bits or 'ternary'} | {method} | {stored:.2f} | {score([g['sentence_embedding'] for g in got])} | {own:.1e} | {took:.0f} |")
    say("")


def sparse(say: Callable[[str], None]) -> None:
    """Table of W4S50 on MiniLM: how blocks are chosen, and the steps of recovery."""
    from luthier.quantization.calibrate import load_graph, weight_layers
    from luthier.quantization.mixed import FedModel
    from luthier.quantization.sparsify import sparsify

    calibration, evaluation = text_data()
    path, shapes = models.get("minilm").path, {k: v.shape for k, v in evaluation[0].items()}
    graph = load_graph(path, shapes)
    layers = [x for x in weight_layers(graph) if x.node.op in ("MatMul", "Gemm")]
    fed = FedModel(graph, layers, evaluation)
    score = Score([w["sentence_embedding"] for w in fed.want])
    say(f"## W4S50, MiniLM ({len(layers)} products, blocks of 16), sentence embeddings\n")
    say(f"{len(calibration)} calibration pages, {len(evaluation)} evaluation texts; activations exact.\n")
    say("| step | mean cosine | worst | NMSE | same largest | s |\n|---|---|---|---|---|---|")

    def row(label: str, **how: Any) -> None:
        start = time.perf_counter()
        made = sparsify(path, 0.5, shapes=shapes, **how)
        took = time.perf_counter() - start
        got = fed.run({x: made.weights[x.name].dense() for x in layers})
        say(f"| {label} | {score([g['sentence_embedding'] for g in got])} | {took:.0f} |")

    row("magnitudes, nearest")
    row("second moments, nearest", calibration=calibration, method="nearest")
    row("compensated", calibration=calibration)
    for epochs in (1, 4):
        row(f"compensated, {epochs} epochs block by block, then of the scales", calibration=calibration, recover=True, epochs=epochs)
    row("2:4, compensated", calibration=calibration, pattern="2:4")
    say("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=("static", "weights", "sparse"), help="default: all")
    parser.add_argument("--model", action="append", choices=("mobilenetv2", "minilm"), help="of the static part; default: both")
    parser.add_argument("--observer", action="append", choices=("minmax", "percentile", "entropy"), help="of the static part; default: all")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--bits", type=int, action="append", help="widths of the weight-only part, 0 for ternary; default: 8 4 3 2 0 1")
    parser.add_argument("--update", action="store_true", help=f"replace these parts in {RESULT.relative_to(ROOT)}")
    given = parser.parse_args()
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    parts = given.part or ["weights", "static", "sparse"]
    if "weights" in parts:
        weights(say, given.group, given.bits or [8, 4, 3, 2, 0, 1])
    if "static" in parts:
        static(given.model or ["mobilenetv2", "minilm"], given.observer or ["minmax", "percentile", "entropy"], say)
    if "sparse" in parts:
        sparse(say)
    if given.update:
        update("\n".join(lines))


def update(text: str) -> None:
    """Sections (``## ``, ``### ``) of ``text`` replace those of the same heading in the result file."""
    head = "# Accuracy of quantization\n\nWritten by `python -m benchmarks.quantize --update`; see there for what the columns mean.\n"
    sections = _sections(RESULT.read_text(encoding="utf-8") if RESULT.exists() else head)
    sections.update(_sections(text))
    RESULT.write_text("\n\n".join(s.strip() for s in sections.values()) + "\n", encoding="utf-8")


def _sections(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        if line.startswith("#"):
            key = line.split(",")[0].split("(")[0].strip()
            found[key] = line
        else:
            found[key] = found.get(key, "") + "\n" + line
    return found


if __name__ == "__main__":
    main()
