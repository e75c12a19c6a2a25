"""What server and aggregator decode of what a client sends: one hostile message after another."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path as FilePath
from random import Random

import torch
from google.protobuf.message import Message
from safetensors.numpy import save

from lesft.adapter_codec import decode, encode
from lesft.bundle import BundleReader, bundle_chunks, bundle_info
from lesft.channel import MAX_MESSAGE_BYTES
from lesft.errors import BundleError, InvalidInput, OutOfOrder, TooLarge, one_line
from lesft.inference_messages import (
    Question,
    TokenAt,
    hidden_bytes,
    hidden_from_bundle,
    question_of,
    step_to_message,
)
from lesft.micro_batch import Path, StepKey, Targets
from lesft.sample_memory import SampleMemory
from lesft.spec import PROTOCOL_VERSION, AdapterEncoding, Encoding, LossSpec, RunSpec
from lesft.spec_messages import (
    adapter_encoding,
    adapter_encoding_to_message,
    encoding_to_message,
)
from lesft.step_messages import (
    MAX_ACTIVATION,
    Limits,
    check_lengths,
    check_samples,
    held_out_from_message,
    held_out_to_message,
    micro_batch_from_message,
    micro_batch_to_message,
)
from lesft.v1 import aggregation_pb2, inference_pb2, training_pb2
from lesft.v1.tensor_pb2 import BundleInfo, Chunk
from lesft_aggregator.adapters import Layout, check_layout, read_layout
from lesft_aggregator.admission import (
    Introduction,
    check_fingerprint,
    check_introduction,
    check_protocol,
)
from lesft_server.handshake import check_opening, check_sequence, resume_point
from lesft_server.sample_store import SampleStore
from tests.aggregator.harness import SHAPES, make_adapter, make_tensors
from tests.harness import RAW
from tests.hostile.lying_safetensors import lying_safetensors
from tests.hostile.mutate import mutate_bytes, mutate_message
from tests.server.harness import make_batch, opening, random_path, random_targets
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE

Decoder = Callable[[Random], None]
"""Decodes one hostile message; returns when it was within the rules, raises when it was refused."""

SPEC = RunSpec(
    rounds=6,
    batch_size=2,
    max_length=64,
    **RAW,
    model_name="tiny",
    front_fingerprint="sha256:" + "ab" * 32,
    cut_layer=1,
)
LIMITS = Limits(SPEC, HIDDEN_SIZE, VOCAB_SIZE)
FROZEN = SPEC.model_copy(update={"train_front": False})
REMEMBERING = SPEC.model_copy(update={"loss": LossSpec(reference_refresh=0)})


def received(random: Random, message: Message) -> Message:
    """A mutation of a message as it is when gRPC has parsed it. Raises DecodeError, TooLarge."""
    data = mutate_message(random, message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise TooLarge("gRPC takes no such message")
    return type(message).FromString(data)


def transferred(random: Random, info: BundleInfo, data: bytes, max_bytes: int) -> bytes:
    """A bundle that went through a reader; often chunks or announcement are not what they were."""
    chunks = list(bundle_chunks(data))
    match random.randrange(8) if chunks else None:
        case 0:
            random.shuffle(chunks)
        case 1:
            chunks *= 2
        case 2:
            chunks = chunks[:-1]
        case 3:
            chunks[-1].index = random.choice((1, 2**32 - 1))
        case 4:
            chunks[-1].data = mutate_bytes(random, chunks[-1].data)
        case 5:
            raw = mutate_message(random, chunks[0])
            chunks[0] = Chunk.FromString(raw)
    reader = BundleReader(info, max_bytes)
    for chunk in chunks:
        reader.add(chunk)
    return reader.data()


def _announced(random: Random, data: bytes) -> BundleInfo:
    """A true announcement, mostly: else nothing behind it would ever be reached."""
    info = bundle_info(data)
    if random.random() < 0.15:
        parsed = received(random, info)
        assert isinstance(parsed, BundleInfo)
        return parsed
    return info


# ---------------------------------------------------------------------- the server


def train_opening(random: Random) -> None:
    """Opening of a training stream."""
    request = received(random, opening(SPEC, "client-0", instance_id="i", checkpoint_rounds=[3]))
    assert isinstance(request, training_pb2.TrainRequest)
    if request.WhichOneof("message") != "open":
        raise OutOfOrder("open was due")
    check_opening(request.open, SPEC)
    resume_point(request.open, lambda key: key == StepKey(3, 0), 0, StepKey(4, 0), lambda: None)
    assert 1 <= request.open.num_samples <= 1 << 40
    assert len(request.open.client_id) <= 64


def micro_batch(random: Random, encoding: Encoding = "raw") -> None:
    """Micro-batch of a client that trains."""
    spec = SPEC.model_copy(update={"activation_encoding": encoding})
    limits = Limits(spec, HIDDEN_SIZE, VOCAB_SIZE)
    header, data = micro_batch_to_message(make_batch(StepKey(0, 0)), encoding)
    data = lying_safetensors(random, data)
    header = _header(random, training_pb2.TrainRequest(micro_batch=header)).micro_batch
    header.bundle.CopyFrom(_announced(random, data))
    check_samples(header, spec, 10)
    check_lengths(header, limits)
    data = transferred(random, header.bundle, data, limits.bundle_bytes(header))
    batch = micro_batch_from_message(header, data, limits)
    assert batch.reference is not None
    for path in (batch.base, batch.reference):
        assert path.activations_ND.shape == (sum(path.lengths), HIDDEN_SIZE)
        assert float(path.activations_ND.abs().max()) <= MAX_ACTIVATION
    _check_ids(batch.targets.ids_T)


def _header(random: Random, request: training_pb2.TrainRequest) -> training_pb2.TrainRequest:
    """A header, in one of two cases mutated; of another kind, it is refused."""
    if random.random() < 0.5:
        return request
    kind = request.WhichOneof("message")
    parsed = received(random, request)
    assert isinstance(parsed, training_pb2.TrainRequest)
    if parsed.WhichOneof("message") != kind:
        raise OutOfOrder(f"{kind} was due")
    return parsed


def _check_ids(ids_T: torch.Tensor) -> None:
    assert 0 <= int(ids_T.min()) <= int(ids_T.max()) < VOCAB_SIZE


class FrozenMicroBatch:
    """Micro-batches of a client that does not train, which the server keeps."""

    def __init__(self, folder: FilePath) -> None:
        self._held = SampleStore(folder, FROZEN, 1 << 20).of("client-0", "i")
        self._limits = Limits(FROZEN, HIDDEN_SIZE, VOCAB_SIZE)

    def __call__(self, random: Random) -> None:
        header, data = micro_batch_to_message(make_batch(StepKey(0, 0)), "raw")
        header.samples.extend([0, 1])
        header.enclosed.extend([0, 1])
        data = lying_safetensors(random, data)
        header = _header(random, training_pb2.TrainRequest(micro_batch=header)).micro_batch
        header.bundle.CopyFrom(_announced(random, data))
        check_samples(header, FROZEN, 4)
        self._held.check_complete(header.samples, header.enclosed)
        if header.enclosed:
            check_lengths(header, self._limits)
            limit = self._limits.bundle_bytes(header)
            data = transferred(random, header.bundle, data, limit)
        batch = micro_batch_from_message(header, data, self._limits)
        whole, _ = self._held.complete(batch)
        assert len(whole.targets.lengths) == len(header.samples)
        assert set(self._held.numbers) <= {0, 1, 2, 3}


class RememberedMicroBatch:
    """Micro-batches of which the server remembers some samples and gets the others."""

    def __init__(self) -> None:
        self._memory = SampleMemory().of("client-0", "i")
        self._limits = Limits(REMEMBERING, HIDDEN_SIZE, VOCAB_SIZE)
        first = self._memory.complete(replace(make_batch(StepKey(0, 0)), **_named((0, 1), (0, 1))))
        found = torch.split(torch.zeros(sum(first.targets.lengths)), list(first.targets.lengths))
        self._memory.keep(first, found)

    def __call__(self, random: Random) -> None:
        whole = make_batch(StepKey(0, 1))
        assert whole.reference is not None
        rows, tokens = whole.reference.lengths[0], whole.targets.lengths[0]
        batch = random.choice(
            (
                replace(whole, **_named((2, 3), (2, 3))),
                replace(
                    whole,
                    reference=Path(whole.reference.activations_ND[:rows], (rows,)),
                    targets=Targets(whole.targets.ids_T[:tokens], (tokens,)),
                    **_named((2, 1), (2,)),
                ),
                replace(
                    whole,
                    reference=None,
                    targets=Targets(torch.empty(0, dtype=torch.long), ()),
                    **_named((0, 1), ()),
                ),
            )
        )
        header, data = micro_batch_to_message(batch, "raw")
        data = lying_safetensors(random, data)
        header = _header(random, training_pb2.TrainRequest(micro_batch=header)).micro_batch
        header.bundle.CopyFrom(_announced(random, data))
        check_samples(header, REMEMBERING, 4)
        self._memory.check_complete(header.samples, header.enclosed)
        check_lengths(header, self._limits)
        data = transferred(random, header.bundle, data, self._limits.bundle_bytes(header))
        received_batch = micro_batch_from_message(header, data, self._limits)
        complete = self._memory.complete(received_batch)
        samples = len(header.samples)
        assert samples == len(complete.base.lengths) == len(complete.targets.lengths)
        assert samples == len(complete.known_log_probs)
        assert sum(complete.targets.lengths) == len(complete.targets.ids_T)
        for length, target in zip(complete.base.lengths, complete.targets.lengths, strict=True):
            assert 1 <= target < length
        unknown = complete.known_log_probs.count(None)
        assert unknown == (len(complete.reference.lengths) if complete.reference else 0)
        _check_ids(complete.targets.ids_T)


def _named(samples: tuple[int, ...], enclosed: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"samples": samples, "enclosed": enclosed}


def held_out(random: Random) -> None:
    """Held-out samples."""
    header, data = held_out_to_message(0, random_path((7, 5), 3), random_targets((3, 2)), "raw")
    data = lying_safetensors(random, data)
    header = _header(random, training_pb2.TrainRequest(held_out=header)).held_out
    header.bundle.CopyFrom(_announced(random, data))
    check_lengths(header, LIMITS)
    data = transferred(random, header.bundle, data, LIMITS.bundle_bytes(header))
    base, targets = held_out_from_message(header, data, LIMITS)
    assert bool(torch.isfinite(base.activations_ND).all())
    _check_ids(targets.ids_T)


def sequence_opening(random: Random) -> None:
    """Opening of a text."""
    message = inference_pb2.OpenSequence(
        protocol_version=PROTOCOL_VERSION,
        front_fingerprint=SPEC.front_fingerprint,
        cut_layer=SPEC.cut_layer,
        activation_encoding=encoding_to_message(SPEC.inference_encoding),
        capacity=64,
        sampling=inference_pb2.Sampling(temperature=0.7, top_p=0.9, seed=3),
    )
    parsed = received(random, message)
    assert isinstance(parsed, inference_pb2.OpenSequence)
    options = check_sequence(parsed, SPEC, 6)
    assert 0 <= options.sampling.temperature <= 100
    assert 0 < options.sampling.top_p <= 1


def decode_step(random: Random) -> None:
    """A step of a text."""
    hidden_QD = torch.randn(3, HIDDEN_SIZE)
    question = Question(1, (TokenAt(2, 5),))
    message, _ = step_to_message(0, hidden_QD, 1, 0, question, "raw")
    data = lying_safetensors(random, message.chunk.data)
    parsed = received(random, message) if random.random() < 0.6 else message
    assert isinstance(parsed, inference_pb2.DecodeStep)
    parsed.bundle.CopyFrom(_announced(random, data))
    asked = question_of(parsed, VOCAB_SIZE)
    limit = hidden_bytes(parsed.tokens, HIDDEN_SIZE)
    data = transferred(random, parsed.bundle, data, limit)
    decoded_QD = hidden_from_bundle(data, parsed.tokens, HIDDEN_SIZE, "raw")
    assert float(decoded_QD.abs().max()) <= MAX_ACTIVATION
    assert asked.wanted <= parsed.tokens


# ---------------------------------------------------------------------- the aggregator


def aggregator_join(random: Random) -> None:
    """A client's introduction to the aggregator."""
    message = aggregation_pb2.JoinRequest(
        protocol_version=PROTOCOL_VERSION,
        client_id="a",
        run_id="lesft",
        num_samples=10,
        run_fingerprint=SPEC.front_fingerprint,
    )
    parsed = received(random, message)
    assert isinstance(parsed, aggregation_pb2.JoinRequest)
    check_protocol(parsed.protocol_version)
    client = Introduction(parsed.client_id, parsed.run_id, parsed.num_samples)
    check_introduction(client, "lesft", 2, ["a"])
    check_fingerprint(SPEC.front_fingerprint, parsed.run_fingerprint)
    assert 1 <= client.num_samples <= 1 << 40


