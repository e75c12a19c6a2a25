"""The opening handshake over real gRPC: what differs is refused by name, and harms nobody else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from lesft.errors import AlreadyJoined, HandshakeMismatch, InvalidInput, OutOfOrder
from lesft.micro_batch import StepKey
from lesft.spec import PROTOCOL_VERSION, LoraSpec
from lesft.spec_messages import lora_to_message, spec_from_message
from lesft.v1 import run_pb2, training_pb2
from lesft.v1.training_pb2 import TrainRequest
from tests.harness import (
    RunningServer,
    random_samples,
    running_server,
    server_settings,
)
from tests.server.harness import (
    RawSession,
    Refusal,
    assert_serving,
    assert_unchanged,
    held_out_messages,
    join,
    leaving,
    next_of,
    opening,
    raw_channel,
    snapshot,
    train_to_the_end,
    without_pauses,
)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that waits for its two clients; tests leave it so."""
    state = tmp_path_factory.mktemp("state")
    settings = server_settings(model, state, clients=2, batch_size=2, threads=1)
    with running_server(settings) as running, without_pauses():
        yield running


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with raw_channel(server.grpc) as opened:
        yield opened


def mismatch(message: str) -> Refusal:
    return Refusal(StatusCode.FAILED_PRECONDITION, HandshakeMismatch, message)


def invalid(message: str) -> Refusal:
    return Refusal(StatusCode.INVALID_ARGUMENT, InvalidInput, message)


def too_many(names: str) -> Refusal:
    return Refusal(
        StatusCode.ALREADY_EXISTS,
        AlreadyJoined,
        f"clients: the run has its 2 clients already ({names}); use one of those names to come "
        "back as it",
    )


def lora(**changes: Any) -> run_pb2.LoraSpec:
    return lora_to_message(LoraSpec(dropout=0.0).model_copy(update=changes))


def protocol_mismatch(theirs: int) -> Refusal:
    return mismatch(
        f"protocol_version: server {PROTOCOL_VERSION}, client {theirs}; install the same LESFT on "
        "both sides"
    )


NEWER = PROTOCOL_VERSION + 1
FINGERPRINT = "FINGERPRINT"  # stands for the server's, which depends on the model
LORA_WAY_OUT = "leave the client's LoRA options out"
CLIENT_ID_RULE = "client_id must be 1 to 64 letters, digits, '.', '_' or '-', got"

