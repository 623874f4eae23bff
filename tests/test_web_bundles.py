"""Production bundles: a small TypeScript app, built by Vite, webpack and esbuild, minified, served as it comes out, run in Chromium with threads.

Needs Chromium, Node and the npm packages of `python benchmarks/setup_web.py --tests`; skipped with the reason without them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import luthier
from benchmarks import browser as browsers
from benchmarks.browser import NODE_MODULES, Browser
from luthier import llm
from luthier.cli import serve
from tests.test_gguf import forward, tiny
from tests.test_web_browser import model

LACKING = browsers.missing() or next(
    (f"{n} is not installed (python benchmarks/setup_web.py --tests)" for n in ("vite", "webpack-cli", "esbuild", "typescript") if not (NODE_MODULES / n).is_dir()), ""
)
pytestmark = pytest.mark.skipif(bool(LACKING), reason=LACKING or "-")
X = np.sin(np.arange(5 * 96)).astype(np.float32).reshape(5, 96)

APP = """
import { load, LuthierError, type Info, type Outputs } from "classifier";

declare const FOLDER: string; // where the model's folder was copied for a bundler that does not follow new URL()

async function main(): Promise<object> {
  const model = await load(typeof FOLDER === "undefined" ? undefined : FOLDER, { threads: 2, requireThreads: true });
  const data = Float32Array.from({ length: 5 * 96 }, (_, i) => Math.sin(i));
  const { y }: Pick<Outputs, "y"> = await model.run({ x: { data, shape: [5, 96] } }, { outputs: ["y"] });
  const rows = Array.from({ length: 5 }, (_, i) => Array.from(data.subarray(96 * i, 96 * i + 96)));
  const again = await model.run({ x: rows });
  const info: Info = model.info;
  let error = {};
  try {
    await model.run({ x: { data, shape: [4, 96] } });
  } catch (e) {
    if (e instanceof LuthierError) error = [e.name, e.code];
  }
  return { info, y: Array.from(y.data), again: Array.from(again.y.data), error };
}

main()
  .catch((e: unknown) => ({ failed: String(e) }))
  .then((result) => {
    document.body.textContent = JSON.stringify(result);
    document.documentElement.dataset.state = "done";
  });
