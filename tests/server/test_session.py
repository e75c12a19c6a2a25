"""What a client may send in mid-run, over real gRPC, and what all hear when one breaks a rule.

In this release a client that breaks off or breaks a rule in mid-run stops the run for all. So what
must hold: everybody is told why, nothing of the bad message is applied, and the service lives on.
"""

import gc
import logging
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc import StatusCode

from lesft.bundle import CHUNK_BYTES, bundle_info
from lesft.channel import MAX_MESSAGE_BYTES
from lesft.cohort_batch import Part
from lesft.errors import (
    BundleError,
    InternalError,
    InvalidInput,
    LesftError,
    OutOfOrder,
    RunStopped,
    TooLarge,
    status_of,
)
from lesft.micro_batch import MicroBatch, StepKey, StepResult, Targets
from lesft.micro_batch import Path as Activations
from lesft.spec import RunSpec
from lesft.step_messages import Limits, held_out_from_message, micro_batch_to_message
from lesft.tensors import encode_tensors
from lesft.v1 import training_pb2
from lesft.v1.tensor_pb2 import Chunk
from lesft.v1.training_pb2 import TrainRequest
from lesft_server.run import RunState
from lesft_server.session import MAX_HELD_OUT_WAITING
from tests.harness import (
    RunningServer,
    random_samples,
    running_server,
    server_settings,
)
from tests.server.harness import (
    BASE_LENGTHS,
    REFERENCE_LENGTHS,
    TARGET_LENGTHS,
    RawSession,
    Refusal,
    Snapshot,
    assert_serving,
    assert_unchanged,
    held_out_messages,
    join,
    leaving,
    make_batch,
    opening,
    raw_channel,
    snapshot,
    step_messages,
    train_to_the_end,
    wait_until,
    with_chunks,
)
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE

MAX_LENGTH = 4096
NO_LEAVE = "its stream ended without leave (was it stopped, or its connection cut?)"

Messages = list[TrainRequest | bytes]


@contextmanager
def serving(
    model: Path, state: Path, clients: int = 2, **options: object
) -> Iterator[RunningServer]:
    """Two rounds of two micro-batches of up to two samples."""
    values: dict[str, Any] = {
        "accumulation": 2,
        "rounds": 2,
        "batch_size": 2,
        "max_length": MAX_LENGTH,
        "threads": 1,
    }
    with running_server(
        server_settings(model, state, clients=clients, **{**values, **options})
    ) as server:
        yield server


def refusal(kind: type[LesftError], message: str) -> Refusal:
    return Refusal(status_of(kind("")).grpc, kind, message)


def run_ended(message: str, at: StepKey, client: str = "b") -> Refusal:
    """What the others hear when a client stops the run."""
    return refusal(RunStopped, f"the run has ended: client {client!r} left at {at}: {message}")


# ---------------------------------------------------------------------- bad input


class Parts:
    """A micro-batch taken apart, so that a test can bend one part of it."""

    def __init__(self, key: StepKey, batch: MicroBatch | None = None) -> None:
        self.header, self.data = micro_batch_to_message(batch or make_batch(key), "raw")

    def tensors(self) -> dict[str, torch.Tensor]:
        batch = make_batch(StepKey(0, 0))
        assert batch.reference is not None
        return {
            "base": batch.base.activations_ND.clone(),
            "reference": batch.reference.activations_ND.clone(),
            "targets": batch.targets.ids_T.int(),
        }

    def with_data(self, data: bytes) -> Messages:
        """The same header before another bundle."""
        self.header.bundle.CopyFrom(bundle_info(data))
        return [*with_chunks(TrainRequest(micro_batch=self.header), data)]

    def with_tensors(self, **tensors: torch.Tensor | None) -> Messages:
        """Other tensors; None leaves one out."""
        changed = {**self.tensors(), **tensors}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        return self.with_data(encode_tensors(kept, "raw"))

    def announced(self) -> TrainRequest:
        return TrainRequest(micro_batch=self.header)


def lengths(
    base: Sequence[int] = BASE_LENGTHS,
    reference: Sequence[int] = REFERENCE_LENGTHS,
    targets: Sequence[int] = TARGET_LENGTHS,
) -> Callable[[StepKey], Messages]:
    """A micro-batch's header with these lengths."""
    return lambda key: [
        TrainRequest(
            micro_batch=training_pb2.MicroBatch(
                round=key.round,
                micro=key.micro,
                base_lengths=base,
                reference_lengths=reference,
                target_lengths=targets,
            )
        )
    ]


def announcing(total_bytes: int) -> Callable[[StepKey], Messages]:
    def messages(key: StepKey) -> Messages:
        parts = Parts(key)
        parts.header.bundle.total_bytes = total_bytes
        return [parts.announced()]

    return messages


