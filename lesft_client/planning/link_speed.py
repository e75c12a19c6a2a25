"""What the link to the server carries: round trip and bandwidth each way, over gRPC as it is used.

A burst is sent, or asked for, and answered piece by piece; each burst is larger than the one before
until one takes long enough for the round trip not to count.
"""

import os
import queue
import statistics
import time
from collections.abc import Callable, Iterator

import grpc
from pydantic import BaseModel, ConfigDict

from lesft.errors import BundleError, Unreachable
from lesft.interceptors import remote_errors
from lesft.link_probe import MAX_PIECE_BYTES, MAX_PROBE_BYTES, MAX_PROBE_SECONDS, charge
from lesft.v1 import model_pb2, model_pb2_grpc

_PINGS = 8
_FIRST_BURST_BYTES = 1 << 16
_PIECE_BYTES = 1 << 18
_GROWTH = 8
_AIM_SECONDS = 1.5
_ENOUGH = 2 / 3
"""Of the aim: a burst that takes so long is the last."""


class LinkSpeed(BaseModel):
    """The link as it was found."""

    model_config = ConfigDict(frozen=True)

    round_trip_seconds: float
    up_bytes_per_second: float
    down_bytes_per_second: float


def measure_link(channel: grpc.Channel, party: str, aim_seconds: float = _AIM_SECONDS) -> LinkSpeed:
    """Takes about two seconds each way. Raises Unreachable when the link breaks meanwhile."""
    noise = os.urandom(_PIECE_BYTES)

    def upload(size: int) -> model_pb2.MeasureLinkRequest:
        return model_pb2.MeasureLinkRequest(payload=noise[:size])

    def download(size: int) -> model_pb2.MeasureLinkRequest:
        return model_pb2.MeasureLinkRequest(answer_bytes=size)

    stub = model_pb2_grpc.ModelServiceStub(channel)
    with remote_errors(party):
        with _Probe(stub, party) as probe:
            round_trip = statistics.median(probe.burst([upload(0)]) for _ in range(_PINGS))
            up = _bandwidth(probe, upload, round_trip, aim_seconds)
        with _Probe(stub, party) as probe:
            down = _bandwidth(probe, download, round_trip, aim_seconds)
    return LinkSpeed(
        round_trip_seconds=round_trip, up_bytes_per_second=up, down_bytes_per_second=down
    )


def _bandwidth(
    probe: "_Probe",
    request: Callable[[int], model_pb2.MeasureLinkRequest],
    round_trip: float,
    aim_seconds: float,
) -> float:
    """Bytes per second of the last and largest burst."""
    size = _FIRST_BURST_BYTES
    while True:
        pieces = [_PIECE_BYTES] * (size // _PIECE_BYTES) or [size]
        seconds = max(probe.burst([request(piece) for piece in pieces]) - round_trip, 1e-6)
        rate = sum(pieces) / seconds
        room = probe.room_bytes
        if seconds >= _ENOUGH * aim_seconds or room < size:
            return rate
        size = int(min(size * _GROWTH, rate * aim_seconds, room))


class _Probe:
    """One call of MeasureLink."""

    def __init__(self, stub: model_pb2_grpc.ModelServiceStub, party: str) -> None:
        self._party = party
        self._outgoing: queue.Queue[model_pb2.MeasureLinkRequest | None] = queue.Queue()
        requests: Iterator[model_pb2.MeasureLinkRequest] = iter(self._outgoing.get, None)
        self._answers = stub.MeasureLink(requests, timeout=MAX_PROBE_SECONDS)
        self.room_bytes = MAX_PROBE_BYTES - MAX_PIECE_BYTES
        """What may still be moved."""

    def __enter__(self) -> "_Probe":
        return self

    def __exit__(self, *error: object) -> None:
        self._outgoing.put(None)
        self._answers.cancel()

    def burst(self, requests: list[model_pb2.MeasureLinkRequest]) -> float:
        """Seconds until all are answered."""
        start = time.monotonic()
        for request in requests:
            self.room_bytes -= charge(len(request.payload), request.answer_bytes)
            self._outgoing.put(request)
        for request in requests:
            answer = next(self._answers, None)
            if answer is None:
                raise Unreachable(f"{self._party}: ended the measurement of the link too early")
            if len(answer.payload) != request.answer_bytes:
                raise BundleError(
                    f"{self._party}: {request.answer_bytes} bytes were asked for, and it sent "
                    f"{len(answer.payload)}"
                )
        return time.monotonic() - start
