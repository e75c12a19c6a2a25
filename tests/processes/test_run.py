"""Runs of real processes: to the end, stopped by anyone, and refused with a clear word."""

import hashlib
import json
import math
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, load_file

from lesft.adapter_halves import load_half
from tests.processes.harness import (
    Launcher,
    Service,
    launcher,
    make_samples,
    save_model_with_tokenizer,
    write_samples,
)

FOREVER = 1_000_000
"""Rounds of a run that does not end by itself."""

PROMPTLY_SECONDS = 30
"""Bound on what must be soon; loading torch is not in it, but the machine may be busy."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Iterator[Launcher]:
    with launcher(tmp_path, model) as started:
        yield started


def get(service: Service, path: str) -> Any:
    """What a control API answers."""
    return httpx.get(f"http://{service.address('control')}{path}").raise_for_status()


# ---------------------------------------------------------------------- to the end


def test_two_clients_train_to_the_end_after_one_of_them_was_stopped_while_it_waited(
    run: Launcher,
) -> None:
    # The default seed leaves the long sample among those that b trains on.
    long = {"prompt": "Add 2 and 1. " * 20, "reference": "3", "target": "3"}
    data_b = write_samples(run.folder / "b.jsonl", [*make_samples(11), long])
    server, aggregator = run.services(clients=2, rounds=4, aggregation_interval=3)
    addresses = server.address("grpc"), aggregator.address("grpc")

    a = run.start_client("a", *addresses)
    a.wait_for_line("joined; the run begins when all its 2 clients have")
    a.signal(signal.SIGINT)
    assert a.wait(PROMPTLY_SECONDS) == 130
    server.wait_for_line("a left before the start: stopped by its user")
    assert get(server, "/v1/run").json()["state"] == "waiting for clients"

    a = run.start_client("a", *addresses, held_out=1)
    b = run.start_client("b", *addresses, data=data_b, weights="server", held_out=1)
    assert (a.wait(), b.wait()) == (0, 0)
    results = [json.loads((client.state / "result.json").read_text()) for client in (a, b)]
    result_a, result_b = results

    assert [result["client_id"] for result in results] == ["a", "b"]
    assert [result["num_samples"] for result in results] == [18, 10]
    assert [result["skipped_samples"] for result in results] == [0, 1]
    said = "1 of 11 train samples are longer than 64 tokens and were skipped (--max-length)"
    assert b.lines.count(said) == 1
    assert not any("skipped" in line for line in a.lines)

    adapter = load_file(a.state / "adapter.safetensors")
    data = (a.state / "adapter.safetensors").read_bytes()
    assert (b.state / "adapter.safetensors").read_bytes() == data
    assert {result["adapter_version"] for result in results} == {2}
    file = get(aggregator, "/v1/adapters/2/file").content
    assert {result["adapter_sha256"] for result in results} == {hashlib.sha256(file).hexdigest()}
    published = load(file)
    assert published.keys() == adapter.keys()
    assert all(torch.equal(published[name], adapter[name]) for name in adapter)

    described = get(server, "/v1/run").json()
    assert (described["state"], described["rounds_done"]) == ("finished", 4)
    share = 18 / 28
    for record in get(server, "/v1/rounds").json():
        losses = [result["loss_by_round"][record["round"]] for result in results]
        mean = share * losses[0] + (1 - share) * losses[1]
        assert record["loss"] == pytest.approx(mean, rel=1e-6)
    halves = [load_half(service.state).info for service in (a, server)]
    assert [(half.side, half.rounds) for half in halves] == [("front", 4), ("back", 4)]
    assert halves[0].spec_fingerprint == halves[1].spec_fingerprint
    assert (a.state / "run_spec.json").read_bytes() == (server.state / "run_spec.json").read_bytes()

    for result in results:
        assert (result["round"], result["rounds"]) == (4, 4)
        for held_out in (result["held_out_before"], result["held_out_after"]):
            assert held_out["tokens"] > 0
            assert 0 < held_out["nll_sum"] / held_out["tokens"] < math.inf
        assert result["held_out_before"] != result["held_out_after"]
        assert result["bytes_up"] == sum(result["wire"]["up"].values())
        assert result["tokens_per_second"] == pytest.approx(
            result["tokens"] / result["seconds"]["training"]
        )
    front = next((run.folder / "cache").glob("front-*/model.safetensors"))
    more = result_b["wire"]["down"]["other"] - result_a["wire"]["down"]["other"]
    assert more > front.stat().st_size

    server.signal(signal.SIGTERM)
    aggregator.signal(signal.SIGINT)
    assert (server.wait(PROMPTLY_SECONDS), aggregator.wait(PROMPTLY_SECONDS)) == (0, 0)


# ---------------------------------------------------------------------- away in mid-run


def start_two_clients(run: Launcher) -> tuple[Service, Service, Service]:
    """A server and two clients in the middle of an endless run."""
    server, aggregator = run.services(clients=2, rounds=FOREVER)
    addresses = server.address("grpc"), aggregator.address("grpc")
    a, b = (
        run.start_client(name, *addresses, share=f"{number}/2")
        for number, name in enumerate("ab", start=1)
    )
    for client in (a, b):
        client.wait_for_line("round 3/")
    return server, a, b


def test_a_client_that_is_told_to_stop_is_waited_for_and_goes_on_when_it_is_started_again(
    run: Launcher,
) -> None:
    server, a, b = start_two_clients(run)
    assert get(a, "/readyz").text == "ok\n"
    status = get(a, "/v1/status").json()
    assert (status["client_id"], status["phase"], status["num_samples"]) == ("a", "training", 9)
    assert status["round"] >= 3

    a.signal(signal.SIGTERM)
    assert a.wait(PROMPTLY_SECONDS) == 130
    assert a.lines[-1] == "lesft-client: stopped"
    server.wait_for_line("a is away at round ")
    described = get(server, "/v1/run").json()
    waits = "client 'a' to come back (stopped by its user)"
    assert (described["state"], described["waiting_for"]) == ("training", waits)
    ready = httpx.get(f"http://{server.address('control')}/readyz")
    assert (ready.status_code, ready.text) == (503, f"waiting for {waits}\n")
    # It may have got as far as the aggregation.
    assert b.wait_for_line("waiting for ") in (
        f"waiting for {waits}",
        "waiting for the adapters of a",
    )

    addresses = server.address("grpc"), run.started[1].address("grpc")
    again = run.start_client("a", *addresses, share="1/2")
    resumed = int(again.wait_for_line("resumed at round ").split()[3])
    assert 0 < resumed <= described["rounds_done"] + 1
    b.wait_for_line(f"round {described['rounds_done'] + 3}/")
    assert get(server, "/v1/clients").json()[0]["resumed"] == 1


def start_one_client(run: Launcher, **options: Any) -> tuple[Service, Service, Service]:
    """A server, an aggregator and a client in the middle of an endless run."""
    server, aggregator = run.services(clients=1, rounds=FOREVER, aggregation_interval=1)
    addresses = server.address("grpc"), aggregator.address("grpc")
    client = run.start_client("a", *addresses, **options)
    client.wait_for_line("round 3/")
    return server, aggregator, client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_client_waits_for_a_server_that_is_gone_but_not_for_ever(
    run: Launcher, number: signal.Signals
) -> None:
    server, _, client = start_one_client(run, reconnect_seconds=2)
    server.signal(number)
    assert server.wait(PROMPTLY_SECONDS) == (0 if number == signal.SIGTERM else -9)
    assert client.wait(PROMPTLY_SECONDS) == 1
    party = f"server {server.address('grpc')}: "
    lost = next(line for line in client.lines if "the connection is lost" in line)
    assert lost.startswith(party)
    assert ("the server is stopping" in lost) == (number == signal.SIGTERM)
    assert client.lines[-1].startswith(f"lesft-client: {party}")
    assert "(tried for 2 s; is it running and is the address right? " in client.lines[-1]
    assert client.lines[-1].endswith("--reconnect-seconds waits longer)")


def test_a_client_waits_for_an_aggregator_that_is_gone_but_not_for_ever(run: Launcher) -> None:
    server, aggregator, client = start_one_client(run, reconnect_seconds=1)
    aggregator.signal(signal.SIGKILL)
    assert client.wait(PROMPTLY_SECONDS) == 1
    party = f"aggregator {aggregator.address('grpc')}: "
    again = [line for line in client.lines if line.startswith(party)]
    assert again
    assert all("; trying again in 0." in line for line in again)
    assert client.lines[-1].startswith(f"lesft-client: {party}")
    assert "(tried for 1 s; is it running and is the address right? " in client.lines[-1]
    described = get(server, "/v1/run").json()
    assert described["state"] == "training"
    assert party in described["waiting_for"]


# ---------------------------------------------------------------------- refused


def failure(service: Service) -> list[str]:
    """What a command has said that ended with status 1; the last line is why."""
    assert service.wait() == 1, service.output
    return service.lines


def test_servers_that_cannot_start_say_why(run: Launcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        taken = f"127.0.0.1:{listening.getsockname()[1]}"
        on_network, cut, on_taken = (
            run.start_server(listen="192.0.2.1:0"),
            run.start_server(cut_layer=4),
            run.start_server(listen=taken),
        )
        assert failure(on_network)[-1] == (
            "lesft-server: cannot listen on 192.0.2.1:0: the port is taken or the host unknown"
        )
        assert failure(cut)[-1] == (
            "lesft-server: cut_layer must lie between 1 and 3 for this 4-layer model, got 4"
        )
        assert failure(on_taken)[-1].startswith(f"lesft-server: cannot listen on {taken}: ")


def test_clients_that_cannot_begin_say_why(run: Launcher) -> None:
    (run.folder / "bad.jsonl").write_text(
        '{"prompt": "a", "target": "b", "reference": "c"}\n{"prompt": \n'
    )
    server, aggregator = run.services(clients=1)
    addresses = server.address("grpc"), aggregator.address("grpc")
    malformed = run.start_client("a", *addresses, data="bad.jsonl")
    nobody = "127.0.0.1:1"
    alone = run.start_client("b", nobody, addresses[1], patience_seconds=1)

    assert failure(malformed)[-1].startswith("lesft-client: bad.jsonl:2: is not JSON: ")
    watch, *again, last = failure(alone)
    assert watch.startswith("to watch: http://127.0.0.1:")
    assert again
    assert all(line.startswith(f"server {nobody}: ") for line in again)
    assert all("; trying again in 0." in line for line in again)
    assert last.startswith(f"lesft-client: server {nobody}: ")
    assert "(tried for 1 s; is it running and is the address right? " in last
    assert get(server, "/v1/run").json()["state"] == "waiting for clients"
