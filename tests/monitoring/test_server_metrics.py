"""The server's metrics over a run, beside what its clients and its REST API say."""

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from lesft.bundle import CHUNK_BYTES, bundle_chunks
from lesft.micro_batch import StepKey
from lesft.v1.training_pb2 import TrainRequest, TrainResponse
from lesft.wire import chunk_messages_bytes
from tests.harness import RunningServer, random_samples, running_server, server_settings
from tests.monitoring.scraped import Scraped, scrape
from tests.server.harness import (
    Crew,
    RawSession,
    join,
    make_batch,
    opening,
    raw_channel,
    step_messages,
    wait_until,
)

SAMPLES = [random_samples(1, 1), random_samples(3, 2)]
ROUNDS, MICRO = 2, 2


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[RunningServer]:
    settings = server_settings(
        model, tmp_path, clients=2, rounds=ROUNDS, accumulation=MICRO, threads=1
    )
    with running_server(settings) as running:
        yield running


def test_a_run_s_figures_are_those_of_the_rest_api(model: Path, server: RunningServer) -> None:
    before = scrape(server.control)
    assert before.series("lesft_server_run_state", "state") == {
        "waiting": 1,
        "training": 0,
        "finished": 0,
        "stopped": 0,
    }
    assert before.value("lesft_server_rounds_planned") == ROUNDS
    assert before.value("lesft_server_clients_planned") == 2
    with Crew(server, model, SAMPLES) as crew:
        crew.train_round(0)
        during = scrape(server.control)
        clients = httpx.get(f"http://{server.control}/v1/clients").json()
        crew.train_round(1)
        crew.leave()
    wait_until(lambda: scrape(server.control).value("lesft_server_clients") == 0)
    after = scrape(server.control)
    rounds = httpx.get(f"http://{server.control}/v1/rounds").json()

    assert during.series("lesft_server_client_connected", "client") == {
        client["client_id"]: client["connected"] for client in clients
    }
    assert during.series("lesft_server_client_awaited", "client") == {"client-0": 1, "client-1": 1}
    for name, silent in during.series("lesft_server_client_silent_seconds", "client").items():
        (seen,) = [client["last_seen"] for client in clients if client["client_id"] == name]
        assert 0 <= silent <= time.time() - seen
    assert after.series("lesft_server_client_connected", "client") == {"client-0": 0, "client-1": 0}
    assert after.series("lesft_server_client_awaited", "client") == {"client-0": 0, "client-1": 0}
    for scraped, record in ((during, rounds[0]), (after, rounds[1])):
        assert scraped.value("lesft_server_loss") == record["loss"]
        assert scraped.value("lesft_server_nll") == record["nll"]
        assert scraped.value("lesft_server_round_seconds") == record["seconds"]
        classes = scraped.series("lesft_server_class_tokens", "class")
        assert list(classes) == ["salient", "sub_salient", "irrelevant"]
        assert list(classes.values()) == record["class_counts"]
    assert rounds[0]["loss"] != rounds[1]["loss"]
    assert after.value("lesft_server_steps_total") == ROUNDS * MICRO
    assert after.value("lesft_server_run_state", state="finished") == 1
    info = {"run_id": server.spec.run_id, "fingerprint": server.spec.fingerprint()}
    assert after.value("lesft_server_run_info", **info) == 1


def test_bytes_are_those_that_each_client_has_counted_by_direction_and_kind(
    model: Path, server: RunningServer
) -> None:
    with Crew(server, model, SAMPLES) as crew:
        for round_index in range(ROUNDS):
            crew.train_round(round_index)
        crew.leave()
        counted = [stream._wire.by_kind() for stream in crew._streams]
    wait_until(lambda: scrape(server.control).value("lesft_server_clients") == 0)
    scraped = scrape(server.control)
    for index, directions in enumerate(counted):
        assert directions["up"]["activations_base"] > 0
        assert directions["down"]["gradients"] > 0
        for direction, kinds in directions.items():
            for kind, count in kinds.items():
                labels = {"client": f"client-{index}", "direction": direction, "kind": kind}
                value = scraped.value("lesft_server_wire_bytes_total", **labels)
                assert value == count, labels


@pytest.mark.parametrize(
    "size", [1, 127, 128, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 130 * CHUNK_BYTES + 5]
)
def test_the_size_of_chunks_on_the_wire_is_known_without_writing_them(size: int) -> None:
    chunks = list(bundle_chunks(bytes(size)))
    expected = sum(TrainRequest(chunk=chunk).ByteSize() for chunk in chunks)
    assert chunk_messages_bytes(size) == expected
    assert expected == sum(TrainResponse(chunk=chunk).ByteSize() for chunk in chunks)


def test_every_phase_of_every_step_is_timed(model: Path, server: RunningServer) -> None:
    assert phase_counts(scrape(server.control)) == dict.fromkeys(
        ("decode", "cohort_wait", "back", "encode", "ledger", "checkpoint", "send"), 0
    )
    start = time.monotonic()
    with Crew(server, model, SAMPLES) as crew:
        for round_index in range(ROUNDS):
            crew.train_round(round_index)
        crew.leave()
    took = time.monotonic() - start
    wait_until(lambda: phase_counts(scrape(server.control))["send"] == 2 * ROUNDS * MICRO)
    scraped = scrape(server.control)
    assert phase_counts(scraped) == {
        "decode": 2 * ROUNDS * MICRO,
        "cohort_wait": ROUNDS * MICRO,
        "back": ROUNDS * MICRO,
        "encode": ROUNDS * MICRO,
        "ledger": ROUNDS * MICRO,
        "checkpoint": ROUNDS,
        "send": 2 * ROUNDS * MICRO,
    }
    seconds = scraped.series("lesft_server_step_seconds_sum", "phase")
    assert 0 < seconds["back"] < took
    assert 0 < seconds["checkpoint"] < took
    assert seconds["checkpoint"] > scraped.value("lesft_server_checkpoint_seconds") > 0
    states = scraped.series("lesft_server_device_seconds_total", "state")
    assert seconds["cohort_wait"] == pytest.approx(states["cohort_wait"]) != 0


