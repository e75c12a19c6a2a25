"""What the pages of the three services show is what their REST APIs answer."""

import asyncio
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from lesft.control import ControlServer
from lesft.live import LivePage, feed
from lesft.wire import WireCounter
from lesft_aggregator import control_api
from lesft_aggregator.server import Aggregator
from lesft_client.control_api import make_app
from lesft_client.status import Status
from lesft_server.run import RoundRecord
from tests.aggregator.harness import Caller, make_adapter, run_aggregator, settings_for
from tests.harness import random_samples, running_server, save_tiny_model, server_settings
from tests.live.harness import events_of, first_of
from tests.server.harness import Crew

Json = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def messages(data: Json) -> list[str]:
    return [event["message"] for event in data["events"]]


def test_the_servers_page_has_its_run_clients_rounds_and_generation(
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.1)
    samples = [random_samples(1, 1), random_samples(3, 2)]
    settings = server_settings(model, tmp_path, clients=2, rounds=3, accumulation=1, threads=1)
    with (
        running_server(settings) as server,
        httpx.Client(base_url=f"http://{server.control}") as http,
        Crew(server, model, samples) as crew,
    ):
        assert first_of(server.control)["curve"]["total"] == 0
        crew.train_round(0)
        crew.train_round(1)
        http.post("/v1/pause")
        http.post("/v1/pause")
        time.sleep(0.06)  # until the service may be read again
        shown = first_of(server.control)
        assert shown["run"] == http.get("/v1/run").json()
        assert shown["run"]["paused"]
        rounds = http.get("/v1/rounds").json()
        assert shown["curve"] == {
            "rounds": [1, 2],
            "loss": [body["loss"] for body in rounds],
            "nll": [body["nll"] for body in rounds],
            "total": 2,
        }
        mean = (rounds[0]["seconds"] + rounds[1]["seconds"]) / 2
        assert shown["run"]["seconds_left"] == pytest.approx(mean, rel=1e-9)
        clients = http.get("/v1/clients").json()
        for client in [*shown["clients"], *clients]:  # heartbeats may come in between
            assert client.pop("last_seen") <= time.time()
            assert client.pop("bytes_received") > 100
            assert client.pop("bytes_sent") > 100
        assert shown["clients"] == clients
        assert [client["share"] for client in clients] == [0.25, 0.75]
        assert shown["generation"] == http.get("/v1/generation").json()
        http.post("/v1/resume")
        time.sleep(0.06)
        told = messages(first_of(server.control))
        assert told[:2] == ["resumed by the operator", "paused by the operator"]
        assert told[2] == "checkpoint taken after round 2"
        assert told[3].startswith("round 2 of 3: loss ")
        assert "client-0 joined (1 of 2)" in told


def test_the_time_left_is_of_the_last_rounds(model: Path, tmp_path: Path) -> None:
    with running_server(server_settings(model, tmp_path, rounds=50, threads=1)) as server:
        run = server.engine.run
        assert run.seconds_left() is None
        run.rounds = [RoundRecord(i, 1.0, 1.0, None, 100.0 if i < 20 else 2.0) for i in range(30)]
        assert run.seconds_left() == 20 * 2.0


def test_a_server_stops_at_once_while_its_page_is_open(model: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        with running_server(server_settings(model, tmp_path, threads=1)) as server:
            events = stack.enter_context(events_of(server.control))
            assert next(events).name == "snapshot"
            started = time.monotonic()
        seconds = time.monotonic() - started
        assert "snapshot" not in [event.name for event in events]  # and the answer ended whole
    assert seconds < 1.5  # without streams it is 0.2 s, with streams that must be cut off 2.2 s


def test_the_aggregators_page_has_its_run_clients_open_round_and_versions(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Any) -> None:
        await caller.join("a")
        await caller.submit("a", make_adapter(1))
        async with httpx.AsyncClient(base_url=f"http://{addresses['control']}") as http:
            run = (await http.get("/v1/run")).json()
            assert run["waiting_for"] == "1 more client to join"
            await caller.submit("b", make_adapter(1), num_samples=30)
            await caller.fetch(1)
            await caller.submit("b", make_adapter(2), base_version=1, num_samples=31)
            shown = await asyncio.to_thread(first_of, addresses["control"])
            assert shown["run"] == (await http.get("/v1/run")).json()
            assert shown["run"]["waiting_for"] == "the adapters of a"
            assert shown["clients"] == (await http.get("/v1/clients")).json()
            rounds = (await http.get("/v1/rounds")).json()
            assert shown["round"] == rounds[-1]
            assert (shown["round"]["client_ids"], shown["round"]["missing"]) == (["b"], ["a"])
            deadline = datetime.fromisoformat(shown["round"]["deadline"].replace("Z", "+00:00"))
            assert abs(deadline.timestamp() - time.time() - 60) < 10
            assert shown["versions"] == [(await http.get("/v1/adapters/1")).json()]

    settings = settings_for(tmp_path, deadline_seconds=60, quorum=2)
    run_aggregator(settings, scenario)


def test_the_aggregators_page_has_the_newest_versions_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_api, "VERSIONS_SHOWN", 3)

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Any) -> None:
        for version in range(5):
            await caller.submit("a", make_adapter(version), base_version=version)
            await caller.fetch(version + 1)
        shown = await asyncio.to_thread(first_of, addresses["control"])
        assert [adapter["version"] for adapter in shown["versions"]] == [5, 4, 3]

    run_aggregator(settings_for(tmp_path, clients=1), scenario)


def test_the_clients_page_has_its_figures_and_a_thinned_curve() -> None:
    status = Status("client-0", WireCounter(), phase="training", rounds=2000, seconds_before=50.0)
    status.loss_by_round = [float(index) for index in range(1200)]
    status.loss_by_round[1199] = None
    status.nll_by_round = [-float(index) for index in range(1200)]
    status.class_counts_by_round = [None] * 1200
    status.wire.add("up", "labels", 8)
    live = LivePage()
    server = ControlServer(make_app(status, live, CollectorRegistry()), insecure=False)
    address = server.start_in_thread("127.0.0.1:0")
    try:
        live.events.note("joined")
        shown = first_of(address)
        answer = httpx.get(f"http://{address}/v1/status").json()
    finally:
        live.stop()
        server.stop_thread()
    assert shown["status"] == {
        name: value for name, value in answer.items() if not name.endswith("_by_round")
    }
    assert (shown["status"]["round"], shown["status"]["wire"]["up"]["labels"]) == (1200, 8)
    curve = shown["curve"]
    assert curve["total"] == 1200
    assert [curve["rounds"][0], curve["rounds"][-1]] == [1, 1200]
    assert 200 < len(curve["rounds"]) <= 500
    for name in ("loss", "nll"):
        assert curve[name] == [answer[f"{name}_by_round"][number - 1] for number in curve["rounds"]]
    assert messages(shown) == ["joined"]
