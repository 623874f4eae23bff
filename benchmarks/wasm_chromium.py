"""Times artifacts of the wasm target in headless Chromium: one page, one instance a folder, results posted back.

Used by ``wasm_speed.py`` (``--engines chromium:relaxed``); needs ``chromium`` on the path.
"""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

PAGE = """<!doctype html><script type="module">
const RECORD = 48, EXTENTS = 16;
const [folders, variant, threads, runs] = await (await fetch("/job")).json();
const get = async (u) => {
  const r = await fetch(u);
  if (!r.ok) throw new Error(`${u}: ${r.status}`);
  return new Uint8Array(await r.arrayBuffer());
};
const out = {};
for (const folder of folders) {
  try {
    const manifest = await (await fetch(`/${folder}/manifest.json`)).json(), spec = manifest.wasm;
    const module = await WebAssembly.compile(await get(`/${folder}/model.${variant}.wasm`));
    const shared = variant.endsWith("threads");
    const memory = new WebAssembly.Memory(shared ? {initial: spec.pages, maximum: spec.max_pages, shared} : {initial: spec.pages});
    const {lt_bind, lt_run} = new WebAssembly.Instance(module, {env: {memory}}).exports;
    new Uint8Array(memory.buffer).set((await get(`/${folder}/weights.bin`)).subarray(0, manifest.weights_bytes), spec.weights);
    const workers = [];
    for (let k = 1; shared && k < threads; k++) {
      const w = new Worker("/worker.js");
      w.postMessage({module, memory, number: k});
      workers.push(w);
    }
    const shapes = await (await fetch(`/${folder}/shapes.json`)).json();
    manifest.inputs.forEach((x, j) => new Int32Array(memory.buffer, spec.io + RECORD * j + EXTENTS, 8).set(shapes[x.name]));
    let status = lt_bind(threads);
    if (status) throw new Error(`lt_bind ${status}`);
    for (let j = 0; j < manifest.inputs.length; j++) {
      const [at] = new Uint32Array(memory.buffer, spec.io + RECORD * j, 2);
      new Uint8Array(memory.buffer).set(await get(`/${folder}/input-${j}.bin`), at);
    }
    const times = [];
    let begin = performance.now();
    while (performance.now() - begin < 400) lt_run(threads, 0);  // until the optimising tier has taken over
    await new Promise((r) => setTimeout(r, 200));
    for (let k = 0; k < runs; k++) {
      const t0 = performance.now();
      status = lt_run(threads, 0);
      times.push(performance.now() - t0);
      if (status) throw new Error(`lt_run ${status}`);
    }
    const want = new Float32Array((await get(`/${folder}/output-0.bin`)).buffer);
    const [at, bytes] = new Uint32Array(memory.buffer, spec.io + RECORD * manifest.inputs.length, 2);
    const got = new Float32Array(memory.buffer, at, bytes / 4);
    let worst = 0, scale = 0;
    for (let k = 0; k < want.length; k++) {
      worst = Math.max(worst, Math.abs(want[k] - got[k]));
      scale = Math.max(scale, Math.abs(want[k]));
    }
    if (got.length !== want.length || !(worst <= 1e-3 * scale)) throw new Error(`wrong output: off by ${worst} of ${scale}`);
    times.sort((a, b) => a - b);
    out[folder] = {least: times[0], middle: times[times.length >> 1]};
    for (const w of workers) w.terminate();
  } catch (e) {
    out[folder] = {error: String(e)};
  }
}
await fetch("/done", {method: "POST", body: JSON.stringify(out)});
</script>"""
WORKER = """onmessage = (e) => {
  const {module, memory, number} = e.data;
  new WebAssembly.Instance(module, {env: {memory}}).exports.lt_worker(number);
};"""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-gpu",
)  # fmt: skip


def measure(root: Path, names: list[str], variant: str, threads: int, runs: int, flags: tuple[str, ...] = (), limit: float = 100.0) -> dict[str, Any]:
    """{folder: {"least", "middle"} in ms or {"error"}}. Raises RuntimeError when the browser gives no answer in ``limit`` seconds."""
    done = threading.Event()
    result: dict[str, Any] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            for k, v in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cross-Origin-Opener-Policy", "same-origin"), ("Cross-Origin-Embedder-Policy", "require-corp")):
                self.send_header(k, v)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path == "/":
                self.answer(PAGE.encode(), "text/html")
            elif path == "/job":
                self.answer(json.dumps([names, variant, threads, runs]).encode(), "application/json")
            elif path == "/worker.js":
                self.answer(WORKER.encode(), "text/javascript")
            elif (root / path[1:]).is_file() and ".." not in path:
                self.answer((root / path[1:]).read_bytes(), "application/octet-stream")
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            result.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(b"", "text/plain")
            done.set()

        def log_message(self, *args: Any) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile = tempfile.mkdtemp(prefix="luthier-chromium-")
    browser = subprocess.Popen(
        [shutil.which("chromium") or "chromium", *FLAGS, *flags, f"--user-data-dir={profile}", f"http://127.0.0.1:{server.server_port}/"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        if not done.wait(limit):
            raise RuntimeError(f"Chromium gave no answer in {limit} s")
    finally:
        browser.terminate()
        browser.wait(20)
        server.shutdown()
        shutil.rmtree(profile, ignore_errors=True)
    return result
