"""A whole run of real processes: what its logs and traces say, and what they never do."""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.processes.harness import (
    ANY_PORT,
    Service,
    launcher,
    save_model_with_tokenizer,
    write_samples,
)

pytest.importorskip("opentelemetry.proto", reason="the extra lesft[tracing] is missing")

from tests.monitoring.collector import Received, collecting

ROUNDS = 2
CANARY = "zyxwv qponm 8642"
LOGS = {"log_format": "json", "log_level": "debug"}


@dataclass(frozen=True)
class WholeRun:
    """What was left of it."""

    logs: dict[str, list[str]]
    """Lines by client id, or by service."""
    spans: list[Received]
    canary_ids: list[int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeRun]:
    """Two clients whose every prompt, reference and target has the canary in it."""
    folder = tmp_path_factory.mktemp("run")
    model = save_model_with_tokenizer(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    with (
        pytest.MonkeyPatch.context() as environment,
        collecting() as (collector, endpoint),
        launcher(folder, model) as started,
    ):
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        started.data = write_samples(
            folder / "data.jsonl",
            [
                {"prompt": f"{n} {CANARY}", "reference": f"{CANARY} {n}", "target": f"= {CANARY}"}
                for n in range(20)
            ],
        )
        server = started.start_server(clients=2, rounds=ROUNDS, aggregation_interval=1, **LOGS)
        options = {"listen": ANY_PORT, "control": ANY_PORT, "clients": 2, **LOGS}
        aggregator = started._start("lesft-aggregator", options)
        server.wait_for_line("ready")
        aggregator.wait_for_line("ready")
        addresses = server.address("grpc"), aggregator.address("grpc")
        clients = [
            started.start_client(name, *addresses, held_out=1, share=f"{number}/2", **LOGS)
            for number, name in ((1, "a"), (2, "b"))
        ]
        assert [client.wait() for client in clients] == [0, 0], clients[0].output
        for service in (server, aggregator):
            service.signal(signal.SIGTERM)
            assert service.wait() == 0, service.output
        logs = {"server": server, "aggregator": aggregator, "a": clients[0], "b": clients[1]}
        yield WholeRun(
            {name: lines_of(service) for name, service in logs.items()},
            list(collector.spans),
            tokenizer(CANARY)["input_ids"],
        )


def lines_of(service: Service) -> list[str]:
    return [line for line in service.lines if line]


def records(lines: list[str]) -> list[dict[str, Any]]:
    """The aggregator says on standard output where it listens: that one is for people."""
    return [json.loads(line) for line in lines if not line.startswith("lesft-aggregator ready")]


def test_every_line_is_one_object_that_says_whose_it_is(run: WholeRun) -> None:
    for name, lines in run.logs.items():
        service = name if name in ("server", "aggregator") else "client"
        for record in records(lines):
            assert record["service"] == f"lesft-{service}"
            assert {"time", "level", "logger", "message"} <= record.keys()
    server = {record["message"]: record for record in records(run.logs["server"])}
    (first,) = [record for message, record in server.items() if message.startswith("round 1 of")]
    assert (first["run"], first["round"]) == ("lesft", 0)
    assert "client" not in first  # it is about all of them
    (left,) = [record for message, record in server.items() if re.fullmatch("a left.*", message)]
    assert left["client"] == "a"
    published = [r for r in records(run.logs["aggregator"]) if "published" in r["message"]]
    assert [(record["run"], record["version"]) for record in published] == [
        ("lesft", 1),
        ("lesft", 2),
    ]
    progress = [r for r in records(run.logs["b"]) if r["message"].startswith("round 2/2")]
    assert [(record["run"], record["client"]) for record in progress] == [("lesft", "b")]


def test_no_text_no_token_ids_and_no_tensors_are_ever_logged(run: WholeRun) -> None:
    ids = run.canary_ids
    assert len(ids) >= 6
    somewhere = r"\b" + r"\D{1,3}".join(map(str, ids[1:5])) + r"\b"
    assert re.search(somewhere, f"what must not be there: {ids}")
    for name, lines in run.logs.items():
        assert len(lines) >= 3, f"{name} has logged nothing"
        for line in lines:
            for word in CANARY.split():
                assert word not in line, f"{name}: {line}"
            assert not re.search(somewhere, line), f"{name}: {line}"
            assert not re.search(r"tensor\(|dtype=|array\(", line), f"{name}: {line}"


def test_a_round_is_one_trace_across_processes_and_links_to_the_aggregator_s(
    run: WholeRun,
) -> None:
    def traces(service: str, **attributes: str | int) -> set[bytes]:
        wanted = {f"lesft.{name}": value for name, value in attributes.items()}
        return {
            span.trace_id
            for span in run.spans
            if span.service == service and wanted.items() <= span.attributes.items()
        }

    rounds = []
    for round_index in range(ROUNDS):
        of_server = traces("lesft-server", round=round_index)
        assert len(of_server) == 1
        for client in ("a", "b"):
            assert traces("lesft-client", round=round_index, client=client) == of_server
        rounds += of_server
        (averaged,) = traces("lesft-aggregator", base_version=round_index)
        links = [
            span.linked_traces
            for span in run.spans
            if span.name == "aggregation" and span.attributes["lesft.round"] == round_index
        ]
        assert links == [(averaged,), (averaged,)]
    assert len(set(rounds)) == ROUNDS
    of_aggregator = sorted(span.name for span in run.spans if span.service == "lesft-aggregator")
    assert of_aggregator == ["averaging"] * ROUNDS + ["submission"] * 2 * ROUNDS


def test_spans_hold_numbers_and_names_of_clients_only(run: WholeRun) -> None:
    for span in run.spans:
        for name, value in span.attributes.items():
            assert isinstance(value, int) or (name == "lesft.client" and value in ("a", "b")), span
