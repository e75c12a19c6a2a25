"""Spans whose traces are named by (run, unit), over OpenTelemetry's SDK: of the tracing extra.

Imported by `lesft.tracing` alone, and only where there is an endpoint.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    set_span_in_context,
)

Unit = tuple[str, int]
"""A run's fingerprint and a round; to the aggregator a run's id and a base version."""


class RoundSpans:
    """Makes spans and hands them to a processor.

    Each is started and ended in one call, afterwards: none is ever the current one, so it does not
    matter which thread or coroutine the work was done by.
    """

    def __init__(self, processor: SpanProcessor, service: str) -> None:
        self._ids = _Ids()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}),
            id_generator=self._ids,
            shutdown_on_exit=False,  # whoever stops it sees to that
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("lesft")

    def record(
        self,
        name: str,
        unit: Unit,
        started_ns: int,
        ended_ns: int,
        link_to: Unit | None,
        attributes: Mapping[str, str | int | float | bool],
    ) -> None:
        """A span of a unit's trace."""
        parent = set_span_in_context(NonRecordingSpan(_context(unit)), Context())
        self._tracer.start_span(
            name,
            context=parent,
            attributes=attributes,
            links=[Link(_context(link_to))] if link_to else [],
            start_time=started_ns,
        ).end(ended_ns)

    def record_whole(
        self,
        name: str,
        unit: Unit,
        started_ns: int,
        attributes: Mapping[str, str | int | float | bool],
    ) -> None:
        """The span that all others of the unit's trace are children of; it ends now."""
        with self._ids.next_are(*_ids(unit)):
            self._tracer.start_span(
                name, context=Context(), attributes=attributes, start_time=started_ns
            ).end()

    def shutdown(self) -> None:
        """Hand over what is left."""
        self._provider.shutdown()


class _Ids(RandomIdGenerator):
    """Random ids, but for a span that is given its own."""

    def __init__(self) -> None:
        self._given = threading.local()

    @contextmanager
    def next_are(self, trace_id: int, span_id: int) -> Iterator[None]:
        """The ids of the one span that this thread makes in the block."""
        self._given.ids = trace_id, span_id
        try:
            yield
        finally:
            del self._given.ids

    def generate_trace_id(self) -> int:
        given: tuple[int, int] | None = getattr(self._given, "ids", None)
        return given[0] if given else super().generate_trace_id()

    def generate_span_id(self) -> int:
        given: tuple[int, int] | None = getattr(self._given, "ids", None)
        return given[1] if given else super().generate_span_id()


def _ids(unit: Unit) -> tuple[int, int]:
    """The trace's id and its root span's; neither may be zero."""
    run, number = unit
    digest = hashlib.sha256(f"{run}/{number}".encode()).digest()
    return int.from_bytes(digest[:16], "big") | 1, int.from_bytes(digest[16:24], "big") | 1


def _context(unit: Unit) -> SpanContext:
    trace_id, span_id = _ids(unit)
    return SpanContext(trace_id, span_id, True, TraceFlags(TraceFlags.SAMPLED))
