"""An OpenTelemetry collector that keeps what it is sent."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(frozen=True)
class Received:
    """One span."""

    service: str
    name: str
    trace_id: bytes
    linked_traces: tuple[bytes, ...]
    attributes: dict[str, str | int]


class Collector(TraceServiceServicer):
    """Receives OTLP over gRPC."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, context: Any) -> pb.ExportTraceServiceResponse:
        for of_process in request.resource_spans:
            service = _values(of_process.resource.attributes)["service.name"]
            for scope in of_process.scope_spans:
                with self._lock:
                    self.spans += [
                        Received(
                            str(service),
                            span.name,
                            span.trace_id,
                            tuple(link.trace_id for link in span.links),
                            _values(span.attributes),
                        )
                        for span in scope.spans
                    ]
        return pb.ExportTraceServiceResponse()


def _values(attributes: Any) -> dict[str, str | int]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A collector on a free port while the block runs, and its endpoint."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
