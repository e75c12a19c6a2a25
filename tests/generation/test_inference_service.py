"""The table of bad input to a sequence, over real gRPC in the midst of a training run: it costs its
sender the sequence, and nobody else anything. And who gets room for a sequence, and for how long.
"""

import asyncio
import logging
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch

from lesft import bundle
from lesft.bundle import BundleReader, bundle_info
from lesft.decoding import SequenceCache, Step, back_steps
from lesft.errors import (
    BundleError,
    Busy,
    HandshakeMismatch,
    InvalidInput,
    LesftError,
    OutOfOrder,
    TooLarge,
    Unreachable,
    status_of,
)
from lesft.inference_messages import MAX_STEP_TOKENS, MAX_WANTED, TokenAt
from lesft.next_token import choose_token
from lesft.sampling import Sampling
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.step_messages import MAX_ACTIVATION
from lesft.tensors import TensorSpec, decode_tensors, encode_tensors
from lesft.v1 import inference_pb2, tensor_pb2
from lesft.v1.inference_pb2 import GenerateRequest
from lesft.v1.tensor_pb2 import Chunk
from lesft.weights import Checkpoint, load_back
from lesft_server.run import RunState
from tests.generation.raw_sequence import (
    RawSequence,
    activations,
    opened,
    opening,
    step,
)
from tests.harness import (
    CPU,
    RunningServer,
    random_samples,
    running_server,
    save_tiny_model,
    server_settings,
)
from tests.server.harness import (
    NARROW,
    Crew,
    assert_serving,
    assert_unchanged,
    raw_channel,
    wait_until,
)
from tests.server.mid_run import MidRun, starting_mid_run
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE

Messages = list[GenerateRequest | bytes]

