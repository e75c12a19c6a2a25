"""Eight hostile clients of a server, each in its own way, until they are ended.

`python -m tests.hostile.attackers HOST:PORT` says "attacking" once all are at work. Four of them
are members of the run.
"""

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import grpc

from lesft.channel import split_address
from lesft.errors import LesftError
from lesft.micro_batch import MicroBatch, Path, StepKey
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import spec_from_message
from lesft.v1 import model_pb2, model_pb2_grpc
from tests.hostile.sockets import (
    END_HEADERS,
    HEADERS,
    PREFACE,
    SETTINGS,
    attack_grpc_port,
    frame,
    grpc_headers,
)
from tests.server.harness import (
    NARROW,
    RawSession,
    heartbeat,
    held_out_messages,
    make_batch,
    next_of,
    opening,
    raw_channel,
    step_messages,
)

_TRAIN = "/lesft.v1.TrainingService/Train"
_PAUSE_SECONDS = 0.02
"""Between two attempts: the attackers share this machine with those whom they attack."""


def joined(channel: grpc.Channel, spec: RunSpec, name: str) -> tuple[RawSession, StepKey]:
    """A session of a member, and what is due from it. Raises grpc.RpcError."""
    session = RawSession(channel)
    session.send(opening(spec, name, instance_id=name))
    return session, next_of(session.receive().opened)


def flood(address: str, spec: RunSpec) -> None:
    """Heartbeats and held-out requests as fast as they are taken."""
    with raw_channel(address) as channel:
        session, _ = joined(channel, spec, "h-flood")
        for _ in range(2_000):
            session.send(heartbeat(), *held_out_messages())
        session.refusal()


def byte_a_second(address: str, spec: RunSpec) -> None:
    """A call whose first message comes a byte a second."""
    headers = frame(HEADERS, END_HEADERS, 1, grpc_headers(_TRAIN))
    message = opening(spec, "h-slow").SerializeToString()
    with socket.create_connection(split_address(address)) as connection:
        connection.sendall(PREFACE + frame(SETTINGS, 0, 0) + headers)
        for byte in b"\x00" + len(message).to_bytes(4, "big") + message:
            connection.sendall(frame(0, 0, 1, bytes([byte])))
            time.sleep(1)


def never_read(address: str, spec: RunSpec) -> None:
    """Asks as much as it may and takes no answer."""
    with raw_channel(address, *NARROW) as channel:
        session, _ = joined(channel, spec, "h-unread")
        for index in range(8):
            session.send(*held_out_messages(index))
        time.sleep(60)


def garbage(address: str, spec: RunSpec) -> None:
    """Broken HTTP/2 of all kinds."""
    random = Random(0)
    for _ in range(1_000):
        attack_grpc_port(random, address, _TRAIN)
        time.sleep(_PAUSE_SECONDS)


def reconnect_storm(address: str, spec: RunSpec) -> None:
    """A connection, a call, and away in the midst of it."""
    with raw_channel(address) as channel:
        session = RawSession(channel)
        session.send(opening(spec, "h-storm"))
        with suppress(grpc.RpcError, StopIteration):
            session.receive()
        session.call.cancel()


def huge_bundle(address: str, spec: RunSpec) -> None:
    """Announces more than there is memory."""
    with raw_channel(address) as channel:
        session, due = joined(channel, spec, "h-huge")
        header = step_messages(make_batch(due))[0]
        header.micro_batch.bundle.total_bytes = 1 << 62
        session.send(header)
        session.refusal()


def absurd_norm(address: str, spec: RunSpec) -> None:
    """Hidden states of a norm that drowns everyone's gradient."""
    with raw_channel(address) as channel:
        session, due = joined(channel, spec, "h-norm")
        batch = make_batch(due, (7,), (8,), (3,))
        large = Path(batch.base.activations_ND * 1e12, batch.base.lengths)
        session.send(*step_messages(MicroBatch(due, large, batch.reference, batch.targets)))
        session.refusal()


def many_streams(address: str, spec: RunSpec) -> None:
    """Opens as many calls as it gets, of every kind, and leaves them open."""
    with raw_channel(address) as channel:
        calls: list[Any] = []
        for index, name in zip(range(300), itertools.cycle(("Generate", "Train")), strict=False):
            service = "InferenceService" if name == "Generate" else "TrainingService"
            method = channel.stream_stream(f"/lesft.v1.{service}/{name}")
            calls.append(method(iter(threading.Event().wait, True), timeout=20))
            if index % 50 == 49:
                time.sleep(0.2)
        time.sleep(5)
        for call in calls:
            call.cancel()


ATTACKERS: tuple[Callable[[str, RunSpec], None], ...] = (
    *(flood, byte_a_second, never_read, garbage),
    *(reconnect_storm, huge_bundle, absurd_norm, many_streams),
)


def describe(address: str) -> RunSpec:
    """The run that the server lays down."""
    with grpc.insecure_channel(address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        request = model_pb2.DescribeRunRequest(protocol_version=PROTOCOL_VERSION)
        return spec_from_message(stub.DescribeRun(request, wait_for_ready=True, timeout=30).spec)


def _again_and_again(
    attack: Callable[[str, RunSpec], None], address: str, spec: RunSpec, begun: threading.Event
) -> None:
    while True:
        begun.set()
        with suppress(grpc.RpcError, LesftError, OSError, StopIteration, AssertionError):
            attack(address, spec)
        counts[attack.__name__] = counts.get(attack.__name__, 0) + 1
        time.sleep(_PAUSE_SECONDS)


counts: dict[str, int] = {}
"""How often each attack has come to its end."""


def main(address: str) -> None:
    """All attackers until standard input is closed; then says how often each has attacked."""
    os.nice(19)  # on their own machines they would take nothing from the others
    spec = describe(address)
    for attack in ATTACKERS:
        begun = threading.Event()
        arguments = (attack, address, spec, begun)
        threading.Thread(target=_again_and_again, args=arguments, daemon=True).start()
        begun.wait()
    sys.stdout.write("attacking\n")
    sys.stdout.flush()
    sys.stdin.read()
    sys.stdout.write(f"{counts}\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
