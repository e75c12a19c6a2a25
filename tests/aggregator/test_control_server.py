"""The part of the control API that all services share, on an app of its own."""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter

from lesft import bad_requests
from lesft.control import ControlServer, make_control_app, write_endpoints
from lesft.errors import STATUS, InvalidInput, LesftError, Unreachable
from tests.server.harness import wait_until

REASONS: list[str] = []


@pytest.fixture
def app() -> FastAPI:
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    made = make_control_app("test", registry, lambda: REASONS[0] if REASONS else None)

    @made.get("/raise/{name}")
    async def fail(name: str) -> None:
        kinds = {kind.__name__: kind for kind in STATUS}
        raise kinds[name]("what went wrong") if name in kinds else RuntimeError("a secret")

    @made.get("/square")
    async def square(number: int) -> int:
        return number * number

    return made


@pytest.fixture
def client(app: FastAPI) -> Iterator[httpx.Client]:
    server = ControlServer(app, insecure=False)
    address = server.start_in_thread("127.0.0.1:0")
    with httpx.Client(base_url=f"http://{address}") as opened:
        yield opened
    server.stop_thread()


def test_health_readiness_and_metrics(client: httpx.Client) -> None:
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200
    REASONS.append("the model is loading")
    try:
        response = client.get("/readyz")
        assert (response.status_code, response.text) == (503, "the model is loading\n")
        assert client.get("/healthz").status_code == 200
    finally:
        REASONS.clear()
    assert "things_total 3.0" in client.get("/metrics").text


@pytest.mark.parametrize("kind", STATUS)
def test_every_error_of_the_tree_gets_its_status_and_one_body(
    kind: type[LesftError], client: httpx.Client
) -> None:
    response = client.get(f"/raise/{kind.__name__}")
    assert response.status_code == STATUS[kind].http
    assert response.json() == {"error": kind.__name__, "message": "what went wrong"}


def test_a_bug_is_logged_and_told_without_details(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    server = ControlServer(app, insecure=False)
    response = httpx.get(f"http://{server.start_in_thread('127.0.0.1:0')}/raise/bug")
    server.stop_thread()
    assert response.status_code == 500
    assert response.json() == {
        "error": "InternalError",
        "message": "internal error; the service's log has the details",
    }
    assert "RuntimeError: a secret" in caplog.text


def test_wrong_values_and_paths_and_methods_are_named(client: httpx.Client) -> None:
    assert client.get("/square?number=7").json() == 49
    response = client.get("/square?number=seven")
    assert response.status_code == 422
    assert response.json()["error"] == "InvalidInput"
    assert response.json()["message"].startswith("number: Input should be a valid integer")
    assert response.json()["message"].endswith("got 'seven'")
    response = client.get("/nowhere")
    assert response.status_code == 404
    assert response.json() == {
        "error": "NotFound",
        "message": "GET /nowhere: Not Found; /openapi.json lists every path",
    }
    response = client.post("/square")
    assert (response.status_code, response.headers["allow"]) == (405, "GET")
    assert response.json()["message"].startswith("POST /square: Method Not Allowed")


def test_an_address_in_use_or_open_by_accident_or_malformed_is_refused(app: FastAPI) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            Unreachable, match=f"cannot listen on {address}: Address already in use"
        ):
            asyncio.run(ControlServer(app, insecure=False).start(address))
        with pytest.raises(
            Unreachable, match=f"cannot listen on {address}: Address already in use"
        ):
            ControlServer(app, insecure=False).start_in_thread(address)
    with pytest.raises(InvalidInput, match=r"0\.0\.0\.0:0 is not a loopback address"):
        asyncio.run(ControlServer(app, insecure=False).start("0.0.0.0:0"))
    with pytest.raises(InvalidInput, match="an address must be HOST:PORT"):
        asyncio.run(ControlServer(app, insecure=False).start("localhost"))


def test_it_serves_on_the_callers_loop_and_leaves_the_signals_alone(app: FastAPI) -> None:
    async def run() -> None:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        server = ControlServer(app, insecure=False)
        address = await server.start("127.0.0.1:0")
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://{address}/square?number=3")).json() == 9
            now = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            assert now == handlers
        await server.stop()
        host, port = address.split(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=1)

    asyncio.run(run())


def test_stopping_is_safe_at_any_time(app: FastAPI) -> None:
    before = threading.active_count()
    asyncio.run(ControlServer(app, insecure=False).stop())
    ControlServer(app, insecure=False).stop_thread()
    server = ControlServer(app, insecure=False)
    server.start_in_thread("127.0.0.1:0")
    server.stop_thread()
    assert threading.active_count() == before


def test_requests_are_not_logged(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client.get("/healthz")
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_endpoints_are_written_whole(tmp_path: Path) -> None:
    write_endpoints(tmp_path, {"grpc": "127.0.0.1:1", "control": "127.0.0.1:2"})
    write_endpoints(tmp_path, {"grpc": "127.0.0.1:3", "control": "127.0.0.1:4"})
    assert json.loads((tmp_path / "endpoints.json").read_text()) == {
        "grpc": "127.0.0.1:3",
        "control": "127.0.0.1:4",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["endpoints.json"]


UNFINISHED = {
    "nothing": (b"", b""),
    "half a head": (b"GET / HT", b"T"),
    "a body": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n{", b" "),
    "another request": (b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n", b"G"),
}


@pytest.mark.parametrize("what", UNFINISHED)
def test_a_request_that_is_never_finished_holds_no_connection(
    what: str, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bad_requests, "REQUEST_SECONDS", 0.5)
    begin, drop = UNFINISHED[what]
    with connection(client) as stranger:
        stranger.sendall(begin)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 10:  # a drop at a time does not help
                stranger.sendall(drop)
                time.sleep(0.05)
                with contextlib.suppress(BlockingIOError):
                    if stranger.recv(4096, socket.MSG_DONTWAIT) == b"":
                        break
        assert 0.3 < time.monotonic() - began < 8


def test_connections_are_bounded(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_requests, "MAX_CONNECTIONS", 2)
    with (
        connection(client),
        connection(client),
        connection(client) as third,
        contextlib.suppress(ConnectionResetError),
    ):
        assert third.recv(1) == b""
    wait_until(lambda: is_served(client))


def connection(client: httpx.Client) -> socket.socket:
    made = socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=10)
    time.sleep(0.05)  # so that they come in turn
    return made


def is_served(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False
