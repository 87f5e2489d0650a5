"""A real S3-compatible server in a process of its own, and a proxy that disturbs what passes it.

As a program, `-m tests.object_server run URL` writes two prompts of `store_cases` to a URL, with
locks that are given up soon, and prints its steps; `serve` is the server, until its input ends.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BEAT, PATIENCE = 0.2, 2.0
ROOT = Path(__file__).parents[1]


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Gives up locks and requests soon."""
    from elm_lanczos.store import bucket

    patch.setattr(bucket, "BEAT", BEAT)
    patch.setattr(bucket, "PATIENCE", PATIENCE)
    pauses = {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(seconds=0.1)}
    retry = {"max_retries": 2, "retry_timeout": timedelta(seconds=10), "backoff": pauses}
    patch.setattr(bucket, "RETRY", retry)


def environment(port: int) -> dict[str, str]:
    """What a user sets to use the server at a port."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-theirs",
        "AWS_REGION": "us-east-1",
    }


VERSIONING = b"<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>"


@contextmanager
def served() -> Iterator[int]:
    """A server with the buckets `bucket` and `versioned`, which keeps versions, and its port."""
    command = [sys.executable, "-m", "tests.object_server", "serve"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, **pipes) as server:
        assert server.stdin is not None and server.stdout is not None
        port = int(server.stdout.readline())
        made = http.client.HTTPConnection("127.0.0.1", port)
        for path, body in (
            ("/bucket", b""),
            ("/versioned", b""),
            ("/versioned?versioning", VERSIONING),
        ):
            made.request("PUT", path, body)
            response = made.getresponse()
            response.read()
            assert response.status == 200
        yield port
        server.stdin.close()


Fault = Callable[[str, str], str | int | None]
"""Of a method and a path: "cut" the request in its middle, "lose" the answer to it, close without
one ("close"), answer with a status, or None: let it pass."""


@contextmanager
def disturbed(port: int, fault: Fault) -> Iterator[int]:
    """A proxy before the server at a port, and its own port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:
                self.close_connection = True

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = fault(self.command, self.path)
            if isinstance(found, int):
                self.answer(found, [], b"<Error><Code>AccessDenied</Code></Error>")
                return
            if found in ("close", "cut"):
                if found == "cut":
                    self.send_half(body)
                self.hang_up()
                return
            server = http.client.HTTPConnection("127.0.0.1", port)
            server.request(self.command, self.path, body or None, dict(self.headers.items()))
            answer = server.getresponse()
            content = answer.read()
            server.close()
            if found == "lose":
                self.hang_up()
            else:
                self.answer(answer.status, answer.getheaders(), content)

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def send_half(self, body: bytes) -> None:
            with socket.create_connection(("127.0.0.1", port)) as server:
                lines = [f"{self.command} {self.path} HTTP/1.1", *str(self.headers).split("\n")]
                head = "\r\n".join(line for line in lines if line)
                server.sendall(f"{head}\r\n\r\n".encode() + body[: len(body) // 2])

        def hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = pass_on

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy.server_port
    finally:
        proxy.shutdown()
        proxy.server_close()


def _serve() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve()
    else:
        from tests.store_cases import HEADERS, run

        hurry(pytest.MonkeyPatch())
        run(sys.argv[2], lambda step: print(step, flush=True), HEADERS[:2])
