"""ONNX decoders with past and present: greedy tokens and logits against onnxruntime's loop that feeds present back."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from benchmarks.llm_onnx import Runtime, greedy
from luthier import llm
from luthier.cli.commands import luthier as luthier_command
from luthier.errors import InputError, InvalidModel, TargetError
from luthier.importers.onnx.language import decoder_graph
from luthier.pipeline import run_graph_passes

Array = np.ndarray[Any, Any]
LAYERS, HEADS, KV, D, VOCABULARY, LIMIT = 2, 4, 2, 16, 61, 64
W = HEADS * D
PROMPT = [5, 17, 33, 0, 41, 41, 8]


class Net:
    """Nodes of a model under construction; weights are random."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.consts: list[Any] = []
        self.rng = np.random.default_rng(11)

    def const(self, a: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.consts)}"
        self.consts.append(numpy_helper.from_array(np.asarray(a, dtype), name))
        return name

    def weight(self, *shape: int, size: float = 1.0) -> str:
        return self.const(self.rng.standard_normal(shape) * size / np.sqrt(shape[0]), np.float32)

    def __call__(self, op: str, *ins: str, out: str = "", domain: str = "", outputs: int = 1, **attrs: Any) -> Any:
        names = [f"v{len(self.nodes)}.{k}" for k in range(outputs)]
        if out:
            names[0] = out
        self.nodes.append(helper.make_node(op, list(ins), names, domain=domain, **attrs))
        return names[0] if outputs == 1 else names

    def save(self, path: Path, inputs: dict[str, Any], outputs: dict[str, Any]) -> Path:
        def infos(d: dict[str, Any]) -> list[Any]:
            return [helper.make_tensor_value_info(n, t, s) for n, (t, s) in d.items()]

        g = helper.make_graph(self.nodes, "decoder", infos(inputs), infos(outputs), self.consts)
        ops = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(g, opset_imports=ops, ir_version=9), path)
        return path

    def linear(self, x: str, a: int, b: int) -> str:
        return str(self("MatMul", x, self.weight(a, b)))

    def heads(self, x: str, n: int) -> str:
        return str(self("Transpose", self("Reshape", x, self.const([0, 0, n, D])), perm=[0, 2, 1, 3]))

    def rms(self, x: str) -> str:
        mean = self("ReduceMean", self("Mul", x, x), axes=[-1])
        y = self("Div", x, self("Sqrt", self("Add", mean, self.const(1e-5, np.float32))))
        return str(self("Mul", y, self.const(self.rng.uniform(0.5, 1.5, W), np.float32)))

    def extent(self, x: str, axis: int) -> str:
        return str(self("Gather", self("Shape", x), self.const([axis])))


