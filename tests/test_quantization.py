"""luthier.quantize end to end on small models, against onnxruntime running the saved file and numpy."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import luthier
from luthier.cli.commands import luthier as command
from luthier.errors import InputError, LuthierError, QuantizationError
from luthier.passes.quantize.insert_qdq import parameters
from luthier.passes.quantize.smooth_activations import smooth_activations, smoothing
from luthier.quantization.calibrate import collect, collect_outputs, load_graph, read_data, weight_layers
from luthier.quantization.half import audit_range
from luthier.quantization.mixed import hull_steps, spend

RNG = np.random.default_rng(11)


def model(nodes: list, inputs: dict, outputs: dict, constants: dict) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in inputs.items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in outputs.items()],
        [numpy_helper.from_array(np.ascontiguousarray(a, np.float32 if a.dtype.kind == "f" else a.dtype), k) for k, a in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def products() -> onnx.ModelProto:
    """MatMul, Gemm with a bias vector, Gemm with a bias of one number and beta, over rows of 64."""
    rng = np.random.default_rng(21)  # the same model whichever tests run before
    c = {"w": rng.standard_normal((64, 96)), "v": rng.standard_normal((48, 96)), "b": rng.standard_normal(48), "u": rng.standard_normal((48, 32)), "d": np.array(0.5)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "v", "b"], ["g"], "second", transB=1),
        helper.make_node("Gemm", ["g", "u", "d"], ["y"], "third", beta=2.0),
    ]
    return model(nodes, {"x": ["n", 64]}, {"y": ["n", 32]}, c)


def convolutions() -> onnx.ModelProto:
    """Conv + Clip, depthwise, 1x1, a residual sum, pooling, a Gemm: MobileNet in small."""
    rng = np.random.default_rng(22)

    def w(*s: int) -> np.ndarray:
        return rng.standard_normal(s) / np.sqrt(np.prod(s[1:]))

    c = {
        "a": w(16, 3, 3, 3), "ab": w(16), "dw": w(16, 1, 3, 3), "p": w(16, 16, 1, 1), "pb": w(16), "lo": np.array(0.0), "hi": np.array(6.0), "f": w(10, 16), "fb": w(10),
        "flat": np.array([0, -1]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "a", "ab"], ["c0"], "stem", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Clip", ["c0", "lo", "hi"], ["r0"], "clip"),
        helper.make_node("Conv", ["r0", "dw"], ["c1"], "depthwise", pads=[1, 1, 1, 1], group=16),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "p", "pb"], ["c2"], "pointwise"),
        helper.make_node("Add", ["r0", "c2"], ["s"], "residual"),
        helper.make_node("MaxPool", ["s"], ["m"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["m"], ["avg"], "average"),
        helper.make_node("Reshape", ["avg", "flat"], ["flattened"], "reshape"),
        helper.make_node("Gemm", ["flattened", "f", "fb"], ["y"], "classifier", transB=1),
    ]
    return model(nodes, {"x": [2, 3, 16, 16]}, {"y": [2, 10]}, c)


def run_ort(source: str | bytes, feed: dict) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feed)  # type: ignore[no-any-return]


def nmse(want: np.ndarray, got: np.ndarray) -> float:
    return float(np.square(got.astype(np.float64) - want).sum() / np.square(want.astype(np.float64)).sum())


ROWS = [{"x": RNG.standard_normal((256, 64)).astype(np.float32)} for _ in range(3)]
IMAGES = [{"x": RNG.standard_normal((2, 3, 16, 16)).astype(np.float32)} for _ in range(4)]


@pytest.mark.parametrize(
    ("precision", "options", "bound"),
    [
        ("w8", {}, 1e-3), ("w4", {"method": "gptq"}, 0.02), ("w4", {"method": "hqq", "group": 16}, 0.02), ("w4", {"symmetric": True, "group": 0, "method": "rtn"}, 0.06),
        ("w3", {"group": 32, "scale_dtype": "bf16"}, 0.1), ("w2", {"group": 16}, 0.3), ("w1", {"group": 16}, 1.0), ("ternary", {"group": 32}, 0.6), ("w6", {}, 5e-3),
        ("w5", {"scale_dtype": "f32"}, 1e-2),
    ],
)  # fmt: skip
def test_low_bit_products_are_what_onnxruntime_computes_from_the_saved_file(precision: str, options: dict, bound: float, tmp_path: Path) -> None:
    source = products()
    q = luthier.quantize(source, precision, calibration=ROWS, **options)
    assert {r.name for r in q.report.layers} == {"first", "second", "third"} and all(r.bytes_after < r.bytes_before for r in q.report.layers)
    x = {"x": RNG.standard_normal((5, 64)).astype(np.float32)}
    (got,) = q.compile().run(x).values()
    (saved,) = run_ort(str(q.save(tmp_path / "m.onnx")), x)
    (want,) = run_ort(source.SerializeToString(), x)
    # DequantizeLinear in front of MatMul (one scale a row) lets onnxruntime round the activations to 8 bits
    np.testing.assert_allclose(got, saved, atol=(0.02 if options.get("group") == 0 else 2e-5) * np.abs(want).max())
    assert nmse(want, got) < bound
    again = luthier.compile(q.save(tmp_path / "own.onnx", form="luthier")).run(x)["y"]
    np.testing.assert_allclose(again, got, atol=1e-5 * np.abs(want).max())


def test_the_low_bit_kernel_is_used() -> None:
    """The graph that compiles holds no f32 matrix any more."""
    source = products()
    q = luthier.quantize(source, "w4", calibration=ROWS)
    assert [n.op for n in q.graph.nodes if n.op in ("MatMul", "Gemm")] == []
    assert q.report.bytes_after < 0.2 * q.report.bytes_before
    rounded = luthier.quantize(source, "w4a8", calibration=ROWS)
    assert all(n.attrs["act_group"] == 32 for n in rounded.graph.nodes if n.op == "luthier::GroupedMatMul" and n.attrs["K"] % 32 == 0)
    x = {"x": RNG.standard_normal((1, 64)).astype(np.float32)}
    a, b = q.compile().run(x)["y"], rounded.compile().run(x)["y"]
    assert 0 < nmse(a, b) < 3e-3  # three layers, 3e-5 each for normal activations; ReLU's halves have larger peaks


@pytest.mark.parametrize("options", [{}, {"observer": "percentile", "percentile": 99.9}, {"observer": "entropy"}, {"method": "mse"}, {"method": "gptq"}])
def test_static_convolutions(options: dict, tmp_path: Path) -> None:
    """The saved QDQ file in onnxruntime (precise mode) and our integer kernels agree to a step of the last layer; both are near f32."""
    source = convolutions()
    q = luthier.quantize(source, "int8", calibration=IMAGES, **options)
    counts = [n.op for n in q.graph.nodes].count
    # inputs: stem, depthwise and residual share one, pointwise, residual's other, pool, average, classifier
    assert counts("QuantizeLinear") == 7 and counts("DequantizeLinear") == 7 + 4 + 3
    module, path = q.compile(), str(q.save(tmp_path / "m.onnx"))
    want, got, saved = (np.stack(runs) for runs in zip(*(
        (run_ort(source.SerializeToString(), x)[0], module.run(x)["y"], run_ort(path, x)[0]) for x in IMAGES
    ), strict=True))  # fmt: skip
    assert nmse(want, got) < 0.02 and nmse(want, saved) < 0.02
    step = max(float(v.data) for n in q.graph.nodes if n.op == "QuantizeLinear" for v in n.inputs[1:2] if v is not None and v.data is not None)
    # a value on a tie may become the neighbouring step in one of 16 inputs of the classifier
    assert np.abs(got - saved).max() <= 4 * step


@pytest.mark.parametrize(("make", "method"), [("convolutions", "rtn"), ("products", "mse"), ("products", "gptq")])
def test_weights_for_sums_of_16_bits(make: str, method: str) -> None:
    """Two products of a weight and an activation of 255 fit 16 bits in every pair, by default; not with the full range, which is nearer to f32."""
    source, data = (convolutions(), IMAGES) if make == "convolutions" else (products(), ROWS)
    errors = {}
    for reduced, words in ((True, {}), (False, {"reduce_range": False})):
        q = luthier.quantize(source, "int8", calibration=data, method=method, detail=0, **words)
        weights = [v.data for n in q.graph.nodes if n.op == "DequantizeLinear" for v in n.inputs[:1] if v is not None and v.data is not None and v.data.dtype == np.int8]
        assert len(weights) >= 3
        largest = [int(np.abs(w.astype(int)).max()) for w in weights]
        assert max(largest) == (63 if reduced else 127) and reduced == (2 * 255 * max(largest) <= 2**15 - 1)
        module = q.compile()
        errors[reduced] = float(np.mean([nmse(run_ort(source.SerializeToString(), x)[0], module.run(x)["y"]) for x in data]))
        notes = " ".join(q.report.notes)
        assert ("weights of 7 bits" if reduced else "weights of 8 bits") in notes and "VNNI" in notes
    assert errors[False] < errors[True] < 0.02


ON_A_CPU_WITHOUT_VNNI = """
import sys, numpy, onnxruntime
x = dict(numpy.load(sys.argv[1]))
want, *got = (onnxruntime.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, x)[0] for p in sys.argv[2:])
print(*(float(numpy.square(y - want).sum() / numpy.square(want).sum()) for y in got))
"""


@pytest.mark.slow
def test_onnxruntime_on_a_cpu_without_vnni(tmp_path: Path) -> None:
    """In an emulated Haswell: the file made by default is as right as elsewhere, the full range saturates."""
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("qemu-x86_64 is not installed (qemu-user)")
    source = convolutions()
    files = [tmp_path / "f32.onnx"]
    onnx.save(source, files[0])
    np.savez(tmp_path / "x.npz", **IMAGES[0])
    for reduced in (True, False):
        q = luthier.quantize(source, "int8", calibration=IMAGES, reduce_range=reduced, detail=None)
        files.append(q.save(tmp_path / f"{reduced}.onnx"))
    words = [qemu, "-cpu", "Haswell", os.path.realpath(sys.executable), "-c", ON_A_CPU_WITHOUT_VNNI, str(tmp_path / "x.npz"), *map(str, files)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    right, wrong = map(float, done.stdout.split())
    want = run_ort(str(files[0]), IMAGES[0])[0]
    assert right < 1.5 * nmse(want, run_ort(str(files[1]), IMAGES[0])[0]) and wrong > 10 * right


def test_what_runs_bf16() -> None:
    """The report says what the file is good for, and that is so."""
    for precision, runs in (("bf16", False), ("f16", True)):
        q = luthier.quantize(products(), precision)
        assert any("onnxruntime" in n for n in q.report.notes) is not runs
        if runs:
            run_ort(q.model().SerializeToString(), ROWS[0])
        else:
            with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
                run_ort(q.model().SerializeToString(), ROWS[0])


@pytest.mark.parametrize("smooth", [None, 0.5])
def test_static_products(smooth: float | None, tmp_path: Path) -> None:
    source = products()
    loud = [{"x": f["x"] * np.where(np.arange(64) == 7, 50, 1).astype(np.float32)} for f in ROWS]  # one channel 50 times the others
    q = luthier.quantize(source, "int8", calibration=loud, smooth=smooth)
    (want,) = run_ort(source.SerializeToString(), loud[0])
    (got,) = q.compile().run(loud[0]).values()
    (saved,) = run_ort(str(q.save(tmp_path / "m.onnx")), loud[0])
    assert nmse(saved, got) < 1e-4
    assert nmse(want, got) < (5e-3 if smooth is None else 2e-3)


def test_smoothing_is_the_same_function() -> None:
    """In f32 nothing changes; channels that dominate become smaller."""
    graph = load_graph(products())
    data = read_data([{"x": f["x"] * np.where(np.arange(64) == 7, 100, 1).astype(np.float32)} for f in ROWS], graph)
    before = collect_outputs(graph, data)
    layers = weight_layers(graph)
    stats = collect(graph, data, peaks=layers)
    factors = {x.x: smoothing(stats.peaks[x.x.name], [x.matrix()], 0.5) for x in layers}
    assert factors[layers[0].x].argmax() == 7
    smooth_activations(graph, factors, {x.node: x.transposed for x in layers})
    for a, b in zip(before, collect_outputs(graph, data)):
        np.testing.assert_allclose(b["y"], a["y"], rtol=1e-4, atol=1e-4 * np.abs(a["y"]).max())


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.booleans())
def test_parameters_hold_zero_and_the_range(a: float, b: float, symmetric: bool) -> None:
    low, high = min(a, b), max(a, b)
    p = parameters(low, high, symmetric)
    lo, hi = (-127, 127) if symmetric else (0, 255)
    assert lo <= p.zero <= hi and p.scale > 0
    for v in (low, high, 0.0):  # nearest code within one step: the zero point is rounded
        q = np.clip(np.rint(v / p.scale) + p.zero, lo, hi)
        assert abs((q - p.zero) * p.scale - v) <= p.scale * 1.001 + 1e-30
    assert (np.rint(0.0 / p.scale) * p.scale) == 0


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision_sums_in_f32(kind: str) -> None:
    """4096 ones: a sum in f16 stops at 2048, in bf16 at 256."""
    source = model([helper.make_node("MatMul", ["x", "w"], ["y"], "sum")], {"x": [1, 4096]}, {"y": [1, 8]}, {"w": np.ones((4096, 8))})
    q = luthier.quantize(source, kind)
    assert (q.compile().run({"x": np.ones((1, 4096), np.float32)})["y"] == 4096).all()
    assert q.report.bytes_after * 2 == q.report.bytes_before


def test_half_precision_is_onnxruntimes(tmp_path: Path) -> None:
    source = convolutions()
    q = luthier.quantize(source, "f16", calibration=IMAGES[:1])
    (want,) = run_ort(source.SerializeToString(), IMAGES[0])
    (got,) = q.compile().run(IMAGES[0]).values()
    (saved,) = run_ort(str(q.save(tmp_path / "m.onnx")), IMAGES[0])
    assert nmse(want, got) < 1e-5 and nmse(saved, got) < 1e-5  # ten roundings of relative size 2**-11


def test_range_audit_names_the_nodes() -> None:
    """Values above 65504 and constants that become 0 stay in f32, and the model still computes them."""
    c = {"w": np.full((4, 4), 300.0), "big": np.array(3e5), "tiny": np.array(1e-12)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "fine"),
        helper.make_node("Mul", ["h", "h"], ["s"], "square"),
        helper.make_node("Add", ["h", "tiny"], ["t"], "epsilon"),
        helper.make_node("Clip", ["t", "", "big"], ["u"], "clip"),
        helper.make_node("Add", ["s", "u"], ["y"], "sum"),
    ]
    source = model(nodes, {"x": [2, 4]}, {"y": [2, 4]}, c)
    x = {"x": np.full((2, 4), 2.0, np.float32)}
    graph = load_graph(source)
    found = {f.node.name: f.what for f in audit_range(graph, read_data(x, graph))}
    assert found == {"square": "overflows", "epsilon": "vanishes", "clip": "overflows", "sum": "overflows"}
    assert set(n.name for n in (f.node for f in audit_range(graph))) == {"epsilon", "clip"}  # constants alone
    q = luthier.quantize(source, "f16", calibration=x)
    assert sum("stays in f32" in note for note in q.report.notes) == 4
    np.testing.assert_allclose(q.compile().run(x)["y"], run_ort(source.SerializeToString(), x)[0], rtol=2e-3)


# ---------------------------------------------------------------- mixed precision


def test_budgets_are_met_and_spent_well() -> None:
    source = products()
    full = luthier.quantize(source, "f32").report.bytes_before / 1e6
    errors = []
    for share in (0.9, 0.3, 0.15, 0.1):
        for sensitivity in ("output", "proxy"):
            q = luthier.quantize(source, "auto", calibration=ROWS, budget_mb=full * share, sensitivity=sensitivity)
            assert q.report.bytes_after <= full * share * 1e6
        errors.append(q.report.outputs["y"].nmse)
    assert errors == sorted(errors) and errors[0] < 1e-4
    uniform = luthier.quantize(source, "w4", calibration=ROWS, method="gptq")
    mixed = luthier.quantize(source, "auto", calibration=ROWS, budget_mb=uniform.report.bytes_after / 1e6)
    assert mixed.report.outputs["y"].nmse < 3 * uniform.report.outputs["y"].nmse
    with pytest.raises(QuantizationError, match="cannot be met"):
        luthier.quantize(source, "auto", calibration=ROWS, budget_mb=full * 0.01)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0.001, 1.0), min_size=3, max_size=3), min_size=1, max_size=4), st.floats(0.1, 0.95))
def test_spending_is_near_the_best_plan(raw: list[list[float]], share: float) -> None:
    """Against every combination: within the budget, and no worse than the best plan that saves one layer's largest step (30) more."""
    options = {i: [(None, 32.0, 0.0), *((b, float(b), sum(errors[: k + 1])) for k, (b, errors) in enumerate(zip((8, 4, 2), [e] * 3)))] for i, e in enumerate(raw)}
    total = 32.0 * len(raw)
    need = total * share * (30 / 32)
    plan = spend(options, -need)  # type: ignore[arg-type]
    point = {i: {p[0]: p for p in points} for i, points in options.items()}
    assert sum(32.0 - point[i][b][1] for i, b in plan.items()) >= need - 1e-9  # type: ignore[index]
    error = sum(point[i][b][2] for i, b in plan.items())  # type: ignore[index]
    combos = [c for c in itertools.product(*options.values()) if sum(32.0 - p[1] for p in c) >= min(need + 30, 30 * len(raw))]
    assert error <= min(sum(p[2] for p in c) for c in combos) + 1e-9


