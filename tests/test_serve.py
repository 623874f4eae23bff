"""``luthier serve``: files of the folder, to this machine, and nothing else."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.cli import serve


@pytest.fixture
def address(tmp_path: Path) -> Iterator[tuple[str, int]]:
    root = tmp_path / "package"
    (root / "sub").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / ".git").mkdir()
    for name in ("index.html", "a b.txt", "sub/index.html", ".env", ".git/config", "sub/.hidden"):
        (root / name).write_text(f"contents of {name}")
    (tmp_path / "secret").write_text("secret")
    (root / "out").symlink_to("../secret")
    (root / "up").symlink_to("..")
    (root / "within").symlink_to("sub/index.html")
    os.mkfifo(root / "pipe")
    server = serve.make_server(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[:2]  # type: ignore[misc]
    server.shutdown()
    server.server_close()


def ask(address: tuple[str, int], target: str, host: str = "localhost", method: str = "GET") -> tuple[int, str]:
    """(status, body) of a request that is sent as it stands."""
    with socket.create_connection(address, timeout=20) as s:
        s.sendall(f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        data = b""
        while part := s.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


@pytest.mark.parametrize(("target", "name"), [("/", "index.html"), ("/a%20b.txt?x=1", "a b.txt"), ("/sub/", "sub/index.html"), ("/within", "sub/index.html")])
def test_files(address: tuple[str, int], target: str, name: str) -> None:
    assert ask(address, target) == (200, f"contents of {name}")


@pytest.mark.parametrize(
    "target",
    ["/out", "/up/secret", "/up/", "/../secret", "/%2e%2e/secret", "/sub/..%2f..%2fsecret", "/.env", "/%2Eenv", "/.git/config", "/sub/.hidden", "/empty/", "/pipe", "/none",
     "/%00", "/index.html%00.txt", "/" + "a" * 5000, "/%ff%fe"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_is_not_there(address: tuple[str, int], target: str, method: str) -> None:
    status, body = ask(address, target, method=method)
    assert status == 404 and "secret" not in body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "LocalHost:8080", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8080", "localhost."])
def test_hosts_of_this_machine(address: tuple[str, int], host: str) -> None:
    assert ask(address, "/", host)[0] == 200


@pytest.mark.parametrize("host", ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]", "localhost:80:80", "127.0.0.2", "evil.example:localhost"])
def test_other_hosts(address: tuple[str, int], host: str) -> None:
    assert ask(address, "/", host)[0] == 403


def test_a_silent_client_is_cut_off(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.Handler, "timeout", 0.3)
    with socket.create_connection(address, timeout=20) as s:
        s.sendall(b"GET / HT")
        start = time.monotonic()
        assert s.recv(100) == b""
    assert time.monotonic() - start < 10
    assert ask(address, "/")[0] == 200