REFUSED: dict[str, tuple[dict[str, Any], Refusal]] = {
    "a newer protocol": ({"protocol_version": NEWER}, protocol_mismatch(NEWER)),
    "an older protocol": ({"protocol_version": 1}, protocol_mismatch(1)),
    "no protocol": ({"protocol_version": 0}, protocol_mismatch(0)),
    "an empty client id": ({"client_id": ""}, invalid(f"{CLIENT_ID_RULE} ''")),
    "a client id with a space": ({"client_id": "a b"}, invalid(f"{CLIENT_ID_RULE} 'a b'")),
    "a client id with a line break": (
        {"client_id": "a\n"},
        invalid(f"{CLIENT_ID_RULE} 'a\\n'"),
    ),
    "a client id of letters from elsewhere": (
        {"client_id": "klient-ä"},
        invalid(f"{CLIENT_ID_RULE} 'klient-ä'"),
    ),
    "a client id that is a path": (
        {"client_id": "../../etc"},
        invalid(f"{CLIENT_ID_RULE} '../../etc'"),
    ),
    "a client id of 65 letters": (
        {"client_id": "x" * 65},
        invalid(f"{CLIENT_ID_RULE} '{'x' * 65}'"),
    ),
    "a client id of a million letters": (
        {"client_id": "x" * 1_000_000},
        invalid(f"{CLIENT_ID_RULE} '{'x' * 80}'"),
    ),
    "no data": (
        {"num_samples": 0},
        invalid("num_samples must be at least 1, got 0: the client has no data"),
    ),
    "another run": (
        {"run_id": "other"},
        mismatch("run_id: server lesft, client other; join the run that the server names"),
    ),
    "no run": (
        {"run_id": ""},
        mismatch("run_id: server lesft, client none; join the run that the server names"),
    ),
    "another cut": (
        {"cut_layer": 2},
        mismatch("cut_layer: server 1, client 2; leave the client's --cut-layer out"),
    ),
    "another rank": (
        {"lora": lora(rank=4)},
        mismatch(f"lora.rank: server 8, client 4; {LORA_WAY_OUT}"),
    ),
    "another alpha": (
        {"lora": lora(alpha=16.5)},
        mismatch(f"lora.alpha: server 16.0, client 16.5; {LORA_WAY_OUT}"),
    ),
    "another dropout": (
        {"lora": lora(dropout=0.2)},
        mismatch(f"lora.dropout: server 0.0, client 0.2; {LORA_WAY_OUT}"),
    ),
    "other target modules": (
        {"lora": lora(target_modules=("gate_proj", "up_proj"))},
        mismatch(
            "lora.target_modules: server gate_proj,up_proj,down_proj, client gate_proj,up_proj; "
            + LORA_WAY_OUT
        ),
    ),
    "no LoRA": ({"lora": None}, mismatch(f"lora.rank: server 8, client 0; {LORA_WAY_OUT}")),
    "another front": (
        {"front_fingerprint": "sha256:0"},
        mismatch(
            f"front_fingerprint: server {FINGERPRINT}, client sha256:0; the client's weights or "
            "config are not the server's; let it fetch them with --weights server"
        ),
    ),
    "rounded activations": (
        {"activation_encoding": 2},
        mismatch(
            "activation_encoding: server raw, client bf16; leave the client's activation_encoding "
            "out"
        ),
    ),
    "activations without encoding": (
        {"activation_encoding": 0},
        mismatch(
            "activation_encoding: server raw, client 0; leave the client's activation_encoding out"
        ),
    ),
    "rounded gradients": (
        {"gradient_encoding": 2},
        mismatch(
            "gradient_encoding: server raw, client bf16; leave the client's gradient_encoding out"
        ),
    ),
    "gradients in an encoding of the future": (
        {"gradient_encoding": 5},
        mismatch(
            "gradient_encoding: server raw, client 5; leave the client's gradient_encoding out"
        ),
    ),
    "an instance id of 65 letters": (
        {"instance_id": "x" * 65},
        invalid("instance_id must have at most 64 characters, got 65"),
    ),
    "checkpoints of rounds that the server has not done": (
        {"checkpoint_rounds": [1, 2]},
        mismatch(
            "checkpoint_rounds: server 0 to 0, client 1,2; give the client, or the server, the "
            "--state that it had before, or start everybody anew with --fresh"
        ),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_opening_that_differs_is_refused_by_name_and_a_right_client_can_still_join(
    what: str, server: RunningServer, channel: grpc.Channel
) -> None:
    changes, refusal = REFUSED[what]
    before = snapshot(server)
    session = RawSession(channel)
    session.send(opening(server.spec, **changes))
    message = refusal.message.replace(FINGERPRINT, server.spec.front_fingerprint)
    assert session.refusal() == Refusal(refusal.code, refusal.kind, message)

    assert server.engine.run.members == {}
    assert_serving(server)
    right = join(channel, server.spec, "a", instance_id="x" * 64)
    right.send(*held_out_messages())
    scores = right.receive().held_out.nll_sums
    assert len(scores) == 2
    assert min(scores) > 0
    right.send(leaving())
    assert right.rest() == []
    assert server.engine.run.members == {}
    assert_unchanged(server, before)


def test_a_message_that_quotes_a_stranger_is_one_line_and_fits_into_the_trailers(
    server: RunningServer, channel: grpc.Channel
) -> None:
    session = RawSession(channel)
    session.send(opening(server.spec, run_id="evil\n\x1b[31m" + "\N{GRINNING FACE}" * 100_000))
    refusal = session.refusal()
    assert (refusal.code, refusal.kind) == (StatusCode.FAILED_PRECONDITION, HandshakeMismatch)
    assert refusal.message.startswith("run_id: server lesft, client evil [31m\N{GRINNING FACE}")
    assert refusal.message.endswith("\N{GRINNING FACE}...; join the run that the server names")
    assert 700 < len(refusal.message.encode()) <= 1000


def test_the_right_opening_is_answered_with_the_spec(
    server: RunningServer, channel: grpc.Channel
) -> None:
    session = RawSession(channel)
    session.send(opening(server.spec, "a"))
    opened = session.receive().opened
    assert spec_from_message(opened.spec) == server.spec
    assert (next_of(opened), opened.course) == (StepKey(0, 0), training_pb2.COURSE_GO_BACK)
    assert opened.heartbeat_seconds == 5
    session.send(leaving())
    assert session.rest() == []


@pytest.mark.parametrize(
    "messages",
    [[leaving()], [TrainRequest()], held_out_messages()],
    ids=["leave", "an empty message", "held_out"],
)
def test_the_first_message_must_be_open(
    messages: list[TrainRequest], server: RunningServer, channel: grpc.Channel
) -> None:
    session = RawSession(channel)
    session.send(*messages)
    assert session.refusal() == Refusal(
        StatusCode.FAILED_PRECONDITION,
        OutOfOrder,
        "the first message of a session must be open",
    )
    assert_serving(server)


def test_a_stream_that_is_closed_before_it_opens_is_told_the_same(
    server: RunningServer, channel: grpc.Channel
) -> None:
    session = RawSession(channel)
    session.close_requests()
    assert session.refusal().message == "the first message of a session must be open"


def test_what_is_no_protobuf_message_is_refused(
    server: RunningServer, channel: grpc.Channel
) -> None:
    session = RawSession(channel)
    session.send(b"\xff\xff\xff")
    assert session.refusal() == Refusal(
        StatusCode.INVALID_ARGUMENT,
        InvalidInput,
        "a message of 3 bytes is not of this method's type: build the client from the same "
        ".proto files as this service",
    )
    assert_serving(server)


def test_a_taken_name_and_a_client_too_many_are_refused_and_the_run_trains_to_its_end(
    model: Path, tmp_path: Path
) -> None:
    with (
        running_server(server_settings(model, tmp_path, clients=2, threads=1)) as server,
        raw_channel(server.grpc) as channel,
    ):
        for changes, _ in REFUSED.values():
            refused = RawSession(channel)
            refused.send(opening(server.spec, **changes))
            refused.refusal()

        first = join(channel, server.spec, "client-0")
        again = RawSession(channel)
        again.send(opening(server.spec, "client-0"))
        assert again.refusal() == Refusal(
            StatusCode.ALREADY_EXISTS,
            AlreadyJoined,
            "client_id: 'client-0' is in the run already; give every client a --client-id of "
            "its own",
        )
        first.send(leaving("makes room"))
        assert first.rest() == []

        train_to_the_end(server, model, [random_samples(3, 1), random_samples(5, 2)])
        assert [record.round for record in server.engine.run.rounds] == [0, 1]
        late = RawSession(channel)
        late.send(opening(server.spec, "client-2", checkpoint_rounds=[2]))
        assert late.refusal() == too_many("client-0, client-1")
        assert_serving(server)


def test_a_client_too_many_is_refused_in_mid_run(model: Path, tmp_path: Path) -> None:
    with (
        running_server(
            server_settings(model, tmp_path, clients=2, batch_size=2, threads=1)
        ) as server,
        raw_channel(server.grpc) as channel,
    ):
        sessions = [join(channel, server.spec, name) for name in ("b", "a")]
        third = RawSession(channel)
        third.send(opening(server.spec, "c"))
        assert third.refusal() == too_many("a, b")
        for session in sessions:
            session.send(*held_out_messages())
            assert len(session.receive().held_out.nll_sums) == 2
