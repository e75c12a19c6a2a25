"""A client's metrics: its status, and what its training loop does meanwhile."""

from pathlib import Path

import httpx
from prometheus_client import generate_latest

from lesft.control import ControlServer
from lesft.live import LivePage
from lesft.wire import WireCounter
from lesft_client.control_api import make_app
from lesft_client.metrics import Metrics
from lesft_client.status import Status
from lesft_client.timeline import WAITS
from tests.harness import random_samples, running_server, server_settings, train_clients
from tests.monitoring.scraped import Scraped, parse, scrape

PREFIX = "lesft_client_"


def scraped_of(status: Status) -> Scraped:
    return parse(generate_latest(Metrics(status).registry).decode())


def test_the_status_is_there_in_numbers() -> None:
    status = Status("client-7", WireCounter())
    status.run_id, status.rounds, status.phase, status.num_samples = "run-7", 5, "training", 12
    status.loss_by_round, status.nll_by_round = [2.5, 1.5], [2.0, 1.0]
    status.adapter_version, status.tokens, status.in_flight, status.reconnects = 4, 600, 3, 2
    status.seconds_by_phase = {"front_forward": 1.5, "optimizer": 0.25}
    status.wire.add("up", "labels", 8)
    scraped = scraped_of(status)
    assert scraped.value(PREFIX + "run_info", run_id="run-7", client="client-7") == 1
    assert scraped.value(PREFIX + "phase_info", phase="training") == 1
    figures = {
        "rounds_total": 2,
        "rounds_planned": 5,
        "loss": 1.5,
        "nll": 1.0,
        "tokens_total": 600,
        "samples": 12,
        "adapter_version": 4,
        "in_flight": 3,
        "reconnects_total": 2,
        "waiting": 0,
    }
    assert {name: scraped.value(PREFIX + name) for name in figures} == figures
    phases = scraped.series(PREFIX + "phase_seconds_total", "phase")
    assert phases == {"front_forward": 1.5, "optimizer": 0.25}
    assert scraped.value(PREFIX + "wire_bytes_total", direction="up", kind="labels") == 8
    assert scraped.value("process_resident_memory_bytes") > 10e6

    status.waiting_for = "client 'b' to come back"
    status.loss_by_round.append(None)  # a round that went on without it
    later = scraped_of(status)
    assert later.value(PREFIX + "waiting") == 1
    assert (PREFIX + "loss", frozenset()) not in later.samples
    assert "client 'b'" not in later.text


def test_the_loop_s_phases_are_those_of_the_result(model: Path, tmp_path: Path) -> None:
    settings = server_settings(model, tmp_path, accumulation=2, threads=1)
    with running_server(settings) as server:
        ((_, status),) = train_clients(server, model, [random_samples(2)])
    assert status.in_flight == 0
    phases = scraped_of(status).series(PREFIX + "phase_seconds_total", "phase")
    of_the_loop = {
        *("front_forward", "send", "waiting_for_gradient", "front_backward", "optimizer"),
        "aggregation",
    }
    assert of_the_loop <= phases.keys() <= of_the_loop | set(WAITS)
    assert min(phases.values()) >= 0
    assert phases["wait_back"] > 0
    # A cut in the loop's own steps would be seen here, and so would time that is counted twice.
    assert 0.9 < sum(phases.values()) / status.training_seconds() <= 1
    assert phases["waiting_for_gradient"] < 0.05 * status.training_seconds()


def test_requests_that_are_refused_are_counted() -> None:
    status = Status("client-7", WireCounter())
    metrics = Metrics(status)
    app = metrics.refused.around(make_app(status, LivePage(), metrics.registry))
    server = ControlServer(app, insecure=False)
    address = server.start_in_thread("127.0.0.1:0")
    try:
        assert httpx.get(f"http://{address}/v1/nothing").status_code == 404
        assert httpx.post(f"http://{address}/v1/status").status_code == 405
        assert httpx.get(f"http://{address}/readyz").status_code == 503
        refused = scrape(address).series(PREFIX + "http_refusals_total", "status")
        assert refused == {"404": 1, "405": 1}
    finally:
        server.stop_thread()
