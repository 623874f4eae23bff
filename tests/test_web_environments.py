"""Web packages where a page's worker cannot be had or is not the place: Node and Deno, test runners, service workers, extensions, code of
another origin, policies. Everywhere they work, or fall back with a word in `model.info`, or say which policy forbids it.

What is missing (Chromium, npm packages of `python benchmarks/setup_web.py --tests`) skips with the reason.
"""

from __future__ import annotations

import functools
import json
import os
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
from benchmarks.browser import NODE_MODULES, Browser, engines
from luthier.cli import serve
from tests.test_web_browser import model

NODE = shutil.which("node")
DENO = next(iter(sorted(NODE_MODULES.glob("@deno/*/deno"))), None)
X = np.sin(np.arange(96)).astype(np.float32).reshape(1, 96)
node = pytest.mark.skipif(NODE is None, reason="node is not installed")
chromium = pytest.mark.skipif(bool(browsers.missing()), reason=browsers.missing() or "-")

# loads, runs one row, and tells about it; `load` and `options` are what stands before
ASK = """
export async function ask(load, url, options) {
  try {
    const model = await load(url, options);
    const { y } = await model.run({ x: Float32Array.from({ length: 96 }, (_, i) => Math.sin(i)) }, { outputs: ["y"] });
    const answer = { y: Array.from(y.data), info: model.info };
    await model.close();
    return answer;
  } catch (e) {
    return { error: e.name, code: e.code, message: e.message, hint: e.hint };
  }
}
"""