BYTES_PER_TOKEN = 3 * 2 * 2 * 8 * 4
"""Of a sequence in the tiny back: layers, keys and values, heads, width, float32."""
CONTEXT = 90
"""Most tokens of a sequence on the server in mid-run."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Reference:
    """The same back, without a server: what a right client must get."""

    def __init__(self, model: Path) -> None:
        self._back = load_back(Checkpoint(model), 1, torch.float32, CPU)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """After each token of a sequence."""
        held = SequenceCache(self._back.config)
        return back_steps(self._back, [Step(held, hidden_ND)], [len(hidden_ND)])[0]

    def tokens(self, hidden_ND: torch.Tensor) -> list[int]:
        return self.logits(hidden_ND).argmax(-1).tolist()


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    # A connection that is kept would wait 40 ms for each answer's second packet.
    with httpx.Client(headers={"Connection": "close"}) as client:
        yield client


@dataclass
class Served:
    """A server, and what it says of its sequences."""

    server: RunningServer
    http: httpx.Client

    @property
    def spec(self) -> RunSpec:
        return self.server.spec

    @contextmanager
    def channel(self, *options: tuple[str, int]) -> Iterator[grpc.Channel]:
        with raw_channel(self.server.grpc, *options) as channel:
            yield channel

    def says(self) -> dict[str, Any]:
        """The answer of GET /v1/generation."""
        body: dict[str, Any] = self.http.get(f"http://{self.server.control}/v1/generation").json()
        return body

    def taken(self) -> tuple[int, float]:
        """Sequences, and tokens that memory is reserved for."""
        body = self.says()
        return body["sequences"], body["cache_bytes_reserved"] / BYTES_PER_TOKEN

    def wait_until_taken(self, sequences: int, tokens: int) -> None:
        wait_until(lambda: self.taken() == (sequences, tokens))


@contextmanager
def serving(model: Path, state: Path, http: httpx.Client, **options: Any) -> Iterator[Served]:
    with running_server(server_settings(model, state, **{"threads": 1, **options})) as server:
        yield Served(server, http)


@contextmanager
def busy_device(server: RunningServer) -> Iterator[None]:
    """The device has something else to do while the block runs."""
    begun, done = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        assert done.wait(30)

    thread = threading.Thread(target=lambda: asyncio.run(server.engine.device.run(job)))
    thread.start()
    assert begun.wait(30)
    try:
        yield
    finally:
        done.set()
        thread.join()


# ---------------------------------------------------------------------- bad input


def open_with(**changes: Any) -> Callable[[RunSpec], Messages]:
    return lambda spec: [opening(spec, **changes)]


def sampling(**values: Any) -> Callable[[RunSpec], Messages]:
    message = inference_pb2.Sampling(**{"top_p": 1.0, **values})
    return open_with(sampling=message)


def after_opening(*messages: GenerateRequest | bytes) -> Callable[[RunSpec], Messages]:
    return lambda spec: [opening(spec), *messages]


def bent(**fields: Any) -> GenerateRequest:
    """A right first step of five tokens but for these fields of its message."""
    (request,) = step()
    for name, value in fields.items():
        setattr(request.step, name, value)
    return request


def carrying(data: bytes, **announced: int) -> GenerateRequest:
    """A step of five tokens with another bundle, and perhaps another announcement of it."""
    request = bent()
    request.step.bundle.CopyFrom(bundle_info(data))
    request.step.chunk.CopyFrom(Chunk(index=0, data=data))
    for name, value in announced.items():
        setattr(request.step.bundle, name, value)
    return request


def tensors(**named: torch.Tensor) -> GenerateRequest:
    return carrying(encode_tensors(named, "raw"))


def with_value(value: float) -> GenerateRequest:
    hidden = activations(5)
    hidden[3, 7] = value
    return tensors(hidden=hidden)


def asking(*scores: tuple[int, int]) -> GenerateRequest:
    """A step that asks for scores (after, token_id)."""
    return step(scores=tuple(TokenAt(*score) for score in scores))[0]


def wide(tokens: int, **fields: Any) -> GenerateRequest:
    """The header of a step of so many tokens; it never gets as far as its bundle."""
    return GenerateRequest(step=inference_pb2.DecodeStep(tokens=tokens, **fields))


DATA = encode_tensors({"hidden": activations(5)}, "raw")
LIMIT = 4096 + 5 * HIDDEN_SIZE * 4
FETCH = (
    "the client's weights or config are not the server's; let it fetch them with --weights server"
)
FRONT = "check the client's front and its precision"
NOTHING_BUT_OPEN = "the first message of a sequence must be open"

Bad = tuple[Callable[[RunSpec], Messages], type[LesftError], str]
"""What is sent, the error that ends the sequence, and how its message begins."""

BAD: dict[str, Bad] = {
    # The opening.
    "a step first": (lambda _: list(step()), OutOfOrder, NOTHING_BUT_OPEN),
    "a chunk first": (
        lambda _: [GenerateRequest(chunk=Chunk(data=b"x"))],
        OutOfOrder,
        NOTHING_BUT_OPEN,
    ),
    "an empty message first": (lambda _: [GenerateRequest()], OutOfOrder, NOTHING_BUT_OPEN),
    "no protobuf first": (
        lambda _: [b"\xff\xff\xff\xff"],
        InvalidInput,
        "a message of 4 bytes is not of this method's type",
    ),
    "another protocol": (
        open_with(protocol_version=PROTOCOL_VERSION + 1),
        HandshakeMismatch,
        f"protocol_version: server {PROTOCOL_VERSION}, client {PROTOCOL_VERSION + 1}; install the "
        "same LESFT on both sides",
    ),
    "another cut": (
        open_with(cut_layer=2),
        HandshakeMismatch,
        "cut_layer: server 1, client 2; ask the server for its run",
    ),
    "another front": (
        open_with(front_fingerprint="sha256:" + "0" * 64),
        HandshakeMismatch,
        "front_fingerprint: server sha256:",
    ),
    "no front": (open_with(front_fingerprint=""), HandshakeMismatch, "front_fingerprint: server"),
    "another encoding": (
        open_with(activation_encoding=tensor_pb2.ENCODING_BF16),
        HandshakeMismatch,
        "inference_encoding: server raw, client bf16; ask the server for its run",
    ),
    "no encoding": (
        open_with(activation_encoding=0),
        HandshakeMismatch,
        "inference_encoding: server raw, client 0; ask the server for its run",
    ),
    "an unknown encoding": (
        open_with(activation_encoding=77),
        HandshakeMismatch,
        "inference_encoding: server raw, client 77; ask the server for its run",
    ),
    "an adapter of another run": (
        open_with(spec_fingerprint="sha256:" + "0" * 64),
        HandshakeMismatch,
        "spec_fingerprint: server sha256:",
    ),
    "an adapter of another round": (
        lambda spec: [opening(spec, spec_fingerprint=spec.fingerprint(), rounds=1)],
        HandshakeMismatch,
        "rounds: server 0, client 1; the adapters of client and server belong together after the "
        "last round only: wait until the run has finished, or use --untuned",
    ),
    "room for nothing": (
        open_with(capacity=0),
        InvalidInput,
        "capacity must be at least 1 token, got 0",
    ),
    "too much room": (
        open_with(capacity=CONTEXT + 1),
        TooLarge,
        f"a sequence may have {CONTEXT} tokens here, prompt and text together, got {CONTEXT + 1}: "
        "shorten the prompt or ask for fewer tokens",
    ),
    "as much room as a number can say": (
        open_with(capacity=2**32 - 1),
        TooLarge,
        f"a sequence may have {CONTEXT} tokens here",
    ),
    "too many logits": (
        open_with(top_logits=1025),
        InvalidInput,
        "top_logits must be at most 1024, got 1025",
    ),
    "no sampling": (
        open_with(sampling=None),
        InvalidInput,
        "sampling.top_p: Input should be greater than 0, got 0.0",
    ),
    "a negative temperature": (
        sampling(temperature=-0.1),
        InvalidInput,
        "sampling.temperature: Input should be greater than or equal to 0, got -0.1",
    ),
    "a high temperature": (sampling(temperature=100.5), InvalidInput, "sampling.temperature: "),
    "a temperature of NaN": (
        sampling(temperature=float("nan")),
        InvalidInput,
        "sampling.temperature: ",
    ),
    "an infinite temperature": (
        sampling(temperature=float("inf")),
        InvalidInput,
        "sampling.temperature: ",
    ),
    "a top_p above 1": (
        sampling(top_p=1.01),
        InvalidInput,
        "sampling.top_p: Input should be less than or equal to 1, got 1.01",
    ),
    "a top_p of NaN": (sampling(top_p=float("nan")), InvalidInput, "sampling.top_p: "),
    "a large seed": (
        sampling(seed=2**63),
        InvalidInput,
        f"sampling.seed: Input should be less than {2**63}, got {2**63}",
    ),
    "all of the sampling": (
        sampling(temperature=-1, top_p=2),
        InvalidInput,
        "sampling.temperature: Input should be greater than or equal to 0, got -1.0; "
        "sampling.top_p: Input should be less than or equal to 1, got 2.0",
    ),
    # Messages out of place.
    "a second open": (
        lambda spec: [opening(spec), opening(spec)],
        OutOfOrder,
        "open came where a step was due",
    ),
    "a chunk of nothing": (
        after_opening(GenerateRequest(chunk=Chunk(data=b"x"))),
        OutOfOrder,
        "chunk came where a step was due",
    ),
    "a chunk after the bundle's last": (
        after_opening(*step(), GenerateRequest(chunk=Chunk(index=1, data=b"x"))),
        OutOfOrder,
        "chunk came where a step was due",
    ),
    "an empty message": (
        after_opening(GenerateRequest()),
        OutOfOrder,
        "an empty message came where a step was due",
    ),
    "no protobuf": (
        after_opening(b"\xff\xff\xff\xff"),
        InvalidInput,
        "a message of 4 bytes is not of this method's type",
    ),
    # The step's numbers.
    "a step too early": (after_opening(*step(1)), OutOfOrder, "step 0 is due, got step 1"),
    "a step again": (
        after_opening(*step(0), *step(0)),
        OutOfOrder,
        "step 1 is due, got step 0",
    ),
    "no tokens": (
        after_opening(bent(tokens=0)),
        InvalidInput,
        f"tokens must lie between 1 and {MAX_STEP_TOKENS}, got 0",
    ),
    "too many tokens": (
        after_opening(wide(MAX_STEP_TOKENS + 1)),
        InvalidInput,
        f"tokens must lie between 1 and {MAX_STEP_TOKENS}, got {MAX_STEP_TOKENS + 1}: a longer "
        "prompt goes in several steps",
    ),
    "as many tokens as a number can say": (
        after_opening(wide(2**32 - 1)),
        InvalidInput,
        f"tokens must lie between 1 and {MAX_STEP_TOKENS}, got {2**32 - 1}",
    ),
    "more guesses than tokens": (
        after_opening(bent(guesses=6)),
        InvalidInput,
        "guesses must be at most tokens (5), got 6",
    ),
    "more wanted than tokens": (
        after_opening(bent(wanted=6)),
        InvalidInput,
        "wanted must be at most tokens (5), got 6",
    ),
    "right guesses before any": (
        after_opening(bent(right_guesses=1)),
        OutOfOrder,
        "right_guesses: the step before had 0 guesses, got 1",
    ),
    "more right guesses than guesses": (
        after_opening(*step(guesses=2), *step(1, 1, right_guesses=3)),
        OutOfOrder,
        "right_guesses: the step before had 2 guesses, got 3",
    ),
    "right guesses of the step before the last": (
        after_opening(*step(guesses=2), *step(1, 1), *step(2, 1, right_guesses=1)),
        OutOfOrder,
        "right_guesses: the step before had 0 guesses, got 1",
    ),
    "a score after the step's tokens": (
        after_opening(asking((4, 0), (5, 0))),
        InvalidInput,
        "scores: after must be below tokens (5), got 5",
    ),
    "a score outside the vocabulary": (
        after_opening(asking((4, VOCAB_SIZE))),
        InvalidInput,
        f"scores: token_id must be below {VOCAB_SIZE} (the model's vocabulary), got {VOCAB_SIZE}",
    ),
    "too many scores": (
        after_opening(asking(*[(4, 1)] * 4097)),
        InvalidInput,
        "scores must have at most 4096 entries, got 4097",
    ),
    "too many wanted": (
        after_opening(wide(300, wanted=MAX_WANTED + 1)),
        InvalidInput,
        f"wanted must be at most {MAX_WANTED}, got {MAX_WANTED + 1}",
    ),
    "a score too far back": (
        after_opening(wide(300, scores=[inference_pb2.TokenAt(after=43)])),
        InvalidInput,
        "a step may ask about its last 256 tokens, this one asks about 257: send the tokens in "
        "several steps",
    ),
    "more tokens than room": (
        after_opening(*step(num_tokens=38), *step(1, 3)),
        TooLarge,
        "the sequence was opened for 40 tokens, this step would make it 41: open it with a larger "
        "capacity",
    ),
    "more guesses than room": (
        after_opening(*step(num_tokens=38), *step(1, 3, guesses=2)),
        TooLarge,
        "the sequence was opened for 40 tokens, this step would make it 41",
    ),
    "more right guesses than room": (
        after_opening(*step(num_tokens=38, guesses=4), *step(1, 3, right_guesses=4)),
        TooLarge,
        "the sequence was opened for 40 tokens, this step would make it 41",
    ),
    # The bundle.
    "no bundle": (
        after_opening(wide(5)),
        BundleError,
        "bundle of 0 bytes announced, but a safetensors byte string has at least 8",
    ),
    "a bundle too short": (
        after_opening(carrying(DATA[:7])),
        BundleError,
        "bundle of 7 bytes announced, but a safetensors byte string has at least 8",
    ),
    "a bundle too large": (
        after_opening(carrying(DATA, total_bytes=LIMIT + 1)),
        TooLarge,
        f"bundle of {LIMIT + 1} bytes announced, but at most {LIMIT} are allowed here",
    ),
    "a bundle as large as a number can say": (
        after_opening(carrying(DATA, total_bytes=2**63)),
        TooLarge,
        f"bundle of {2**63} bytes announced, but at most {LIMIT} are allowed here",
    ),
    "no chunk": (
        after_opening(
            GenerateRequest(step=inference_pb2.DecodeStep(tokens=5, bundle=bundle_info(DATA)))
        ),
        BundleError,
        f"chunk 0 must have {len(DATA)} bytes, got 0",
    ),
    "a chunk too long": (
        after_opening(carrying(DATA, total_bytes=len(DATA) - 1)),
        BundleError,
        f"chunk 0 must have {len(DATA) - 1} bytes, got {len(DATA)}",
    ),
    "a damaged bundle": (
        after_opening(carrying(DATA, crc32=1)),
        BundleError,
        f"bundle has checksum {zlib.crc32(DATA):08x}, but 00000001 was announced",
    ),
    "no safetensors": (
        after_opening(carrying(b"\xff" * 100)),
        BundleError,
        "bundle is no safetensors byte string: ",
    ),
    "another name": (
        after_opening(tensors(base=activations(5))),
        BundleError,
        "1 tensors expected, got 1; not expected: 'base'",
    ),
    "a tensor too many": (
        after_opening(tensors(hidden=activations(5), more=torch.zeros(1))),
        BundleError,
        "1 tensors expected, got 2; not expected: 'more'",
    ),
    "another dtype": (
        after_opening(tensors(hidden=activations(5).half())),
        BundleError,
        "tensor 'hidden' must be torch.float32 or torch.bfloat16, got torch.float16",
    ),
    "another shape": (
        after_opening(tensors(hidden=activations(4))),
        BundleError,
        f"tensor 'hidden' must have shape [5, {HIDDEN_SIZE}], got [4, {HIDDEN_SIZE}]",
    ),
    "a shape of its own": (
        after_opening(tensors(hidden=activations(5)[None])),
        BundleError,
        f"tensor 'hidden' must have shape [5, {HIDDEN_SIZE}], got [1, 5, {HIDDEN_SIZE}]",
    ),
    "NaN": (
        after_opening(with_value(float("nan"))),
        BundleError,
        "tensor 'hidden' has values that are NaN or infinite",
    ),
    "an infinite value": (
        after_opening(with_value(float("-inf"))),
        BundleError,
        "tensor 'hidden' has values that are NaN or infinite",
    ),
    "an absurd value": (
        after_opening(with_value(-2 * MAX_ACTIVATION)),
        BundleError,
        "tensor 'hidden' has values up to 2.0e+12 in magnitude, but activations must stay within "
        f"1e+12: {FRONT}",
    ),
    "a bad step after good ones": (
        after_opening(*step(0), *step(1), *step(2, hidden=activations(5) * float("nan"))),
        BundleError,
        "tensor 'hidden' has values that are NaN or infinite",
    ),
}


@dataclass
class MidRunServed(Served):
    mid_run: MidRun


@pytest.fixture(scope="module")
def mid_run(
    model: Path, http: httpx.Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MidRunServed]:
    """A server in mid-run, where a bad message could spoil gradients."""
    options: dict[str, Any] = {"max_context": CONTEXT, "stall_seconds": 600}
    with starting_mid_run(model, tmp_path_factory.mktemp("server"), **options) as started:
        yield MidRunServed(started.server, http, started)
        assert_serving(started.server)  # after all that was sent to it
        started.end_round()


def assert_run_goes_on(served: MidRunServed) -> None:
    """Nothing has changed for those who train."""
    run = served.server.engine.run
    assert (run.state, run.steps) == (RunState.TRAINING, 1)
    assert [run.members[name].connected for name in "ab"] == [True, True]
    assert_unchanged(served.server, served.mid_run.before)


def log_of_ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What service and event loop have logged, at any level."""
    names = ("lesft", "asyncio")
    return [r.getMessage() for r in caplog.records if r.name.startswith(names)]


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_ends_its_senders_sequence_and_nothing_else(
    mid_run: MidRunServed, reference: Reference, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    messages, kind, start = BAD[bad]
    caplog.set_level(logging.DEBUG, "lesft")
    caplog.set_level(logging.DEBUG, "lesft_server")
    expected = reference.tokens(torch.cat([activations(5, seed=0), activations(3, seed=1)]))
    with mid_run.channel() as channel:
        other = opened(channel, mid_run.spec)
        assert other.token_ids(*step(0)) == expected[4:5]

        sequence = RawSequence(channel)
        sequence.send(*messages(mid_run.spec))
        refused = sequence.refusal()
        assert (refused.kind, refused.code) == (kind, status_of(kind("")).grpc)
        assert refused.message.startswith(start)

        mid_run.wait_until_taken(1, 40)
        assert other.token_ids(*step(1, 3, wanted=3)) == expected[5:]
        assert other.close() == []
        mid_run.wait_until_taken(0, 0)
    # What it sent is nowhere, and who sends it again and again fills no log.
    assert re.fullmatch(r"(a call of Generate ended with \w+)?", "\n".join(log_of_ours(caplog)))
    assert_run_goes_on(mid_run)


SMALL_CHUNK = 256


def in_chunks() -> list[GenerateRequest]:
    """A right step whose bundle goes in three chunks."""
    messages = step()
    assert [m.WhichOneof("message") for m in messages] == ["step", "chunk", "chunk"]
    return messages


def bent_chunk(index: int, length: int) -> GenerateRequest:
    return GenerateRequest(chunk=Chunk(index=index, data=bytes(length)))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "CHUNK_BYTES", SMALL_CHUNK)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("message", "kind", "start"),
    [
        (bent_chunk(2, SMALL_CHUNK), BundleError, "chunk 1 expected, got chunk 2: "),
        (bent_chunk(0, SMALL_CHUNK), BundleError, "chunk 1 expected, got chunk 0: "),
        (bent_chunk(1, 255), BundleError, "chunk 1 must have 256 bytes, got 255"),
        (bent_chunk(1, 0), BundleError, "chunk 1 must have 256 bytes, got 0"),
        (bent_chunk(1, SMALL_CHUNK + 1), BundleError, "chunk 1 must have 256 bytes, got 257"),
        (bent(), BundleError, "chunk 1 of a bundle is missing"),
        (GenerateRequest(), BundleError, "chunk 1 of a bundle is missing"),
        (None, BundleError, "chunk 1 of a bundle is missing"),
        (b"\xff\xff\xff\xff", InvalidInput, "a message of 4 bytes is not of this method's type"),
    ],
)
def test_what_comes_in_the_midst_of_a_bundle_must_be_its_next_chunk(
    mid_run: MidRunServed, message: Any, kind: type[LesftError], start: str
) -> None:
    with mid_run.channel() as channel:
        sequence = opened(channel, mid_run.spec)
        sequence.send(in_chunks()[0], message)
        refused = sequence.refusal()
    assert refused.kind is kind
    assert refused.message.startswith(start)
    mid_run.wait_until_taken(0, 0)
    assert_run_goes_on(mid_run)


