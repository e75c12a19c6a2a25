"""A portion of hostile messages to live services; `python -m tests.hostile` sends the rest."""

from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from lesft.control import ControlServer, make_control_app
from tests.hostile.live import attacked, undisturbed
from tests.hostile.sockets import send_raw
from tests.processes.harness import save_model_with_tokenizer
from tests.recovery.harness import Zygote

ROUNDS, MESSAGES = 8, 150


def test_a_run_comes_out_the_same_whatever_its_services_are_sent(tmp_path: Path) -> None:
    zygote = Zygote()
    try:
        model = save_model_with_tokenizer(tmp_path / "model")
        expected = undisturbed(zygote, tmp_path / "undisturbed", model, ROUNDS)
        outcome, figures = attacked(
            zygote, tmp_path / "attacked", model, MESSAGES, 7, ROUNDS, with_endpoint=False
        )
    finally:
        zygote.close()
    assert outcome == expected
    assert [each.server_errors for each in figures] == [{}, {}, {}]
    assert all(each.messages >= MESSAGES for each in figures)
    server, aggregator, client = figures
    for service in (server, aggregator):
        assert service.statuses["INVALID_ARGUMENT"] > 10
        assert service.raw_connections > 50
    assert client.statuses["400"] > 20


BROKEN_BODY = (
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nno length\r\n"
)


@pytest.mark.parametrize(
    "request_bytes",
    [BROKEN_BODY, BROKEN_BODY[:-13] + b"g" * 70_000, b"\x16\x03\x01" * 30, b"GET / HTTP/9\r\n\r\n"],
)
def test_bad_http_is_refused_without_a_line_in_the_log(
    request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Else strangers could fill a disk, and hide what matters between tracebacks."""
    app = make_control_app("t", CollectorRegistry(), lambda: None)
    server = ControlServer(app, insecure=False)
    address = server.start_in_thread("127.0.0.1:0")
    try:
        for _ in range(3):
            answer = send_raw(address, request_bytes)
            assert answer[:12] in (b"HTTP/1.1 400", b"")
        assert httpx.get(f"http://{address}/healthz", trust_env=False).text == "ok\n"
    finally:
        server.stop_thread()
    assert [record for record in caplog.records if record.name != "httpx"] == []
