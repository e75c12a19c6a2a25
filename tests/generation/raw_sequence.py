"""A client of the inference service without our client's care, and right messages to bend."""

import queue
from typing import Any

import grpc
import pytest
import torch

from lesft.inference_messages import Question, TokenAt, sampling_to_message, step_to_message
from lesft.sampling import GREEDY
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import encoding_to_message
from lesft.v1 import inference_pb2
from lesft.v1.inference_pb2 import GenerateRequest, GenerateResponse
from tests.server.harness import Refusal, refusal_of
from tests.tiny_models import HIDDEN_SIZE


class RawSequence:
    """A Generate stream. Bytes are sent as they are; heartbeats are passed over."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._outgoing: queue.Queue[GenerateRequest | bytes | None] = queue.Queue()
        self.call: Any = channel.stream_stream(
            "/lesft.v1.InferenceService/Generate",
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=GenerateResponse.FromString,
        )(iter(self._outgoing.get, None), timeout=30)

    def send(self, *messages: GenerateRequest | bytes) -> None:
        """Send messages, one after another."""
        for message in messages:
            self._outgoing.put(message)

    def receive(self) -> GenerateResponse:
        """The next message, which must be there."""
        return next(message for message in self.call if not message.HasField("heartbeat"))

    def token_ids(self, *messages: GenerateRequest) -> list[int]:
        """The tokens of the result of a step of these messages."""
        self.send(*messages)
        message = self.receive()
        assert message.WhichOneof("message") == "result"
        return list(message.result.token_ids)

    def refusal(self) -> Refusal:
        """How the call ends, which must not be well; what it sends before is not looked at."""
        with pytest.raises(grpc.RpcError) as caught:
            for _ in self.call:
                pass
        self._outgoing.put(None)
        return refusal_of(caught.value)

    def close(self) -> list[GenerateResponse]:
        """Close the stream as a client does whose text is done; all that still comes."""
        self._outgoing.put(None)
        return [message for message in self.call if not message.HasField("heartbeat")]


def opening(spec: RunSpec, **changes: Any) -> GenerateRequest:
    """What a right client sends first, for the untuned model; `changes` are fields of it."""
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "front_fingerprint": spec.front_fingerprint,
        "cut_layer": spec.cut_layer,
        "activation_encoding": encoding_to_message(spec.inference_encoding),
        "capacity": 40,
        "sampling": sampling_to_message(GREEDY),
    }
    return GenerateRequest(open=inference_pb2.OpenSequence(**{**fields, **changes}))


def opened(channel: grpc.Channel, spec: RunSpec, **changes: Any) -> RawSequence:
    """A sequence that the server has opened."""
    sequence = RawSequence(channel)
    sequence.send(opening(spec, **changes))
    assert sequence.receive().WhichOneof("message") == "opened"
    return sequence


def activations(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Random activations of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)


def step(
    index: int = 0,
    num_tokens: int = 5,
    guesses: int = 0,
    right_guesses: int = 0,
    wanted: int = 1,
    scores: tuple[TokenAt, ...] = (),
    hidden: torch.Tensor | None = None,
) -> list[GenerateRequest]:
    """A right step as it travels."""
    hidden_QD = activations(num_tokens, seed=index) if hidden is None else hidden
    header, more = step_to_message(
        index, hidden_QD, guesses, right_guesses, Question(wanted, scores), "raw"
    )
    chunks = [GenerateRequest(chunk=chunk) for chunk in more]
    return [GenerateRequest(step=header), *chunks]