def submission(random: Random, encoding: AdapterEncoding = "raw", base_version: int = 0) -> None:
    """A client's adapter at the aggregator."""
    base = make_tensors(1) if base_version else {}
    valid = make_adapter(0) if encoding == "raw" else encode(make_tensors(0), encoding, base)
    data = lying_safetensors(random, valid)
    message = aggregation_pb2.SubmitRequest(
        submission=aggregation_pb2.Submission(
            client_id="a",
            run_id="lesft",
            num_samples=10,
            encoding=adapter_encoding_to_message(encoding),
        )
    )
    parsed = received(random, message) if random.random() < 0.3 else message
    assert isinstance(parsed, aggregation_pb2.SubmitRequest)
    if parsed.WhichOneof("message") != "submission":
        raise OutOfOrder("a submission was due")
    header = parsed.submission
    client = Introduction(header.client_id, header.run_id, header.num_samples)
    check_introduction(client, "lesft", 2, ["a"])
    info = _announced(random, data)
    if info.total_bytes > 1 << 20:
        raise InvalidInput("too large")
    data, named = transferred(random, info, data, 1 << 20), adapter_encoding(header.encoding)
    if named != "raw":
        data = save(decode(data, named, base, 1 << 20))
    layout = read_layout(data)
    expected: Layout = dict(SHAPES)
    check_layout(layout, expected)
    assert layout == expected


