"""A whole language model on this machine, with the library's own generation: the yardstick."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from lesft.batching import LARGE_STEP, Batcher
from lesft.device import Precision, choose_device
from lesft.device_thread import DeviceThread
from lesft.errors import InvalidInput, ModelError
from lesft.sampling import Sampling
from lesft_client.language_model import (
    FinishReason,
    GenerationRequest,
    Piece,
    Score,
    check_token_ids,
)
from lesft_client.text_stream import TextStream

_READ_BYTES = 1 << 20


class LocalModel:
    """See `LanguageModel`: the whole model, with or without a PEFT adapter.

    Requests that wait at the same time and take the likeliest tokens are written together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        fingerprint: str,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        max_length: int,
    ) -> None:
        """`end_ids` are the tokens that end a text."""
        self.name = name
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._model = model
        self._end_ids = end_ids
        self._device = DeviceThread()
        self._batcher: Batcher[_Text, None] = Batcher(self._write_batch)

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
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        text = _Text(
            request,
            TextStream(self.tokenizer, request.stop, self._end_ids),
            lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece),
        )
        alone = request.sampling.temperature > 0 or request.sampling.repetition_penalty != 1
        num_tokens = LARGE_STEP + 1 if alone else 1
        length = len(request.prompt_ids) + request.max_tokens
        writing = asyncio.create_task(self._batcher.submit(text, text, num_tokens, length))
        reading = asyncio.create_task(pieces.get())
        try:
            while True:
                await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done() and writing.done():
                    writing.result()  # raises what went wrong
                piece = await reading
                reading = asyncio.create_task(pieces.get())
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            text.abandoned = True
            reading.cancel()
            writing.cancel()  # the batch goes on for the others

    async def score(
        self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Score]:
        """See `LanguageModel`."""
        every = [*prompt_ids, *(token_id for ids in continuations for token_id in ids)]
        check_token_ids(every, self._model.config.vocab_size)
        return await self._device.run(lambda: self._scores(list(prompt_ids), continuations))

    async def close(self) -> None:
        """End the thread that computes."""
        await asyncio.to_thread(self._device.close)

    # ------------------------------------------------------------------ on the device thread

    async def _write_batch(self, texts: Sequence["_Text"]) -> list[None]:
        await self._device.run(lambda: self._write(texts))
        return [None] * len(texts)

    @torch.no_grad()
    def _write(self, texts: Sequence["_Text"]) -> None:
        longest = max(len(text.request.prompt_ids) for text in texts)
        rows = [list(text.request.prompt_ids) for text in texts]
        missing = [longest - len(row) for row in rows]
        device = self._model.device
        ids_BL = torch.tensor([[0] * n + row for n, row in zip(missing, rows, strict=True)])
        mask_BL = torch.tensor([[0] * n + [1] * (longest - n) for n in missing])
        sampling = texts[0].request.sampling
        with torch.random.fork_rng():
            torch.manual_seed(sampling.seed)
            self._model.generate(  # type: ignore[operator]
                input_ids=ids_BL.to(device),
                attention_mask=mask_BL.to(device),
                max_new_tokens=max(text.request.max_tokens for text in texts),
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([_Watch(texts)]),
                **_options(sampling),
            )

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


def _options(sampling: Sampling) -> dict[str, Any]:
    """As the library's `generate` takes them; nothing is left to the model's own config."""
    shared = {"repetition_penalty": sampling.repetition_penalty}
    if sampling.temperature == 0:
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {**shared, **greedy}
    return {
        **shared,
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }


class _Text:
    """One text on its way out of the library's loop."""

    def __init__(
        self, request: GenerationRequest, stream: TextStream, tell: Callable[[Piece], object]
    ) -> None:
        """`tell` gets the pieces, in the thread that computes."""
        self.request = request
        self.abandoned = False
        self._stream = stream
        self._tell = tell
        self._written = 0
        self._ended = False

    def add(self, token_id: int) -> bool:
        """Take the next token; returns whether the text is over."""
        if self._ended or self.abandoned:
            return True
        self._written += 1
        new, ended = self._stream.add(token_id)
        reason: FinishReason | None = "stop" if ended else None
        if self._written == self.request.max_tokens and not ended:
            new, reason = new + self._stream.finish(), "length"
        self._ended = reason is not None
        self._tell(Piece(new, (token_id,), reason))
        return self._ended


class _Watch(StoppingCriteria):
    """Sees each step of the library's loop: hands the tokens on, and ends the texts that are."""

    def __init__(self, texts: Sequence[_Text]) -> None:
        self._texts = texts

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.BoolTensor:
        """See the library."""
        last = input_ids[:, -1].tolist()
        over = [text.add(token_id) for text, token_id in zip(self._texts, last, strict=True)]
        return torch.tensor(over, device=input_ids.device)  # type: ignore[return-value]


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