def tensors(**changes: torch.Tensor | None) -> Callable[[StepKey], Messages]:
    return lambda key: Parts(key).with_tensors(**changes)


def bundle(data: bytes) -> Callable[[StepKey], Messages]:
    return lambda key: Parts(key).with_data(data)


def chunks(*pieces: tuple[int, int]) -> Callable[[StepKey], Messages]:
    """A bundle of one full chunk and a bit, sent in pieces of (index, length)."""

    def messages(key: StepKey) -> Messages:
        parts = Parts(key, make_batch(key, (2300, 2300), (2300, 2300), (1, 1)))
        parts.header.bundle.total_bytes = CHUNK_BYTES + 1000
        return [
            parts.announced(),
            *(TrainRequest(chunk=Chunk(index=i, data=bytes(length))) for i, length in pieces),
        ]

    return messages


def in_mid_bundle(message: TrainRequest) -> Callable[[StepKey], Messages]:
    return lambda key: [Parts(key).announced(), message]


def damaged(key: StepKey) -> Messages:
    parts = Parts(key)
    data = bytearray(parts.data)
    data[-1] ^= 1
    return [parts.announced(), TrainRequest(chunk=Chunk(index=0, data=bytes(data)))]


def checksums() -> tuple[str, str]:
    """The checksum of the damaged bundle, and that of the whole one."""
    data = Parts(StepKey(0, 0)).data
    return f"{zlib.crc32(data[:-1] + bytes([data[-1] ^ 1])):08x}", f"{zlib.crc32(data):08x}"


def changed(name: str, value: float, index: int = 0) -> Callable[[StepKey], Messages]:
    """One number of one tensor is another."""

    def messages(key: StepKey) -> Messages:
        parts = Parts(key)
        tensor = parts.tensors()[name]
        tensor.view(-1)[index] = value
        return parts.with_tensors(**{name: tensor})

    return messages


def held_out(**fields: object) -> Callable[[StepKey], Messages]:
    return lambda _: [TrainRequest(held_out=training_pb2.HeldOut(**fields))]  # type: ignore[arg-type]


def always(*messages: TrainRequest | bytes) -> Callable[[StepKey], Messages]:
    return lambda _: list(messages)


BUNDLE_LIMIT = (
    (sum(BASE_LENGTHS) + sum(REFERENCE_LENGTHS)) * HIDDEN_SIZE * 4 + sum(TARGET_LENGTHS) * 4 + 4096
)
FRONT = "check the client's front and its precision"
TOKENIZER = "client and server must use the same model's tokenizer"
SKIP = "skip the sample or raise --max-length on the server"
OVER_THE_LIMIT = TrainRequest(chunk=Chunk(data=bytes(MAX_MESSAGE_BYTES)))

