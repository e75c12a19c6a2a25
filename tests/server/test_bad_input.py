"""The table of bad input in mid-run, over real gRPC: it costs its sender the call and nobody else
anything. The run waits for the sender, who may come back and do better.
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lesft.bundle import CHUNK_BYTES, bundle_info
from lesft.channel import MAX_MESSAGE_BYTES
from lesft.errors import BundleError, InvalidInput, OutOfOrder, TooLarge
from lesft.micro_batch import MicroBatch, StepKey
from lesft.spec import RunSpec
from lesft.step_messages import micro_batch_to_message
from lesft.tensors import encode_tensors
from lesft.v1 import training_pb2
from lesft.v1.tensor_pb2 import Chunk
from lesft.v1.training_pb2 import TrainRequest
from tests.harness import random_samples
from tests.server.harness import (
    BASE_LENGTHS,
    REFERENCE_LENGTHS,
    TARGET_LENGTHS,
    RawSession,
    Refusal,
    Snapshot,
    assert_serving,
    assert_unchanged,
    heartbeat,
    held_out_messages,
    join,
    leaving,
    make_batch,
    raw_channel,
    refusal,
    snapshot,
    step_messages,
    train_to_the_end,
    with_chunks,
    without_pauses,
)
from tests.server.mid_run import MAX_LENGTH, NO_LEAVE, MidRun, serving
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE

Messages = list[TrainRequest | bytes]


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
    "a heartbeat in the midst of a bundle": (
        in_mid_bundle(heartbeat()),
        refusal(BundleError, "chunk 0 of a bundle is missing: heartbeat came"),
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
            "within 1e+12: " + FRONT,
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


@pytest.mark.parametrize("what", BAD)
def test_bad_input_in_mid_run_changes_nothing_and_the_run_waits_for_its_sender(
    what: str, mid_run: MidRun, after_round_0: Snapshot
) -> None:
    expected = send_bad(mid_run.b, what, mid_run.at)
    assert mid_run.b.refusal() == expected
    mid_run.assert_waits_for_b(expected.message, after_round_0)


def test_bad_input_before_the_start_only_costs_its_sender_the_place(
    model: Path, tmp_path: Path
) -> None:
    samples = [random_samples(5, 1), random_samples(3, 2)]
    with serving(model, tmp_path / "undisturbed") as server:
        undisturbed = train_to_the_end(server, model, samples)
    disturbed_server = serving(model, tmp_path / "disturbed")
    with disturbed_server as server, raw_channel(server.grpc) as channel, without_pauses():
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


def test_a_message_over_the_channels_limit_ends_its_senders_call_only(
    mid_run: MidRun, after_round_0: Snapshot
) -> None:
    mid_run.b.send(OVER_THE_LIMIT)
    assert mid_run.b.refusal() == refusal(
        TooLarge,
        f"SERVER: Received message larger than max ({OVER_THE_LIMIT.ByteSize()} vs. 2097152)",
    )
    mid_run.assert_waits_for_b(NO_LEAVE, after_round_0)


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
