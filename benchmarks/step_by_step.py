"""Quantized models judged step by step: every quantized tensor computed from the reference's own earlier ones.

Between two QuantizeLinear the arithmetic is f32, where the last bit is nobody's; one value in some 10^5 lies so near to half a step
that this bit decides to which side it is rounded, and a deep network amplifies that step to all of its output: onnxruntime's own exact modes
(`session.x64quantprecision`, and no graph rewrites) end as far from each other as from anyone else. So the output of such a model,
computed from its inputs alone, shows nothing either way. Here the outputs of each QuantizeLinear and DynamicQuantizeLinear become
inputs of the model for everything that reads them, filled with the reference's values, and outputs as well: what every piece
between two quantizations makes out of equal inputs is compared, the model's own outputs included. A model is cut behind each
STFT, too: vocoders (kokoro) feed on the phases of its bins, and where a bin is zero but for rounding, or real, the sign of a
rounding error decides between -pi and pi; and behind each DynamicQuantizeLSTM, which quantizes its state at every step where
nobody sees it: its outputs may be as far from the reference as the reference's own are for inputs a few units in the last place
apart. A model in f16 is cut behind each product: a value rounded to f16 is a quantized one as well, onnxruntime's CPU provider computes
such models in f32 throughout, and a hundred layers amplify the difference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Outputs = dict[str, NDArray[Any]]
QUANTIZERS = ("QuantizeLinear", "DynamicQuantizeLinear")
RECURRENCES = ("DynamicQuantizeLSTM",)
CUTS = (*QUANTIZERS, "STFT", *RECURRENCES)
PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")  # where their result is f16
NUDGES = tuple(1 + k * 2.0**-23 for k in (-3, -2, -1, 1, 2, 3))
INTEGER_PRODUCTS = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")
MADE = ".made"


@dataclass(frozen=True)
class Steps:
    """``path``: the model in pieces, which ``inputs`` feed; ``reference``: by name, what they make in onnxruntime, ``mode`` says how;
    ``tensors``: names of those that it is cut at; ``spread``: by name of a recurrence's output, how far the reference's own are
    apart for nudged inputs."""

    path: Path
    tensors: tuple[str, ...]
    inputs: Outputs
    reference: Outputs
    mode: str
    spread: dict[str, float]

    def judge(self, got: Outputs) -> Judgement:
        """The outputs of ``path`` for ``inputs`` against the reference."""
        worst, flipped, total, steps, recurrent = 0.0, 0, 0, 0.0, 0.0
        for name, want in self.reference.items():
            a = got.get(name + MADE if name in self.tensors else name)
            if a is None or a.shape != want.shape:
                return Judgement(float("inf"), 0, 0, float("inf"))
            if not want.size:
                continue
            away = np.abs(a.astype(np.float64) - want.astype(np.float64))
            if want.dtype.kind == "f":
                gap = _over_largest(away, want)
                if gap <= 2 * self.spread.get(name, -1.0):
                    recurrent = max(recurrent, gap)
                else:
                    worst = max(worst, gap if np.isfinite(gap) else float("inf"))
            else:
                flipped, total, steps = flipped + int((away > 0).sum()), total + want.size, max(steps, float(away.max()))
        return Judgement(worst, flipped, total, steps, recurrent)


def _over_largest(away: NDArray[Any], want: NDArray[Any]) -> float:
    return float(away.max()) / max(float(np.abs(want).max()), 1e-30)


@dataclass(frozen=True)
class Judgement:
    """``error``: of the tensors of floats (outputs, scales), over the largest magnitude of each; ``flipped`` of ``total`` quantized elements
    differ, by ``steps`` at most; ``recurrent``: the error of outputs of recurrences that is within the reference's own spread."""

    error: float
    flipped: int
    total: int
    steps: float
    recurrent: float = 0.0

    def ok(self, bar: float) -> bool:
        """Floats within the bar; quantized elements one step away at most, and that only in ties: one in 10^4."""
        return self.error <= bar and self.steps <= 1 and self.flipped <= 1e-4 * self.total

    def __str__(self) -> str:
        text = f"{self.flipped} of {self.total:,} quantized elements differ"
        text += (f", by {self.steps:g}" if self.flipped else "") + f"; outputs {self.error:.1e}"
        return text + (f"; recurrences {self.recurrent:.1e}, within the reference's own spread" if self.recurrent else "")