def test_hull_leaves_bad_widths_out() -> None:
    """A width that costs more error than a narrower one is never taken."""
    steps = hull_steps([(None, 32.0, 0.0), (8, 8.0, 5.0), (4, 4.0, 0.1), (2, 2.0, 3.0)])
    assert [s[2] for s in steps] == [4, 2]


# ---------------------------------------------------------------- options, errors, command line


def test_excluded_nodes_and_convolutions_stay() -> None:
    q = luthier.quantize(products(), "w4", exclude=("sec*",))
    assert [(r.name, r.note) for r in q.report.layers if r.note] == [("second", "excluded")]
    conv = luthier.quantize(convolutions(), "w8")
    assert {r.name for r in conv.report.layers if r.note == "a convolution stays f32"} == {"stem", "depthwise", "pointwise"}


def test_tables_become_bytes(tmp_path: Path) -> None:
    table = RNG.standard_normal((3000, 100)).astype(np.float32)
    nodes = [helper.make_node("Gather", ["t", "i"], ["e"], "embed"), helper.make_node("MatMul", ["e", "w"], ["y"], "project")]
    source = model(nodes, {}, {"y": ["n", 32]}, {"t": table, "w": RNG.standard_normal((100, 32))})
    source.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT64, ["n"]))
    q = luthier.quantize(source, "w8", group=0)
    i = {"i": np.array([0, 2999, 7])}
    (want,) = run_ort(source.SerializeToString(), i)
    (got,) = q.compile().run(i).values()
    (saved,) = run_ort(str(q.save(tmp_path / "m.onnx")), i)
    assert nmse(want, got) < 2e-4 and nmse(saved, got) < 2e-4
    assert q.report.bytes_after < 0.27 * q.report.bytes_before


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("w7", {}, "unknown precision"), ("int4", {}, "did you mean"), ("int8", {}, "needs calibration data"), ("auto", {"calibration": ROWS}, "size budget"),
        ("auto", {"calibration": ROWS, "budget_mb": 1, "sensitivity": "guess"}, "sensitivity"), ("w4", {"budget_mb": 3}, "goes with precision auto"),
        ("w4", {"method": "gptq"}, "needs calibration data"), ("w4", {"method": "best"}, "unknown method"), ("w4", {"group": 3}, "groups of 3"), ("w4", {"scale_dtype": "f8"}, "f8"),
        ("int8", {"calibration": ROWS, "observer": "mean"}, "unknown observer"), ("int8", {"calibration": ROWS, "smooth": 2.0}, "smoothing strength"),
        ("int8", {"calibration": ROWS, "method": "hqq"}, "hqq"), ("w4", {"calibration": []}, "no calibration data"), ("w4", {"samples": 0}, "too few"),
    ],
)  # fmt: skip
def test_bad_options(precision: str, options: dict, message: str) -> None:
    with pytest.raises((QuantizationError, InputError), match=message):
        luthier.quantize(products(), precision, **options)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(products(), "m.onnx")
    np.savez("data.npz", **ROWS[0])

    def call(*words: str) -> str:
        result = CliRunner().invoke(command, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0
        return result.output

    text = call("quantize", "m.onnx", "-p", "w4", "-c", "data.npz", "--report", "r.json", "--no-speed")
    assert "m.w4.onnx" in text and "NMSE" in text and "MB" in text
    report = json.loads(Path("r.json").read_text())
    assert report["bytes_after"] < report["bytes_before"] and len(report["layers"]) == 3 and 0 < report["outputs"]["y"]["nmse"] < 0.02
    call("compile", "m.onnx", "-p", "int8", "-c", "data.npz", "-o", "m.luthier", "--no-speed")
    for words, top in (((), 63), (("--full-range",), 127), (("--form", "luthier"), 127)):
        call("quantize", "m.onnx", "-p", "int8", "-c", "data.npz", "--no-speed", *words)
        assert max(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max() for t in onnx.load("m.int8.onnx").graph.initializer if t.data_type == onnx.TensorProto.INT8) == top
    got = luthier.load("m.luthier").run(ROWS[0])["y"]
    assert nmse(run_ort("m.onnx", ROWS[0])[0], got) < 0.01
    for words in (["compile", "m.onnx", "-p", "int8"], ["quantize", "m.onnx", "-p", "w9"], ["quantize", "m.onnx", "-p", "w4", "-c", "none.npz"], ["quantize", "m.onnx", "-p", "w4", "--form", "x"]):
        with pytest.raises(LuthierError) as error:
            call(*words)
        assert error.value.exit_code == 2


def test_an_estimate_says_so() -> None:
    from luthier.codegen.targets.ceilings import Ceilings

    q = luthier.quantize(products(), "w4")
    q.report.estimate_speed(Ceilings(1, 100.0, {"L1": 100.0, "DRAM": 10.0}, {"L1": 1000}, ""))
    assert q.report.speed["weights_ms_before"] == pytest.approx(q.report.bytes_before / 10e6)
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    q.report.print(Console(file=out, width=250))
    assert "estimate" in out.getvalue() and "no calibration data" in out.getvalue()
