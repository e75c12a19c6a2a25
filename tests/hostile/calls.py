"""Hostile calls of every RPC over real gRPC: mutated messages, wrong order, lying bundles."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

import grpc
import torch
from google.protobuf.message import Message

from lesft.bundle import bundle_chunks, bundle_info
from lesft.inference_messages import Question, step_to_message
from lesft.micro_batch import StepKey
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import adapter_encoding_to_message, encoding_to_message
from lesft.v1 import aggregation_pb2, inference_pb2, model_pb2
from lesft.v1.heartbeat_pb2 import Heartbeat
from lesft.v1.tensor_pb2 import Chunk
from lesft.v1.training_pb2 import TrainRequest
from tests.aggregator.harness import make_adapter
from tests.hostile.lying_safetensors import lying_safetensors
from tests.hostile.mutate import mutate_message
from tests.server.harness import (
    held_out_messages,
    leaving,
    make_batch,
    opening,
    step_messages,
)

SECONDS = 0.5
"""How long an attacker waits for the end of its call before it goes away in the midst of it."""

STRANGER = "mallory"


class Attacker:
    """Calls a service again and again, each time otherwise; counts what it is told."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.statuses: Counter[str] = Counter()

    def stream(self, method: str, messages: Iterable[bytes], seconds: float = SECONDS) -> int:
        """Send messages to a method of any kind; returns how many."""
        sent = list(messages)
        call: Any = self._channel.stream_stream(method)(iter(sent), timeout=seconds)
        try:
            for _ in call:
                pass
            self.statuses["OK"] += 1
        except grpc.RpcError as error:
            self.statuses[error.code().name] += 1
        return len(sent)


Attack = Callable[[Random, Attacker], int]
"""Sends a few messages; returns how many."""


def _mutated(random: Random, messages: Sequence[Message]) -> list[bytes]:
    """Valid messages of which one or two are mutated, or that come in another order."""
    out = [message.SerializeToString() for message in messages]
    if not out:
        return out
    for _ in range(random.randint(1, 2)):
        at = random.randrange(len(out))
        match random.randrange(6):
            case 0:
                random.shuffle(out)
            case 1:
                out.insert(at, out[at])
            case 2 if len(out) > 1:
                del out[at]
            case 3:
                out[at] = random.randbytes(random.choice((0, 1, 100)))
            case _:
                out[at % len(messages)] = mutate_message(random, messages[at % len(messages)])
    return out


# ---------------------------------------------------------------------- the server


class ServerAttacks:
    """Attacks on a server whose run has begun; none of them is a member of it."""

    def __init__(self, spec: RunSpec, members: Sequence[str], hidden_size: int) -> None:
        self._spec = spec
        self._members = members
        self._hidden_size = hidden_size

    def __call__(self, random: Random, attacker: Attacker) -> int:
        """One call."""
        return random.choice((self._train, self._train, self._generate, self._model))(
            random, attacker
        )

    def _train(self, random: Random, attacker: Attacker) -> int:
        name = random.choice((*self._members, STRANGER))
        first = opening(self._spec, name, instance_id=STRANGER, num_samples=3)
        batch = make_batch(StepKey(random.randrange(3), 0))
        rest = random.choice((step_messages(batch), held_out_messages(), [leaving()], [_beat()]))
        return attacker.stream("/lesft.v1.TrainingService/Train", _mutated(random, [first, *rest]))

    def _generate(self, random: Random, attacker: Attacker) -> int:
        first = inference_pb2.OpenSequence(
            protocol_version=PROTOCOL_VERSION,
            front_fingerprint=self._spec.front_fingerprint,
            cut_layer=self._spec.cut_layer,
            activation_encoding=encoding_to_message(self._spec.inference_encoding),
            capacity=32,
            sampling=inference_pb2.Sampling(temperature=0, top_p=1, seed=1),
        )
        requests = [inference_pb2.GenerateRequest(open=first)]
        for index in range(random.choice((1, 2))):
            hidden_QD = torch.randn(2, self._hidden_size)
            step, _ = step_to_message(index, hidden_QD, 0, 0, Question(1), "raw")
            if random.random() < 0.7:
                data = lying_safetensors(random, step.chunk.data)
                step.bundle.CopyFrom(bundle_info(data))
                step.chunk.data = data
            requests.append(inference_pb2.GenerateRequest(step=step))
        messages = [message.SerializeToString() for message in requests]
        if random.random() < 0.6:
            messages = _mutated(random, requests)
        return attacker.stream("/lesft.v1.InferenceService/Generate", messages)

    def _model(self, random: Random, attacker: Attacker) -> int:
        name, request = random.choice(
            (
                ("DescribeRun", model_pb2.DescribeRunRequest(protocol_version=PROTOCOL_VERSION)),
                (
                    "FetchFront",
                    model_pb2.FetchFrontRequest(front_fingerprint=self._spec.front_fingerprint),
                ),
                (
                    "FetchAdapter",
                    model_pb2.FetchAdapterRequest(
                        protocol_version=PROTOCOL_VERSION,
                        spec_fingerprint=self._spec.fingerprint(),
                        rounds=self._spec.rounds,
                    ),
                ),
                ("MeasureLink", model_pb2.MeasureLinkRequest(payload=b"1", answer_bytes=1)),
                (
                    "MeasureBack",
                    model_pb2.MeasureBackRequest(
                        protocol_version=PROTOCOL_VERSION,
                        base_lengths=[5],
                        reference_lengths=[6],
                        target_lengths=[2],
                    ),
                ),
                (
                    "ApplyPlan",
                    model_pb2.ApplyPlanRequest(
                        protocol_version=PROTOCOL_VERSION,
                        spec_fingerprint=self._spec.fingerprint(),
                        cut_layer=2,
                        activation_encoding=encoding_to_message("int8"),
                        gradient_encoding=encoding_to_message("int8"),
                        adapter_encoding=adapter_encoding_to_message("int8"),
                    ),
                ),
            )
        )
        message = mutate_message(random, request)
        return attacker.stream(f"/lesft.v1.ModelService/{name}", [message])


