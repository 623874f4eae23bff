"""Writes one ONNX file from torch, or an int8 one from an f32 one; run by `models.py` in the peers' environment.

    python benchmarks/export_model.py NAME OUT.onnx [--exporter dynamo|torchscript] [--weights FILE] [--float FILE]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import model_inputs

DEPTH = 12  # GPT-2 small


def build(name: str, weights: Path | None) -> tuple:
    """(module, example arguments, input names, output names, dynamic axes by input) of an architecture."""
    import torch

    from benchmarks import torch_models as tm

    if name in ("resnet50", "mobilenetv2"):
        model = tm.scale_by_fan_in(tm.ResNet50() if name == "resnet50" else tm.MobileNetV2(), seed=1)
        tm.tame_residuals(model)
        tm.calibrate_batch_norm(model, torch.from_numpy(model_inputs.images(7, 24, 224, 224)))
        return model, (torch.randn(2, 3, 224, 224),), ["image"], ["logits"], {"image": {0: "batch"}}
    if name == "vit-tiny":
        vit = tm.ViTTiny()
        tm.scale_by_fan_in(vit, seed=1)
        torch.nn.init.normal_(vit.pos, 0.0, 0.2, generator=torch.Generator().manual_seed(2))
        torch.nn.init.normal_(vit.cls, 0.0, 0.2, generator=torch.Generator().manual_seed(3))
        return vit.eval(), (torch.randn(2, 3, 224, 224),), ["image"], ["logits"], {"image": {0: "batch"}}
    if name == "mlp":
        return tm.scale_by_fan_in(tm.MLP(), seed=1).eval(), (torch.randn(4, 1024),), ["x"], ["y"], {"x": {0: "batch"}}
    if name == "minilm":
        if weights is None:
            raise SystemExit("minilm needs --weights model.safetensors")
        # Three tensors of their own: torch.export takes two inputs that are one tensor for one input.
        ids, mask, kinds = (torch.full((2, 16), v, dtype=torch.int64) for v in (1, 1, 0))
        names = ["input_ids", "attention_mask", "token_type_ids"]
        axes = {n: {0: "batch", 1: "length"} for n in names}
        outs = ["last_hidden_state", "sentence_embedding"]
        return tm.MiniLM.from_safetensors(str(weights)), (ids, mask, kinds), names, outs, axes
    if name == "gpt2":
        gpt = tm.GPT2()
        tm.scale_by_fan_in(gpt, seed=1)
        tm.finish_gpt2(gpt)
        keys = [f"{i}.{kind}" for i in range(DEPTH) for kind in ("key", "value")]
        names = ["input_ids", *(f"past_key_values.{k}" for k in keys)]
        axes = {"input_ids": {0: "batch", 1: "sequence"}}
        axes |= {n: {0: "batch", 2: "past"} for n in names[1:]}
        args = (torch.ones(2, 3, dtype=torch.int64), [torch.randn(2, 12, 5, 64) for _ in keys])
        return gpt.eval(), args, names, ["logits", *(f"present.{k}" for k in keys)], axes
    if name == "vits":
        from benchmarks.torch_vits import seeded

        names = ["input", "input_lengths", "scales"]
        args = (torch.randint(0, 60, (1, 24)), torch.tensor([24]), torch.tensor([0.667, 1.0, 0.8]))
        axes = {"input": {0: "batch", 1: "phonemes"}, "input_lengths": {0: "batch"}, "output": {0: "batch", 2: "time"}, "scales": {}}
        return seeded(), args, names, ["output"], axes
    if name.startswith("whisper"):
        if weights is None:
            raise SystemExit(f"{name} needs --weights model.bin")
        return whisper(name, weights)
    raise SystemExit(f"unknown architecture {name}")


def whisper(part: str, weights: Path) -> tuple:
    """As `build`: one of the three graphs that exporters make of Whisper, by their usual names of inputs and outputs."""
    import torch

    from benchmarks.torch_whisper import FirstStep, NextStep, from_ctranslate2

    encoder, decoder = from_ctranslate2(weights)
    features = torch.randn(1, encoder.conv1.in_channels, 2 * encoder.positions.shape[0])
    if part == "whisper-encoder":
        return encoder, (features,), ["input_features"], ["last_hidden_state"], {"input_features": {0: "batch"}}
    keys = [f"{i}.{of}.{kind}" for i in range(len(decoder.layer)) for of in ("decoder", "encoder") for kind in ("key", "value")]
    ids = {"input_ids": {0: "batch", 1: "sequence"}}
    with torch.no_grad():
        hidden = encoder(features)
        if part == "whisper-first":
            names, outs = ["input_ids", "encoder_hidden_states"], ["logits", *(f"present.{k}" for k in keys)]
            return FirstStep(decoder), (torch.ones(1, 2, dtype=torch.int64), hidden), names, outs, {**ids, names[1]: {0: "batch"}}
        past = list(FirstStep(decoder)(torch.ones(1, 2, dtype=torch.int64), hidden)[1:])
    names = ["input_ids", *(f"past_key_values.{k}" for k in keys)]
    axes = {"input_ids": {0: "batch"}, **{n: {0: "batch", 2: "past"} if ".decoder." in n else {0: "batch"} for n in names[1:]}}
    outs = ["logits", *(f"present.{k}" for k in keys if ".decoder." in k)]
    return NextStep(decoder), (torch.ones(1, 1, dtype=torch.int64), past), names, outs, axes


def export(name: str, out: Path, exporter: str, weights: Path | None) -> None:
    """Runs torch.onnx.export with its defaults (the opset included) but for dynamic axes and one single file."""
    import torch

    model, args, names, outs, axes = build(name, weights)
    kwargs: dict = {"input_names": names, "output_names": outs}
    if exporter == "dynamo":
        dims: dict[str, torch.export.Dim] = {}
        shapes = [
            {axis: dims.setdefault(label, torch.export.Dim(label)) for axis, label in axes[n].items()} for n in names
        ]
        tree = (shapes[0], shapes[1:]) if name == "gpt2" else tuple(shapes)
        kwargs |= {"dynamo": True, "dynamic_shapes": tree, "external_data": False}
    else:
        kwargs |= {"dynamo": False, "dynamic_axes": axes}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, args, str(out), **kwargs)


def quantize(source: Path, out: Path, rows: Iterator[dict[str, NDArray[Any]]]) -> None:
    """onnxruntime's static quantizer with its defaults: QDQ, u8 activations, s8 weights, calibrated on ``rows`` of inputs."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Rows(CalibrationDataReader):
        """Feeds one row at a time."""

        def get_next(self) -> dict[str, NDArray[Any]] | None:  # type: ignore[override]
            return next(rows, None)

    ready = out.with_suffix(".float.onnx")
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)  # which stops at shapes that torch leaves open
    quantize_static(
        str(ready),
        str(out),
        Rows(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=False,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    ready.unlink()


def quantize_dynamically(source: Path, out: Path) -> None:
    """onnxruntime's dynamic quantizer with its defaults: DynamicQuantizeLinear, MatMulInteger, s8 weights of one scale a tensor."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(out), weight_type=QuantType.QInt8)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--exporter", choices=("dynamo", "torchscript"), default="dynamo")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--float", type=Path, help="the f32 model to quantize")
    parser.add_argument("--vocab", type=Path, help="the words of a model of texts; others take images")
    parser.add_argument("--dynamic", action="store_true", help="quantize activations when the model runs")
    args = parser.parse_args()
    if args.dynamic:
        quantize_dynamically(args.float, args.out)
    elif args.float is not None and args.vocab is not None:
        quantize(args.float, args.out, (dict(model_inputs.tokens(args.vocab, 11 + i, 1, 128)) for i in range(16)))
    elif args.float is not None:
        quantize(args.float, args.out, ({"image": x[None]} for x in model_inputs.images(11, 16, 224, 224)))
    else:
        export(args.name, args.out, args.exporter, args.weights)


if __name__ == "__main__":
    main()