BAD: dict[str, tuple[Callable[[StepKey], Messages], Refusal]] = {
    # Messages out of place.
    "a second open": (
        always(TrainRequest(open=training_pb2.OpenSession(client_id="b"))),
        refusal(OutOfOrder, "open came where a micro_batch, held_out or leave was due"),
    ),
    "a chunk of nothing": (
        always(TrainRequest(chunk=Chunk(index=0, data=b"x"))),
        refusal(OutOfOrder, "chunk came where a micro_batch, held_out or leave was due"),
    ),
    "a chunk after the bundle's last": (
        lambda key: [
            *held_out_messages(),
            TrainRequest(chunk=Chunk(index=1, data=b"x")),
        ],
        refusal(OutOfOrder, "chunk came where a micro_batch, held_out or leave was due"),
    ),
    "an empty message": (
        always(TrainRequest()),
        refusal(OutOfOrder, "an empty message came where a micro_batch, held_out or leave was due"),
    ),
    "no protobuf": (
        always(b"\xff\xff\xff\xff"),
        refusal(
            InvalidInput,
            "a message of 4 bytes is not of this method's type: build the client from the same "
            ".proto files as this service",
        ),
    ),
    # Lengths.
    "no samples": (
        lengths(base=(), reference=(), targets=()),
        refusal(InvalidInput, "target_lengths must have 1 to 2 entries (batch_size), got 0"),
    ),
    "more samples than batch_size": (
        lengths(base=(7, 5, 5), reference=(8, 6, 6), targets=(3, 2, 2)),
        refusal(InvalidInput, "target_lengths must have 1 to 2 entries (batch_size), got 3"),
    ),
    "a base length too few": (
        lengths(base=(7,)),
        refusal(InvalidInput, "base_lengths must have one entry per sample (2), got 1"),
    ),
    "no reference where the loss needs one": (
        lengths(reference=()),
        refusal(InvalidInput, "reference_lengths must have one entry per sample (2), got 0"),
    ),
    "too many tokens": (
        lengths(base=(7, MAX_LENGTH + 1)),
        refusal(
            TooLarge,
            "base_lengths: a sequence of 4097 tokens, but the run's max_length is 4096: " + SKIP,
        ),
    ),
    "too many tokens on the reference path": (
        lengths(reference=(2**32 - 1, 6)),
        refusal(
            TooLarge,
            "reference_lengths: a sequence of 4294967295 tokens, but the run's max_length is "
            "4096: " + SKIP,
        ),
    ),
    "a sequence of one token": (
        lengths(base=(1, 5)),
        refusal(
            InvalidInput,
            "base_lengths: a sequence must have at least 2 tokens, prompt and target, got 1",
        ),
    ),
    "a target of no token": (
        lengths(targets=(0, 2)),
        refusal(
            InvalidInput,
            "target_lengths: a target must have 1 to 6 of its sequence's 7 tokens, got 0",
        ),
    ),
    "a target as long as its sequence": (
        lengths(targets=(3, 5)),
        refusal(
            InvalidInput,
            "target_lengths: a target must have 1 to 4 of its sequence's 5 tokens, got 5",
        ),
    ),
    "a held-out target as long as its sequence": (
        held_out(base_lengths=[5], target_lengths=[5]),
        refusal(
            InvalidInput,
            "target_lengths: a target must have 1 to 4 of its sequence's 5 tokens, got 5",
        ),
    ),
    # Bundles.
    "a bundle announced too large": (
        announcing(BUNDLE_LIMIT + 1),
        refusal(
            TooLarge,
            f"bundle of {BUNDLE_LIMIT + 1} bytes announced, but at most {BUNDLE_LIMIT} are allowed "
            "here: send fewer or shorter samples per micro-batch",
        ),
    ),
    "a bundle announced as large as can be": (
        announcing(2**64 - 1),
        refusal(
            TooLarge,
            f"bundle of {2**64 - 1} bytes announced, but at most {BUNDLE_LIMIT} are allowed here: "
            "send fewer or shorter samples per micro-batch",
        ),
    ),
    "a bundle not announced": (
        announcing(0),
        refusal(
            BundleError,
            "bundle of 0 bytes announced, but a safetensors byte string has at least 8: announce "
            "the bundle before its chunks",
        ),
    ),
    "a chunk too short": (
        chunks((0, CHUNK_BYTES - 1)),
        refusal(BundleError, "chunk 0 must have 1048576 bytes, got 1048575"),
    ),
    "a chunk too long": (
        chunks((0, CHUNK_BYTES), (1, 1001)),
        refusal(BundleError, "chunk 1 must have 1000 bytes, got 1001"),
    ),
    "an empty chunk": (
        chunks((0, CHUNK_BYTES), (1, 0)),
        refusal(BundleError, "chunk 1 must have 1000 bytes, got 0"),
    ),
    "chunks in another order": (
        chunks((1, 1000), (0, CHUNK_BYTES)),
        refusal(BundleError, "chunk 0 expected, got chunk 1: chunks must come in order, each once"),
    ),
    "a chunk twice": (
        chunks((0, CHUNK_BYTES), (0, CHUNK_BYTES)),
        refusal(BundleError, "chunk 1 expected, got chunk 0: chunks must come in order, each once"),
    ),
    "a damaged chunk": (
        damaged,
        refusal(
            BundleError,
            "bundle has checksum {}, but {} was announced: it was damaged on the way, send it "
            "again".format(*checksums()),
        ),
    ),
    "a leave in the midst of a bundle": (
        in_mid_bundle(leaving()),
        refusal(BundleError, "chunk 0 of a bundle is missing: leave came"),
    ),
    "a micro-batch in the midst of a bundle": (
        lambda key: [Parts(key).announced(), Parts(key).announced()],
        refusal(BundleError, "chunk 0 of a bundle is missing: micro_batch came"),
    ),
    "an empty message in the midst of a bundle": (
        in_mid_bundle(TrainRequest()),
        refusal(BundleError, "chunk 0 of a bundle is missing: an empty message came"),
    ),
    # Tensors.
    "bytes that are no safetensors": (
        bundle(bytes(100)),
        refusal(
            BundleError,
            "bundle is no safetensors byte string: Error while deserializing: invalid JSON in "
            "header: EOF while parsing a value at line 1 column 0",
        ),
    ),
    "a tensor too few": (
        tensors(reference=None),
        refusal(BundleError, "3 tensors expected, got 2; missing: 'reference'"),
    ),
    "a tensor too many": (
        tensors(secret=torch.zeros(1)),
        refusal(BundleError, "3 tensors expected, got 4; not expected: 'secret'"),
    ),
    "a tensor in float16": (
        tensors(base=torch.zeros(sum(BASE_LENGTHS), HIDDEN_SIZE, dtype=torch.float16)),
        refusal(
            BundleError, "tensor 'base' must be torch.float32 or torch.bfloat16, got torch.float16"
        ),
    ),
    "token ids in 64 bits": (
        tensors(targets=torch.zeros(sum(TARGET_LENGTHS), dtype=torch.int64)),
        refusal(BundleError, "tensor 'targets' must be torch.int32, got torch.int64"),
    ),
    "a row too few": (
        tensors(base=torch.zeros(sum(BASE_LENGTHS) - 1, HIDDEN_SIZE)),
        refusal(BundleError, "tensor 'base' must have shape [12, 32], got [11, 32]"),
    ),
    "a width of another model": (
        tensors(reference=torch.zeros(sum(REFERENCE_LENGTHS), HIDDEN_SIZE + 1)),
        refusal(BundleError, "tensor 'reference' must have shape [14, 32], got [14, 33]"),
    ),
    "NaN": (
        changed("base", float("nan"), index=-1),
        refusal(BundleError, "tensor 'base' has values that are NaN or infinite"),
    ),
    "infinity": (
        changed("reference", float("-inf")),
        refusal(BundleError, "tensor 'reference' has values that are NaN or infinite"),
    ),
    "numbers whose gradients would be NaN": (
        changed("base", -3e38),
        refusal(
            BundleError,
            "tensor 'base' has values up to 3.0e+38 in magnitude, but activations must stay "
            "within 1e+15: " + FRONT,
        ),
    ),
    "a label below the vocabulary": (
        changed("targets", -1),
        refusal(
            InvalidInput,
            f"label ids must lie between 0 and 96 (the model's vocabulary), got -1: {TOKENIZER}",
        ),
    ),
    "a label above the vocabulary": (
        changed("targets", VOCAB_SIZE, index=-1),
        refusal(
            InvalidInput,
            f"label ids must lie between 0 and 96 (the model's vocabulary), got 97: {TOKENIZER}",
        ),
    ),
}


