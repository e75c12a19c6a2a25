"""The stream of events over a real socket: what it sends when, to whom, and how it ends."""

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from lesft.control import ControlServer
from lesft.identity.access import OPEN_PATHS
from lesft.live import feed, stream
from lesft.live.feed import MAX_WATCHERS
from tests.live.harness import GENERATION, Service, events_of, first_of, serving


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service is read ten times as often."""
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.1)


def wait_until(condition: object, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def watchers(service: Service) -> int:
    assert service.page._feed is not None
    return service.page._feed.watchers


def test_a_reader_gets_a_snapshot_at_once_and_then_what_changes() -> None:
    with serving(Service(run={"round": 1}, clients=[{"id": "a"}])) as service:
        started = time.monotonic()
        with events_of(service.address) as events:
            first = next(events)
            assert (first.name, first.retry) == ("snapshot", 1000)
            assert first.seconds - started < 2
            assert abs(first.data.pop("now") - time.time()) < 1
            assert first.data == {
                "service": "server",
                "run": {"round": 1},
                "clients": [{"id": "a"}],
                "curve": None,
                "generation": dict.fromkeys(GENERATION, 0),
                "events": [],
            }

            changed_at = time.monotonic()
            service.run = {"round": 2}
            second = next(events)
            assert (second.name, second.retry) == ("change", None)
            assert second.seconds - changed_at < 2
            assert second.data.keys() == {"now", "run"}
            assert second.data["run"] == {"round": 2}

            logging.getLogger("lesft_server").warning("client a is away")
            [event] = next(events).data["events"]
            assert (event["level"], event["message"]) == ("WARNING", "client a is away")

            for round_number in range(3, 40):  # far more often than once a second
                service.run = {"round": round_number}
                time.sleep(0.01)
            third = next(events)
            assert third.data["run"] == {"round": 39}
            assert third.seconds - second.seconds > 0.9


def test_a_quiet_stream_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "KEEP_ALIVE_SECONDS", 0.1)
    with serving(Service()) as service, events_of(service.address) as events:
        assert next(events).name == "snapshot"
        assert [(next(events).name, next(events).data) for _ in range(2)] == 2 * [("", {})]


def test_a_stream_ends_after_a_while_so_that_the_token_is_looked_at_again(
    hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "STREAM_SECONDS", 0.3)
    with serving(Service()) as service:
        started = time.monotonic()
        with events_of(service.address) as events:
            assert [event.name for event in events] == ["snapshot"]
        assert 0.3 <= time.monotonic() - started < 1
        wait_until(lambda: watchers(service) == 0)


def test_the_service_is_read_once_for_all_and_not_at_all_when_nobody_watches(hasty: None) -> None:
    with serving(Service(run={"round": 1})) as service:
        started = time.monotonic()
        with ExitStack() as open_streams:
            streams = [open_streams.enter_context(events_of(service.address)) for _ in range(8)]
            for events in streams:
                assert next(events).data["run"] == {"round": 1}
            service.run = {"round": 2}
            for events in streams:
                assert next(events).data["run"] == {"round": 2}
        wait_until(lambda: watchers(service) == 0)
        before = service.snapshots
        assert 2 <= before <= 2 + 20 * (time.monotonic() - started)
        time.sleep(0.3)
        assert service.snapshots == before


def test_only_so_many_may_watch_and_a_place_is_free_again(hasty: None) -> None:
    with serving(Service()) as service:
        with ExitStack() as open_streams:
            streams = [
                open_streams.enter_context(events_of(service.address)) for _ in range(MAX_WATCHERS)
            ]
            assert [next(events).name for events in streams] == MAX_WATCHERS * ["snapshot"]
            response = httpx.get(f"{service.url}/v1/events")
            assert response.status_code == 503
            assert response.json() == {
                "error": "Busy",
                "message": "32 streams of events are open already: close a page",
            }
            assert httpx.get(f"{service.url}/healthz").status_code == 200
        wait_until(lambda: watchers(service) == 0)
        assert first_of(service.address)["service"] == "server"


def test_a_reader_that_does_not_read_is_cut_off_and_delays_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(stream, "SEND_SECONDS", 0.3)
    with serving(Service(run={"text": "x" * 400_000})) as service:
        host, port = service.address.split(":")
        with (
            socket.create_connection((host, int(port))) as idle,
            events_of(service.address) as events,
        ):
            idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            idle.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
            assert next(events).name == "snapshot"
            deadline, turn = time.monotonic() + 8, 0
            cut_off = ""
            while "was cut off" not in cut_off:
                assert time.monotonic() < deadline, "it was not cut off"
                turn += 1
                service.run = {"text": f"{turn}" * 400_000}
                event = next(events)
                cut_off = str(event.data.get("events", ""))
            assert watchers(service) == 1
            service.run = {"text": "the last"}
            while event.data.get("run") != {"text": "the last"}:
                event = next(events)


def test_a_stop_ends_open_streams_at_once() -> None:
    service = Service()
    server = ControlServer(service.app(), insecure=False)
    service.address = server.start_in_thread("127.0.0.1:0")
    with ExitStack() as open_streams, ThreadPoolExecutor() as pool:
        streams = [open_streams.enter_context(events_of(service.address)) for _ in range(3)]
        assert [next(events).name for events in streams] == 3 * ["snapshot"]
        waiting = [pool.submit(lambda events=events: list(events)) for events in streams]
        started = time.monotonic()
        service.page.stop()
        server.stop_thread()
        seconds = time.monotonic() - started
        # They ended whole: the answer's last chunk came.
        assert [future.result(5) for future in waiting] == 3 * [[]]
    assert seconds < 1.5  # with streams that must be cut off it is 2.2
    service.page.stop()


def test_a_stop_before_anybody_came_ends_the_streams_that_come_late() -> None:
    service = Service()
    with serving(service):
        service.page.stop()
        with events_of(service.address) as events:
            assert [event.name for event in events] in ([], ["snapshot"])


def test_figures_that_cannot_be_read_end_the_streams_and_are_an_error_to_the_next(
    hasty: None, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(Service()) as service:
        with events_of(service.address) as events:
            assert next(events).name == "snapshot"
            service.error = RuntimeError("a bug")
            assert [event.name for event in events if event.name != "change"] == []
        assert "the figures for the live page cannot be read" in caplog.text
        assert httpx.get(f"{service.url}/v1/events").json()["error"] == "InternalError"
        service.error, service.run = None, {"round": 9}
        time.sleep(0.06)
        assert first_of(service.address)["run"] == {"round": 9}


def test_the_page_its_files_and_its_events_say_what_browsers_may_do_with_them() -> None:
    policy = (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    types = {"/": "text/html", "/live.css": "text/css", "/live.js": "text/javascript"}
    with serving(Service()) as service, httpx.Client(base_url=service.url) as http:
        for path, media_type in types.items():
            response = http.get(path)
            assert response.status_code == 200
            assert response.headers["content-type"] == f"{media_type}; charset=utf-8"
            assert response.headers["content-security-policy"] == policy
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"
            assert response.headers["cache-control"] == "no-cache"
        assert "<title>LESFT &lt;test&gt;</title>" in http.get("/").text
        with http.stream("GET", "/v1/events") as response:
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["cache-control"] == "no-cache"


def test_the_page_loads_nothing_from_elsewhere_and_all_that_it_names_is_there() -> None:
    with serving(Service()) as service, httpx.Client(base_url=service.url) as http:
        found, seen = ["/"], set[str]()
        while found:
            path = found.pop()
            seen.add(path)
            response = http.get(path)
            assert response.status_code == 200, path
            text = response.text.replace("http://www.w3.org/2000/svg", "")
            assert "://" not in text, path
            names = [
                part.split('"')[0] for part in text.split('"') if ".js" in part or ".css" in part
            ]
            found += [f"/{name.lstrip('./')}" for name in names if name[:1] in "./"]
            found = [name for name in found if name not in seen]
    assert len(seen) == 12
    assert seen <= OPEN_PATHS  # a browser asks for them without a token