"""
PAGE = '<!doctype html><meta charset="utf-8"><title>app</title><link rel="icon" href="data:,"><body><script type="module" src="{}"></script></body>'
OPTIONS = {
    "compilerOptions": {
        "strict": True, "target": "es2022", "module": "esnext", "moduleResolution": "bundler", "lib": ["es2022", "dom"], "noEmit": True, "types": []
    },
    "include": ["src"],
}  # fmt: skip
WEBPACK = """module.exports = {
  mode: "production", entry: "./src/main.ts", output: { path: __dirname + "/dist" },
  module: { rules: [{ test: /\\.ts$/, loader: %s, options: { target: "es2022" } }] },
};
"""


def tool(folder: Path, name: str, *words: str) -> None:
    done = subprocess.run([str(NODE_MODULES / ".bin" / name), *words], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr


def vite(app: Path) -> None:
    (app / "index.html").write_text(PAGE.format("/src/main.ts"))
    tool(app, "vite", "build", "--logLevel=warn")


def webpack(app: Path) -> None:
    (app / "webpack.config.cjs").write_text(WEBPACK % json.dumps(str(NODE_MODULES / "esbuild-loader")))
    tool(app, "webpack")
    (app / "dist" / "index.html").write_text(PAGE.format("main.js"))


def esbuild(app: Path) -> None:
    tool(app, "esbuild", "src/main.ts", "--bundle", "--minify", "--format=esm", "--outdir=dist", '--define:FOLDER="model/"')
    shutil.copytree(app / "node_modules" / "classifier", app / "dist" / "model")
    (app / "dist" / "index.html").write_text(PAGE.format("main.js"))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {t: luthier.compile(model(), target=t).save(folder / t) for t in ("wasm", "webgpu")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as b:
        yield b


def write_app(folder: Path, package: Path, text: str = APP) -> Path:
    shutil.copytree(package, folder / "node_modules" / "classifier")
    (folder / "src").mkdir()
    (folder / "src" / "main.ts").write_text(text)
    (folder / "package.json").write_text('{"name": "app", "private": true, "type": "module"}')
    (folder / "tsconfig.json").write_text(json.dumps(OPTIONS))
    return folder


def result_of(browser: Browser, folder: Path) -> dict[str, Any]:
    """What the page of a built app shows, served with isolation and the strict policy of `luthier serve`."""
    server = serve.make_server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.open(server.url)
    page.wait_for("html[data-state=done]", 60)
    result = dict(json.loads(page.text("body")))
    assert page.log() == []
    page.close()
    server.shutdown()
    server.server_close()
    return result


@pytest.mark.parametrize(("build", "target"), [(vite, "wasm"), (vite, "webgpu"), (webpack, "wasm"), (esbuild, "wasm"), (esbuild, "webgpu")], ids=lambda f: getattr(f, "__name__", f))
def test_bundle(packages: dict[str, Path], browser: Browser, tmp_path: Path, build: Any, target: str) -> None:
    app = write_app(tmp_path / "app", packages[target])
    build(app)
    out = result_of(browser, app / "dist")
    assert "failed" not in out, out
    want = onnxruntime.InferenceSession(model().SerializeToString()).run(["y"], {"x": X})[0]
    for name in ("y", "again"):
        np.testing.assert_allclose(np.array(out[name]).reshape(want.shape), want, rtol=1e-4, atol=1e-6)
    assert out["error"] == ["InputError", "WRONG_SHAPE"]  # names survive the minifier
    assert out["info"]["warnings"] == []
    if target == "wasm":
        assert out["info"]["threads"] == 2 and out["info"]["variant"] == "relaxed-threads"


SPEAKER = """
import { load } from "classifier";

async function main(): Promise<object> {
  const model = await load(undefined, { threads: 2 });
  const logits = await model.feed([5, 17, 93]);
  return { logits: Array.from(logits), info: model.info };
}

main()
  .catch((e: unknown) => ({ failed: String(e) }))
  .then((result) => {
    document.body.textContent = JSON.stringify(result);
    document.documentElement.dataset.state = "done";
  });
"""


def test_language_model(browser: Browser, tmp_path: Path) -> None:
    """A language model's package depends on libraries for texts and chats, which come into the bundle as npm has installed them."""
    libraries = NODE_MODULES / "@huggingface"
    if not all((libraries / name).is_dir() for name in ("tokenizers", "jinja")):
        pytest.skip("@huggingface/tokenizers and jinja are not installed (python benchmarks/setup_web.py --tests)")
    file = tiny(tmp_path / "tiny.gguf")
    app = write_app(tmp_path / "app", llm.compile_model(file, "wasm", capacity=32, chunk=4, exact=True).save(tmp_path / "speaker"), SPEAKER)
    shutil.copytree(libraries, app / "node_modules" / "@huggingface")
    vite(app)
    assert any("tokenizers" in p.name for p in (app / "dist" / "assets").iterdir())
    out = result_of(browser, app / "dist")
    assert "failed" not in out, out
    want = forward(file, [5, 17, 93])[-1]
    assert np.abs(np.array(out["logits"]) - want).max() < 2e-3 * np.abs(want).max() and out["info"]["threads"] == 2


def test_types(packages: dict[str, Path], tmp_path: Path) -> None:
    """The app and the package's declarations pass a strict check; a wrong name and a wrong type do not."""
    app = write_app(tmp_path / "app", packages["wasm"])
    tool(app, "tsc", "-p", ".")
    for wrong in ('void load().then((m) => m.run({ q: 1 }));', 'void load().then((m) => m.run({ x: "text" }));', "void load(undefined, { thread: 1 });"):
        (app / "src" / "main.ts").write_text(f'import {{ load }} from "classifier";\n{wrong}\n')
        done = subprocess.run([str(NODE_MODULES / ".bin" / "tsc"), "-p", "."], cwd=app, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0, wrong
