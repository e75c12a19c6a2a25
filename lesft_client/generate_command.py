"""`lesft-client generate`: one text after a prompt."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lesft.errors import InvalidInput
from lesft_client.conversation import encode_bare, encode_turns
from lesft_client.language_model import GenerationRequest
from lesft_client.settings import GenerateSettings

if TYPE_CHECKING:
    from lesft_client.language_model import LanguageModel

FROM_STANDARD_INPUT = "-"


def generate(settings: GenerateSettings) -> None:
    """Write a text to standard output as it comes.

    Raises InvalidInput when there is no prompt or it does not fit, and what opens or ends the
    model's work; KeyboardInterrupt when the user stops it.
    """
    prompt = _prompt(settings)
    with _ends_its_line():
        asyncio.run(_generate(settings, prompt))


def _prompt(settings: GenerateSettings) -> str:
    if settings.prompt != FROM_STANDARD_INPUT:
        return settings.prompt
    if sys.stdin.isatty():
        raise InvalidInput('there is no prompt: set --prompt "...", or pipe it in: ... < FILE')
    text = sys.stdin.read()
    # The line's end belongs to the file, but a raw prompt is taken as it is.
    return text if settings.raw else text.removesuffix("\n")


@contextlib.contextmanager
def _ends_its_line() -> Iterator[None]:
    """Whatever comes next on the terminal begins on a line of its own."""
    try:
        yield
    finally:
        if sys.stdout.isatty():
            sys.stdout.write("\n")
            sys.stdout.flush()


async def _generate(settings: GenerateSettings, prompt: str) -> None:
    from lesft_client.open_model import open_model

    async with open_model(settings) as model:
        await write_text(model, settings, prompt)


async def write_text(model: "LanguageModel", settings: GenerateSettings, prompt: str) -> None:
    """Write the model's answer to standard output, and --stats to standard error."""
    prompt_ids = _prompt_ids(model, settings, prompt)
    request = GenerationRequest(
        prompt_ids=prompt_ids,
        max_tokens=min(settings.max_tokens, model.max_length - len(prompt_ids)),
        sampling=settings.sampling,
        stop=settings.stop,
    )
    started, num_tokens = time.monotonic(), 0
    async with contextlib.aclosing(model.generate(request)) as pieces:
        async for piece in pieces:
            num_tokens += len(piece.token_ids)
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    if settings.stats:
        seconds = time.monotonic() - started
        sys.stderr.write(
            f"\n{len(prompt_ids)} tokens of prompt, {num_tokens} tokens of text in "
            f"{seconds:.2f} s: {num_tokens / max(seconds, 1e-9):.1f} tokens/s\n"
        )


def _prompt_ids(model: "LanguageModel", settings: GenerateSettings, prompt: str) -> list[int]:
    if settings.raw:
        ids = encode_bare(f"{settings.system}{prompt}", model.tokenizer)
    else:
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        ids = encode_turns([*system, {"role": "user", "content": prompt}], model.tokenizer)
    if not 1 <= len(ids) < model.max_length:
        raise InvalidInput(
            f"the prompt must have 1 to {model.max_length - 1} tokens for this model, "
            f"got {len(ids)}"
        )
    return ids
