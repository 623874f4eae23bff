"""Names of models on a terminal: nothing in them is acted on."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h

from luthier.cli.terminal import printable

EVIL = "\x1b[2J\x07\u202e[bold]x\x9b31m\n\u2028\u200b"


def test_printable() -> None:
    for code in range(0x3000):
        c = chr(code)
        shown = printable(c)
        if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp"):
            assert shown != c and shown.isascii() and shown.startswith("\\")
            assert printable(c, c) == c
        elif unicodedata.category(c) != "Cn":
            assert shown == c
    assert printable("größe/層:0 [bold]") == "größe/層:0 [bold]"
    assert printable("\ud800") == "\\ud800"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evil") / "m.onnx"
    nodes = [h.make_node("Softmax", [f"in{EVIL}"], ["m"], name=f"node{EVIL}"), h.make_node("Relu", ["m"], [f"out{EVIL}"])]
    graph = h.make_graph(
        nodes, f"graph{EVIL}", [h.make_tensor_value_info(f"in{EVIL}", T.FLOAT, [f"n{EVIL}", 3])], [h.make_tensor_value_info(f"out{EVIL}", T.FLOAT, None)]
    )
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    "words",
    [["compile", "{}", "-o", "{}.out"], ["run", "{}"], ["bench", "{}", "--runs", "1"], ["inspect", "{}"], ["run", "{}", "-i", "{}.npy"], ["run", "{}", "--shape", "nothing=1"]],
    ids=["compile", "run", "bench", "inspect", "bad-input", "bad-shape"],
)  # fmt: skip
def test_commands(model: Path, words: list[str]) -> None:
    np.save(f"{model}.npy", np.zeros((1, 4), np.float32))
    code = "import sys; from luthier.cli.commands import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *(w.format(model) for w in words)], capture_output=True, check=False)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode in (0, 2), text
    assert "\\x1b[2J" in text
    acted = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - {"\n", "\t"}
    assert not acted, acted
    if words[0] == "bench":
        assert "[bold]" in text  # no markup either
