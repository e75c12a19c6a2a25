"""A whole language model on this machine: the yardstick for the split one."""

import asyncio
import functools
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lesft.batching import MAX_BATCH
from lesft.device import Precision, choose_device
from lesft.device_thread import DeviceThread
from lesft.errors import InvalidInput, ModelError
from lesft_client.language_model import (
    GenerationRequest,
    Piece,
    Score,
    check_token_ids,
)
from lesft_client.local_batch import RowBatch
from lesft_client.local_text import LocalText
from lesft_client.text_stream import TextStream

_READ_BYTES = 1 << 20

_TURNS = 10
"""Turns of the event loop from an answer to what its reader asks for next, with some to spare."""

_ALIKE = 256
"""Texts up to this many tokens are short, all the same. Longer ones are written with those of at
least half and at most twice their length: in a batch all cost as much as the longest."""


class LocalModel:
    """See `LanguageModel`: the whole model, with or without a PEFT adapter.

    Texts that are asked for at the same time are written together. Which ones those are does not
    depend on the clock, so that the same questions asked in the same way get the same answers, to
    the last bit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        fingerprint: str,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        max_length: int,
        device: DeviceThread,
    ) -> None:
        """`end_ids` are the tokens that end a text. It closes `device`, which is for it alone."""
        self.name = name
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._model = model
        self._end_ids = end_ids
        self._device = device
        self._rows = RowBatch(model)
        self._texts: list[LocalText] = []  # one for each row
        self._waiting: deque[LocalText] = deque()
        self._scorings: deque[_Scoring] = deque()
        self._came = False
        self._worker: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """See `LanguageModel`."""
        check_token_ids(request.prompt_ids, self._model.config.vocab_size)
        most = self.max_length - len(request.prompt_ids)
        if not 1 <= request.max_tokens <= most:
            raise InvalidInput(
                f"prompt and text may have {self.max_length} tokens together, each at least one, "
                f"but the prompt has {len(request.prompt_ids)} and {request.max_tokens} were asked "
                "for"
            )
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        text = LocalText(
            request,
            TextStream(self.tokenizer, request.stop, self._end_ids),
            lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece),
        )
        self._waiting.append(text)
        self._work_on()
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            text.abandoned = True

    async def score(
        self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Score]:
        """See `LanguageModel`. Others do not change the last bits of a score."""
        every = [*prompt_ids, *(token_id for ids in continuations for token_id in ids)]
        check_token_ids(every, self._model.config.vocab_size)
        result: asyncio.Future[list[Score]] = asyncio.get_running_loop().create_future()
        self._scorings.append(_Scoring(list(prompt_ids), continuations, result))
        self._work_on()
        return await result

    async def close(self) -> None:
        """End the thread that computes."""
        for text in self._texts:
            text.abandoned = True
        if self._worker is not None:
            self._worker.cancel()
        await asyncio.to_thread(self._device.close)

    # ------------------------------------------------------------------ on the event loop

    def _work_on(self) -> None:
        self._came = True
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Do what is wanted, until nothing is."""
        while True:
            # Those that have just been answered bring what they want next in a few turns of the
            # loop. Nobody waits for a clock here: who is in the next batch is always the same.
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            self._came = False
            if self._scorings:
                await self._score_next(self._scorings.popleft())
                continue
            coming = self._take()
            if not coming and not self._texts:
                return
            try:
                await self._device.run(functools.partial(self._write, coming))
            except Exception as error:  # each caller gets it
                for text in {*self._texts, *coming}:
                    text.fail(error)
                self._texts, self._rows = [], RowBatch(self._model)

    async def _score_next(self, scoring: "_Scoring") -> None:
        if scoring.result.done():  # its caller has gone
            return
        try:
            scores = await self._device.run(
                lambda: self._scores(scoring.prompt_ids, scoring.continuations)
            )
        except Exception as error:  # its caller gets it
            if not scoring.result.done():
                scoring.result.set_exception(error)
        else:
            if not scoring.result.done():
                scoring.result.set_result(scores)

    def _take(self) -> list["LocalText"]:
        """Those that may join now, in the order in which they came."""
        coming: list[LocalText] = []
        while self._waiting:
            lengths = [text.length for text in (*self._texts, *coming, self._waiting[0])]
            if len(lengths) > MAX_BATCH or max(lengths) > 2 * max(min(lengths), _ALIKE):
                break
            text = self._waiting.popleft()
            if not text.abandoned:
                coming.append(text)
        return coming

    # ------------------------------------------------------------------ on the device thread

    def _write(self, coming: Sequence["LocalText"]) -> None:
        """Write on with those that come, until a text is over or more are asked for."""
        for text in coming:
            logits_V = self._rows.join(text.request.prompt_ids)
            self._texts.append(text)
            text.add(logits_V, int(logits_V.argmax()))
        while not (self._came or any(text.over for text in self._texts)):
            logits_BV = self._rows.step([text.token_ids[-1] for text in self._texts])
            likeliest = logits_BV.argmax(-1).tolist()
            for text, logits_V, token_id in zip(self._texts, logits_BV, likeliest, strict=True):
                text.add(logits_V, token_id)
        kept = [row for row, text in enumerate(self._texts) if not text.over]
        self._rows.keep(kept)
        self._texts = [self._texts[row] for row in kept]

    def _scores(self, prompt_ids: list[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        if any(len(ids) > 1 for ids in continuations):
            return [self._score(prompt_ids, list(ids)) for ids in continuations]
        # Letters of choices, mostly: they all stand at the same place.
        log_probs_V = self._log_probs(prompt_ids, 1)[0]
        likeliest = int(log_probs_V.argmax())
        return [Score(float(log_probs_V[i]), i == likeliest) for [i] in continuations]

    @torch.no_grad()
    def _log_probs(self, token_ids: list[int], last: int) -> torch.Tensor:
        """Float32 log probabilities `[last, V]` of what comes after the last tokens."""
        inputs = torch.tensor([token_ids], device=self._model.device)
        logits_TV = self._model(input_ids=inputs, logits_to_keep=last).logits[0].float()
        return torch.log_softmax(logits_TV, -1)

    def _score(self, prompt_ids: list[int], ids: list[int]) -> Score:
        log_probs_TV = self._log_probs(prompt_ids + ids[:-1], len(ids))
        targets_T = torch.tensor(ids, device=log_probs_TV.device)
        log_probs_T = log_probs_TV.gather(-1, targets_T[:, None])
        is_greedy = bool((log_probs_TV.argmax(-1) == targets_T).all())
        return Score(float(log_probs_T.double().sum()), is_greedy)


@dataclass(frozen=True)
class _Scoring:
    """What is to be scored, and where the scores go."""

    prompt_ids: list[int]
    continuations: Sequence[Sequence[int]]
    result: "asyncio.Future[list[Score]]"


def load_local_model(
    folder: Path, adapter: Path | None, precision: Precision, device: str
) -> tuple[PreTrainedModel, str]:
    """The whole model of a folder with its adapter, and the fingerprint of both.

    Raises ModelError when either cannot be used.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"--model {folder}: the whole model cannot be loaded from there ({reason}); --local "
            "needs all its weights"
        ) from None
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # requests say all
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, str(adapter))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(
                f"--adapter {adapter}: is no PEFT adapter of this model ({reason}); lesft-client "
                "export makes one"
            ) from None
        files += [adapter / "adapter_config.json", *sorted(adapter.glob("*.safetensors"))]
    return model.to(choose_device(device)).eval(), _digest(files, precision)


def _digest(files: Sequence[Path], precision: Precision) -> str:
    digest = hashlib.sha256(precision.encode())
    for path in files:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    return "sha256:" + digest.hexdigest()
