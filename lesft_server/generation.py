"""The sequences that clients are writing: their room in memory, and their steps in batches."""

import asyncio
from collections import Counter
from collections.abc import Sequence as Several
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from lesft.back import Back
from lesft.batching import Batcher
from lesft.decoding import SequenceCache, Step, cache_bytes_per_token
from lesft.device_thread import DeviceThread
from lesft.errors import Busy, HandshakeMismatch, InvalidInput, OutOfOrder, TooLarge
from lesft.inference_messages import Question, Reply, TokenAt, TokenScore, TopLogits, num_places
from lesft.next_token import choose_token
from lesft.sampling import Sampling

_LEFT_TO_OTHERS = 8
"""One in so many places, and of the room, is for clients that have no text under way."""


@dataclass(frozen=True)
class SequenceOptions:
    """What a client asks for when it opens a sequence; checked."""

    untuned: bool
    capacity: int
    """Most tokens of the sequence."""
    sampling: Sampling
    top_logits: int


@dataclass(frozen=True)
class _Work:
    """One step on its way through the model."""

    sequence: "ServedSequence"
    hidden_QD: torch.Tensor
    tentative: bool
    keep: int
    """How many of the tentative tokens of the step before stay."""
    question: Question


@dataclass(frozen=True)
class _Draws:
    """Logits on the CPU, one row for each token that is yet to be drawn."""

    logits_WV: torch.Tensor
    first_position: int

    def choose(self, sampling: Sampling) -> tuple[int, ...]:
        """The tokens."""
        return tuple(
            choose_token(logits_V, sampling, self.first_position + place)
            for place, logits_V in enumerate(self.logits_WV)
        )


@dataclass(frozen=True)
class _Outcome:
    """What the device has made of a step."""

    reply: Reply
    draws: _Draws | None = None
    """Where tokens are to be drawn: the reply has none yet."""


