"""Split decoding's messages to and from what both sides compute with, checked on the way in.

Shape letters: Q new tokens, W tokens that the next one is wanted for, K logits, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from google.protobuf.json_format import MessageToDict
from pydantic import ValidationError

from lesft.bundle import bundle_chunks, bundle_info
from lesft.errors import BundleError, InvalidInput
from lesft.sampling import Sampling
from lesft.spec import Encoding
from lesft.step_messages import check_magnitude
from lesft.tensors import (
    HEADER_BYTES,
    TensorSpec,
    decode_encoded,
    decode_tensors,
    encode_tensors,
)
from lesft.v1 import inference_pb2
from lesft.v1.tensor_pb2 import Chunk

MAX_STEP_TOKENS = 512
"""Tokens of one step: a longer prompt goes in pieces, and others' steps in between."""

MAX_PLACES = 256
"""Tokens of one step that anything may be asked about: bounds the logits that a step makes."""

MAX_WANTED = 64
"""Tokens of one step that the next one may be wanted for: the last certain one and guesses."""

MAX_SCORES = 4096
"""Scores that one step may ask for."""

MAX_TOP_LOGITS = 1024
"""Logits of one place that may be asked for."""

_F32 = (torch.float32,)


@dataclass(frozen=True)
class TokenAt:
    """A token that might come after the token at the place `after` of its step."""

    after: int
    token_id: int


@dataclass(frozen=True)
class TokenScore:
    """log P of a token in nats, and whether no other is likelier."""

    log_prob: float
    likeliest: bool


@dataclass(frozen=True)
class TopLogits:
    """The largest logits at W places, in falling order."""

    token_ids_WK: torch.Tensor
    """int32."""
    logits_WK: torch.Tensor
    """float32."""


