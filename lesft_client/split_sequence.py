"""One text that is written with the server's help, over as many streams as it takes."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from lesft.adapter_halves import HalfInfo
from lesft.decoding import SequenceCache
from lesft.errors import Busy, Unreachable
from lesft.inference_messages import (
    MAX_STEP_TOKENS,
    Question,
    Reply,
    TokenAt,
    sampling_to_message,
    step_to_message,
)
from lesft.next_token import choose_token, penalize_repetition
from lesft.sampling import Sampling
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import encoding_to_message
from lesft.v1 import inference_pb2
from lesft.wire import WireCounter
from lesft_client.front_decoder import FrontDecoder
from lesft_client.patience import Tries
from lesft_client.sequence_stream import Connection, SequenceStream

log = logging.getLogger(__name__)

TOP_LOGITS = 256
"""Logits that the client chooses among where it has to choose itself."""


@dataclass(frozen=True)
class SplitContext:
    """What all texts of a client share."""

    decoder: FrontDecoder
    connection: Connection
    spec: RunSpec
    front_fingerprint: str
    """Of the front that was loaded."""
    half: HalfInfo | None
    """What the front's adapter is; None where front and back are to have none."""
    trained_by: str
    """What tells the adapters of both halves from others of the same settings; empty for none."""
    patience_seconds: float
    stall_seconds: float
    wire: WireCounter


class SplitSequence:
    """Prompt and text so far, and what front and back have seen of them.

    The client has all that the server keeps: where a stream breaks it opens another one, sends the
    activations of all tokens again, and the text goes on as if nothing had been.
    """

    def __init__(
        self, context: SplitContext, prompt_ids: Sequence[int], capacity: int, sampling: Sampling
    ) -> None:
        """`capacity` is the most tokens that it will have."""
        self.token_ids = list(prompt_ids)
        """What is certain; its owner appends to it."""
        self._context = context
        self._capacity = capacity
        self._sampling = sampling
        # The penalty looks at the prompt, which the server does not know.
        self._top_logits = TOP_LOGITS if sampling.repetition_penalty != 1 else 0
        self._stream: SequenceStream | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self.close()
        self._stream = None
        self._cache = SequenceCache(self._context.decoder.config)
        # Tokens that both caches hold for good.
        self._length = 0
        # Tokens that they hold back, since those at the end of them are guesses.
        self._held: list[int] = []
        self._num_guesses = 0

    def close(self) -> None:
        """End its stream and give the room on the server back."""
        self._context.decoder.forget(self)
        if self._stream is not None:
            self._stream.close()

    # ------------------------------------------------------------------ what comes next

    async def next_tokens(self, guesses: Sequence[int]) -> list[int]:
        """The token after `token_ids`, and after each guess as if it and those before were right.

        Raises what ends the text, Unreachable or Busy once patience has ended.
        """
        reply = await self.ask(guesses, wanted=len(guesses) + 1)
        if reply.top is None:
            return list(reply.token_ids)
        chosen = []
        for place, logits_K in enumerate(reply.top.logits_WK):
            ids_K = reply.top.token_ids_WK[place]
            seen = [*self.token_ids, *guesses[:place]]
            penalty = self._sampling.repetition_penalty
            penalized_K = penalize_repetition(logits_K, ids_K, seen, penalty)
            chosen.append(int(ids_K[choose_token(penalized_K, self._sampling, len(seen))]))
        return chosen

    async def ask(
        self, guesses: Sequence[int], wanted: int = 0, scores: Sequence[TokenAt] = ()
    ) -> Reply:
        """Send what was not sent yet, with guesses after it, and ask about its last tokens.

        `TokenAt.after` counts from the first token of the sequence, guesses included.
        """
        tries = Tries(self._context.patience_seconds)
        while True:
            tries.begin()
            try:
                return await self._ask(guesses, wanted, scores)
            except (Unreachable, Busy) as error:
                if self._stream is not None and self._stream.fell_silent:
                    self._context.connection.renew(self._stream.channel)
                self._start_anew()
                pause = tries.pause_after(error)
            await asyncio.sleep(pause)

    async def _ask(self, guesses: Sequence[int], wanted: int, scores: Sequence[TokenAt]) -> Reply:
        kept = common_length(self._held, self.token_ids[self._length :])
        right_guesses = max(0, kept - (len(self._held) - self._num_guesses))
        while True:
            start = self._length + kept
            new = self.token_ids[start:]
            if len(new) + len(guesses) <= MAX_STEP_TOKENS:
                break
            # One stays for the last step, which is asked about what comes after it.
            piece = new[: min(MAX_STEP_TOKENS, len(new) - 1)]
            await self._step(piece, 0, kept, right_guesses, Question())
            kept = right_guesses = 0
        question = Question(wanted, tuple(TokenAt(s.after - start, s.token_id) for s in scores))
        return await self._step([*new, *guesses], len(guesses), kept, right_guesses, question)

    async def _step(
        self, new: list[int], num_guesses: int, kept: int, right_guesses: int, question: Question
    ) -> Reply:
        """One step with new tokens, after the first `kept` of those held back."""
        context, tentative = self._context, num_guesses > 0
        hidden_QD = await context.decoder.activations(self, self._cache, new, tentative, kept)
        # Only now: the server keeps room from the opening on.
        stream = self._stream or await self._open()
        encoding = context.spec.inference_encoding
        header, more = step_to_message(
            stream.next_index, hidden_QD, num_guesses, right_guesses, question, encoding
        )
        reply = await stream.step(header, more, question)
        self._length += kept + (0 if tentative else len(new))
        self._held = new if tentative else []
        self._num_guesses = num_guesses
        return reply

    async def _open(self) -> SequenceStream:
        context, half = self._context, self._context.half
        stream = SequenceStream(
            context.connection,
            context.decoder.config.vocab_size,
            self._top_logits,
            context.stall_seconds,
            context.wire,
        )
        self._stream = stream  # so that it is closed whatever comes of it
        await stream.open(
            inference_pb2.OpenSequence(
                protocol_version=PROTOCOL_VERSION,
                front_fingerprint=context.front_fingerprint,
                cut_layer=context.spec.cut_layer,
                spec_fingerprint=half.spec_fingerprint if half else "",
                rounds=half.rounds if half else 0,
                activation_encoding=encoding_to_message(context.spec.inference_encoding),
                capacity=self._capacity,
                sampling=sampling_to_message(self._sampling),
                top_logits=self._top_logits,
            )
        )
        return stream


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of their first items are the same."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