def _beat() -> TrainRequest:
    return TrainRequest(heartbeat=Heartbeat())


# ---------------------------------------------------------------------- the aggregator


class AggregatorAttacks:
    """Attacks on an aggregator whose run has its adapters' layout already.

    The adapters are of another layout: none of them is ever a right one.
    """

    def __init__(self, run_id: str, members: Sequence[str], version: Callable[[], int]) -> None:
        """`version` asks for the newest one; that is done now and then."""
        self._run_id = run_id
        self._members = members
        self._ask_version = version
        self._calls = 0
        self._newest = 0

    def _version(self) -> int:
        if self._calls % 100 == 0:
            self._newest = self._ask_version()
        self._calls += 1
        return self._newest

    def __call__(self, random: Random, attacker: Attacker) -> int:
        """One call."""
        return random.choice((self._submit, self._submit, self._join, self._fetch))(
            random, attacker
        )

    def _submit(self, random: Random, attacker: Attacker) -> int:
        data = lying_safetensors(random, make_adapter(random.randrange(3)))
        header = aggregation_pb2.Submission(
            client_id=random.choice((*self._members, STRANGER)),
            run_id=self._run_id,
            base_version=self._version() + random.choice((0, 0, 0, 1)),
            num_samples=3,
            bundle=bundle_info(data),
        )
        requests = [
            aggregation_pb2.SubmitRequest(submission=header),
            *(aggregation_pb2.SubmitRequest(chunk=chunk) for chunk in bundle_chunks(data)),
        ]
        messages = [message.SerializeToString() for message in requests]
        if random.random() < 0.6:
            messages = _mutated(random, requests)
        return attacker.stream("/lesft.v1.AggregationService/Submit", messages)

    def _join(self, random: Random, attacker: Attacker) -> int:
        request = aggregation_pb2.JoinRequest(
            protocol_version=PROTOCOL_VERSION,
            client_id=STRANGER,
            run_id=self._run_id,
            num_samples=3,
            run_fingerprint="sha256:" + "0" * 64,
        )
        message = mutate_message(random, request)
        return attacker.stream("/lesft.v1.AggregationService/Join", [message])

    def _fetch(self, random: Random, attacker: Attacker) -> int:
        request = aggregation_pb2.FetchRequest(
            client_id=STRANGER, run_id=self._run_id, version=self._version()
        )
        message = mutate_message(random, request)
        return attacker.stream("/lesft.v1.AggregationService/Fetch", [message], 0.2)


def huge_announcement(total_bytes: int) -> list[bytes]:
    """A submission's header that announces so many bytes, and one chunk of them."""
    header = aggregation_pb2.Submission(client_id=STRANGER, run_id="lesft", num_samples=1)
    header.bundle.total_bytes = total_bytes
    return [
        aggregation_pb2.SubmitRequest(submission=header).SerializeToString(),
        aggregation_pb2.SubmitRequest(chunk=Chunk(index=0, data=bytes(1000))).SerializeToString(),
    ]