@pytest.mark.usefixtures("small_chunks")
def test_a_bundle_in_several_chunks_is_taken_like_one_in_one(
    mid_run: MidRunServed, reference: Reference
) -> None:
    with mid_run.channel() as channel:
        sequence = opened(channel, mid_run.spec)
        assert sequence.token_ids(*in_chunks()) == reference.tokens(activations(5))[-1:]
        assert sequence.close() == []


# ---------------------------------------------------------------------- good input


def test_a_step_is_answered_from_all_tokens_that_stay(
    mid_run: MidRunServed, reference: Reference
) -> None:
    first, second = activations(8, seed=1), activations(4, seed=2)
    drawn = Sampling(temperature=1.5, top_p=0.9, seed=4)
    logits = reference.logits(torch.cat([first[:6], second]))
    expected = [choose_token(logits[i], drawn, i + 1) for i in range(10)]
    message = inference_pb2.Sampling(temperature=1.5, top_p=0.9, seed=4)
    with mid_run.channel() as channel:
        sequence = opened(channel, mid_run.spec, sampling=message)
        got = sequence.token_ids(*step(0, 8, guesses=3, wanted=4, hidden=first))
        assert got[:2] == expected[4:6]  # with the one before the guesses, and the right one
        scores = (TokenAt(3, 5), TokenAt(0, expected[7]))
        sequence.send(
            *step(1, 4, right_guesses=1, wanted=2, hidden=second, scores=scores),
        )
        result = sequence.receive().result
        assert sequence.close() == []
    assert (result.index, list(result.token_ids)) == (1, expected[8:])
    log_probs = logits.log_softmax(-1)
    assert [score.log_prob for score in result.scores] == pytest.approx(
        [float(log_probs[9, 5]), float(log_probs[6, expected[7]])], abs=1e-5
    )
    likeliest = logits.argmax(-1)
    assert [score.likeliest for score in result.scores] == [
        int(likeliest[9]) == 5,
        int(likeliest[6]) == expected[7],
    ]


