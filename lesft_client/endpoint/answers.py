"""What answers hold: whole ones, and streams of server-sent events.

https://platform.openai.com/docs/api-reference/chat-streaming
"""

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lesft.errors import LesftError
from lesft_client.endpoint.errors import refusal
from lesft_client.language_model import FinishReason, Piece

_log = logging.getLogger(__name__)

Json = dict[str, Any]
Pieces = AsyncGenerator[tuple[int, Piece], None]
"""Each with the number of its choice."""


class Shape(NamedTuple):
    """How one of the two ways of asking is answered."""

    id_prefix: str
    whole: str
    """The `object` of a whole answer."""
    chunk: str
    """The `object` of a chunk of a stream."""
    whole_choice: Callable[[str], Json]
    """A choice with all of its text."""
    piece_of_choice: Callable[[str], Json]
    """A choice with the next piece of its text."""
    opening: Json | None
    """A choice before its text, where there is one."""


CHAT = Shape(
    id_prefix="chatcmpl-",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    whole_choice=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    piece_of_choice=lambda text: {"delta": {"content": text} if text else {}},
    opening={"delta": {"role": "assistant", "content": ""}},
)
COMPLETION = Shape(
    id_prefix="cmpl-",
    whole="text_completion",
    chunk="text_completion",
    whole_choice=lambda text: {"text": text},
    piece_of_choice=lambda text: {"text": text},
    opening=None,
)


@dataclass
class Answer:
    """One request's answer, on its way."""

    shape: Shape
    model_name: str
    fingerprint: str
    prefixes: Sequence[str]
    """What each choice begins with before the model has written: its prompt, or nothing."""
    num_prompt_tokens: int
    num_completion_tokens: int = 0
    answer_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, pieces: Pieces) -> Json:
        """The answer once all of it is written. Raises what the pieces raise."""
        texts = [[prefix] for prefix in self.prefixes]
        reasons: list[FinishReason | None] = [None for _ in texts]
        async with aclosing(pieces):
            async for number, piece in pieces:
                self.num_completion_tokens += len(piece.token_ids)
                texts[number].append(piece.text)
                reasons[number] = piece.finish_reason
        choices = [
            _choice(number, self.shape.whole_choice("".join(text)), reason)
            for number, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return self._body(self.shape.whole, choices, {"usage": self._usage()})

    async def events(self, pieces: Pieces, with_usage: bool) -> AsyncGenerator[str, None]:
        """The answer as server-sent events; an error in mid-stream is the last of them."""
        usage: Json = {"usage": None} if with_usage else {}
        try:
            async with aclosing(pieces):
                for choice in self._openings():
                    yield self._chunk([choice], usage)
                async for number, piece in pieces:
                    self.num_completion_tokens += len(piece.token_ids)
                    if piece.text or piece.finish_reason:
                        for choice in self._choices_of(number, piece):
                            yield self._chunk([choice], usage)
        except Exception as error:
            if not isinstance(error, LesftError):
                _log.exception("an answer failed in mid-stream")
            yield _event(refusal(error).body)
            return
        if with_usage:
            yield self._chunk([], {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _openings(self) -> list[Json]:
        numbers = range(len(self.prefixes))
        opening = self.shape.opening
        first = [] if opening is None else [_choice(number, opening, None) for number in numbers]
        echoed = [
            _choice(number, self.shape.piece_of_choice(self.prefixes[number]), None)
            for number in numbers
            if self.prefixes[number]
        ]
        return first + echoed

    def _choices_of(self, number: int, piece: Piece) -> list[Json]:
        """In chats, the reason of the end has a chunk of its own, without text."""
        shape = self.shape
        if shape.opening is None or not (piece.text and piece.finish_reason):
            return [_choice(number, shape.piece_of_choice(piece.text), piece.finish_reason)]
        return [
            _choice(number, shape.piece_of_choice(piece.text), None),
            _choice(number, shape.piece_of_choice(""), piece.finish_reason),
        ]

    def _chunk(self, choices: list[Json], usage: Json) -> str:
        return _event(self._body(self.shape.chunk, choices, usage))

    def _body(self, kind: str, choices: list[Json], usage: Json) -> Json:
        return {
            "id": self.shape.id_prefix + self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model_name,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **usage,
        }

    def _usage(self) -> Json:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
        }


def _choice(number: int, content: Mapping[str, Any], reason: FinishReason | None) -> Json:
    return {"index": number, **content, "logprobs": None, "finish_reason": reason}


def _event(body: Json) -> str:
    return f"data: {json.dumps(body)}\n\n"
