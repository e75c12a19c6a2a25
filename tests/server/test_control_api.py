"""The server's HTTP side before, during and after a run, its orders, and gRPC's own services."""

import errno
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lesft.errors import InvalidInput, RunStopped
from lesft.micro_batch import MicroBatch, StepKey, StepResult
from lesft_server.ledger import Entry
from tests.harness import RunningServer, random_samples, running_server, server_settings
from tests.server.harness import (
    SERVICES,
    Crew,
    join,
    leaving,
    make_batch,
    raw_channel,
    refusal,
    step_messages,
    wait_until,
)

SHARES = {"client-0": 0.25, "client-1": 0.75}
SAMPLES = [random_samples(1, 1), random_samples(3, 2)]


@contextmanager
def serving(
    model: Path, state: Path, **options: Any
) -> Iterator[tuple[RunningServer, httpx.Client]]:
    values: dict[str, Any] = {"clients": 2, "accumulation": 2, "threads": 1, **options}
    settings = server_settings(model, state, **values)
    with (
        running_server(settings) as server,
        httpx.Client(base_url=f"http://{server.control}") as http,
    ):
        yield server, http


@pytest.fixture
def waiting(model: Path, tmp_path: Path) -> Iterator[tuple[RunningServer, httpx.Client]]:
    with serving(model, tmp_path) as pair:
        yield pair