class Generation:
    """All sequences that are open on this server. Lives on the event loop."""

    def __init__(
        self,
        back: Back,
        device: DeviceThread,
        max_sequences: int,
        max_context: int,
        cache_bytes: int,
    ) -> None:
        """`max_context` is in tokens; caches together never hold more than `cache_bytes`."""
        self.back = back
        self._device = device
        self._batcher: Batcher[_Work, _Outcome] = Batcher(self._decode_batch)
        self.max_sequences = max_sequences
        self.max_context = max_context
        self.cache_bytes = cache_bytes
        self.bytes_per_token = cache_bytes_per_token(back.model.config, back.model.dtype)
        self.bytes_reserved = 0
        self.sequences: set[ServedSequence] = set()
        self._of_clients: Counter[str] = Counter()
        # A thread of its own: training must not wait behind what texts ask to be drawn.
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draws")
        self.tokens = 0
        """Tokens that have gone through the back for inference."""

    @property
    def rounds(self) -> int:
        """Rounds that the back has been trained for."""
        return self.back.optimizer.steps

    @property
    def batches(self) -> tuple[int, int]:
        """Batches so far, and steps in them."""
        return self._batcher.batches, self._batcher.requests

    def open(self, options: SequenceOptions, client: str = "") -> "ServedSequence":
        """A new sequence of a client, with room for all of it.

        Raises TooLarge when it can never have that room, Busy when it cannot now.
        """
        size = options.capacity * self.bytes_per_token
        if options.capacity > self.max_context or size > self.cache_bytes:
            most = min(self.max_context, self.cache_bytes // self.bytes_per_token)
            raise TooLarge(
                f"a sequence may have {most} tokens here, prompt and text together, got "
                f"{options.capacity}: shorten the prompt or ask for fewer tokens"
            )
        # Who has a text under way leaves the last places, and the last room, to others.
        part = 1 / _LEFT_TO_OTHERS if self._of_clients[client] else 0
        if len(self.sequences) >= self.max_sequences - int(part * self.max_sequences):
            raise Busy(
                f"{len(self.sequences)} texts are being written, of {self.max_sequences} that this "
                "server takes; the last places are for clients that have none: try again in a while"
            )
        if self.bytes_reserved + size > self.cache_bytes - int(part * self.cache_bytes):
            raise Busy(
                f"{_mib(self.bytes_reserved)} of {_mib(self.cache_bytes)} for keys and values are "
                f"taken by other texts ({len(self.sequences)}), and {_mib(size)} are needed: try "
                "again in a while or ask for fewer tokens"
            )
        self.bytes_reserved += size
        sequence = ServedSequence(self, options, self.rounds, size, client)
        self.sequences.add(sequence)
        self._of_clients[client] += 1
        return sequence

    def close(self, sequence: "ServedSequence") -> None:
        """Give the room back. Does nothing the second time."""
        if sequence in self.sequences:
            self.sequences.remove(sequence)
            self.bytes_reserved -= sequence.num_bytes
            self._of_clients[sequence.client] -= 1
            if not self._of_clients[sequence.client]:
                del self._of_clients[sequence.client]
            self._batcher.forget(sequence)

    async def decode(self, work: _Work) -> Reply:
        """What comes of a step. Raises what made it fail, Busy when the device has no memory."""
        sequence, num_tokens = work.sequence, len(work.hidden_QD)
        self.tokens += num_tokens
        outcome = await self._batcher.submit(sequence, work, num_tokens, sequence.length)
        if outcome.draws is None:
            return outcome.reply
        # Sorting all logits takes longer than a step on a GPU: not on the device's thread.
        loop, sampling = asyncio.get_running_loop(), sequence.options.sampling
        token_ids = await loop.run_in_executor(self._drawing, outcome.draws.choose, sampling)
        return replace(outcome.reply, token_ids=token_ids)

    async def _decode_batch(self, batch: Several[_Work]) -> list[_Outcome | Exception]:
        return await self._device.run(lambda: self._decode_on_device(batch))

    # ------------------------------------------------------------------ on the device thread

    def _decode_on_device(self, batch: Several[_Work]) -> list[_Outcome | Exception]:
        outcomes: dict[int, _Outcome | Exception] = {
            index: HandshakeMismatch(
                f"rounds: the sequence was begun after {work.sequence.rounds}, and the run has "
                f"trained {self.rounds} since: open another one with the adapters of now"
            )
            for index, work in enumerate(batch)
            if not work.sequence.options.untuned and work.sequence.rounds != self.rounds
        }
        for untuned in (False, True):
            alike = [
                index
                for index, work in enumerate(batch)
                if index not in outcomes and work.sequence.options.untuned is untuned
            ]
            if alike:
                works = [batch[index] for index in alike]
                outcomes.update(zip(alike, self._decode_alike(works, untuned), strict=True))
        return [outcomes[index] for index in range(len(batch))]

    def _decode_alike(self, batch: Several[_Work], untuned: bool) -> Several[_Outcome | Exception]:
        model, steps, starts = self.back.model, [], []
        for work in batch:
            cache = work.sequence.cache
            cache.keep(work.keep)
            starts.append(cache.length)
            inputs_QD = work.hidden_QD.to(model.device, model.dtype)
            steps.append(Step(cache, inputs_QD, work.tentative))
        # One place at least: a step that asks for nothing needs no logits, but it is rare.
        places = [max(1, num_places(len(w.hidden_QD), w.question)) for w in batch]
        try:
            logits = self.back.next_logits(steps, places, untuned)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            busy = Busy("the device has no memory for this step: try again in a while")
            return [busy] * len(batch)
        return [
            _outcome(work, start, logits_WV)
            for work, start, logits_WV in zip(batch, starts, logits, strict=True)
        ]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _outcome(work: _Work, start: int, logits_WV: torch.Tensor) -> _Outcome | Exception:
    """What comes of a step that began at the sequence's token `start`."""
    question, options = work.question, work.sequence.options
    num_tokens, wanted = len(work.hidden_QD), question.wanted
    if not bool(torch.isfinite(logits_WV.amax())):
        return InvalidInput(
            "the hidden states lead to logits that are NaN or infinite: check the client's front "
            "and its precision"
        )
    scores = _scores(question.scores, logits_WV, num_tokens - len(logits_WV))
    wanted_WV = logits_WV[len(logits_WV) - wanted :] if wanted else logits_WV[:0]
    if options.top_logits and wanted:
        top = wanted_WV.topk(min(options.top_logits, wanted_WV.shape[-1]))
        ids_WK = top.indices.to(torch.int32).cpu()
        return _Outcome(Reply((), TopLogits(ids_WK, top.values.cpu()), scores))
    if options.sampling.temperature == 0:
        return _Outcome(Reply(tuple(wanted_WV.argmax(-1).tolist()), None, scores))
    first = start + num_tokens - wanted + 1
    return _Outcome(Reply((), None, scores), _Draws(wanted_WV.cpu(), first))


def _scores(
    asked: Several[TokenAt], logits_WV: torch.Tensor, num_before: int
) -> tuple[TokenScore, ...]:
    """The scores asked for; the first row of logits is that of the step's token `num_before`."""
    if not asked:
        return ()
    rows = torch.tensor([score.after - num_before for score in asked], device=logits_WV.device)
    ids = torch.tensor([score.token_id for score in asked], device=logits_WV.device)
    log_probs = logits_WV[rows, ids] - logits_WV.logsumexp(-1)[rows]
    likeliest = logits_WV.argmax(-1)[rows] == ids
    pairs = zip(log_probs.tolist(), likeliest.tolist(), strict=True)
    return tuple(TokenScore(log_prob, is_likeliest) for log_prob, is_likeliest in pairs)


class ServedSequence:
    """One client's sequence: what it may send next, and the back's cache of it."""

    def __init__(
        self,
        generation: Generation,
        options: SequenceOptions,
        rounds: int,
        num_bytes: int,
        client: str,
    ) -> None:
        """Made by `Generation.open`."""
        self.client = client
        self._generation = generation
        self.options = options
        self.rounds = rounds
        self.num_bytes = num_bytes
        self.cache = SequenceCache(generation.back.model.config)
        self.next_index = 0
        # Tokens that are there for good; then those of the last step where it had guesses: as many
        # that were none, which wait with the guesses, and these.
        self._length = 0
        self._certain = 0
        self._guesses = 0

    @property
    def length(self) -> int:
        """Tokens with those that are held back."""
        return self._length + self._certain + self._guesses

    def check_step(self, index: int, tokens: int, right_guesses: int) -> None:
        """Refuse a step that is not due. Raises OutOfOrder or TooLarge."""
        if index != self.next_index:
            raise OutOfOrder(f"step {self.next_index} is due, got step {index}")
        if right_guesses > self._guesses:
            raise OutOfOrder(
                f"right_guesses: the step before had {self._guesses} guesses, got {right_guesses}"
            )
        length = self._length + self._certain + right_guesses + tokens
        if length > self.options.capacity:
            raise TooLarge(
                f"the sequence was opened for {self.options.capacity} tokens, this step would make "
                f"it {length}: open it with a larger capacity"
            )

    async def decode(
        self, hidden_QD: torch.Tensor, guesses: int, right_guesses: int, question: Question
    ) -> Reply:
        """Add a checked step's tokens; what comes next. Raises HandshakeMismatch when Φ moved."""
        keep = self._certain + right_guesses
        certain = len(hidden_QD) - guesses
        self._length += keep if guesses else keep + certain
        self._certain, self._guesses = certain if guesses else 0, guesses
        self.next_index += 1
        return await self._generation.decode(_Work(self, hidden_QD, guesses > 0, keep, question))

    def close(self) -> None:
        """The client is done with it."""
        self._generation.close(self)
