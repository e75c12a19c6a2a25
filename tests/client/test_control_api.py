"""The client's control API over a real socket."""

from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest

from lesft.control import ControlServer
from lesft.live import LivePage
from lesft.wire import KINDS, WireCounter
from lesft_client.control_api import make_app
from lesft_client.metrics import Metrics
from lesft_client.status import Status, StatusBody


@pytest.fixture
def status() -> Status:
    return Status("client-0", WireCounter())


@pytest.fixture
def api(status: Status) -> Iterator[httpx.Client]:
    server = ControlServer(make_app(status, LivePage(), Metrics(status).registry), insecure=False)
    address = server.start_in_thread("127.0.0.1:0")
    try:
        with httpx.Client(base_url=f"http://{address}") as client:
            yield client
    finally:
        server.stop_thread()


def train_two_of_five_rounds(status: Status) -> None:
    status.run_id, status.rounds, status.phase = "run-7", 5, "training"
    status.num_samples, status.skipped_samples = 12, 3
    status.adapter_version, status.tokens = 4, 600
    status.loss_by_round = [2.5, 1.5]
    status.nll_by_round, status.class_counts_by_round = [2.0, 1.0], [(3, 2, 1), None]
    status.seconds_before = 60.0
    status.waiting_for, status.reconnects = "client 'b'", 2
    status.wire.add("up", "labels", 8)
    status.wire.add("up", "activations_base", 100)
    status.wire.add("down", "gradients", 90)


def test_status_says_what_the_client_is_doing(status: Status, api: httpx.Client) -> None:
    train_two_of_five_rounds(status)
    response = api.get("/v1/status")
    assert response.status_code == 200
    assert response.json() == {
        "client_id": "client-0",
        "run_id": "run-7",
        "phase": "training",
        "waiting_for": "client 'b'",
        "reconnects": 2,
        "round": 2,
        "rounds": 5,
        "loss": 1.5,
        "loss_by_round": [2.5, 1.5],
        "nll_by_round": [2.0, 1.0],
        "class_counts_by_round": [[3, 2, 1], None],
        "adapter_version": 4,
        "num_samples": 12,
        "skipped_samples": 3,
        "tokens": 600,
        "tokens_per_second": 10.0,
        "bytes_up": 108,
        "bytes_down": 90,
        "wire": {
            "up": dict.fromkeys(KINDS, 0) | {"labels": 8, "activations_base": 100},
            "down": dict.fromkeys(KINDS, 0) | {"gradients": 90},
        },
        "seconds_left": 90.0,
        "seconds_by_phase": {},
    }


def test_what_is_not_known_before_the_first_round_is_null(
    status: Status, api: httpx.Client
) -> None:
    body = StatusBody.model_validate_json(api.get("/v1/status").content)
    assert (body.phase, body.round, body.loss, body.seconds_left) == ("starting", 0, None, None)
    assert body.tokens_per_second == 0


def test_it_is_healthy_from_the_start(api: httpx.Client) -> None:
    response = api.get("/healthz")
    assert (response.status_code, response.text) == (200, "ok\n")


@pytest.mark.parametrize(
    ("phase", "code", "text"),
    [
        ("starting", 503, "the client is starting\n"),
        ("getting the front (88 MB)", 503, "the client is getting the front (88 MB)\n"),
        ("training", 200, "ok\n"),
        ("finished", 503, "the client is finished\n"),
    ],
)
def test_it_is_ready_while_it_trains_and_else_says_what_it_does(
    status: Status, api: httpx.Client, phase: str, code: int, text: str
) -> None:
    status.phase = phase
    response = api.get("/readyz")
    assert (response.status_code, response.text) == (code, text)


def test_it_is_not_ready_while_it_waits_for_others(status: Status, api: httpx.Client) -> None:
    status.phase, status.waiting_for = "training", "server a:1 to answer again"
    response = api.get("/readyz")
    assert (response.status_code, response.text) == (
        503,
        "waiting for server a:1 to answer again\n",
    )


def metrics_of(api: httpx.Client) -> dict[str, float]:
    """Values of the metrics by their name and labels."""
    response = api.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_have_the_values_of_the_status(status: Status, api: httpx.Client) -> None:
    train_two_of_five_rounds(status)
    metrics = metrics_of(api)
    prefix = "lesft_client_"
    wire = {name: value for name, value in metrics.items() if "wire_bytes" in name and value}
    assert wire == {
        prefix + 'wire_bytes_total{direction="up",kind="labels"}': 8,
        prefix + 'wire_bytes_total{direction="up",kind="activations_base"}': 100,
        prefix + 'wire_bytes_total{direction="down",kind="gradients"}': 90,
    }
    assert metrics[prefix + "rounds_total"] == 2
    assert metrics[prefix + "tokens_total"] == 600
    assert metrics[prefix + "loss"] == 1.5

    status.loss_by_round.append(1.25)
    status.wire.add("up", "labels", 2)
    metrics = metrics_of(api)
    assert metrics[prefix + "rounds_total"] == 3
    assert metrics[prefix + "loss"] == 1.25
    assert metrics[prefix + 'wire_bytes_total{direction="up",kind="labels"}'] == 10


def test_there_is_no_loss_before_there_is_one(api: httpx.Client) -> None:
    metrics = metrics_of(api)
    assert metrics["lesft_client_rounds_total"] == 0
    assert "lesft_client_loss" not in metrics


@pytest.mark.parametrize(
    ("method", "path", "code", "error", "message"),
    [
        ("GET", "/v1/nothing", 404, "NotFound", "GET /v1/nothing: Not Found"),
        ("GET", "/v1/run", 404, "NotFound", "GET /v1/run: Not Found"),
        ("GET", "/docs", 404, "NotFound", "GET /docs: Not Found"),
        ("POST", "/v1/status", 405, "InvalidInput", "POST /v1/status: Method Not Allowed"),
        ("DELETE", "/metrics", 405, "InvalidInput", "DELETE /metrics: Method Not Allowed"),
    ],
)
def test_a_wrong_path_or_method_is_told_what_there_is(
    api: httpx.Client, method: str, path: str, code: int, error: str, message: str
) -> None:
    response = api.request(method, path)
    assert response.status_code == code
    assert response.json() == {
        "error": error,
        "message": f"{message}; /openapi.json lists every path",
    }


def test_it_describes_the_status_it_sends(api: httpx.Client) -> None:
    described = api.get("/openapi.json").json()
    assert {"/v1/status", "/healthz", "/readyz", "/metrics"} <= described["paths"].keys()
    fields = described["components"]["schemas"]["StatusBody"]["properties"]
    assert fields.keys() == api.get("/v1/status").json().keys()


def test_only_time_in_the_training_loop_counts_as_training(
    status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("lesft_client.status.time", SimpleNamespace(monotonic=lambda: now))
    status.tokens, status.seconds_before = 600, 10.0  # of an earlier process of this client
    assert (status.training_seconds(), status.body().tokens_per_second) == (10.0, 60.0)
    status.training_begins()
    now = 130.0
    assert (status.training_seconds(), status.body().tokens_per_second) == (40.0, 15.0)
    status.training_ends()
    now = 9999.0
    assert (status.training_seconds(), status.body().tokens_per_second) == (40.0, 15.0)
    status.training_begins()  # it went back to a checkpoint
    now = 10009.0
    assert status.training_seconds() == 50.0
