"""RNN, GRU, LSTM against onnxruntime, in every direction and with every optional input."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir.errors import UnsupportedOperator
from tests.ops.check import check_op
from tests.ops.suite import cases, run_case

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
T, B, I, H = 5, 3, 4, 6


def args(kind: str, d: int, seed: int = 0, bias: bool = True, lens: bool = False, init: bool = False, peep: bool = False) -> list:
    r = np.random.default_rng(seed)

    def f(*s: int) -> np.ndarray:
        return (r.standard_normal(s) * 0.5).astype(np.float32)

    g = GATES[kind]
    out = [f(T, B, I), f(d, g * H, I), f(d, g * H, H), f(d, 2 * g * H) if bias else None, np.array([5, 2, 3], np.int32) if lens else None]
    out.append(f(d, B, H) if init else None)
    if kind == "LSTM":
        out += [f(d, B, H) if init else None, f(d, 3 * H) if peep else None]
    while out[-1] is None:
        out.pop()
    return out


def outputs(kind: str) -> int:
    return 3 if kind == "LSTM" else 2


def test_onnx_suite():
    names = [n for n in cases() if n.startswith(("test_lstm", "test_gru", "test_rnn", "test_simple_rnn"))]
    assert len(names) >= 15
    for n in names:
        run_case(cases()[n])


@pytest.mark.parametrize("kind", sorted(GATES))
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("lens", [False, True])
def test_directions(kind, direction, lens):
    d = 2 if direction == "bidirectional" else 1
    attrs = {"hidden_size": H, "direction": direction}
    check_op(kind, args(kind, d, lens=lens, init=True), attrs, outputs=outputs(kind), const=(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(GATES))
def test_no_bias_and_default_state(kind):
    check_op(kind, args(kind, 1, bias=False), {"hidden_size": H}, outputs=outputs(kind), const=(1, 2), rtol=1e-4, atol=1e-5)


def test_gru_linear_before_reset():
    for bias in (True, False):
        check_op("GRU", args("GRU", 2, bias=bias, init=True), {"hidden_size": H, "direction": "bidirectional", "linear_before_reset": 1}, outputs=2, const=(1, 2), rtol=1e-4, atol=1e-5)


def test_lstm_peepholes_and_coupled_gates():
    check_op("LSTM", args("LSTM", 1, init=True, peep=True), {"hidden_size": H}, outputs=3, const=(1, 2), rtol=1e-4, atol=1e-5)
    check_op("LSTM", args("LSTM", 1, init=True), {"hidden_size": H, "input_forget": 1}, outputs=3, const=(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_clip(kind):
    check_op(kind, args(kind, 1, seed=3), {"hidden_size": H, "clip": 0.3}, outputs=2, const=(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "f, alpha, beta",
    [("Relu", None, None), ("LeakyRelu", [0.2], None), ("Affine", [0.5], [0.1]), ("HardSigmoid", [0.3], [0.4]), ("Elu", [0.7], None),
     ("Softsign", None, None), ("Softplus", None, None), ("ScaledTanh", [0.5], [0.8]), ("ThresholdedRelu", [0.1], None)],
)
def test_activations(f, alpha, beta):
    attrs: dict = {"hidden_size": H, "activations": (f,)}
    if alpha:
        attrs["activation_alpha"] = tuple(alpha)
    if beta:
        attrs["activation_beta"] = tuple(beta)
    check_op("RNN", args("RNN", 1, init=True), attrs, outputs=2, const=(1, 2), rtol=1e-4, atol=1e-5)


def test_unknown_activation_is_refused():
    with pytest.raises(UnsupportedOperator, match="activation 'Swoosh'"):
        check_op("RNN", args("RNN", 1), {"hidden_size": H, "activations": ("Swoosh",)}, outputs=2)