@pytest.mark.parametrize("asked", [3, VOCAB_SIZE + 1])
def test_a_client_that_chooses_gets_the_largest_logits(
    mid_run: MidRunServed, reference: Reference, asked: int
) -> None:
    with mid_run.channel() as channel:
        sequence = opened(channel, mid_run.spec, top_logits=asked)
        sequence.send(*step(wanted=2))
        result = sequence.receive().result
        assert sequence.close() == []
    reader = BundleReader(result.bundle, 1 << 20)
    reader.add(result.chunk)
    shape = (2, min(asked, VOCAB_SIZE))
    expected = {
        "token_ids": TensorSpec(shape, (torch.int32,)),
        "logits": TensorSpec(shape, (torch.float32,)),
    }
    got = decode_tensors(reader.data(), expected)
    top = reference.logits(activations(5))[-2:].topk(shape[1])
    assert list(result.token_ids) == []
    torch.testing.assert_close(got["logits"], top.values, atol=1e-5, rtol=0)
    assert got["token_ids"][:, :3].tolist() == top.indices[:, :3].tolist()
    assert len({*got["token_ids"][0].tolist()}) == shape[1]


def test_a_step_may_ask_for_nothing(mid_run: MidRunServed) -> None:
    with mid_run.channel() as channel:
        sequence = opened(channel, mid_run.spec)
        sequence.send(*step(wanted=0))
        assert sequence.receive().result == inference_pb2.DecodeResult(index=0)
        assert sequence.close() == []