def ports(kv: int, mask: bool = True, positions: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    ins: dict[str, Any] = {"input_ids": (TensorProto.INT64, ["batch", "sequence"])}
    if mask:
        ins["attention_mask"] = TensorProto.INT64, ["batch", "past_sequence_length + 1"]
    if positions:
        ins["position_ids"] = TensorProto.INT64, ["batch", "sequence"]
    outs: dict[str, Any] = {"logits": (TensorProto.FLOAT, ["batch", "sequence", VOCABULARY])}
    for i in range(LAYERS):
        for kind in ("key", "value"):
            ins[f"past_key_values.{i}.{kind}"] = TensorProto.FLOAT, ["batch", kv, "past_sequence_length", D]
            outs[f"present.{i}.{kind}"] = TensorProto.FLOAT, ["batch", kv, "total", D]
    return ins, outs


def masked(m: Net, scores: str, total: str, length: str) -> str:
    """Causal and padding mask, as exports spell it."""
    cols = m("Range", m.const(0), m("Squeeze", total), m.const(1))
    rows = m("Add", m("Range", m.const(0), m("Squeeze", length), m.const(1)), m("Squeeze", m("Sub", total, length)))
    hidden = m("Greater", m("Unsqueeze", cols, m.const([0])), m("Unsqueeze", rows, m.const([1])))
    pad = m("Equal", m("Unsqueeze", "attention_mask", m.const([1, 2])), m.const(0))
    low = m("Where", m("Or", hidden, pad), m.const(-3.4e38, np.float32), m.const(0, np.float32))
    return str(m("Add", scores, low))


def llama(path: Path, past_elsewhere: bool = False) -> Path:
    """Rotary positions, RMS norms, two query heads on a key head (repeated by Expand), a gated feed-forward net."""
    m = Net()
    table = m.weight(VOCABULARY, W, size=8)
    x = m("Gather", table, "input_ids")
    angles = np.outer(np.arange(LIMIT), 10000.0 ** (-np.arange(0, D, 2) / D))
    cos, sin = (m("Unsqueeze", m("Gather", m.const(np.concatenate([f(angles)] * 2, 1), np.float32), "position_ids"), m.const([1])) for f in (np.cos, np.sin))

    def rotate(t: str) -> str:
        lo, hi = m("Slice", t, m.const([0]), m.const([D // 2]), m.const([3])), m("Slice", t, m.const([D // 2]), m.const([D]), m.const([3]))
        return str(m("Add", m("Mul", t, cos), m("Mul", m("Concat", m("Neg", hi), lo, axis=3), sin)))

    for i in range(LAYERS):
        h = m.rms(x)
        q, k, v = rotate(m.heads(m.linear(h, W, W), HEADS)), rotate(m.heads(m.linear(h, W, KV * D), KV)), m.heads(m.linear(h, W, KV * D), KV)
        length = m.extent(q, 2)
        k = m("Concat", f"past_key_values.{i}.key", k, out=f"present.{i}.key", axis=2)
        v = m("Concat", f"past_key_values.{i}.value", v, out=f"present.{i}.value", axis=2)
        if past_elsewhere:
            more = m("ReduceSum", f"past_key_values.{i}.key", m.const([0, 1, 2, 3]), keepdims=0)
            x = m("Add", x, m("Mul", more, m.const(1e-3, np.float32)))
        total = m.extent(k, 2)
        parts = []
        for t in (k, v):
            shape = m("Concat", m.const([1, KV, HEADS // KV]), total, m.const([D]), axis=0)
            parts.append(m("Reshape", m("Expand", m("Unsqueeze", t, m.const([2])), shape), m("Concat", m.const([1, HEADS]), total, m.const([D]), axis=0)))
        scores = m("Mul", m("MatMul", q, m("Transpose", parts[0], perm=[0, 1, 3, 2])), m.const(D**-0.5, np.float32))
        a = m("MatMul", m("Softmax", masked(m, scores, total, length), axis=-1), parts[1])
        x = m("Add", x, m.linear(m("Reshape", m("Transpose", a, perm=[0, 2, 1, 3]), m.const([0, 0, W])), W, W))
        h = m.rms(x)
        g = m.linear(h, W, 96)
        x = m("Add", x, m.linear(m("Mul", m("Mul", g, m("Sigmoid", g)), m.linear(h, W, 96)), 96, W))
    m("MatMul", m.rms(x), m.weight(W, VOCABULARY, size=2), out="logits")
    return m.save(path, *ports(KV))


def gpt2(path: Path) -> Path:
    """Learned positions from the length of the past, layer norms, one product for queries, keys and values; no mask and no positions given."""
    m = Net()
    length = m.extent("input_ids", 1)
    past = m.extent("past_key_values.0.key", 2)
    places = m("Range", m("Squeeze", past), m("Squeeze", m("Add", past, length)), m.const(1))
    x = m("Add", m("Gather", m.weight(VOCABULARY, W, size=8), "input_ids"), m("Gather", m.weight(LIMIT, W, size=4), places))

    def norm(t: str) -> str:
        return str(m("LayerNormalization", t, m.const(m.rng.uniform(0.5, 1.5, W), np.float32), m.const(m.rng.standard_normal(W) / 8, np.float32), axis=-1))

    rows = m("Unsqueeze", places, m.const([1]))
    for i in range(LAYERS):
        qkv = m("Add", m.linear(norm(x), W, 3 * W), m.weight(3 * W))
        q, k, v = (m.heads(t, HEADS) for t in m("Split", qkv, m.const([W] * 3), outputs=3, axis=-1))
        k = m("Concat", f"past_key_values.{i}.key", k, out=f"present.{i}.key", axis=2)
        v = m("Concat", f"past_key_values.{i}.value", v, out=f"present.{i}.value", axis=2)
        scores = m("Div", m("MatMul", q, m("Transpose", k, perm=[0, 1, 3, 2])), m.const(D**0.5, np.float32))
        cols = m("Range", m.const(0), m("Squeeze", m.extent(k, 2)), m.const(1))
        scores = m("Where", m("LessOrEqual", cols, rows), scores, m.const(-1e9, np.float32))
        a = m("Reshape", m("Transpose", m("MatMul", m("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3]), m.const([0, 0, W]))
        x = m("Add", x, m("Add", m.linear(a, W, W), m.weight(W)))
        x = m("Add", x, m.linear(m("Relu", m.linear(norm(x), W, 96)), 96, W))
    m("MatMul", norm(x), m.weight(W, VOCABULARY, size=2), out="logits")
    return m.save(path, *ports(HEADS, False, False))


def grouped(path: Path) -> Path:
    """com.microsoft's GroupQueryAttention with rotary positions, as onnxruntime's model builder exports it."""
    m = Net()
    x = m("Gather", m.weight(VOCABULARY, W, size=8), "input_ids")
    total = m("ReduceSum", "attention_mask", m.const([1]), keepdims=0)
    keys = m("Cast", m("Sub", total, m.const([1])), to=TensorProto.INT32)
    count = m("Cast", m("Gather", m("Shape", "attention_mask"), m.const(1)), to=TensorProto.INT32)
    angles = np.outer(np.arange(LIMIT), 10000.0 ** (-np.arange(0, D, 2) / D))
    cos, sin = (m.const(f(angles), np.float32) for f in (np.cos, np.sin))
    for i in range(LAYERS):
        h = m.rms(x)
        ins = [m.linear(h, W, W), m.linear(h, W, KV * D), m.linear(h, W, KV * D), f"past_key_values.{i}.key", f"past_key_values.{i}.value", keys, count, cos, sin]
        outs = [f"a{i}", f"present.{i}.key", f"present.{i}.value"]
        m.nodes.append(helper.make_node("GroupQueryAttention", ins, outs, domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV, do_rotary=1))
        x = m("Add", x, m.linear(f"a{i}", W, W))
        x = m("Add", x, m.linear(m("Relu", m.linear(m.rms(x), W, 96)), 96, W))
    m("MatMul", m.rms(x), m.weight(W, VOCABULARY, size=2), out="logits")
    return m.save(path, *ports(KV, True, False))


def whole(path: Path) -> Path:
    """Attention over the tokens of the call alone, beside the states of an encoder."""
    m = Net()
    x = m("Add", m("Gather", m.weight(VOCABULARY, W, size=8), "input_ids"), m("ReduceMean", "encoder_hidden_states", axes=[1]))
    q, k, v = (m.linear(x, W, W) for _ in range(3))
    scores = m("Add", m("MatMul", q, m("Transpose", k, perm=[0, 2, 1])), m("Unsqueeze", m("Log", m("Trilu", m("Expand", m.const(1, np.float32), m("Concat", m.extent(x, 1), m.extent(x, 1), axis=0)), upper=0)), m.const([0])))
    m("MatMul", m("Add", x, m("MatMul", m("Softmax", scores, axis=-1), v)), m.weight(W, VOCABULARY), out="logits")
    ins, outs = ports(KV, False, False)
    more = {"encoder_hidden_states": (TensorProto.FLOAT, ["batch", "encoded", W])}
    return m.save(path, {"input_ids": ins["input_ids"], **more}, {"logits": outs["logits"]})


def compare(path: Path, ours: llm.LanguageModel, given: dict[str, Array] | None = None) -> None:
    """Logits of prompts in pieces and of single tokens, then ten greedy ones, twice."""
    peer = Runtime(str(path))
    peer.given = given or {}
    ours.give(**(given or {}))
    for part in (PROMPT[:3], PROMPT[3:4], PROMPT[4:], [9]):
        a, b = ours.feed(part), peer.feed(part)
        if not peer.pasts:  # the peer sees the tokens of the call alone
            continue
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()
    for _ in range(2):
        ours.reset()
        peer.reset()
        if peer.pasts:
            want = greedy(peer.feed, PROMPT, 10)
        else:
            want = []
            for _ in range(10):
                want.append(int(np.argmax(peer.feed([*PROMPT, *want]))))
        assert list(ours.decode_tokens(PROMPT, 10)) == want
        assert len(set(want)) > 2  # tokens that say something


@pytest.mark.parametrize("make", [llama, gpt2, grouped], ids=["llama", "gpt2", "grouped"])
def test_caches_in_place(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "model.onnx")
    m = llm.load(path, threads=2, capacity=32, chunk=3)
    assert m.about["by"] == "past" and len(m.about["state"]) == 2 * LAYERS
    names = {s.name for s in m.module.inputs}
    assert names == {*m.about["state"], "tokens", "last", "past"} and [s.name for s in m.module.outputs] == ["logits"]
    compare(path, m)
    ops = Counter(n.op for n in run_graph_passes(decoder_graph(path, 32).graph).nodes)
    assert ops["luthier::AppendToCache"] == 2 * LAYERS and ops["Concat"] == 0
    if make is not gpt2:  # it masks with Where, which is no attention that the compiler knows
        assert ops["luthier::AttendFilled"] == LAYERS and ops["luthier::FilledCache"] == 0
    m.module.save(tmp_path / "saved")
    compare(path, llm.load(tmp_path / "saved", threads=1))
    every = llm.load(path, threads=1, capacity=32, chunk=4, all_logits=True).feed(PROMPT)
    assert every.shape == (len(PROMPT), VOCABULARY)
    assert np.abs(every[-1] - Runtime(str(path)).feed(PROMPT)).max() < 1e-4 * np.abs(every).max()


def test_present_fed_back(tmp_path: Path) -> None:
    """A past that is read beside its Concat stays an input."""
    path = llama(tmp_path / "model.onnx", past_elsewhere=True)
    m = llm.load(path, threads=1, capacity=32, chunk=3)
    assert m.about["by"] == "present" and not m.about["state"]
    compare(path, m)
    m.module.save(tmp_path / "saved")
    compare(path, llm.load(tmp_path / "saved", threads=1))
    with pytest.raises(TargetError, match="keeps no cache in place"):
        llm.load(path, "wasm")


def test_without_a_past(tmp_path: Path) -> None:
    path = whole(tmp_path / "model.onnx")
    m = llm.load(path, threads=1, capacity=32, chunk=32)
    assert m.about["by"] == "whole"
    with pytest.raises(InputError, match="needs the input encoder_hidden_states"):
        m.feed([1])
    with pytest.raises(InputError, match="no further input mask"):
        m.give(mask=np.zeros(1))
    compare(path, m, {"encoder_hidden_states": np.random.default_rng(0).standard_normal((1, 5, W)).astype(np.float32)})


def test_on_wasm(tmp_path: Path) -> None:
    pytest.importorskip("wasmtime")
    path = llama(tmp_path / "model.onnx")
    compare(path, llm.load(path, "wasm", threads=1, capacity=32, chunk=3))
    with pytest.raises(TargetError, match="do not run on webgpu"):
        llm.load(path, "webgpu")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("make", [llama, grouped], ids=["llama", "grouped"])
def test_package_for_the_web(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "model.onnx")
    llm.compile_model(path, "wasm", capacity=32, chunk=3).save(tmp_path / "package", 0.1)
    (tmp_path / "run.mjs").write_text("""
    import { load } from "./package/index.js";
    const m = await load(undefined, { threads: 1 });
    const prompt = JSON.parse(process.argv[2]);
    const out = [];
    for (let k = 0; k < 2; k++) {
      const tokens = [];
      m.reset(2 * k);
      for await (const t of m.generateTokens(prompt.slice(2 * k), { maxTokens: 8 })) tokens.push(t);
      out.push(tokens);
    }
    await m.close();
    console.log(JSON.stringify(out));
    """)
    done = subprocess.run(["node", str(tmp_path / "run.mjs"), json.dumps(PROMPT)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    want = greedy(Runtime(str(path)).feed, PROMPT, 8)
    assert json.loads(done.stdout.splitlines()[-1]) == [want, want]


def test_settings_beside_the_model(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = gpt2(tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": LIMIT, "eos_token_id": 7}))
    vocabulary = {chr(97 + i) if i < 26 else f"w{i}": i for i in range(VOCABULARY)}
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    t.save(str(tmp_path / "tokenizer.json"))
    m = llm.load(path, threads=1)
    assert m.capacity == LIMIT and m.end_tokens == {7}
    text = "".join(m.generate("b c d", max_tokens=4))
    m.reset()
    assert text.split() == [t.id_to_token(i) for i in m.decode_tokens([1, 2, 3], 4)]
    with pytest.raises(InputError, match="capacity of 65"):
        llm.load(path, capacity=65)
    cli = CliRunner()
    done = cli.invoke(luthier_command, ["compile", str(path), "--language", "--shape", "cache=16", "-o", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    for source in (path, tmp_path / "made"):
        done = cli.invoke(luthier_command, ["generate", str(source), "b c d", "-n", "4"])
        assert done.exit_code == 0 and done.output.strip() == text.strip(), done.output
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidModel, match=r"cannot read .*config\.json"):
        llm.load(path)


def test_bad_models(tmp_path: Path) -> None:
    path = gpt2(tmp_path / "model.onnx")
    m = llm.load(path, threads=1, capacity=8)
    with pytest.raises(InputError, match="the cache holds 8 positions"):
        m.feed([1] * 9)
    with pytest.raises(InputError, match="token 61 is outside"):
        m.feed([61])
    with pytest.raises(InvalidModel, match="without a tokenizer"):
        list(m.generate("text"))
    with pytest.raises(InputError, match="states the types"):
        llm.load(path, cache_bits=8)
    model = onnx.load(path)
    del model.graph.output[-1]
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(InvalidModel, match="no output belongs to the input"):
        llm.load(tmp_path / "bad.onnx")
    for i in model.graph.input:
        i.name = i.name.replace("input_ids", "pixels")
    for n in model.graph.node:
        n.input[:] = [s.replace("input_ids", "pixels") for s in n.input]
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(InvalidModel, match="is no language model"):
        llm.load(tmp_path / "bad.onnx")
    (tmp_path / "bad.onnx").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InvalidModel, match="no ONNX model"):
        llm.load(tmp_path / "bad.onnx")


@pytest.mark.parametrize("heads", [2, 4, 6])
@pytest.mark.parametrize("masked", [None, "rows", "heads", "nothing"])
def test_attention_over_caches(heads: int, masked: str | None) -> None:
    """Against the softmax in f64, for prompts and single tokens; what lies behind the filled positions is NaN and must not be read."""
    from luthier.build_graph import compile_graph
    from luthier.importers.builder import GraphBuilder
    from luthier.ir.dtypes import f32, u8
    from luthier.ir.expr import var

    b = GraphBuilder("attend")
    s, p = var("S", lo=1), var("P", lo=0)
    k, v = (b.input(n, f32, [1, 2, 21, 24]) for n in "kv")
    q, past = b.input("q", f32, [1, heads, s, 24]), b.input("past", u8, [p])
    shape = {None: None, "rows": [s, p + s], "heads": [1, heads, 1, p + s], "nothing": [s, p + s]}[masked]
    mask = [] if shape is None else [b.input("mask", f32, shape)]
    b.output("y", b.op("luthier::AttendFilled", k, v, q, past, *mask, scale=0.3))
    module = compile_graph(b.graph(), threads=2)
    rng = np.random.default_rng(0)
    for rows, before in ((1, 0), (1, 7), (3, 4), (9, 0), (5, 16), (2, 15)):
        t = rows + before
        ks, vs = (np.full((1, 2, 21, 24), np.nan, np.float32) for _ in range(2))
        for a in (ks, vs):
            a[:, :, :t] = rng.standard_normal((1, 2, t, 24))
        x = rng.standard_normal((1, heads, rows, 24)).astype(np.float32)
        given: list[Array] = []
        if shape is not None:
            given = [rng.standard_normal((1, heads, 1, t) if masked == "heads" else (rows, t)).astype(np.float32)]
        if masked == "nothing":
            given[0][0] = -np.inf
        got = module(ks, vs, x, np.zeros(before, np.uint8), *given)[0]
        kr, vr = (np.repeat(a[:, :, :t].astype(np.float64), heads // 2, 1) for a in (ks, vs))
        scores = x @ kr.swapaxes(-1, -2) * 0.3 + (given[0] if given else 0)
        top = scores.max(-1, keepdims=True)
        e = np.exp(scores - np.where(np.isinf(top), 0, top))
        want = e / np.maximum(e.sum(-1, keepdims=True), 1e-300) @ vr
        assert np.abs(got - want).max() < 1e-5, (rows, before)


def real(name: str) -> Path:
    path = Path("build/models") / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path} is not there (benchmarks/models.py makes it)")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gpt2-ts"])
def test_gpt2(name: str) -> None:
    path = real(name)
    prompt = [464, 3139, 286, 4881, 318, 1969, 13, 383]
    ours, peer = llm.load(path, threads=2, capacity=64, chunk=5), Runtime(str(path), 2)
    assert ours.about["by"] == "past"
    assert list(ours.decode_tokens(prompt, 20)) == greedy(peer.feed, prompt, 20)


@pytest.mark.slow
def test_a_decoder_without_a_past() -> None:
    """flan-t5's decoder gets the whole sequence every time, and the states of an encoder."""
    path = real("flan-t5-decoder")
    rng = np.random.default_rng(2)
    given = {"encoder_hidden_states": rng.standard_normal((1, 9, 512)).astype(np.float32) / 4, "encoder_attention_mask": np.ones((1, 9), np.int64)}
    ours = llm.load(path, threads=2, capacity=64, chunk=64)
    ours.give(**given)
    model = onnx.load(path)
    model.opset_import[0].version = 19  # the evaluator has no DequantizeLinear of 18, which is the same
    reference = ReferenceEvaluator(model)
    tokens, errors = [0], []
    with np.errstate(all="ignore"):
        for _ in range(3):
            want = reference.run(["logits"], {"input_ids": np.array([tokens]), **given})[0][0, -1]
            got = ours.feed(tokens[-1:])
            errors.append(np.abs(got - want).max() / np.abs(want).max())
            assert int(np.argmax(got)) == int(np.argmax(want))
            tokens.append(int(np.argmax(want)))
    # dynamic quantization: a value on the edge between two integers moves what follows; it is one call in three here
    assert sorted(errors)[1] < 1e-5
