"""Traces of a run by OpenTelemetry, an extra: one trace per round, across client and server.

Nothing of it crosses our wire. The id of a round's trace is derived from the run's fingerprint and
the round, so all who take part name the same trace by themselves. The aggregator knows no rounds:
its work on a version is a trace of its own, by the run's id and the base version, which the
clients' spans link to.

Without the packages of `lesft[tracing]`, or without an endpoint in the standard variables
(OTEL_EXPORTER_OTLP_ENDPOINT, ...), everything here does nothing.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

    from lesft.round_spans import RoundSpans

log = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_STOP_SECONDS = 2.0

Attribute = str | int | float | bool
"""Numbers, and ids of clients; never text, token ids or tensors."""

_spans: "RoundSpans | None" = None
"""Where this process's spans go; like logging, OpenTelemetry is one for a process."""


def start_tracing(service: str) -> None:
    """Send the spans of this process to where the environment says, if it does."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning(
            "an OpenTelemetry endpoint is set, but there will be no traces: pip install "
            "'lesft[tracing]'"
        )
        return
    trace_to(BatchSpanProcessor(OTLPSpanExporter()), service)


def trace_to(processor: "SpanProcessor", service: str) -> None:
    """Give the spans of this process to a span processor of OpenTelemetry's SDK."""
    from lesft.round_spans import RoundSpans

    global _spans
    _spans = RoundSpans(processor, service)


def stop_tracing() -> None:
    """Hand over what is left, but wait no longer than a moment for a collector that is away."""
    global _spans
    spans, _spans = _spans, None
    if spans is not None:
        handing_over = threading.Thread(target=spans.shutdown, name="last spans", daemon=True)
        handing_over.start()
        handing_over.join(_STOP_SECONDS)


@contextmanager
def span(
    name: str,
    run: str,
    number: int,
    link_to: tuple[str, int] | None = None,
    **attributes: Attribute,
) -> Iterator[None]:
    """The block as a span of the trace of (run, number).

    Those are a run's fingerprint and a round or, at the aggregator, the run's id and a base
    version; `link_to` names another trace in the same way.
    """
    started_ns = time.time_ns()
    try:
        yield
    finally:
        record_span(name, run, number, started_ns, time.time_ns(), link_to, **attributes)


def record_span(
    name: str,
    run: str,
    number: int,
    started_ns: int,
    ended_ns: int,
    link_to: tuple[str, int] | None = None,
    **attributes: Attribute,
) -> None:
    """As `span`, for what is over; times are of `time.time_ns`."""
    if _spans is not None:
        _spans.record(name, (run, number), started_ns, ended_ns, link_to, _named(attributes))


def record_whole(
    name: str, run: str, number: int, started_ns: int, **attributes: Attribute
) -> None:
    """What the others of a trace are parts of, such as the round; one party records it."""
    if _spans is not None:
        _spans.record_whole(name, (run, number), started_ns, _named(attributes))


def _named(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {f"lesft.{name}": value for name, value in attributes.items()}