def test_a_stream_that_ends_without_a_word_is_refused(mid_run: MidRunServed) -> None:
    with mid_run.channel() as channel:
        sequence = RawSequence(channel)
        sequence.send(None)  # type: ignore[arg-type]  # the end of the stream
        refused = sequence.refusal()
    assert (refused.kind, refused.message) == (OutOfOrder, NOTHING_BUT_OPEN)


# ---------------------------------------------------------------------- room


def test_as_many_sequences_as_may_be_are_written_at_once(
    model: Path, tmp_path: Path, http: httpx.Client
) -> None:
    with serving(model, tmp_path, http, max_sequences=2) as served, served.channel() as channel:
        spec = served.spec
        first, _second = opened(channel, spec), opened(channel, spec)
        third = RawSequence(channel)
        third.send(opening(spec))
        refused = third.refusal()
        assert refused.kind is Busy
        assert refused.message.startswith("2 texts are being written, of 2 that this server takes")
        assert first.close() == []
        served.wait_until_taken(1, 40)
        with served.channel() as other_channel:
            _third = opened(other_channel, spec, capacity=7)
            assert served.taken() == (2, 47)
        served.wait_until_taken(1, 40)  # whose connection has gone gives its room back too


def test_as_much_memory_as_there_is_can_be_taken(
    model: Path, tmp_path: Path, http: httpx.Client
) -> None:
    most = (1 << 20) // BYTES_PER_TOKEN
    options = {"cache_mib": 1, "max_context": 5000}
    with (
        serving(model, tmp_path, http, **options) as served,
        served.channel() as channel,
        served.channel() as others,
    ):
        spec = served.spec

        def refused(capacity: int) -> tuple[type[LesftError], str]:
            sequence = RawSequence(channel)
            sequence.send(opening(spec, capacity=capacity))
            refusal = sequence.refusal()
            return refusal.kind, refusal.message

        kind, message = refused(most + 1)
        assert kind is TooLarge
        assert message.startswith(f"a sequence may have {most} tokens here")
        large, small = opened(channel, spec, capacity=most - 10), opened(others, spec, capacity=10)
        kind, message = refused(1)
        assert kind is Busy
        assert "of 1.0 MiB for keys and values are taken by other texts (2)" in message
        assert served.taken() == (2, most)
        assert small.token_ids(*step()) == large.token_ids(*step())
        assert large.close() == []
        served.wait_until_taken(1, 10)
        _other = opened(channel, spec, capacity=most - 10)
        small.send(*step(5))  # one that is refused gives its room back
        assert small.refusal().kind is OutOfOrder
        served.wait_until_taken(1, most - 10)
        _third = opened(others, spec, capacity=10)
        assert served.taken() == (2, most)


