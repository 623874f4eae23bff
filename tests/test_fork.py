"""A process that forks while another of its threads compiles: the child compiles and runs, and the parent's helpers end with the parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

FORKS = """
import gc, os, random, signal, sys, threading, time, warnings
import numpy as np
from onnx import TensorProto as T, helper as h, numpy_helper
import luthier
warnings.simplefilter("ignore")

def model(k):  # of other text each time: the cache of kernels knows none
    w = np.full((4, 3), 1 + k, np.float32)
    nodes = [h.make_node("MatMul", ["x", "w"], ["a"]), h.make_node("LeakyRelu", ["a"], ["y"], alpha=1 / (2 + k))]
    ins, outs = [h.make_tensor_value_info("x", T.FLOAT, [2, 4])], [h.make_tensor_value_info("y", T.FLOAT, None)]
    return h.make_model(h.make_graph(nodes, f"m{k}", ins, outs, [numpy_helper.from_array(w, "w")]), opset_imports=[h.make_opsetid("", 20)], ir_version=9)

stop = False
def compiling():
    k = 0
    while not stop:
        luthier.compile(model(k), threads=1)
        k += 1

thread = threading.Thread(target=compiling, daemon=True)
thread.start()
rng, bad = random.Random(1), []
for k in range(int(sys.argv[1])):
    time.sleep(rng.uniform(0, 0.02))
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        y = luthier.compile(model(10**6 + k), threads=1).run({"x": np.ones((2, 4), np.float32)})["y"]
        os._exit(0 if (y == 4.0 * (10**6 + k + 1)).all() and gc.isenabled() else 3)
    bad += [s for s in [os.waitpid(pid, 0)[1]] if s]
stop = True
thread.join()
print(bad)
"""


def test_forks_while_other_threads_compile(tmp_path: Path) -> None:
    environment = {**os.environ, "LUTHIER_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FORKS, "50"], capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.stdout.strip() == "[]", done


HELPERS = """
import os, signal, sys, time
from luthier.codegen.program.compile_ahead import WORTH_A_PROCESS, Workers

with Workers(lambda t: t[:3].encode(), lambda: None, 3) as w:
    for k in range(4):
        w.submit(f"{k:03}" + "x" * (WORTH_A_PROCESS // 2))
    pid = os.fork()
    if pid == 0:  # one that stays, and must not keep the helpers waiting
        time.sleep(100)
        os._exit(0)
    if sys.argv[1] == "dies":
        print(*(p for p, _ in w.children), pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    print(sorted(w.objects().values()))
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_child_does_not_keep_helpers_waiting() -> None:
    done = subprocess.run([sys.executable, "-c", HELPERS, "lives"], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.strip() == "[b'000', b'001', b'002', b'003']", done


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked at in /proc")
def test_helpers_end_with_their_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", HELPERS, "dies"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        *helpers, child = (int(p) for p in process.stdout.readline().split())
        process.wait(timeout=60)
        assert len(helpers) == 2
        try:
            end = time.monotonic() + 20
            while any(map(running, helpers)) and time.monotonic() < end:
                time.sleep(0.05)
            assert not any(map(running, helpers))
        finally:
            os.kill(child, 9)
