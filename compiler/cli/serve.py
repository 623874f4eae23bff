"""``luthier serve``: a web package on the loopback interface, with the headers that threads need."""

from __future__ import annotations

import functools
import http.server
import os
import re
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from luthier.cli.terminal import echo
from luthier.errors import ArtifactError
from luthier.manifest import read_manifest

__all__ = ["POLICY", "Server", "make_server"]

POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
ISOLATION = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}


_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])\.?(:[0-9]{1,5})?", re.IGNORECASE)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of one folder; requests that name another host are refused, so that no other site can read them."""

    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds without a byte, either way
    extensions_map = {
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".wasm": "application/wasm", ".js": "text/javascript", ".mjs": "text/javascript", ".json": "application/json",
        ".bin": "application/octet-stream", ".onnx": "application/octet-stream", ".wgsl": "text/plain",
    }  # fmt: skip

    def __init__(self, *args: Any, headers: dict[str, str], quiet: bool, links: bool = False, **kwargs: Any) -> None:
        self.extra, self.quiet, self.links = headers, quiet, links
        super().__init__(*args, **kwargs)

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if not _HOST.fullmatch(self.headers.get("Host", "")):
            self.send_error(403, "served on the loopback interface alone")
            return False
        return True

    def send_head(self) -> Any:
        """What is served: regular files below the folder, links out of it only where asked for, nothing whose name begins with a dot."""
        path = urllib.parse.unquote(self.path.partition("?")[0].partition("#")[0], errors="replace")
        hidden = any(part.startswith(".") for part in path.split("/"))
        if not hidden and "\0" not in path:
            root, file = (os.path.realpath(p) for p in (self.directory, self.translate_path(self.path)))
            if os.path.isdir(file) and path.endswith("/"):
                file = os.path.realpath(os.path.join(file, "index.html"))
            if (self.links or os.path.commonpath([root, file]) == root) and (os.path.isfile(file) or os.path.isdir(file)):
                return super().send_head()
        self.send_error(404, "no such file")
        return None

    def list_directory(self, path: Any) -> None:
        self.send_error(404, "no such file")

    def end_headers(self) -> None:
        for name, value in self.extra.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        if not self.quiet:
            super().log_message(format, *args)


class Server(http.server.ThreadingHTTPServer):
    """``url``: of the folder's start page."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away or fell asleep is no news."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server_address[1]}/"


def make_server(
    folder: Path, port: int = 0, isolated: bool = True, policy: str | None = POLICY, quiet: bool = True, links: bool = False,
) -> Server:
    """A server for ``folder``, on any free port for 0. ``isolated``: send the headers of cross-origin isolation; ``policy``: the
    Content-Security-Policy, None for none; ``links``: serve what links in the folder point to elsewhere. Raises ArtifactError when
    the port is taken."""
    headers = dict(ISOLATION) if isolated else {}
    if policy:
        headers["Content-Security-Policy"] = policy
    handler = functools.partial(Handler, directory=str(folder), headers=headers, quiet=quiet, links=links)
    try:
        return Server(("127.0.0.1", port), handler)
    except OSError as e:
        raise ArtifactError(f"cannot serve on port {port}: {e.strerror or e}", hint="name another one with --port") from e


def check_package(folder: Path) -> None:
    """Raises ArtifactError when ``folder`` is no web package."""
    try:
        manifest = read_manifest(folder)
    except ArtifactError as e:
        raise ArtifactError(f"{folder} is no web package: {e.message}", hint="make one with: luthier compile MODEL --target=wasm -o FOLDER") from e
    if "web" not in manifest or not (folder / "index.html").is_file():
        raise ArtifactError(f"{folder} was compiled for {manifest['target']['name']}, not for the web", hint="compile with --target=wasm or --target=webgpu")


def serve(folder: Path, port: int, show: bool) -> None:
    """Serve the package ``folder`` until interrupted; ``show``: open the start page. Raises ArtifactError."""
    import webbrowser

    check_package(folder)
    server = make_server(folder, port, quiet=False)
    echo(f"{folder} at {server.url} (Ctrl-C stops)")
    if show:
        webbrowser.open(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        echo()
    finally:
        server.server_close()