def refusals(random: Random) -> None:
    """A message that quotes what a stranger sent."""
    text = "".join(
        chr(random.choice((0, 10, 0x202E, 0x2028, 0x1F600, 0xD800, 97))) for _ in range(9)
    )
    line = one_line(text * random.choice((1, 1_000, 300_000)))
    assert len(line.encode()) <= 1000
    assert line.isprintable()
    raise BundleError(line)


def served_decoders(folder: FilePath) -> dict[str, Decoder]:
    """All of them, by name; `folder` is for what they keep."""
    return {
        "Train: open": train_opening,
        "Train: micro_batch": micro_batch,
        "Train: micro_batch, int8": partial(micro_batch, encoding="int8"),
        "Train: micro_batch, int4": partial(micro_batch, encoding="int4"),
        "Train: micro_batch, frozen front": FrozenMicroBatch(folder),
        "Train: micro_batch, remembered samples": RememberedMicroBatch(),
        "Train: held_out": held_out,
        "Generate: open": sequence_opening,
        "Generate: step": decode_step,
        "Join": aggregator_join,
        "Submit": submission,
        "Submit, int8 and whole": partial(submission, encoding="int8"),
        "Submit, int8": partial(submission, encoding="int8", base_version=1),
        "Submit, int4": partial(submission, encoding="int4", base_version=1),
        "refusals": refusals,
    }
