"""An OpenAI-compatible service on a real socket that answers by script."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What one request gets; a `status` of 0 is a connection that breaks without a word."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


BROKEN_CONNECTION = Reply(status=0)


def says(text: Any, finish_reason: str | None = "stop") -> Reply:
    """A chat completion with this text."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return Reply(
        body={
            "choices": [{**choice, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 3},
        }
    )


Script = Callable[[str, int], Reply]
"""From a prompt, and how often it came before, to the reply."""


@dataclass
class FakeTeacher:
    """Its address, and what it was asked: bodies, headers and paths in the order of arrival."""

    script: Script
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    models: Reply = field(default_factory=lambda: Reply(body={"data": [{"id": "small"}]}))
    busy: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any] | None) -> Reply:
        if body is None:
            return self.models
        prompt = body["messages"][0]["content"]
        with self.lock:
            before = sum(prompt == each["messages"][0]["content"] for each in self.bodies)
            self.bodies.append(body)
            self.headers.append(headers)
            self.paths.append(path)
            self.busy += 1
            self.most_at_once = max(self.most_at_once, self.busy)
        try:
            return self.script(prompt, before)
        finally:
            with self.lock:
                self.busy -= 1

    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


@contextmanager
def serving(script: Script) -> Iterator[FakeTeacher]:
    """Serve while the block runs."""
    teacher = FakeTeacher(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

        def do_GET(self) -> None:
            self.send(teacher.answer(self.path, dict(self.headers), None))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(teacher.answer(self.path, dict(self.headers), body))

        def send(self, reply: Reply) -> None:
            if reply.status == 0:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            plain = isinstance(reply.body, str)
            data = (reply.body if plain else json.dumps(reply.body)).encode()
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    teacher.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield teacher
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