def send_bad(session: RawSession, what: str, key: StepKey) -> Refusal:
    """Send a bad message; returns the refusal that is due for it."""
    messages, expected = BAD[what]
    session.send(*messages(key))
    return expected


class MidRun:
    """A run whose clients a and b have trained on the first micro-batch of a window.

    So there are gradients in the adapters that a bad message could spoil. The second micro-batch of
    a is there too and waits for b's.
    """

    at = StepKey(0, 1)

    def __init__(self, server: RunningServer, channel: grpc.Channel) -> None:
        self.server = server
        self.channel = channel
        self.a, self.b = (join(channel, server.spec, name) for name in "ab")
        for session in (self.a, self.b):
            session.send(*step_messages(make_batch(StepKey(0, 0))))
        for session in (self.a, self.b):
            assert session.receive_step().loss > 0
        self.before: Snapshot = snapshot(server)
        gradients = [gradient for _, gradient in self.before.values() if gradient is not None]
        assert any(bool(gradient.any()) for gradient in gradients)
        self.a.send(*step_messages(make_batch(self.at)))
        wait_until(lambda: server.engine.run.members["a"].next_key == StepKey(1, 0))

    def assert_stopped(self, why: str) -> None:
        """The others were told, a newcomer is too, nothing was applied, and the service lives."""
        ended = run_ended(why, self.at)
        assert self.a.refusal() == ended
        newcomer = RawSession(self.channel)
        newcomer.send(opening(self.server.spec, "c"))
        assert newcomer.refusal() == ended
        assert self.server.engine.run.state is RunState.STOPPED
        assert self.server.engine.run.rounds == []
        assert_unchanged(self.server, self.before)
        assert_serving(self.server)


@pytest.fixture
def mid_run(model: Path, tmp_path: Path) -> Iterator[MidRun]:
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        yield MidRun(server, channel)


@pytest.mark.parametrize("what", BAD)
def test_bad_input_in_mid_run_changes_nothing_and_everyone_hears_of_it(
    what: str, mid_run: MidRun
) -> None:
    expected = send_bad(mid_run.b, what, mid_run.at)
    assert mid_run.b.refusal() == expected
    mid_run.assert_stopped(expected.message)