def in_steps(path: Path, inputs: Outputs, folder: Path) -> Steps:
    """The model in pieces, written into ``folder``. Extents that the model declares as open stay open. The reference follows
    the standard to the letter, but for models with integer products: onnxruntime's kernels of these saturate on some processors unless
    its precise mode replaces them; for models in f16 it computes each piece from the same rounded tensors. Raises ValueError for a model without
    quantizers and without products in f16."""
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    infos = {v.name: v for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    own = {o.name for o in graph.output}
    half = {n for n, v in infos.items() if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16} - own
    rounded = {o for n in graph.node if n.op_type in PRODUCTS for o in n.output} & half
    cuts = [n for n in graph.node if n.op_type in CUTS or set(n.output) & rounded]
    floats = {o for n in cuts for k, o in enumerate(n.output) if k == 1 or n.op_type not in QUANTIZERS}
    kinds = {o: onnx.TensorProto.FLOAT if o in floats else onnx.TensorProto.UINT8 for n in cuts for o in n.output if o}
    if not rounded and not any(n.op_type in QUANTIZERS for n in cuts) or own & set(kinds):
        raise ValueError(f"{path.name} has no {' or '.join(QUANTIZERS)} and no products in f16 inside")
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.graph.output.extend(infos.get(n) or onnx.helper.make_tensor_value_info(n, k, None) for n, k in kinds.items())
    exposed = folder / f"{path.stem}-exposed.onnx"
    onnx.save(whole, str(exposed))
    precise = any(n.op_type in INTEGER_PRODUCTS for n in graph.node)
    reference = run_onnxruntime(exposed, inputs, precise)
    extents: dict[int, str] = {}
    for i in graph.input:
        for d, extent in zip(i.type.tensor_type.shape.dim, np.shape(inputs[i.name]) if i.name in inputs else (), strict=False):
            if d.dim_param:
                extents.setdefault(extent, d.dim_param)
    for node in cuts:
        for k, o in enumerate(node.output):
            node.output[k] = o + MADE if o else o
    for name in kinds:
        shape = [extents.get(e, e) for e in reference[name].shape]
        kind = onnx.helper.np_dtype_to_tensor_dtype(reference[name].dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
        graph.output.append(onnx.helper.make_tensor_value_info(name + MADE, kind, shape))
    del graph.value_info[:]
    pieces = folder / f"{path.stem}-steps.onnx"
    onnx.save(model, str(pieces))
    feeds = {**inputs, **{n: reference[n] for n in kinds}}
    if rounded:
        made = run_onnxruntime(pieces, feeds, precise)
        reference = {n.removesuffix(MADE): v for n, v in made.items()}
    spread = {o.removesuffix(MADE): 0.0 for n in cuts if n.op_type in RECURRENCES for o in n.output if o}
    for nudge in NUDGES if spread else ():
        nudged = {k: np.asarray(v * nudge, np.float32) if v.dtype == np.float32 else v for k, v in feeds.items()}
        moved = run_onnxruntime(pieces, nudged, precise)
        for name in spread:
            gap = _over_largest(np.abs(moved[name + MADE] - reference[name]), reference[name])
            spread[name] = max(spread[name], gap)
    return Steps(pieces, tuple(kinds), feeds, reference, "precise mode" if precise else "no rewrites", spread)


def run_onnxruntime(path: Path, inputs: Outputs, rewrites: bool) -> Outputs:
    """Its CPU provider in an exact mode: as the standard says to the letter, or with its rewrites and unsaturated 8-bit products."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if rewrites:
        options.add_session_config_entry("session.x64quantprecision", "1")
    else:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, inputs), strict=True))