@dataclass(frozen=True)
class Question:
    """What a step asks beside adding its tokens to the sequence."""

    wanted: int = 0
    """For how many of the step's last tokens the next one is wanted."""
    scores: tuple[TokenAt, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What comes of a step."""

    token_ids: tuple[int, ...] = ()
    """The tokens wanted, where the server chooses."""
    top: TopLogits | None = None
    """The largest logits at the places wanted, where the client chooses."""
    scores: tuple[TokenScore, ...] = ()


# ---------------------------------------------------------------------- sampling


def sampling_to_message(sampling: Sampling) -> inference_pb2.Sampling:
    """The part of it that the server sees to: the repetition penalty needs the client's prompt."""
    return inference_pb2.Sampling(**sampling.model_dump(exclude={"repetition_penalty"}))


def sampling_from_message(message: inference_pb2.Sampling) -> Sampling:
    """Raises InvalidInput when a value breaks its rule."""
    values = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    values["seed"] = int(values["seed"])  # JSON writes 64 bits as a string
    try:
        return Sampling(**values)
    except ValidationError as error:
        wrong = "; ".join(
            f"sampling.{detail['loc'][0]}: {detail['msg']}, got {detail['input']!r}"
            for detail in error.errors()
        )
        raise InvalidInput(wrong) from None


# ---------------------------------------------------------------------- steps


def step_to_message(
    index: int,
    hidden_QD: torch.Tensor,
    guesses: int,
    right_guesses: int,
    question: Question,
    encoding: Encoding,
) -> tuple[inference_pb2.DecodeStep, list[Chunk]]:
    """A step, and what does not fit into its message of its bundle."""
    data = encode_tensors({"hidden": hidden_QD}, encoding)
    first, *more = bundle_chunks(data)
    return inference_pb2.DecodeStep(
        index=index,
        tokens=len(hidden_QD),
        guesses=guesses,
        right_guesses=right_guesses,
        wanted=question.wanted,
        scores=[
            inference_pb2.TokenAt(after=score.after, token_id=score.token_id)
            for score in question.scores
        ],
        bundle=bundle_info(data),
        chunk=first,
    ), more


def question_of(step: inference_pb2.DecodeStep, vocab_size: int) -> Question:
    """What a step asks. Raises InvalidInput when that cannot be answered."""
    if not 1 <= step.tokens <= MAX_STEP_TOKENS:
        raise InvalidInput(
            f"tokens must lie between 1 and {MAX_STEP_TOKENS}, got {step.tokens}: a longer prompt "
            "goes in several steps"
        )
    if step.wanted > MAX_WANTED:
        raise InvalidInput(f"wanted must be at most {MAX_WANTED}, got {step.wanted}")
    for name in ("guesses", "wanted"):
        value = getattr(step, name)
        if value > step.tokens:
            raise InvalidInput(f"{name} must be at most tokens ({step.tokens}), got {value}")
    if len(step.scores) > MAX_SCORES:
        raise InvalidInput(f"scores must have at most {MAX_SCORES} entries, got {len(step.scores)}")
    for score in step.scores:
        if score.after >= step.tokens:
            raise InvalidInput(
                f"scores: after must be below tokens ({step.tokens}), got {score.after}"
            )
        if score.token_id >= vocab_size:
            raise InvalidInput(
                f"scores: token_id must be below {vocab_size} (the model's vocabulary), got "
                f"{score.token_id}"
            )
    question = Question(
        step.wanted, tuple(TokenAt(score.after, score.token_id) for score in step.scores)
    )
    if num_places(step.tokens, question) > MAX_PLACES:
        raise InvalidInput(
            f"a step may ask about its last {MAX_PLACES} tokens, this one asks about "
            f"{num_places(step.tokens, question)}: send the tokens in several steps"
        )
    return question


def num_places(num_tokens: int, question: Question) -> int:
    """How many of a step's last tokens its question is about."""
    first = min((score.after for score in question.scores), default=num_tokens)
    return max(question.wanted, num_tokens - first)


def hidden_bytes(num_tokens: int, hidden_size: int) -> int:
    """Most bytes that the bundle of a step may have."""
    return HEADER_BYTES + 4 * num_tokens * hidden_size


def hidden_from_bundle(
    data: bytes, num_tokens: int, hidden_size: int, encoding: Encoding
) -> torch.Tensor:
    """Activations `[Q, D]` of a step's bundle. Raises BundleError when they are not that."""
    hidden_QD = decode_encoded(data, {"hidden": (num_tokens, hidden_size)}, encoding)["hidden"]
    check_magnitude("hidden", hidden_QD)
    return hidden_QD


# ---------------------------------------------------------------------- results


def reply_to_message(index: int, reply: Reply) -> tuple[inference_pb2.DecodeResult, list[Chunk]]:
    """A result, and what does not fit into its message of its bundle, where it has one."""
    message = inference_pb2.DecodeResult(
        index=index,
        token_ids=reply.token_ids,
        scores=[
            inference_pb2.TokenScore(log_prob=score.log_prob, likeliest=score.likeliest)
            for score in reply.scores
        ],
    )
    if reply.top is None:
        return message, []
    tensors = {"token_ids": reply.top.token_ids_WK, "logits": reply.top.logits_WK}
    data = encode_tensors(tensors, "raw")
    first, *more = bundle_chunks(data)
    message.bundle.CopyFrom(bundle_info(data))
    message.chunk.CopyFrom(first)
    return message, more


def reply_from_message(
    result: inference_pb2.DecodeResult,
    data: bytes,
    question: Question,
    top_logits: int,
    vocab_size: int,
) -> Reply:
    """Raises BundleError when the result does not answer the question."""
    top = None
    if top_logits and question.wanted:
        shape = (question.wanted, min(top_logits, vocab_size))
        expected = {
            "token_ids": TensorSpec(shape, (torch.int32,)),
            "logits": TensorSpec(shape, _F32),
        }
        tensors = decode_tensors(data, expected)
        top = TopLogits(tensors["token_ids"], tensors["logits"])
        _check_ids(top.token_ids_WK.flatten().tolist(), vocab_size)
    num_ids = 0 if top_logits else question.wanted
    if len(result.token_ids) != num_ids or len(result.scores) != len(question.scores):
        raise BundleError(
            f"{num_ids} tokens and {len(question.scores)} scores expected, got "
            f"{len(result.token_ids)} and {len(result.scores)}"
        )
    _check_ids(result.token_ids, vocab_size)
    scores = tuple(TokenScore(score.log_prob, score.likeliest) for score in result.scores)
    return Reply(tuple(result.token_ids), top, scores)


def result_bytes(question: Question, top_logits: int) -> int:
    """Most bytes that the bundle of a result may have."""
    return HEADER_BYTES + 8 * question.wanted * top_logits


def _check_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    outside = next((i for i in token_ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise BundleError(
            f"token ids must lie between 0 and {vocab_size - 1} (the model's vocabulary), got "
            f"{outside}"
        )