def test_bad_input_before_the_start_only_costs_its_sender_the_place(
    model: Path, tmp_path: Path
) -> None:
    samples = [random_samples(5, 1), random_samples(3, 2)]
    with serving(model, tmp_path / "undisturbed") as server:
        undisturbed = train_to_the_end(server, model, samples)
    with serving(model, tmp_path / "disturbed") as server, raw_channel(server.grpc) as channel:
        before = snapshot(server)
        for what in BAD:
            session = join(channel, server.spec, "client-0")
            expected = send_bad(session, what, StepKey(0, 0))
            assert session.refusal() == expected, what
            assert server.engine.run.members == {}
        assert_unchanged(server, before)
        assert_serving(server)
        disturbed = train_to_the_end(server, model, samples)
    assert disturbed.keys() == undisturbed.keys()
    assert all(torch.equal(disturbed[name], undisturbed[name]) for name in undisturbed)


def test_a_message_over_the_channels_limit_ends_its_senders_call_only(mid_run: MidRun) -> None:
    mid_run.b.send(OVER_THE_LIMIT)
    assert mid_run.b.refusal() == refusal(
        TooLarge,
        f"SERVER: Received message larger than max ({OVER_THE_LIMIT.ByteSize()} vs. 2097152)",
    )
    mid_run.assert_stopped(NO_LEAVE)


# ---------------------------------------------------------------------- the order of micro-batches

WRONG_KEYS = {
    "repeated": StepKey(0, 0),
    "a gap": StepKey(0, 2),
    "the next round's": StepKey(1, 0),
    "of a far round": StepKey(2**32 - 1, 2**32 - 1),
}


@pytest.mark.parametrize("what", WRONG_KEYS)
def test_a_micro_batch_whose_turn_it_is_not_is_refused(what: str, mid_run: MidRun) -> None:
    key = WRONG_KEYS[what]
    mid_run.b.send(*step_messages(make_batch(key)))
    message = f"round 0 micro-batch 1 is due, got {key}: each must come once and in order"
    assert mid_run.b.refusal() == refusal(OutOfOrder, message)
    mid_run.assert_stopped(message)


def test_a_micro_batch_of_the_next_round_must_wait_for_the_answers_of_this_one(
    mid_run: MidRun,
) -> None:
    # b's second one is not there yet, so a cannot have stepped its adapters at the round's end.
    mid_run.a.send(*step_messages(make_batch(StepKey(1, 0))))
    message = "round 1 micro-batch 0 came before the round before it was answered"
    assert mid_run.a.refusal() == refusal(OutOfOrder, message)
    assert mid_run.b.refusal() == run_ended(message, StepKey(1, 0), "a")
    assert_unchanged(mid_run.server, mid_run.before)
    assert_serving(mid_run.server)


def test_a_micro_batch_past_the_last_round_is_refused_and_the_run_stays_finished(
    model: Path, tmp_path: Path
) -> None:
    with serving(model, tmp_path, clients=1) as server, raw_channel(server.grpc) as channel:
        session = join(channel, server.spec, "a")
        for round_index in range(2):
            for micro in range(2):
                session.send(*step_messages(make_batch(StepKey(round_index, micro))))
            for _ in range(2):
                session.receive_step()
        trained = snapshot(server)
        session.send(*step_messages(make_batch(StepKey(2, 0))))
        assert session.refusal() == refusal(
            OutOfOrder, "round 2 micro-batch 0: the run has only 2 rounds"
        )
        assert server.engine.run.state is RunState.FINISHED
        assert [record.round for record in server.engine.run.rounds] == [0, 1]
        assert_unchanged(server, trained)
        assert_serving(server)


# ---------------------------------------------------------------------- those who go


def cancel(mid_run: MidRun) -> None:
    mid_run.b.call.cancel()


def cancel_in_mid_bundle(mid_run: MidRun) -> None:
    member = mid_run.server.engine.run.members["b"]
    before = member.last_seen
    mid_run.b.send(*chunks((0, CHUNK_BYTES))(mid_run.at))
    wait_until(lambda: member.last_seen > before)
    mid_run.b.call.cancel()


def close_the_stream(mid_run: MidRun) -> None:
    mid_run.b.close_requests()
    assert mid_run.b.refusal() == refusal(OutOfOrder, NO_LEAVE)


@pytest.mark.parametrize("how", [cancel, cancel_in_mid_bundle, close_the_stream])
def test_a_client_that_breaks_off_stops_the_run_and_all_hear_its_name(
    how: Callable[[MidRun], None], mid_run: MidRun
) -> None:
    how(mid_run)
    mid_run.assert_stopped(NO_LEAVE)


