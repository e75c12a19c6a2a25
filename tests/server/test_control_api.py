"""The server's HTTP side before, during and after a run, and its gRPC health and reflection."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lesft.micro_batch import StepResult
from tests.harness import RunningServer, random_samples, running_server, server_settings
from tests.server.harness import SERVICES, Crew, join, leaving, raw_channel

SHARES = {"client-0": 0.25, "client-1": 0.75}
SAMPLES = [random_samples(1, 1), random_samples(3, 2)]


@contextmanager
def serving(model: Path, state: Path) -> Iterator[tuple[RunningServer, httpx.Client]]:
    settings = server_settings(model, state, clients=2, rounds=2, accumulation=2, threads=1)
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
    pairs = [line.split() for line in lines if line.startswith("lesft_")]
    return {name: float(value) for name, value in pairs}


def run_body(server: RunningServer, **changes: Any) -> dict[str, Any]:
    return {
        "state": "waiting for clients",
        "reason": "",
        "rounds_done": 0,
        "clients_joined": 0,
        "spec_fingerprint": server.spec.fingerprint(),
        "spec": server.spec.model_dump(mode="json"),
        **changes,
    }


def client_bodies(http: httpx.Client, since: float) -> list[dict[str, Any]]:
    """/v1/clients without `last_seen`, which must lie between `since` and now."""
    bodies: list[dict[str, Any]] = http.get("/v1/clients").json()
    for body in bodies:
        assert since <= body.pop("last_seen") <= time.time()
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
    assert bodies == [round_body(i, window) for i, window in enumerate(windows)][first:]
    assert all(0 < s < 60 for s in seconds)


def test_the_bodies_follow_a_run_from_its_start_to_its_end(
    model: Path, waiting: tuple[RunningServer, httpx.Client]
) -> None:
    server, http = waiting
    start = time.time()
    # Before.
    assert http.get("/v1/run").json() == run_body(server)
    assert http.get("/v1/clients").json() == []
    assert http.get("/v1/rounds").json() == []
    assert metrics(http) == {"lesft_server_rounds_total": 0.0, "lesft_server_clients": 0.0}
    assert http.get("/readyz").text == "ok\n"

    with Crew(server, model, SAMPLES) as crew:
        # During.
        assert http.get("/v1/run").json() == run_body(server, state="training", clients_joined=2)
        assert client_bodies(http, start) == [client_body(i, True, 0) for i in range(2)]
        first = crew.train_round(0)
        assert http.get("/v1/run").json() == run_body(
            server, state="training", clients_joined=2, rounds_done=1
        )
        assert client_bodies(http, start) == [client_body(i, True, 1) for i in range(2)]
        assert_rounds(http, [first], first=0)
        assert_rounds(http, [first], first=1)
        figures = metrics(http)
        seconds = http.get("/v1/rounds").json()[0]["seconds"]
        assert figures == {
            "lesft_server_rounds_total": 1.0,
            "lesft_server_clients": 2.0,
            "lesft_server_loss": pytest.approx(by_share(first, "loss"), rel=1e-12),
            "lesft_server_round_seconds": pytest.approx(seconds),
        }
        second = crew.train_round(1)
        assert by_share(second, "loss") != by_share(first, "loss")
        crew.leave()

    # After.
    assert http.get("/v1/run").json() == run_body(
        server, state="finished", clients_joined=2, rounds_done=2
    )
    assert client_bodies(http, start) == [client_body(i, False, 2) for i in range(2)]
    for offset in (0, 1, 2, 10**9):
        assert_rounds(http, [first, second], first=offset)
    figures = metrics(http)
    assert figures["lesft_server_rounds_total"] == 2.0
    assert figures["lesft_server_clients"] == 0.0
    assert figures["lesft_server_loss"] == pytest.approx(by_share(second, "loss"), rel=1e-12)
    assert http.get("/readyz").text == "ok\n"


def test_a_run_that_was_stopped_is_not_ready_and_says_why(
    waiting: tuple[RunningServer, httpx.Client],
) -> None:
    server, http = waiting
    with raw_channel(server.grpc) as channel:
        sessions = [join(channel, server.spec, name) for name in "ab"]
        sessions[1].send(leaving("the battery is low"))
        sessions[0].refusal()
    reason = "client 'b' left at round 0 micro-batch 0: the battery is low"
    response = http.get("/readyz")
    assert (response.status_code, response.text) == (503, f"the run has ended: {reason}\n")
    assert http.get("/v1/run").json() == run_body(
        server, state="stopped", reason=reason, clients_joined=2
    )
    assert [client["connected"] for client in http.get("/v1/clients").json()] == [False, False]
    response = http.get("/healthz")
    assert (response.status_code, response.text) == (200, "ok\n")


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
        *("/v1/run", "/v1/clients", "/v1/rounds"),
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
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    files = described.file_descriptor_response.file_descriptor_proto
    assert b"lesft/v1/training.proto" in files[0]