@pytest.mark.parametrize(("capacity", "most"), [(10, 14), ((1 << 20) // BYTES_PER_TOKEN // 8, 7)])
def test_the_last_places_and_the_last_room_are_for_clients_without_a_text(
    capacity: int, most: int, model: Path, tmp_path: Path, http: httpx.Client
) -> None:
    options = {"cache_mib": 1, "max_context": 5000, "max_sequences": 16}
    with (
        serving(model, tmp_path, http, **options) as served,
        served.channel() as greedy,
        served.channel() as other,
    ):
        texts = [opened(greedy, served.spec, capacity=capacity) for _ in range(most)]
        one_more = RawSequence(greedy)
        one_more.send(opening(served.spec, capacity=capacity))
        assert one_more.refusal().kind is Busy
        assert len(opened(other, served.spec, capacity=capacity).token_ids(*step())) == 1
        assert texts[0].close() == []


def test_a_client_that_vanishes_in_a_step_gives_its_room_back(
    model: Path, tmp_path: Path, http: httpx.Client, reference: Reference
) -> None:
    with serving(model, tmp_path, http) as served:
        with served.channel() as channel, busy_device(served.server):
            sequence = opened(channel, served.spec)
            sequence.send(*step())
            channel.close()
            served.wait_until_taken(0, 0)
        with served.channel() as channel:
            sequence = opened(channel, served.spec)
            assert sequence.token_ids(*step()) == reference.tokens(activations(5))[-1:]


def read_nothing(served: Served, channel: grpc.Channel) -> RawSequence:
    """A sequence whose client does not read, so that the server cannot send all its results."""
    sequence = RawSequence(channel)
    sequence.send(opening(served.spec, capacity=250, top_logits=VOCAB_SIZE))
    for index in range(20):  # results of 50 kB
        sequence.send(*step(index, 64, guesses=64, wanted=64))
    wait_until(lambda: served.says()["tokens"] >= 128)
    return sequence


def test_a_client_that_reads_nothing_gives_its_room_back_when_it_vanishes(
    model: Path, tmp_path: Path, http: httpx.Client
) -> None:
    with serving(model, tmp_path, http) as served:
        with served.channel(*NARROW) as channel:
            _sequence = read_nothing(served, channel)
            assert served.taken() == (1, 250)
        served.wait_until_taken(0, 0)
        assert served.says()["tokens"] < 20 * 64


# ---------------------------------------------------------------------- silence


def test_a_sequence_that_nothing_comes_for_is_ended(
    model: Path, tmp_path: Path, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "CHUNK_BYTES", SMALL_CHUNK)
    with serving(model, tmp_path, http, idle_seconds=0.3) as served, served.channel() as channel:
        mute, idle, half = (RawSequence(channel) for _ in range(3))
        for sequence in (idle, half):
            sequence.send(opening(served.spec))
        half.send(in_chunks()[0])
        for sequence in (mute, idle, half):
            refused = sequence.refusal()
            assert refused.kind is Unreachable
            assert refused.message == (
                "nothing came for this sequence for 0.3 s (--idle-seconds): open another one and "
                "send its tokens again"
            )
        served.wait_until_taken(0, 0)


def test_a_client_that_reads_nothing_gives_its_room_back_after_a_while(
    model: Path, tmp_path: Path, http: httpx.Client
) -> None:
    with (
        serving(model, tmp_path, http, idle_seconds=0.3) as served,
        served.channel(*NARROW) as channel,
    ):
        _sequence = read_nothing(served, channel)
        served.wait_until_taken(0, 0)
        assert served.says()["tokens"] < 20 * 64


def test_the_heart_beats_while_a_step_waits_and_waiting_is_no_silence_of_the_client(
    model: Path, tmp_path: Path, http: httpx.Client, reference: Reference
) -> None:
    options = {"idle_seconds": 0.2, "heartbeat_seconds": 0.05}
    with serving(model, tmp_path, http, **options) as served, served.channel() as channel:
        with busy_device(served.server):
            sequence = RawSequence(channel)
            sequence.send(opening(served.spec))
            assert sequence.receive().opened.heartbeat_seconds == 0.05
            sequence.send(*step())
            kinds = [next(sequence.call).WhichOneof("message") for _ in range(8)]
        assert kinds == ["heartbeat"] * 8
        assert list(sequence.receive().result.token_ids) == reference.tokens(activations(5))[-1:]


# ---------------------------------------------------------------------- beside a training


def test_a_sequence_of_the_fine_tuned_model_ends_when_the_run_trains_on(
    model: Path, tmp_path: Path, http: httpx.Client
) -> None:
    with serving(model, tmp_path, http) as served, served.channel() as channel:
        spec = served.spec
        with Crew(served.server, model, [random_samples(4)]) as crew:
            tuned = opened(channel, spec, spec_fingerprint=spec.fingerprint(), rounds=0)
            untuned = opened(channel, spec)
            assert tuned.token_ids(*step()) == untuned.token_ids(*step())
            crew.train_round(0)
            tuned.send(*step(1))
            refused = tuned.refusal()
            assert refused.kind is HandshakeMismatch
            assert refused.message.startswith(
                "rounds: the sequence was begun after 0, and the run has trained 1 since"
            )
            served.wait_until_taken(1, 40)
            assert len(untuned.token_ids(*step(1))) == 1
            crew.train_round(1)
            crew.leave()
