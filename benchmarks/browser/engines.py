"""Firefox (WebDriver BiDi) and WebKit (WebDriver) for tests: a page is opened, and functions that a module of its server exports are called.

Both are Debian's: ``apt-get install firefox-esr webkit2gtk-driver xvfb``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.browser import BrowserError

Calls = Sequence[tuple[str, Any]]  # (function, argument)
MINI_BROWSERS = ("/usr/lib/x86_64-linux-gnu/webkit2gtk-4.1/MiniBrowser", "/usr/lib/aarch64-linux-gnu/webkit2gtk-4.1/MiniBrowser")
SCRIPT = """
const done = arguments[3];
import(arguments[0]).then((m) => m[arguments[1]](JSON.parse(arguments[2]))).then((v) => done(JSON.stringify([v])), (e) => done(String(e)));
"""


def lacks_firefox() -> str:
    """What is not installed to run Firefox, empty when all is there."""
    if shutil.which("node") is None:
        return "node is not installed (20 or newer)"
    return "" if shutil.which("firefox-esr") else "firefox-esr is not installed (apt-get install firefox-esr)"


def lacks_webkit() -> str:
    """What is not installed to run WebKit, empty when all is there."""
    if shutil.which("WebKitWebDriver") is None or not any(map(os.path.exists, MINI_BROWSERS)):
        return "WebKit is not installed (apt-get install webkit2gtk-driver)"
    return "" if shutil.which("xvfb-run") else "xvfb is not installed (apt-get install xvfb)"


def in_firefox(page: str, module: str, calls: Calls, timeout: float = 90) -> list[Any]:
    """Results of ``calls`` of functions of ``module`` in the page. Raises BrowserError."""
    command = ["node", "--experimental-websocket", str(Path(__file__).with_name("firefox.mjs")), str(shutil.which("firefox-esr")), page, module, json.dumps(calls)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            raise BrowserError(f"Firefox did not answer within {timeout:.0f} s") from None
    if process.returncode:
        raise BrowserError(errors[-2000:])
    return list(json.loads(out.splitlines()[-1]))


def in_webkit(page: str, module: str, calls: Calls, timeout: float = 60) -> list[Any]:
    """The same in WebKit. Memory is shared as in Safari: under automation WebKitGTK leaves it out unless a setting says so."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        settings = {"HOME": home, "NO_AT_BRIDGE": "1", "JSC_useSharedArrayBuffer": "1", "WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1"}  # it may run as root
        command = ["xvfb-run", "-a", "WebKitWebDriver", f"--port={port}"]
        driver = subprocess.Popen(command, env={**os.environ, **settings}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def ask(path: str, body: Any = None) -> Any:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=timeout) as reply:
                    return json.load(reply)["value"]
            except urllib.error.HTTPError as e:
                raise BrowserError(e.read().decode()) from e

        try:
            _until_up(lambda: ask("/status"))
            options = {"binary": next(p for p in MINI_BROWSERS if os.path.exists(p)), "args": ["--automation"]}
            session = f"/session/{ask('/session', {'capabilities': {'alwaysMatch': {'webkitgtk:browserOptions': options}}})['sessionId']}"
            ask(f"{session}/timeouts", {"script": int(timeout * 1e3)})
            ask(f"{session}/url", {"url": page})
            results = []
            for name, argument in calls:
                text = ask(f"{session}/execute/async", {"script": SCRIPT, "args": [module, name, json.dumps(argument)]})
                if not text.startswith("["):
                    raise BrowserError(text)
                results.append(json.loads(text)[0])
            return results
        finally:
            _end(driver)


def _until_up(ask: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            ask()
            return
        except OSError as e:
            if time.monotonic() > end:
                raise BrowserError(f"the driver does not answer: {e}") from e
            time.sleep(0.1)


def _end(process: subprocess.Popen[Any]) -> None:
    """Ends a process with all that it started."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