def phase_counts(scraped: Scraped) -> dict[str, float]:
    return scraped.series("lesft_server_step_seconds_count", "phase")


def test_a_checkpoint_makes_its_age_begin_anew(model: Path, server: RunningServer) -> None:
    def age() -> float:
        return scrape(server.control).value("lesft_server_checkpoint_age_seconds")

    time.sleep(0.5)
    assert age() > 0.5
    assert ("lesft_server_checkpoint_seconds", frozenset()) not in scrape(server.control).samples
    with Crew(server, model, SAMPLES) as crew:
        before = time.monotonic()
        crew.train_round(0)
        assert age() < time.monotonic() - before


def test_a_micro_batch_that_waits_for_others_is_in_the_queue(model: Path, tmp_path: Path) -> None:
    settings = server_settings(model, tmp_path, clients=2, batch_size=2)
    with (
        running_server(settings) as server,
        raw_channel(server.grpc) as one,
        raw_channel(server.grpc) as other,
    ):
        first, second = join(one, server.spec, "a"), join(other, server.spec, "b")
        first.send(*step_messages(make_batch(StepKey(0, 0))))
        wait_until(lambda: scrape(server.control).value("lesft_server_micro_batches_waiting") == 1)
        awaited = scrape(server.control).series("lesft_server_client_awaited", "client")
        assert awaited == {"a": 0, "b": 1}
        ledger_before = scrape(server.control).value("lesft_server_ledger_bytes")
        second.send(*step_messages(make_batch(StepKey(0, 0))))
        first.receive_answer()
        scraped = scrape(server.control)
        assert scraped.value("lesft_server_micro_batches_waiting") == 0
        assert scraped.value("lesft_server_ledger_bytes") > ledger_before


def test_what_is_refused_is_counted_and_makes_no_label_of_its_own(server: RunningServer) -> None:
    train = "lesft.v1.TrainingService/Train"
    with raw_channel(server.grpc) as channel:
        for _ in range(2):
            stranger = RawSession(channel)
            stranger.send(opening(server.spec, "stranger", run_id="stranger-run"))
            stranger.refusal()
        nonsense = RawSession(channel)
        nonsense.send(b"\xff" * 20)
        nonsense.refusal()
        made_up = channel.unary_unary("/lesft.v1.Stranger/Knock")
        with pytest.raises(grpc.RpcError):
            made_up(b"", timeout=10)
    with httpx.Client(base_url=f"http://{server.control}") as http:
        assert http.get("/v1/stranger").status_code == 404
        assert http.delete("/v1/clients/stranger").status_code == 404
        assert http.get("/v1/rounds", params={"first": "stranger"}).status_code == 422
        assert http.get("/healthz").status_code == 200
    scraped = scrape(server.control)
    refusals = "lesft_server_refusals_total"
    assert scraped.value(refusals, method=train, error="HandshakeMismatch") == 2
    assert scraped.value(refusals, method=train, error="InvalidInput") == 1
    assert scraped.value(refusals, method="none", error="NotFound") == 1
    assert scraped.series("lesft_server_http_refusals_total", "status") == {"404": 2, "422": 1}
    assert "stranger" not in scraped.text.lower()


def test_a_client_that_was_dropped_has_no_series_any_more(server: RunningServer) -> None:
    with raw_channel(server.grpc) as channel:
        sessions = [join(channel, server.spec, name) for name in ("stays", "goes")]
        assert 'client="goes"' in scrape(server.control).text
        httpx.delete(f"http://{server.control}/v1/clients/goes").raise_for_status()
        text = scrape(server.control).text
        assert 'client="goes"' not in text
        assert 'client="stays"' in text
        assert len(sessions) == 2  # they end when nobody holds them


def test_orders_and_obstacles_are_shown(server: RunningServer) -> None:
    assert scrape(server.control).value("lesft_server_paused") == 0
    httpx.post(f"http://{server.control}/v1/pause").raise_for_status()
    assert scrape(server.control).value("lesft_server_paused") == 1
    httpx.post(f"http://{server.control}/v1/resume").raise_for_status()
    assert scrape(server.control).value("lesft_server_paused") == 0
    assert scrape(server.control).value("lesft_server_disk_wait") == 0
    server.engine.run.obstacle = "no room on disk"
    assert scrape(server.control).value("lesft_server_disk_wait") == 1
    server.engine.run.obstacle = ""


def test_limits_that_were_met_are_counted_by_reason(server: RunningServer) -> None:
    assert scrape(server.control).series("lesft_server_limit_hits_total", "reason") == {}
    server.server._metrics.limits.inc("activation norm clipped")
    server.server._metrics.limits.inc("activation norm clipped")
    hits = scrape(server.control).series("lesft_server_limit_hits_total", "reason")
    assert hits == {"activation norm clipped": 2}


def test_the_process_is_measured(server: RunningServer) -> None:
    scraped = scrape(server.control)
    assert scraped.value("process_resident_memory_bytes") > 50e6
    assert scraped.value("process_cpu_seconds_total") > 0
    assert scraped.value("process_open_fds") > 3