def check(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer is right; its ``info``."""
    assert "y" in answer, answer
    want = onnxruntime.InferenceSession(model().SerializeToString()).run(["y"], {"x": X})[0]
    np.testing.assert_allclose(np.array(answer["y"]).reshape(want.shape), want, rtol=1e-4, atol=1e-6)
    return dict(answer["info"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    (folder / "index.html").write_text('<!doctype html><title>tests</title><link rel="icon" href="data:,">')
    for target in ("wasm", "webgpu"):
        luthier.compile(model(), target=target).save(folder / target)
    (folder / "ask.js").write_text(ASK)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "page.js").write_text("""
import { ask } from "./ask.js";
export const load = async ({ code, url, options }) => ask((await import(code)).load, url, options);
export const knows = (probes) => Object.keys(probes).filter((name) => WebAssembly.validate(Uint8Array.from(atob(probes[name]), (c) => c.charCodeAt(0))));
export async function refusedThenAway({ code }) {
  const { load } = await import(code);
  await fetch("http://localhost:10/").catch(() => undefined);
  await new Promise((done) => setTimeout(done, 50));
  return ask(load, "http://localhost:9/", { worker: false });
}
export async function service({ script }) {
  const answer = new Promise((done) => navigator.serviceWorker.addEventListener("message", (e) => done(e.data)));
  await navigator.serviceWorker.register(script, { type: "module" });
  (await navigator.serviceWorker.ready).active.postMessage("run");
  return answer;
}
""")
    for target in ("wasm", "webgpu"):
        (folder / f"service_{target}.js").write_text(f"""
import {{ ask }} from "./ask.js";
import {{ load }} from "./{target}/index.js";
addEventListener("message", (e) => e.waitUntil(ask(load).then((answer) => e.source.postMessage(answer))));
""")
    return folder


# ---------------------------------------------------------------- without a browser


def script(root: Path, command: list[str], text: str) -> dict[str, Any]:
    """What the program ``text`` prints last: `load` and `ask` are there, it says `answer = ...`."""
    file = root / "try.mjs"
    file.write_text(f'let answer;\n{text}\nconsole.log(JSON.stringify(answer));\n')
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


IMPORTS = """
const { ask } = await import("./ask.js");
const { load } = await import("./wasm/index.js");
"""


@node
@pytest.mark.parametrize("worker", [False, True])
def test_node_takes_its_cores(root: Path, worker: bool) -> None:
    """No `navigator` (Node 20): the threads are still those of the machine."""
    hide = 'Object.defineProperty(globalThis, "navigator", { value: undefined, configurable: true });'
    info = check(script(root, [str(NODE)], f"{hide}{IMPORTS}\nanswer = await ask(load, undefined, {{ worker: {json.dumps(worker)} }});"))
    assert info["threads"] == min(len(os.sched_getaffinity(0)), 8)
    assert info["warnings"] == []


JSDOM = """
import { createRequire } from "node:module";
const { JSDOM } = createRequire(MODULES)("jsdom");
const { window } = new JSDOM("<!doctype html><title>t</title>", { url: "http://localhost:3000/" });
for (const name of ["window", "document", "navigator", "location", "URL", "Blob", "AbortController", "AbortSignal", "Event", "EventTarget", "MessageEvent"]) {
  Object.defineProperty(globalThis, name, { value: name === "window" ? window : window[name], configurable: true, writable: true });
}
globalThis.addEventListener = window.addEventListener.bind(window);
for (const name of ["fetch", "TextDecoder", "crypto"]) Object.defineProperty(globalThis, name, { value: undefined, configurable: true });
"""


@node
@pytest.mark.parametrize("options", ["undefined", "{ threads: 1 }", "{ worker: true, threads: 2 }"])
@pytest.mark.parametrize("url", ["undefined", '"wasm"'])
def test_runner_that_defines_document(root: Path, options: str, url: str) -> None:
    """Globals of jsdom, and none of fetch, TextDecoder, crypto, as Jest leaves them: it is Node all the same."""
    if not (NODE_MODULES / "jsdom").is_dir():
        pytest.skip("jsdom is not installed (python benchmarks/setup_web.py --tests)")
    setup = JSDOM.replace("MODULES", json.dumps(str(NODE_MODULES / "x.js")))
    text = f"{setup}process.chdir({json.dumps(str(root))});{IMPORTS}\nanswer = await ask(load, {url}, {options});"
    assert check(script(root, [str(NODE)], text))["warnings"] == []


@pytest.mark.skipif(DENO is None, reason="deno is not installed (python benchmarks/setup_web.py --tests)")
@pytest.mark.parametrize("options", ["{ threads: 1 }", "{ threads: 2 }", "{ threads: 2, worker: true }"])
def test_deno(root: Path, options: str) -> None:
    """With no more permission than to read files."""
    info = check(script(root, [str(DENO), "run", "--no-prompt", "--allow-read"], f"{IMPORTS}\nanswer = await ask(load, undefined, {options});"))
    assert info["variant"] == ("relaxed" if "1" in options else "relaxed-threads") and info["warnings"] == []


# ---------------------------------------------------------------- in Chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as b:
        yield b


def served(root: Path, headers: dict[str, str]) -> Iterator[str]:
    handler = functools.partial(serve.Handler, directory=str(root), headers=headers, quiet=True)
    server = serve.Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.url
    server.shutdown()
    server.server_close()


ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
CDN = {"Access-Control-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin"}
SELF = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; img-src data:"


def in_page(browser: Browser, root: Path, headers: dict[str, str], function: str = "load", code: str = "/wasm/index.js", **argument: Any) -> dict[str, Any]:
    for url in served(root, headers):
        page = browser.open(url)
        answer = dict(page.call("/page.js", function, {"code": code, **argument}))
        page.close()
    return answer


@chromium
@pytest.mark.parametrize("target", ["wasm", "webgpu"])
def test_service_worker(browser: Browser, root: Path, target: str) -> None:
    """A module service worker has neither import() nor workers."""
    answer = in_page(browser, root, ISOLATED, "service", script=f"/service_{target}.js")
    if target == "webgpu" and answer.get("code") in ("NO_WEBGPU", "NO_ADAPTER"):
        pytest.skip(answer["message"])
    info = check(answer)
    if target == "wasm":
        assert info["variant"] == "relaxed" and info["warnings"] == ["one thread: there are no workers in this place"]


@chromium
@pytest.mark.parametrize("policy", [True, False])
def test_extension_background(browser: Browser, root: Path, tmp_path: Path, policy: bool) -> None:
    """The background of an extension, which may compile WebAssembly only where its manifest says so."""
    folder = shutil.copytree(root / "wasm", tmp_path / "extension" / "wasm").parent
    (folder / "ask.js").write_text(ASK)
    (folder / "background.js").write_text(
        'import { ask } from "./ask.js";\nimport { load } from "./wasm/index.js";\nglobalThis.answer = ask(load);\n',
    )
    about: dict[str, Any] = {"manifest_version": 3, "name": "tests", "version": "1", "background": {"service_worker": "background.js", "type": "module"}}
    about["content_security_policy"] = {"extension_pages": f"script-src 'self'{' ' + repr('wasm-unsafe-eval') if policy else ''}; object-src 'self'"}
    (folder / "manifest.json").write_text(json.dumps(about))
    answer = browser.extension(folder)
    if policy:
        info = check(answer)
        assert info["threads"] == 1 and any("workers" in w for w in info["warnings"])
    else:
        assert (answer["error"], answer["code"]) == ("UnsupportedError", "POLICY"), answer
        assert "Content-Security-Policy" in answer["message"] and "'wasm-unsafe-eval'" in answer["hint"]


@chromium
@pytest.mark.parametrize("target", ["wasm", "webgpu"])
def test_code_of_another_origin(browser: Browser, root: Path, target: str) -> None:
    """The page is isolated, the package comes from a server of another origin: the model still has its worker and its threads."""
    for cdn in served(root, CDN):
        info = check(in_page(browser, root, ISOLATED, code=f"{cdn}{target}/index.js", options={"threads": 2} if target == "wasm" else {}))
        assert info["warnings"] == []
        assert target != "wasm" or info["threads"] == 2
        strict = in_page(browser, root, {**ISOLATED, "Content-Security-Policy": SELF.replace("'self'", f"'self' {cdn}")}, code=f"{cdn}{target}/index.js")
        info = check(strict)  # no worker-src blob:
        assert "worker" in info["warnings"][0] and "Content-Security-Policy" in info["warnings"][0], info


@chromium
@pytest.mark.parametrize("names", ["luthier", "other", None])
def test_trusted_types(browser: Browser, root: Path, names: str | None) -> None:
    policy = f"{SELF}; require-trusted-types-for 'script'" + (f"; trusted-types {names}" if names else "")
    info = check(in_page(browser, root, {**ISOLATED, "Content-Security-Policy": policy}, options={"threads": 2}))
    if names == "other":
        assert any("trusted-types" in w for w in info["warnings"]), info
    else:
        assert info["warnings"] == [] and info["threads"] == 2


@chromium
def test_policies_are_named(browser: Browser, root: Path) -> None:
    def answer(policy: str, **argument: Any) -> dict[str, Any]:
        return in_page(browser, root, {**ISOLATED, "Content-Security-Policy": policy}, **argument)

    for options in ({}, {"worker": False}):
        refused = answer(SELF.replace("'wasm-unsafe-eval'", ""), options=options)
        assert (refused["error"], refused["code"]) == ("UnsupportedError", "POLICY"), refused
        assert "'wasm-unsafe-eval'" in refused["hint"]
        refused = answer(SELF.replace("connect-src 'self'", "connect-src 'none'"), options=options)
        assert refused["code"] == "FILE_UNREACHABLE" and "connect-src" in refused["message"], refused
    info = check(answer(SELF.replace("worker-src 'self'", "worker-src 'none'")))
    assert "the page's own thread" in info["warnings"][0] and "worker-src" in info["warnings"][0], info
    # a server that does not answer is not the policy's doing, whatever else that has refused before
    away = in_page(browser, root, {**ISOLATED, "Content-Security-Policy": SELF.replace("connect-src", "connect-src http://localhost:9")}, "refusedThenAway")
    assert away["code"] == "FILE_UNREACHABLE" and "Policy" not in away["message"], away
    refused = answer(SELF.replace("worker-src 'self'", "worker-src 'none'"), options={"worker": True})
    assert (refused["error"], refused["code"]) == ("ClosedError", "WORKER_NOT_STARTED") and "worker-src" in refused["message"], refused


# ---------------------------------------------------------------- other engines


@pytest.mark.parametrize("engine", ["firefox", "webkit"])
def test_other_engines(root: Path, engine: str) -> None:
    """The best variant that the engine knows is loaded, in a worker and on the page's thread, with threads and without."""
    lacking = getattr(engines, f"lacks_{engine}")()
    if lacking:
        pytest.skip(lacking)
    probes = json.loads((root / "wasm" / "manifest.json").read_text())["wasm"]["probes"]
    options: list[dict[str, Any]] = [{"threads": 2}, {"threads": 1}, {"threads": 2, "worker": False}, {"threads": 1, "worker": False}]
    calls: list[tuple[str, Any]] = [("knows", probes), *(("load", {"code": "/wasm/index.js", "options": o}) for o in options)]
    for url in served(root, {**ISOLATED, "Content-Security-Policy": SELF}):
        knows, *answers = getattr(engines, f"in_{engine}")(url, f"{url}page.js", calls)
    assert {"simd", "threads"} <= set(knows)
    for answer, given in zip(answers, options, strict=True):
        info = check(answer)
        assert info["threads"] == given["threads"] and info["warnings"] == []
        assert info["variant"] == ("relaxed" if "relaxed" in knows else "simd") + ("-threads" if given["threads"] > 1 else "")
