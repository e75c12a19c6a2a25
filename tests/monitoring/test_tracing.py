"""Spans of one round share a trace, whoever makes them."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lesft import tracing
from tests.harness import random_samples, running_server, server_settings, train_clients

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="the extra lesft[tracing] is missing")

from opentelemetry.sdk.trace import ReadableSpan  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: E402
    InMemorySpanExporter,
)

from lesft.round_spans import RoundSpans  # noqa: E402

OF_SERVER = {"decode", "cohort_wait", "back", "encode", "ledger", "checkpoint", "send"}
OF_CLIENT = {
    "front_forward",
    "waiting_for_gradient",
    "front_backward",
    "optimizer",
    "aggregation",
}


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    spans = InMemorySpanExporter()
    tracing.trace_to(SimpleSpanProcessor(spans), "lesft-test")
    try:
        yield spans
    finally:
        tracing.stop_tracing()


def of_round(spans: tuple[ReadableSpan, ...], round_index: int) -> list[ReadableSpan]:
    return [span for span in spans if (span.attributes or {})["lesft.round"] == round_index]


def test_client_and_server_of_a_round_share_its_trace(
    model: Path, tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    settings = server_settings(model, tmp_path, clients=2, accumulation=2, threads=1)
    with running_server(settings) as server:
        train_clients(server, model, [random_samples(1), random_samples(2)])
    spans = exporter.get_finished_spans()
    traces = []
    for round_index in (0, 1):
        found = of_round(spans, round_index)
        assert {span.name for span in found} == {"round"} | OF_SERVER | OF_CLIENT
        (trace_id,) = {span.context.trace_id for span in found}
        (root,) = [span for span in found if span.name == "round"]
        assert root.parent is None
        for span in found:
            if span is not root:
                assert span.parent is not None
                assert span.parent.span_id == root.context.span_id, span.name
        ids = [span.context.span_id for span in found]
        assert len(set(ids)) == len(ids)
        forwards = [span for span in found if span.name == "front_forward"]
        assert sorted(
            (str((span.attributes or {})["lesft.client"]), (span.attributes or {})["lesft.micro"])
            for span in forwards
        ) == [("client-0", 0), ("client-0", 1), ("client-1", 0), ("client-1", 1)]
        traces.append(trace_id)
    assert traces[0] != traces[1]
    assert len(of_round(spans, 0)) + len(of_round(spans, 1)) == len(spans)


def test_attributes_are_numbers_and_names_of_clients(
    model: Path, tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    with running_server(server_settings(model, tmp_path, threads=1)) as server:
        train_clients(server, model, [random_samples(1)])
    for span in exporter.get_finished_spans():
        for name, value in (span.attributes or {}).items():
            assert isinstance(value, int) or (name, value) == ("lesft.client", "client-0"), name


def test_processes_name_the_same_trace_by_themselves_and_others_for_other_rounds() -> None:
    def recorded(service: str, unit: tuple[str, int], link_to: tuple[str, int]) -> ReadableSpan:
        exporter = InMemorySpanExporter()
        spans = RoundSpans(SimpleSpanProcessor(exporter), service)
        spans.record("a step", unit, 1, 3, link_to, {})
        spans.shutdown()
        (span,) = exporter.get_finished_spans()
        return span

    server = recorded("lesft-server", ("sha256:a", 3), ("lesft", 0))
    client = recorded("lesft-client", ("sha256:a", 3), ("lesft", 0))
    assert server.context.trace_id == client.context.trace_id
    assert server.parent == client.parent
    assert server.context.span_id != client.context.span_id
    assert (server.start_time, server.end_time) == (1, 3)
    assert server.resource.attributes["service.name"] == "lesft-server"

    others = [recorded("x", unit, ("lesft", 1)) for unit in (("sha256:a", 4), ("sha256:b", 3))]
    assert len({span.context.trace_id for span in [server, *others]}) == 3
    version = recorded("lesft-aggregator", ("lesft", 0), ("lesft", 1))
    assert server.links[0].context.trace_id == version.context.trace_id
    assert others[0].links[0].context.trace_id != version.context.trace_id


def test_a_collector_that_is_away_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A port that nobody listens on, and none can while this one is bound.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        tracing.start_tracing("lesft-test")
        assert tracing._spans is not None
        with tracing.span("a step", "run", 1):
            pass
        start = time.monotonic()
        tracing.stop_tracing()
        assert time.monotonic() - start < 4
        assert tracing._spans is None


def test_without_an_endpoint_nothing_is_traced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in tracing._ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    tracing.start_tracing("lesft-test")
    assert tracing._spans is None
    with tracing.span("a step", "run", 1):
        pass
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracing.start_tracing("lesft-test")
    assert tracing._spans is None