def test_a_client_may_break_off_while_its_message_is_still_being_read(
    mid_run: MidRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, release = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        decoding.set()
        assert release.wait(20)

    monkeypatch.setattr("lesft_server.session.held_out_from_message", slow)
    mid_run.b.send(*held_out_messages())
    try:
        assert decoding.wait(20)
        mid_run.b.call.cancel()
        assert mid_run.a.refusal() == run_ended(NO_LEAVE, mid_run.at)
    finally:
        release.set()
    assert_unchanged(mid_run.server, mid_run.before)
    assert_serving(mid_run.server)


def test_a_client_whose_connection_is_gone_stops_the_run(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        a = join(channel, server.spec, "a")
        with raw_channel(server.grpc) as other:
            join(other, server.spec, "b")
        assert a.refusal() == run_ended(NO_LEAVE, StepKey(0, 0))
        assert_serving(server)


def test_a_leave_in_mid_run_ends_its_senders_call_well_and_its_reason_is_told(
    mid_run: MidRun,
) -> None:
    mid_run.b.send(leaving("the battery is low"))
    assert mid_run.b.rest() == []
    mid_run.assert_stopped("the battery is low")


def test_a_leave_ends_the_call_although_a_micro_batch_still_waits_for_the_others(
    mid_run: MidRun,
) -> None:
    mid_run.a.send(leaving())
    assert mid_run.a.rest() == []
    why = "the run has ended: client 'a' left at round 1 micro-batch 0: no reason given"
    assert mid_run.b.refusal() == refusal(RunStopped, why)
    assert_unchanged(mid_run.server, mid_run.before)


def test_a_hostile_reason_reaches_the_others_as_one_short_line(
    mid_run: MidRun, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        mid_run.b.send(leaving("bye\r\nround 9 of 9: loss 0.0000\x1b[2J " + "ä" * 500_000))
        heard = mid_run.a.refusal()
    assert (heard.code, heard.kind) == (StatusCode.ABORTED, RunStopped)
    assert heard.message.startswith(
        "the run has ended: client 'b' left at round 0 micro-batch 1: bye round 9 of 9: loss "
        "0.0000 [2J äää"
    )
    assert len(heard.message.encode()) <= 1000
    assert len(mid_run.server.engine.run.reason) < 1100
    assert not any("\n" in record.getMessage() for record in caplog.records)


def test_a_client_that_leaves_before_the_start_frees_its_place_and_can_come_back(
    model: Path, tmp_path: Path
) -> None:
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        for reason in ("", "forgot the charger"):
            session = join(channel, server.spec, "client-0")
            assert list(server.engine.run.members) == ["client-0"]
            session.send(leaving(reason))
            assert session.rest() == []
            assert server.engine.run.members == {}
        session = join(channel, server.spec, "client-0")
        session.call.cancel()
        wait_until(lambda: not server.engine.run.members)
        assert server.engine.run.state is RunState.WAITING
        train_to_the_end(server, model, [random_samples(3, 1), random_samples(3, 2)])
        assert server.engine.run.state is RunState.FINISHED


# ---------------------------------------------------------------------- what the server must hold


def num_micro_batches_held() -> int:
    gc.collect()
    return sum(type(thing) is MicroBatch for thing in gc.get_objects())


def test_what_a_client_sent_before_it_left_goes_with_it(model: Path, tmp_path: Path) -> None:
    """Were the parts kept, ever new names would pile them up, and they would count as others'."""
    before = num_micro_batches_held()
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        for name in ("x", "y", "z"):
            session = join(channel, server.spec, name)
            for micro in range(2):
                session.send(*step_messages(make_batch(StepKey(0, micro))))
            member = server.engine.run.members[name]
            wait_until(lambda member=member: member.next_key == StepKey(1, 0))
            assert num_micro_batches_held() == before + 2
            session.send(leaving())
            assert session.rest() == []
        assert num_micro_batches_held() == before
        train_to_the_end(server, model, [random_samples(3, 1), random_samples(3, 2)])
        assert server.engine.run.state is RunState.FINISHED


def test_unanswered_held_out_requests_are_bounded(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        session = join(channel, server.spec, "a")
        session.send(*step_messages(make_batch(StepKey(0, 0))))  # its answer waits for b
        for index in range(MAX_HELD_OUT_WAITING + 1):
            session.send(*held_out_messages(index))
        assert session.refusal() == refusal(
            OutOfOrder, "at most 8 held_out requests may be unanswered"
        )
        assert server.engine.run.members == {}
        assert_serving(server)


def test_as_many_held_out_requests_as_may_wait_are_answered_in_order(
    model: Path, tmp_path: Path
) -> None:
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        a, b = (join(channel, server.spec, name) for name in "ab")
        a.send(*step_messages(make_batch(StepKey(0, 0))))
        for index in range(MAX_HELD_OUT_WAITING):
            a.send(*held_out_messages(index))
        b.send(*step_messages(make_batch(StepKey(0, 0))))
        assert a.receive_step().round == 0
        scores = [a.receive().held_out for _ in range(MAX_HELD_OUT_WAITING)]
        assert [score.index for score in scores] == list(range(MAX_HELD_OUT_WAITING))
        assert len({tuple(score.nll_sums) for score in scores}) == 1
        assert all(nll > 0 for nll in scores[0].nll_sums)


NARROW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 << 10))
"""Makes a client's end take few bytes that are not read, so that the server soon has to wait."""


def bulky_round(round_index: int) -> Messages:
    """The micro-batches of a round; the answer to each is four times what a narrow client takes."""
    messages: Messages = []
    for micro in range(2):
        batch = make_batch(StepKey(round_index, micro), (900, 900), (), (1, 1))
        messages += step_messages(MicroBatch(batch.key, batch.base, None, batch.targets))
    return messages


def test_answers_that_a_client_does_not_read_count_as_unanswered(
    model: Path, tmp_path: Path
) -> None:
    """Else a client could make the server hold the answers of all rounds."""
    loss = {"token_weights": "uniform"}
    with (
        serving(model, tmp_path, clients=1, loss=loss) as server,
        raw_channel(server.grpc, *NARROW) as channel,
    ):
        session = join(channel, server.spec, "a")
        session.send(*bulky_round(0))
        # The first answer is on its way, as far as it fits; the second is computed.
        wait_until(lambda: server.engine.run.rounds)
        session.send(*bulky_round(1))
        wait_until(lambda: server.engine.run.state is RunState.STOPPED)
        assert session.refusal() == refusal(
            OutOfOrder, "round 1 micro-batch 0 came before the round before it was answered"
        )
        assert [record.round for record in server.engine.run.rounds] == [0]
        assert_serving(server)


def test_a_session_that_was_ended_takes_nothing_more_while_its_client_does_not_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, release = threading.Event(), threading.Event()
    decoded: list[int] = []

    def slow(
        header: training_pb2.HeldOut, data: bytes, limits: Limits
    ) -> tuple[Activations, Targets]:
        decoded.append(header.index)
        decoding.set()
        assert release.wait(20)
        return held_out_from_message(header, data, limits)

    monkeypatch.setattr("lesft_server.session.held_out_from_message", slow)
    loss = {"token_weights": "uniform"}
    with (
        serving(model, tmp_path, loss=loss) as server,
        raw_channel(server.grpc, *NARROW) as channel,
        raw_channel(server.grpc) as other,
    ):
        scored: list[Targets] = []
        monkeypatch.setattr(
            server.engine.back, "score", lambda _, targets: scored.append(targets) or [0.0]
        )
        a, b = join(channel, server.spec, "a"), join(other, server.spec, "b")
        for session in (a, b):
            session.send(*bulky_round(0))
        for _ in range(2):
            b.receive_step()
        a.send(*held_out_messages(0), *held_out_messages(1))
        try:
            assert decoding.wait(20)
            b.call.cancel()
            wait_until(lambda: server.engine.run.state is RunState.STOPPED)
        finally:
            release.set()
        assert a.refusal() == run_ended(NO_LEAVE, StepKey(1, 0))
        snapshot(server)  # after all jobs that were queued
        assert decoded == [0]
        assert scored == []


# ---------------------------------------------------------------------- when the server fails


def test_a_failure_while_scoring_is_logged_and_told_without_details(
    mid_run: MidRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> list[float]:
        raise RuntimeError("CUDA out of memory at 0xdeadbeef")

    monkeypatch.setattr(mid_run.server.engine.back, "score", fail)
    mid_run.b.send(*held_out_messages())
    assert mid_run.b.refusal() == refusal(
        InternalError, "internal error; the service's log has the details"
    )
    mid_run.assert_stopped("its call failed on the server; the log has the details")
    assert "RuntimeError: CUDA out of memory at 0xdeadbeef" in caplog.text


def test_a_failure_while_reading_a_message_is_logged_and_told_without_details(
    mid_run: MidRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug in the checks")

    monkeypatch.setattr("lesft_server.session.check_lengths", fail)
    mid_run.b.send(*held_out_messages())
    assert mid_run.b.refusal() == refusal(
        InternalError, "internal error; the service's log has the details"
    )
    mid_run.assert_stopped("its call failed on the server; the log has the details")
    assert "RuntimeError: a bug in the checks" in caplog.text


STEP_FAILURES = {
    "a bug": (
        RuntimeError("CUDA out of memory at 0xdeadbeef"),
        "round 0 micro-batch 1 failed on the server; its log has the details",
    ),
    "bad activations": (
        InvalidInput("client 'b': its activations lead to NaN"),
        "client 'b': its activations lead to NaN",
    ),
}


@pytest.mark.parametrize("what", STEP_FAILURES)
def test_a_step_that_fails_stops_the_run_for_all_clients_with_the_reason(
    what: str,
    mid_run: MidRun,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    error, reason = STEP_FAILURES[what]

    def fail(*_: object) -> list[StepResult]:
        raise error

    monkeypatch.setattr(mid_run.server.engine.back, "train_step", fail)
    mid_run.b.send(*step_messages(make_batch(mid_run.at)))
    ended = refusal(RunStopped, f"the run has ended: {reason}")
    assert mid_run.b.refusal() == ended
    assert mid_run.a.refusal() == ended
    assert_unchanged(mid_run.server, mid_run.before)
    assert_serving(mid_run.server)
    assert ("0xdeadbeef" in caplog.text) == (what == "a bug")


def test_steps_that_still_wait_when_a_client_breaks_off_are_not_taken(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also not recorded: the last step of a run that was stopped must not finish it."""
    with serving(model, tmp_path, rounds=1) as server, raw_channel(server.grpc) as channel:
        back, started, release = server.engine.back, threading.Event(), threading.Event()
        taken: list[StepKey] = []
        train_step = back.train_step

        def slow(key: StepKey, parts: Sequence[Part]) -> list[StepResult]:
            taken.append(key)
            started.set()
            assert release.wait(20)
            return train_step(key, parts)

        monkeypatch.setattr(back, "train_step", slow)
        a, b = (join(channel, server.spec, name) for name in "ab")
        for session in (a, b):
            for micro in range(2):
                session.send(*step_messages(make_batch(StepKey(0, micro))))
        try:
            assert started.wait(20)
            wait_until(lambda: server.engine.run.members["b"].next_key == StepKey(1, 0))
            b.call.cancel()
            assert a.refusal() == run_ended(NO_LEAVE, StepKey(1, 0))
        finally:
            release.set()
        snapshot(server)  # after all steps that were queued
        assert taken == [StepKey(0, 0)]
        assert server.engine.run.rounds == []
        assert server.engine.run.state is RunState.STOPPED
        assert not (tmp_path / "adapter.safetensors").exists()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_client_that_breaks_off_while_the_last_step_runs_stops_the_run_quietly(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        serving(model, tmp_path, rounds=1, accumulation=1) as server,
        raw_channel(server.grpc) as channel,
    ):
        back, started, release = server.engine.back, threading.Event(), threading.Event()
        train_step = back.train_step

        def slow(key: StepKey, parts: Sequence[Part]) -> list[StepResult]:
            started.set()
            assert release.wait(20)
            return train_step(key, parts)

        monkeypatch.setattr(back, "train_step", slow)
        a, b = (join(channel, server.spec, name) for name in "ab")
        for session in (a, b):
            session.send(*step_messages(make_batch(StepKey(0, 0))))
        try:
            assert started.wait(20)
            b.call.cancel()
            assert a.refusal() == run_ended(NO_LEAVE, StepKey(1, 0))
        finally:
            release.set()
        snapshot(server)
        assert_serving(server)
        assert server.engine.run.state is RunState.STOPPED
        assert server.engine.run.rounds == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_server_that_stops_tells_its_clients(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server:
        channel = grpc.insecure_channel(server.grpc)
        sessions = [join(channel, server.spec, name) for name in "ab"]
    for session in sessions:
        assert session.refusal() == refusal(RunStopped, "the run has ended: the test is over")
    channel.close()


def test_the_checks_use_the_runs_own_spec(model: Path, tmp_path: Path) -> None:
    """A run without reference path refuses one, and bf16 refuses float32."""
    loss = {"token_weights": "uniform"}
    with (
        serving(model, tmp_path, loss=loss, activation_encoding="bf16") as server,
        raw_channel(server.grpc) as channel,
    ):
        spec: RunSpec = server.spec
        session = join(channel, spec, "a")
        session.send(*step_messages(make_batch(StepKey(0, 0))))
        assert session.refusal() == refusal(
            InvalidInput,
            "reference_lengths must be empty: this run's loss needs no reference path",
        )
        session = join(channel, spec, "a")
        batch = make_batch(StepKey(0, 0))
        session.send(*step_messages(MicroBatch(batch.key, batch.base, None, batch.targets)))
        assert session.refusal() == refusal(
            BundleError, "tensor 'base' must be torch.bfloat16, got torch.float32"
        )