def metrics(http: httpx.Client) -> dict[str, float]:
    """Our own samples of /metrics."""
    lines = http.get("/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("lesft_")]
    return {name: float(value) for name, value in pairs}


def run_body(server: RunningServer, **changes: Any) -> dict[str, Any]:
    return {
        "state": "waiting for clients",
        "reason": "",
        "waiting_for": "2 more clients to join",
        "paused": False,
        "rounds_done": 0,
        "seconds_left": server.engine.run.seconds_left(),
        "steps_applied": 0,
        "lineage": server.engine.run.lineage,
        "clients_joined": 0,
        "spec_fingerprint": server.spec.fingerprint(),
        "spec": server.spec.model_dump(mode="json"),
        **changes,
    }


def client_bodies(http: httpx.Client, since: float) -> list[dict[str, Any]]:
    """/v1/clients without `last_seen`, which must lie between `since` and now, and the bytes."""
    bodies: list[dict[str, Any]] = http.get("/v1/clients").json()
    for body in bodies:
        assert since <= body.pop("last_seen") <= time.time()
        assert body.pop("bytes_received") > 0
        assert body.pop("bytes_sent") > 0
    return bodies


def client_body(index: int, connected: bool, next_round: int) -> dict[str, Any]:
    name = f"client-{index}"
    return {
        "client_id": name,
        "num_samples": len(SAMPLES[index]),
        "share": SHARES[name],
        "connected": connected,
        "next_round": next_round,
        "next_micro": 0,
        "resumed": 0,
        "away_because": "" if connected else "it left",
    }


def by_share(window: list[list[StepResult]], figure: str) -> float:
    """Mean over a round's micro-batches of the clients' figures weighted by their shares."""
    sums = [
        sum(share * getattr(r, figure) for share, r in zip(SHARES.values(), results, strict=True))
        for results in window
    ]
    return sum(sums) / len(sums)


def round_body(index: int, window: list[list[StepResult]]) -> dict[str, Any]:
    counts = [result.class_counts for results in window for result in results]
    return {
        "round": index,
        "loss": pytest.approx(by_share(window, "loss"), rel=1e-12),
        "nll": pytest.approx(by_share(window, "nll"), rel=1e-12),
        "class_counts": [sum(column) for column in zip(*filter(None, counts), strict=True)],
    }


def assert_rounds(http: httpx.Client, windows: list[list[list[StepResult]]], first: int) -> None:
    bodies = http.get("/v1/rounds", params={"first": first}).json()
    seconds = [body.pop("seconds") for body in bodies]
    states = [body.pop("device_seconds") for body in bodies]
    assert bodies == [round_body(i, window) for i, window in enumerate(windows)][first:]
    assert all(0 < s < 60 for s in seconds)
    for whole, parts in zip(seconds, states, strict=True):
        assert set(parts) == {"keep", "idle", "cohort_wait", "queue", "back"}
        assert sum(parts.values()) == pytest.approx(whole)
        assert parts["back"] > 0


def test_the_bodies_follow_a_run_from_its_start_to_its_end(
    model: Path, waiting: tuple[RunningServer, httpx.Client]
) -> None:
    server, http = waiting
    start = time.time()
    # Before.
    assert http.get("/v1/run").json() == run_body(server)
    assert server.engine.run.lineage == ""
    assert http.get("/v1/clients").json() == []
    assert http.get("/v1/rounds").json() == []
    nothing_written = {
        "lesft_server_sequences": 0.0,
        "lesft_server_cache_bytes_reserved": 0.0,
        "lesft_server_decoded_tokens_total": 0.0,
        "lesft_server_decode_batches_total": 0.0,
        "lesft_server_decode_steps_total": 0.0,
    }
    figures = metrics(http)
    for name, value in {
        "lesft_server_rounds_total": 0.0,
        "lesft_server_clients": 0.0,
        "lesft_server_kept_activation_bytes": 0.0,
        "lesft_server_remembered_bytes": 0.0,
        **nothing_written,
    }.items():
        assert figures[name] == value, name
    assert "lesft_server_loss" not in figures
    assert http.get("/readyz").text == "ok\n"

    with Crew(server, model, SAMPLES) as crew:
        # During.
        training = {"state": "training", "clients_joined": 2}
        both = "clients client-0, client-1"
        assert http.get("/v1/run").json() == run_body(server, waiting_for=both, **training)
        assert client_bodies(http, start) == [client_body(i, True, 0) for i in range(2)]
        first = crew.train_round(0)
        assert http.get("/v1/run").json() == run_body(
            server, waiting_for=both, rounds_done=1, steps_applied=2, **training
        )
        lineage = server.engine.run.lineage
        assert re.fullmatch("[0-9a-f]{64}", lineage)
        assert http.get("/readyz").text == "ok\n"
        assert client_bodies(http, start) == [client_body(i, True, 1) for i in range(2)]
        assert_rounds(http, [first], first=0)
        assert_rounds(http, [first], first=1)
        figures = metrics(http)
        seconds = http.get("/v1/rounds").json()[0]["seconds"]
        for name, value in {
            "lesft_server_rounds_total": 1.0,
            "lesft_server_clients": 2.0,
            "lesft_server_kept_activation_bytes": 0.0,
            "lesft_server_remembered_bytes": 0.0,
            "lesft_server_loss": pytest.approx(by_share(first, "loss"), rel=1e-12),
            "lesft_server_round_seconds": pytest.approx(seconds),
            **nothing_written,
        }.items():
            assert figures[name] == value, name
        second = crew.train_round(1)
        assert by_share(second, "loss") != by_share(first, "loss")
        crew.leave()

    # After.
    assert http.get("/v1/run").json() == run_body(
        server, state="finished", waiting_for="", clients_joined=2, rounds_done=2, steps_applied=4
    )
    assert server.engine.run.lineage not in ("", lineage)
    assert client_bodies(http, start) == [client_body(i, False, 2) for i in range(2)]
    for offset in (0, 1, 2, 10**9):
        assert_rounds(http, [first, second], first=offset)
    figures = metrics(http)
    assert figures["lesft_server_rounds_total"] == 2.0
    assert figures["lesft_server_clients"] == 0.0
    assert figures["lesft_server_loss"] == pytest.approx(by_share(second, "loss"), rel=1e-12)
    assert http.get("/readyz").text == "ok\n"


def test_a_run_that_was_stopped_is_not_ready_and_says_why(
    waiting: tuple[RunningServer, httpx.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, http = waiting

    def fail(*_: object) -> list[StepResult]:
        raise InvalidInput("the loss is NaN")

    monkeypatch.setattr(server.engine.back, "train_step", fail)
    with raw_channel(server.grpc) as channel:
        sessions = [join(channel, server.spec, name) for name in "ab"]
        for session in sessions:
            session.send(*step_messages(one_sample(StepKey(0, 0))))
        for session in sessions:
            session.refusal()
    response = http.get("/readyz")
    assert (response.status_code, response.text) == (503, "the run has ended: the loss is NaN\n")
    assert http.get("/v1/run").json() == run_body(
        server, state="stopped", reason="the loss is NaN", waiting_for="", clients_joined=2
    )
    clients = http.get("/v1/clients").json()
    assert [client["connected"] for client in clients] == [False, False]
    assert clients[0]["away_because"] == "the run has ended: the loss is NaN"
    response = http.get("/healthz")
    assert (response.status_code, response.text) == (200, "ok\n")


def test_a_run_that_waits_for_a_client_is_not_ready_until_it_is_back(
    waiting: tuple[RunningServer, httpx.Client],
) -> None:
    server, http = waiting
    with raw_channel(server.grpc) as channel:
        sessions = [join(channel, server.spec, name) for name in "ab"]
        sessions[1].send(leaving("the battery is low"))
        sessions[1].rest()
        why = "client 'b' to come back (the battery is low)"
        response = http.get("/readyz")
        assert (response.status_code, response.text) == (503, f"waiting for {why}\n")
        assert http.get("/v1/run").json()["waiting_for"] == why
        clients = http.get("/v1/clients").json()
        assert [client["away_because"] for client in clients] == ["", "the battery is low"]
        assert [client["connected"] for client in clients] == [True, False]

        sessions[1] = join(channel, server.spec, "b", StepKey(0, 0))
        assert http.get("/readyz").text == "ok\n"
        clients = http.get("/v1/clients").json()
        assert [client["away_because"] for client in clients] == ["", ""]
        assert [client["resumed"] for client in clients] == [0, 1]


def test_a_run_whose_disk_is_full_is_not_ready_and_goes_on_once_there_is_room(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lesft.files._ROOM_PAUSE_SECONDS", 0.02)
    with (
        serving(model, tmp_path, clients=1, heartbeat_seconds=0.05) as (server, http),
        raw_channel(server.grpc) as channel,
    ):
        ledger, full = server.engine.journal.ledger, threading.Event()
        append = ledger.append

        def try_to_append(entries: Sequence[Entry]) -> None:
            if full.is_set():
                raise OSError(errno.ENOSPC, "No space left on device")
            append(entries)

        monkeypatch.setattr(ledger, "append", try_to_append)
        full.set()
        session = join(channel, server.spec, "a")
        session.send(*step_messages(one_sample(StepKey(0, 0))))
        why = f"no room on disk for {tmp_path}: free some, training goes on by itself"
        wait_until(lambda: session.receive_heartbeat() == why)
        response = http.get("/readyz")
        assert (response.status_code, response.text) == (503, f"waiting for {why}\n")
        full.clear()
        assert session.receive_step().round == 0
        assert http.get("/readyz").text == "ok\n"


# ---------------------------------------------------------------------- orders to the run


def one_sample(key: StepKey) -> MicroBatch:
    return make_batch(key, (7,), (8,), (3,))


def order(http: httpx.Client, name: str) -> dict[str, Any]:
    """Give an order twice, which must be as good as once; the run as the answer has it."""
    first, second = (http.post(f"/v1/{name}") for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200)
    body: dict[str, Any] = second.json()
    return body


def test_a_paused_run_takes_no_step_until_it_is_resumed(model: Path, tmp_path: Path) -> None:
    with (
        serving(model, tmp_path, clients=1, heartbeat_seconds=0.05) as (server, http),
        raw_channel(server.grpc) as channel,
    ):
        session = join(channel, server.spec, "a")
        paused = "the server's operator, who has paused the run"
        assert order(http, "pause") == run_body(
            server, state="training", waiting_for=paused, paused=True, clients_joined=1
        )
        session.send(*step_messages(one_sample(StepKey(0, 0))))
        wait_until(lambda: session.receive_heartbeat() == paused)
        assert server.engine.run.steps == 0
        assert order(http, "resume")["paused"] is False
        assert session.receive_step().round == 0
        assert http.get("/v1/run").json()["steps_applied"] == 1


def rounds_with_checkpoint(channel: grpc.Channel, server: RunningServer) -> list[list[bool]]:
    """Train a client to the end; what each answer says of a checkpoint."""
    session = join(channel, server.spec, "a")
    flags = []
    for round_index in range(server.spec.rounds):
        for micro in range(server.spec.accumulation):
            session.send(*step_messages(one_sample(StepKey(round_index, micro))))
        flags.append([session.receive_step().checkpoint for _ in range(server.spec.accumulation)])
    return flags


def test_checkpoints_are_taken_with_each_aggregation_and_when_an_operator_asks(
    model: Path, tmp_path: Path
) -> None:
    options = {"clients": 1, "rounds": 4, "aggregation_interval": 4}
    none, at_the_end = [False, False], [False, True]
    for asked, rounds in ((False, [none] * 3), (True, [at_the_end, none, none])):
        with (
            serving(model, tmp_path / str(asked), **options) as (server, http),
            raw_channel(server.grpc) as channel,
        ):
            if asked:
                order(http, "checkpoint")
            assert rounds_with_checkpoint(channel, server) == [*rounds, at_the_end]


def test_an_operator_stops_the_run_after_its_round_and_it_goes_on_from_there(
    model: Path, tmp_path: Path
) -> None:
    options = {"clients": 1, "rounds": 3, "aggregation_interval": 3}
    reason = (
        "its operator stopped it after round 1; start server and clients again with the same "
        "--state to go on"
    )
    with (
        serving(model, tmp_path, **options) as (server, http),
        raw_channel(server.grpc) as channel,
    ):
        session = join(channel, server.spec, "a")
        session.send(*step_messages(one_sample(StepKey(0, 0))))
        session.receive_step()
        order(http, "stop")
        session.send(*step_messages(one_sample(StepKey(0, 1))))
        assert session.receive_step().checkpoint
        session.send(*step_messages(one_sample(StepKey(1, 0))))
        assert session.refusal() == refusal(RunStopped, f"the run has ended: {reason}")
        assert http.get("/v1/run").json()["reason"] == reason
    with (
        serving(model, tmp_path, **options) as (server, http),
        raw_channel(server.grpc) as channel,
    ):
        body = http.get("/v1/run").json()
        assert (body["state"], body["rounds_done"], body["steps_applied"]) == ("training", 1, 2)
        session = join(channel, server.spec, "a", StepKey(1, 0))
        session.send(*step_messages(one_sample(StepKey(1, 0))))
        assert session.receive_step().round == 1


WRONG_REQUESTS = {
    "a path that is not there": (
        ("GET", "/v1/nowhere"),
        (404, "NotFound", "GET /v1/nowhere: Not Found; /openapi.json lists every path"),
    ),
    "a path out of the tree": (
        ("GET", "/v1/run/../../etc/passwd"),
        (404, "NotFound", "GET /etc/passwd: Not Found; /openapi.json lists every path"),
    ),
    "no number": (
        ("GET", "/v1/rounds?first=abc"),
        (
            422,
            "InvalidInput",
            "first: Input should be a valid integer, unable to parse string as an integer, got "
            "'abc'",
        ),
    ),
    "a negative number": (
        ("GET", "/v1/rounds?first=-1"),
        (422, "InvalidInput", "first: Input should be greater than or equal to 0, got '-1'"),
    ),
    "an order by GET": (
        ("GET", "/v1/stop"),
        (405, "InvalidInput", "GET /v1/stop: Method Not Allowed; /openapi.json lists every path"),
    ),
    "a method that is not there": (
        ("POST", "/v1/run"),
        (
            405,
            "InvalidInput",
            "POST /v1/run: Method Not Allowed; /openapi.json lists every path",
        ),
    ),
}


@pytest.fixture(scope="module")
def http(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(model, tmp_path_factory.mktemp("state")) as (_, client):
        yield client


@pytest.mark.parametrize("what", WRONG_REQUESTS)
def test_a_wrong_request_gets_its_status_and_an_error_body(what: str, http: httpx.Client) -> None:
    request, (status, error, message) = WRONG_REQUESTS[what]
    response = http.request(*request)
    assert response.status_code == status
    assert response.json() == {"error": error, "message": message}


def test_the_description_lists_every_path(http: httpx.Client) -> None:
    assert set(http.get("/openapi.json").json()["paths"]) == {
        *("/healthz", "/readyz", "/metrics"),
        *("/v1/run", "/v1/clients", "/v1/rounds", "/v1/generation"),
        *("/v1/pause", "/v1/resume", "/v1/checkpoint", "/v1/stop", "/v1/clients/{client_id}"),
    }


# ---------------------------------------------------------------------- gRPC's own services


@pytest.mark.parametrize("name", SERVICES)
def test_health_answers_once_and_by_watching(
    name: str, waiting: tuple[RunningServer, httpx.Client]
) -> None:
    server, _ = waiting
    request = health_pb2.HealthCheckRequest(service=name)
    with raw_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(request, timeout=20)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_health_does_not_know_other_services(
    waiting: tuple[RunningServer, httpx.Client],
) -> None:
    server, _ = waiting
    with raw_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="lesft.v1.Nothing"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_names_our_services_and_describes_them(
    waiting: tuple[RunningServer, httpx.Client],
) -> None:
    server, _ = waiting
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="lesft.v1.TrainingService"),
    ]
    with raw_channel(server.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, described = stub.ServerReflectionInfo(iter(requests), timeout=20)
    assert {service.name for service in listed.list_services_response.service} == {
        "lesft.v1.TrainingService",
        "lesft.v1.ModelService",
        "lesft.v1.InferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    files = described.file_descriptor_response.file_descriptor_proto
    assert b"lesft/v1/training.proto" in files[0]
