"""Headless Chromium through playwright-core, for benchmarks and tests.

The npm packages are in ``build/web/node_modules`` (``benchmarks/setup_web.py``); Chromium is the system's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NODE_MODULES = ROOT / "build" / "web" / "node_modules"
FLAGS = (
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan", "--disable-dev-shm-usage",
)  # fmt: skip


class BrowserError(Exception):
    """The browser or a page failed."""


def chromium() -> str | None:
    """The path of the system's Chromium, None when there is none."""
    return next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


def missing() -> str:
    """What is not installed, empty when a Browser can be made."""
    if shutil.which("node") is None:
        return "node is not installed (20 or newer)"
    if chromium() is None:
        return "chromium is not installed (apt-get install chromium)"
    if not (NODE_MODULES / "playwright-core").is_dir():
        return "playwright-core is not installed (python benchmarks/setup_web.py --tests)"
    return ""


class Browser:
    """One headless Chromium; ``with Browser() as b``. Raises BrowserError when it cannot start or a page throws."""

    def __init__(self, flags: tuple[str, ...] = FLAGS) -> None:
        lack = missing()
        if lack:
            raise BrowserError(lack)
        driver = Path(__file__).with_name("driver.mjs")
        command = ["node", str(driver), str(NODE_MODULES.parent), str(chromium()), *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BrowserError(f"the browser ended with status {self.process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise BrowserError(reply["error"])
        return reply["value"]

    def ask(self, op: str, **request: Any) -> Any:
        """One operation of ``driver.mjs``."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **request}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def open(self, url: str, scripts: tuple[str, ...] = ()) -> Page:
        """A new page with a fresh profile, on its way to ``url``; ``scripts`` run before the page's own."""
        return Page(self, self.ask("open", url=url, scripts=list(scripts)))

    def extension(self, folder: Path) -> Any:
        """What the global promise ``answer`` of the background worker of the extension in ``folder`` comes to."""
        return self.ask("extension", folder=str(folder))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Page:
    """One page of a Browser."""

    def __init__(self, browser: Browser, key: int) -> None:
        self.browser, self.key = browser, key

    def call(self, module: str, name: str, argument: Any = None) -> Any:
        """What the function ``name`` that the module ``module`` (a path on the page's server) exports returns for ``argument``."""
        return self.browser.ask("call", key=self.key, module=module, name=name, argument=argument)

    def wait_for(self, selector: str, timeout: float = 60.0) -> None:
        """Until an element matches the CSS ``selector``; ``timeout`` in seconds."""
        self.browser.ask("waitFor", key=self.key, selector=selector, timeout=timeout * 1e3)

    def text(self, selector: str) -> str:
        return str(self.browser.ask("text", key=self.key, selector=selector))

    def log(self) -> list[str]:
        """What the page wrote to its console."""
        return list(self.browser.ask("log", key=self.key))

    def screenshot(self, path: Path) -> None:
        self.browser.ask("screenshot", key=self.key, path=str(path))

    def close(self) -> None:
        self.browser.ask("close", key=self.key)
